from __future__ import annotations

import json
import math
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_translation import TASKS, Toy, rows, weights

import nspec
from nspec.mt import checkpoints, training
from nspec.mt.config import TrainConfig
from nspec.mt.model import load_system
from nspec.mt.supervision import TrainingDiverged
from nspec.mt.training import build_optimizer, inverse_square_root, resolve_precision, train_system

pytestmark = pytest.mark.usefixtures("one_thread")


def same_bits(first: Path, second: Path) -> bool:
    a, b = weights(first), weights(second)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_schedule_is_fairseqs() -> None:
    factors = [inverse_square_root(update, 4) for update in range(1, 17)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[15] == 0.5
    assert inverse_square_root(1, 0) == 1.0


def test_a_training_leaves_model_summary_and_log(toy: Toy) -> None:
    folder = toy.train("dense", valid_bleu_sentences=5, accumulate=2)
    log = checkpoints.read_log(folder / "log.jsonl")
    trained = [row for row in log if "loss" in row]
    valid = [row for row in log if "valid_loss" in row]
    assert [row["step"] for row in trained] == [5, 10, 12]  # the last update ends a shorter window
    assert [row["step"] for row in valid] == [4, 8, 12]
    assert set(trained[0]) == {"step", "updates", "loss", "lr", "grad_norm", "tokens_per_second", "seconds"}
    assert trained[1]["lr"] == pytest.approx(6e-3 * 10 / 20)
    assert trained[-1]["loss"] < trained[0]["loss"]
    assert set(valid[0]["tasks"]) == set(TASKS)
    assert valid[0]["valid_bleu"] == pytest.approx(sum(t["bleu"] for t in valid[0]["tasks"].values()) / 4)
    summary = json.loads((folder / "summary.json").read_text())
    best = min(valid, key=lambda row: row["valid_loss"])
    assert summary["best_step"] == best["step"]
    assert summary["best_value"] == best["valid_loss"]
    assert summary["updates"] == 12
    assert summary["micro_batches"] == 24
    assert summary["mode"] is None
    assert summary["density"] is None
    assert summary["precision"] == "fp32"
    assert summary["tokens"] == tokens_of(toy, 24)
    model, tokenizer = load_system(folder / "model")
    assert summary["parameters"] == sum(p.numel() for p in model.parameters())
    assert model.config.use_cache
    assert tokenizer.get_vocab() == toy.data.tokenizer.get_vocab()


def tokens_of(toy: Toy, micro_batches: int) -> int:
    """Real tokens of the first micro-batches."""
    data = toy.data
    keys = [key for batch in plan(toy, micro_batches) for key in batch]
    return sum(len(ids) for task, i in keys for ids in data.pair("train", data.tasks[task], i))


def plan(toy: Toy, micro_batches: int) -> Any:
    """The sampler that trainings have by default."""
    from nspec.mt.sampling import TaskBatchSampler

    train = toy.config().train
    return TaskBatchSampler(toy.data, "train", train.batch_tokens, train.temperature, micro_batches, seed=1)


def test_a_finished_training_is_not_touched_again(toy: Toy) -> None:
    folder = toy.train("twice", updates=4)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    toy.train("twice", updates=4)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_a_finished_training_goes_on_when_it_is_given_more_updates(toy: Toy) -> None:
    folder = toy.train("longer", updates=8)
    toy.train("longer", updates=12)
    straight = toy.train("straight", updates=12)
    assert [row for row in rows(folder) if "tasks" in row] == [row for row in rows(straight) if "tasks" in row]
    assert same_bits(folder / "model", straight / "model")


@pytest.mark.parametrize("mode", ["forward", "update"])
def test_a_specialised_training_saves_a_system_that_loads_specialised(toy: Toy, mode: str) -> None:
    folder = toy.train(f"saved_{mode}", mode=mode)
    summary = json.loads((folder / "summary.json").read_text())
    shares = [share for layers in toy.masks().density().values() for share in layers.values()]
    assert summary["mode"] == mode
    assert summary["density"] == pytest.approx(sum(shares) / len(shares))
    model, _ = load_system(folder / "model")
    with nspec.task(model, "en-de"):
        pass
    assert set(weights(folder / "model")) == set(weights(toy.train("plain", updates=4) / "model"))
    valid = [row for row in rows(folder) if "valid_loss" in row]
    assert valid[-1]["valid_loss"] < valid[0]["valid_loss"]


def test_rows_outside_the_masks_in_use_keep_their_weights_with_the_row_sparse_optimizer(toy: Toy) -> None:
    config = toy.config(optimizer="row_sparse_adamw", updates=4, accumulate=4, weight_decay=0.1)
    start = toy.model(config).state_dict()
    model = toy.model(config)
    masks = toy.masks(density=0.3)
    train_system(
        "sparse",
        config,
        config.train,
        toy.data,
        model,
        toy.folder / "sparse",
        masks=masks,
        mode="update",
        progress=False,
    )
    drawn = {TASKS[task] for task in plan(toy, 16).plan}
    assert len(drawn) > 1
    for layer in masks.layers:
        used = torch.stack([masks[task][layer] for task in drawn]).any(0)
        moved = (model.state_dict()[f"{layer}.weight"] != start[f"{layer}.weight"]).any(1)
        assert used.sum() < 64
        assert torch.equal(moved, used)


def test_validation_in_forward_mode_has_the_masks_on(toy: Toy) -> None:
    """The loss of each direction is that of the plain model into which that direction is merged."""
    folder = toy.train("masked", mode="forward", updates=4)
    row = rows(folder)[-1]
    model, _ = load_system(folder / "model")
    for task in TASKS:
        assert row["tasks"][task]["loss"] == pytest.approx(token_loss(toy, nspec.merge(model, task), task), rel=1e-5)


def token_loss(toy: Toy, model: Any, task: str) -> float:
    """-log p of the target tokens, one sentence at a time."""
    data = toy.data
    total = tokens = 0.0
    for i in range(data.size("valid", task)):
        source, target = (torch.from_numpy(ids)[None] for ids in data.pair("valid", task, i))
        with torch.no_grad():
            logits = model(input_ids=source, decoder_input_ids=torch.cat([target.new_tensor([[2]]), target[:, :-1]], 1))
        total -= logits.logits[0].log_softmax(-1)[torch.arange(target.shape[1]), target[0]].sum().item()
        tokens += target.shape[1]
    return total / tokens


def test_the_validation_loss_is_weighted_by_tokens(toy: Toy) -> None:
    folder = toy.train("weighted", updates=4)
    row = rows(folder)[-1]
    model, _ = load_system(folder / "model")
    data = toy.data
    tokens = {task: int(data.lengths("valid", task)[1].sum()) for task in TASKS}
    losses = {task: token_loss(toy, model, task) for task in TASKS}
    assert {task: row["tasks"][task]["loss"] for task in TASKS} == pytest.approx(losses, rel=1e-5)
    mean = sum(losses[task] * tokens[task] for task in TASKS) / sum(tokens.values())
    assert row["valid_loss"] == pytest.approx(mean, rel=1e-5)


def test_accumulated_micro_batches_give_the_gradient_over_all_their_tokens(toy: Toy) -> None:
    """One update of plain SGD-like arithmetic by hand: the logged loss and gradient norm are those of one big batch."""
    config = toy.config(updates=1, accumulate=3, log_every=1, model={"dropout": 0.0, "attention_dropout": 0.0})
    folder = toy.folder / "by_hand"
    train_system("x", config, config.train, toy.data, toy.model(config), folder, progress=False)
    from nspec.mt.collate import collate
    from nspec.mt.data import PairDataset

    model, data = toy.model(config), toy.data
    pairs = PairDataset(data, "train")
    batches = [collate([pairs[key] for key in batch]) for batch in plan(toy, 3)]
    assert len({batch["task"] for batch in batches}) > 1
    total, count = torch.zeros(()), 0
    for batch in batches:
        labels = batch["labels"]
        logits = model(**{k: v for k, v in batch.items() if k not in ("labels", "task")}).logits
        total = total + torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), label_smoothing=0.1, reduction="sum"
        )
        count += int(labels.ne(-100).sum())
    (total / count).backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    row = rows(folder)[0]
    assert row["loss"] == pytest.approx(total.item() / count, rel=1e-5)
    assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)


def test_a_training_killed_at_any_time_ends_as_an_undisturbed_one(toy: Toy) -> None:
    toy.data  # noqa: B018 (prepared here, not in the process that is killed)
    job: dict[str, Any] = {"mode": "forward", "updates": 60, "valid_every": 7, "log_every": 5, "accumulate": 2}
    undisturbed = toy.run("undisturbed", **job)
    killed = toy.folder / "killed"
    for step in (7, 35):
        process = toy.start("killed", **job)
        wait_for(killed / "checkpoints" / f"checkpoint-{step}" / "model.safetensors", process)
        process.kill()  # while this checkpoint or what follows is being written
        process.communicate()
        assert not (killed / "summary.json").exists()
    partial = killed / "checkpoints" / "checkpoint-59"
    partial.mkdir()
    (partial / "model.safetensors").write_text("torn")
    toy.run("killed", **job)
    assert rows(killed) == rows(undisturbed)
    assert same_bits(killed / "model", undisturbed / "model")
    assert same_bits(last(killed), last(undisturbed))
    a, b = (json.loads((folder / "summary.json").read_text()) for folder in (killed, undisturbed))
    for key in ("updates", "tokens", "best_step", "best_value", "density"):
        assert a[key] == b[key]


def last(system: Path) -> Path:
    (only,) = checkpoints.whole(system / "checkpoints")
    return only


def wait_for(path: Path, process: Any) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_sigterm_saves_a_checkpoint_from_which_training_goes_on(toy: Toy) -> None:
    toy.data  # noqa: B018
    job: dict[str, Any] = {"updates": 3000, "valid_every": 3000, "log_every": 5}
    process = toy.start("terminated", **job)
    log = toy.folder / "terminated" / "log.jsonl"
    wait_for(log, process)
    while not log.read_text().count("\n") > 2:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143, errors
    step = checkpoints.Progress.read(last(toy.folder / "terminated")).step
    assert step % 3000 != 0
    assert rows(toy.folder / "terminated")[-1]["step"] <= step


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(toy: Toy) -> None:
    toy.data  # noqa: B018
    job: dict[str, Any] = {"mode": "update", "accumulate": 4, "updates": 10, "log_every": 1, "valid_every": 5}
    job |= {"model": {"dropout": 0.0, "attention_dropout": 0.0}, "optimizer": "row_sparse_adamw"}
    job |= {"valid_bleu_sentences": 4}
    one, two = toy.run("one", **job), toy.run("two", ranks=2, **job)
    for alone, shared in zip(rows(one), rows(two), strict=True):
        assert flat(shared) == pytest.approx(flat(alone), rel=2e-4)
    a, b = weights(one / "model"), weights(two / "model")
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-5)
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (one, two)]
    assert summaries[0]["tokens"] == summaries[1]["tokens"]
    assert len(list((two / "checkpoints").iterdir())) == 1


def flat(row: dict[str, Any]) -> dict[str, float]:
    tasks = row.pop("tasks", {})
    return {**row, **{f"{t}/{name}": value for t, values in tasks.items() for name, value in values.items()}}


def test_a_loss_that_is_not_finite_stops_before_the_update(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    smoothed = training.label_smoothed_loss
    calls = 0

    def spoiled(*args: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return smoothed(*args) * (math.nan if calls == 12 else 1.0)

    monkeypatch.setattr(training, "label_smoothed_loss", spoiled)
    with pytest.raises(
        TrainingDiverged, match=r"update 6: the loss of a batch of ..-.. is nan.*learning rate of 0.0018"
    ):
        toy.train("diverged", accumulate=2)
    monkeypatch.undo()
    assert [path.name for path in checkpoints.whole(toy.folder / "diverged" / "checkpoints")] == ["checkpoint-4"]
    folder = toy.train("diverged", accumulate=2)
    assert rows(folder) == rows(toy.train("converged", accumulate=2))


def test_an_infinite_gradient_stops_too(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    smoothed = training.label_smoothed_loss

    def spoiled(logits: torch.Tensor, *args: Any) -> torch.Tensor:
        logits.register_hook(lambda gradient: gradient * math.inf)
        return smoothed(logits, *args)

    monkeypatch.setattr(training, "label_smoothed_loss", spoiled)
    with pytest.raises(TrainingDiverged, match="norm of the gradient is (nan|inf)"):
        toy.train("exploded")


def test_training_stops_when_validation_stops_getting_better(toy: Toy) -> None:
    folder = toy.train("patient", lr=0.0, updates=100, valid_every=2, patience=3)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["updates"] == 8
    assert summary["best_step"] == 2
    assert same_bits(folder / "model", last(folder))  # a rate of 0 moves nothing


def test_the_best_checkpoint_becomes_the_model(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = training.Validator.measure
    losses = iter([3.0, 1.0, 2.0])
    monkeypatch.setattr(training.Validator, "measure", lambda self: {**measure(self), "valid_loss": next(losses)})
    folder = toy.train("best")
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["best_step"], summary["best_value"]) == (8, 1.0)
    monkeypatch.undo()
    shutil.rmtree(toy.folder / "eight", ignore_errors=True)
    assert same_bits(folder / "model", toy.train("eight", updates=8) / "model")


def test_bleu_can_pick_the_best_checkpoint(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = training.Validator.measure
    scores = iter([3.0, 9.0, 2.0])
    monkeypatch.setattr(training.Validator, "measure", lambda self: {**measure(self), "valid_bleu": next(scores)})
    folder = toy.train("bleu", best="bleu", valid_bleu_sentences=1)
    assert json.loads((folder / "summary.json").read_text())["best_step"] == 8


def test_bfloat16_trains_on_a_cpu_and_leaves_the_model_as_it_was(toy: Toy) -> None:
    config = toy.config(precision="bf16", updates=4, valid_bleu_sentences=2)
    model = toy.model(config)
    train_system("bf16", config, config.train, toy.data, model, toy.folder / "bf16", progress=False)
    assert json.loads((toy.folder / "bf16" / "summary.json").read_text())["precision"] == "bf16"
    assert "forward" not in vars(model)  # no autocast is left on it
    assert next(model.parameters()).dtype == torch.float32
    toy.train("fp32_after_bf16", updates=4)  # accelerate keeps its precision for the whole process


def test_precision_auto_is_float32_on_a_cpu() -> None:
    assert resolve_precision("auto", torch.device("cpu")) == "fp32"
    assert resolve_precision("bf16", torch.device("cpu")) == "bf16"


def test_weight_decay_is_for_matrices_only(toy: Toy) -> None:
    optimizer = build_optimizer(toy.model(), TrainConfig(weight_decay=0.1))
    for group in optimizer.param_groups:
        assert all((p.dim() > 1) == (group["weight_decay"] == 0.1) for p in group["params"])


def test_checkpoints_of_another_training_are_refused(toy: Toy) -> None:
    folder = toy.train("options", updates=4)
    (folder / "summary.json").unlink()
    with pytest.raises(ValueError, match=r"other options: lr was 0.006, is 0.5"):
        toy.train("options", updates=4, lr=0.5)
    with pytest.raises(ValueError, match=r"mode was None, is 'forward'"):
        toy.train("options", updates=4, mode="forward")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "row_sparse_adamw"}, "needs a specialised model"),
        ({"best": "bleu"}, "valid_bleu_sentences must be above 0"),
        ({"updates": 0}, "updates is 0"),
    ],
)
def test_settings_that_contradict_each_other_are_errors(toy: Toy, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        toy.train("contradiction", **options)
    assert not (toy.folder / "contradiction").exists()


def test_a_direction_without_masks_is_an_error_that_names_it(toy: Toy) -> None:
    config = toy.config()
    masks = toy.masks(tasks=["en-de", "de-en"])
    with pytest.raises(ValueError, match="no masks for en-fr, fr-en; there are masks for en-de, de-en"):
        train_system(
            "x", config, config.train, toy.data, toy.model(), toy.folder / "lacking", masks=masks, mode="forward"
        )

from __future__ import annotations

import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_translation import TASKS, Toy, last, rows, run_options, same_bits, weights

import nspec
from nspec.mt.methods import NeuronSpecialization
from nspec.mt.model import load_system
from nspec.mt.training import checkpoints
from nspec.mt.training import train as training
from nspec.mt.training.config import TrainConfig
from nspec.mt.training.loop import TrainingDiverged, build_optimizer, inverse_square_root
from nspec.mt.training.precision import resolve_precision
from nspec.mt.training.train import train_system

pytestmark = pytest.mark.usefixtures("one_thread")


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
    return sum(len(ids) for task, i in keys for ids in data.ids("train", data.tasks[task], i))


def plan(toy: Toy, micro_batches: int) -> Any:
    """The sampler that trainings have by default."""
    from nspec.mt.text.batches import TaskBatchSampler

    train = toy.config().train
    return TaskBatchSampler(toy.data, "train", train.batch_tokens, train.temperature, micro_batches, seed=1)


def test_a_finished_training_is_not_touched_again(toy: Toy) -> None:
    folder = toy.train("twice", updates=4)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    toy.train("twice", updates=4)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_without_updates_a_model_is_measured_and_kept_as_it_is(toy: Toy) -> None:
    folder = toy.train("as_it_is", updates=0, valid_bleu_sentences=5, best="bleu")
    built = toy.model().state_dict()
    kept = weights(folder / "model")
    assert all(torch.equal(built[name], value) for name, value in kept.items())
    (measured,) = checkpoints.read_log(folder / "log.jsonl")
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["best_value"] == measured["valid_bleu"]
    assert (summary["updates"], summary["tokens_per_second"]) == (0, None)


def test_a_training_that_has_begun_is_not_mistaken_for_a_model_to_be_kept(toy: Toy) -> None:
    folder = toy.train("begun", updates=4)
    (folder / "summary.json").unlink()
    with pytest.raises(ValueError, match=r"has a training of 4 updates; expected none"):
        toy.train("begun", updates=0)


def test_a_model_that_computes_no_numbers_is_not_taken_as_it_is(toy: Toy, tmp_path: Path) -> None:
    model = toy.model()
    model.model.decoder.layer_norm.weight.data.fill_(3e38)  # finite, and more than the sums have room for
    config = toy.config(updates=0)
    with pytest.raises(TrainingDiverged, match=r"validation loss of the model .* is nan in fp32"):
        train_system("dense", config.train, toy.data, model, tmp_path / "run", show=False, **run_options(config))
    assert not (tmp_path / "run" / "summary.json").exists()


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
        config.train,
        toy.data,
        model,
        toy.folder / "sparse",
        method=NeuronSpecialization(masks, "update"),
        show=False,
        **run_options(config),
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
    """-log p of the target's tokens behind its tag, which a translation is given, one sentence at a time."""
    data = toy.data
    total = tokens = 0.0
    for i in range(data.size("valid", task)):
        source, target = (torch.from_numpy(ids)[None] for ids in data.ids("valid", task, i))
        with torch.no_grad():
            logits = model(input_ids=source, decoder_input_ids=torch.cat([target.new_tensor([[2]]), target[:, :-1]], 1))
        total -= logits.logits[0].log_softmax(-1)[torch.arange(target.shape[1]), target[0]][1:].sum().item()
        tokens += target.shape[1] - 1
    return total / tokens


def test_the_validation_loss_is_weighted_by_tokens(toy: Toy) -> None:
    folder = toy.train("weighted", updates=4)
    row = rows(folder)[-1]
    model, _ = load_system(folder / "model")
    data = toy.data
    tokens = {task: int((data.lengths("valid", task)[1] - 1).sum()) for task in TASKS}
    losses = {task: token_loss(toy, model, task) for task in TASKS}
    assert {task: row["tasks"][task]["loss"] for task in TASKS} == pytest.approx(losses, rel=1e-5)
    mean = sum(losses[task] * tokens[task] for task in TASKS) / sum(tokens.values())
    assert row["valid_loss"] == pytest.approx(mean, rel=1e-5)


def test_accumulated_micro_batches_give_the_gradient_over_all_their_tokens(toy: Toy) -> None:
    """One update of plain SGD-like arithmetic by hand: the logged loss and gradient norm are those of one big batch."""
    config = toy.config(updates=1, accumulate=3, log_every=1, model={"dropout": 0.0, "attention_dropout": 0.0})
    folder = toy.folder / "by_hand"
    train_system("x", config.train, toy.data, toy.model(config), folder, show=False, **run_options(config))
    from nspec.mt.text.collate import collate
    from nspec.mt.text.prepared import Examples

    model, data = toy.model(config), toy.data
    examples = Examples(data, "train")
    batches = [collate([examples[key] for key in batch]) for batch in plan(toy, 3)]
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


@pytest.mark.slow
@pytest.mark.parametrize("tasks_per_batch", [1, 3])
def test_two_processes_give_the_losses_of_one(toy: Toy, tasks_per_batch: int) -> None:
    toy.data  # noqa: B018
    job: dict[str, Any] = {
        "mode": "update",
        "tasks_per_batch": tasks_per_batch,
        "accumulate": 4,
        "updates": 10,
        "log_every": 1,
        "valid_every": 5,
    }
    job |= {"model": {"dropout": 0.0, "attention_dropout": 0.0}, "optimizer": "row_sparse_adamw"}
    job |= {"valid_bleu_sentences": 4}
    names = [f"{number} of {tasks_per_batch}" for number in ("one", "two")]
    one, two = toy.train(names[0], **job), toy.run(names[1], ranks=2, **job)
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
    row.pop("loss_of", None)  # a word
    return {**row, **{f"{t}/{name}": value for t, values in tasks.items() for name, value in values.items()}}


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
    options: dict[str, Any] = {"updates": 4, "valid_bleu_sentences": 2}
    before = rows(toy.train("fp32_before_bf16", **options))
    config = toy.config(precision="bf16", **options)
    model = toy.model(config)
    train_system("bf16", config.train, toy.data, model, toy.folder / "bf16", show=False, **run_options(config))
    assert json.loads((toy.folder / "bf16" / "summary.json").read_text())["precision"] == "bf16"
    assert "forward" not in vars(model)  # no autocast is left on it
    assert next(model.parameters()).dtype == torch.float32
    assert rows(toy.train("fp32_after_bf16", **options)) == before
    assert rows(toy.folder / "bf16") != before


def test_the_environment_of_accelerate_launch_does_not_change_the_precision(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = toy.train("in fp32", updates=2)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert same_bits(straight / "model", toy.train("launched", updates=2) / "model")


def test_a_compiled_training_leaves_a_plain_model(toy: Toy) -> None:
    """Dynamo runs what it would compile as it is, which shows all but the compiler."""
    config = toy.config(compile=True)
    model = toy.model(config)
    torch.compiler.set_stance("force_eager")
    try:
        train_system(
            "compiled", config.train, toy.data, model, toy.folder / "compiled", show=False, **run_options(config)
        )
    finally:
        torch.compiler.set_stance("default")
    assert rows(toy.folder / "compiled") == rows(toy.train("not_compiled"))
    assert model._compiled_call_impl is None


def test_the_time_of_validation_is_not_training_time(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = training.Validator.measure
    monkeypatch.setattr(training.Validator, "measure", lambda self: [time.sleep(0.4), measure(self)][1])
    begun = time.monotonic()
    folder = toy.train("timed")
    passed = time.monotonic() - begun
    summary = json.loads((folder / "summary.json").read_text())
    assert 0 < summary["train_seconds"] < passed - 3 * 0.4
    assert summary["tokens_per_second"] == pytest.approx(summary["tokens"] / summary["train_seconds"])


def test_each_validation_is_one_line_where_there_is_no_terminal(toy: Toy, capfd: pytest.CaptureFixture[str]) -> None:
    config = toy.config(valid_bleu_sentences=2)
    for shown in (True, False):
        folder = toy.folder / f"shown_{shown}"
        train_system("dense", config.train, toy.data, toy.model(), folder, show=shown, **run_options(config))
        out, err = capfd.readouterr()
        assert out == ""
        lines = err.splitlines()
        assert len(lines) == (3 if shown else 0)
        if shown:
            pattern = (
                r"dense: update 8/12  loss \d\.\d+  valid loss \d\.\d+  valid BLEU \d+\.\d  best so far  \d+ tokens/s  "
            )
            assert re.fullmatch(pattern + r"\d+\.\d s left", lines[1])


def test_a_launch_that_would_shard_the_model_is_refused(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="accelerate launch asks for FSDP"):
        toy.train("sharded")


def test_micro_batches_that_the_processes_cannot_share_are_an_error(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training.processes, "world", lambda: 2)
    with pytest.raises(ValueError, match="accumulate is 3, .* a multiple of the 2 processes"):
        toy.train("odd", accumulate=3)


@pytest.mark.parametrize(
    ("amx", "d_model", "precision"), [(True, 512, "bf16"), (True, 256, "fp32"), (False, 512, "fp32")]
)
def test_precision_auto_is_bf16_for_wide_models_on_a_cpu_with_matrix_units(
    amx: bool, d_model: int, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": amx}, raising=False)
    assert resolve_precision("auto", torch.device("cpu"), d_model) == precision
    assert resolve_precision("fp32", torch.device("cpu"), d_model) == "fp32"
    assert resolve_precision("bf16", torch.device("cpu"), d_model) == "bf16"


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
        ({"updates": -1}, "updates is -1"),
        ({"tasks_per_batch": 0}, "tasks_per_batch is 0"),
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
            "x",
            config.train,
            toy.data,
            toy.model(),
            toy.folder / "lacking",
            method=NeuronSpecialization(masks, "forward"),
        )

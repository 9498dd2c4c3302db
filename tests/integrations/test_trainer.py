"""A Trainer of Transformers runs every pass with the task of its batch."""

from __future__ import annotations

import doctest
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from training import TASKS, MyTrainer, all_right, arguments, rows, specialised, spied, weights
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerFast, Seq2SeqTrainer, Trainer, TrainerCallback

import nspec
import nspec.integrations.trainer

MIXED = ["en-de", "de-en", "de-en", "en-fr", None, "en-fr", "en-de"]
PAIRED = ["en-de", "en-de", "en-fr", "en-fr", "de-en", "de-en", "en-de"]  # the last batch has one row


def padding(model: Any) -> DataCollatorForSeq2Seq:
    vocabulary = {"<pad>": 1} | {str(i): i for i in range(40) if i != 1}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(vocabulary)), pad_token="<pad>")
    return DataCollatorForSeq2Seq(tokenizer, model=model)


class Stream(torch.utils.data.IterableDataset):
    """Rows that come one by one."""

    def __init__(self, content: list[dict[str, Any]]) -> None:
        self.content = content

    def __iter__(self) -> Any:
        return iter(self.content)


@pytest.mark.parametrize(
    ("tasks", "collated"),
    [(MIXED, True), (PAIRED, False), ([TASKS.index(task) for task in PAIRED], True)],
    ids=["mixed", "one", "numbers"],
)
def test_every_training_step_has_the_tasks_of_its_batch(tmp_path: Path, tasks: list[Any], collated: bool) -> None:
    model = specialised()
    seen, data = spied(model), rows(tasks)
    options = arguments(tmp_path, gradient_accumulation_steps=3, train_sampling_strategy="sequential")
    trainer = MyTrainer(model, options, train_dataset=data, data_collator=padding(model) if collated else None)
    trainer.train()
    assert all_right(seen)
    assert len(seen) == 4
    assert trainer.state.global_step == 2
    assert data == rows(tasks)
    assert model.model.encoder.layers[0].fc1.task is None


@pytest.mark.parametrize(
    "options",
    [
        {"train_sampling_strategy": "group_by_length", "include_num_input_tokens_seen": "all"},
        {"label_smoothing_factor": 0.1, "bf16": True, "dataloader_drop_last": True},
        {"dataloader_num_workers": 1, "remove_unused_columns": False},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_of_a_trainer_do_not_stand_in_the_way(tmp_path: Path, options: dict[str, Any]) -> None:
    model, data = specialised(), rows(MIXED)
    for row in data:
        row["decoder_input_ids"] = row["labels"]  # label smoothing takes the labels away
        if "remove_unused_columns" in options:
            del row["note"]
    seen = spied(model)
    trainer = MyTrainer(model, arguments(tmp_path, **options), train_dataset=data, data_collator=padding(model))
    trainer.train()
    assert all_right(seen)


def trained(folder: Path, **options: Any) -> dict[str, torch.Tensor]:
    model = specialised().double()  # in float32 AdamW would make steps of rounding errors, where a gradient is 0
    optimizer = nspec.RowSparseAdamW(model.parameters(), lr=0.01)
    resume = options.pop("resume", None)
    given = {"gradient_accumulation_steps": 2, "max_steps": 3, "lr_scheduler_type": "constant"} | options
    trainer = MyTrainer(model, arguments(folder, **given), train_dataset=rows(MIXED), optimizers=(optimizer, None))
    trainer.train(resume_from_checkpoint=resume)
    return weights(model)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """What an ordinary training makes of the model."""
    return trained(tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_checkpointing_computes_again_with_the_same_tasks(tmp_path: Path, plain: Any, reentrant: bool) -> None:
    kind = {"use_reentrant": reentrant}
    found = trained(tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs=kind)
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-9)


def test_a_compiled_model_is_trained_alike(tmp_path: Path, plain: Any) -> None:
    found = trained(tmp_path, torch_compile=True, torch_compile_backend="eager")
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-9)


def test_a_training_that_is_resumed_ends_with_the_same_weights(tmp_path: Path, plain: Any) -> None:
    trained(tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    found = trained(tmp_path, resume=str(tmp_path / "checkpoint-1"))
    assert all(torch.equal(found[name], plain[name]) for name in plain)


def test_evaluation_and_generation_run_under_the_tasks(tmp_path: Path) -> None:
    model, data = specialised(), rows(MIXED)
    seen = spied(model)
    options = arguments(tmp_path, predict_with_generate=True, generation_max_length=6, generation_num_beams=2)
    sets = {"one": data, "two": Stream(rows(PAIRED))}
    trainer = MyTrainer(model, options, eval_dataset=sets, compute_metrics=lambda outputs: {"n": 1})
    assert {"eval_one_loss", "eval_two_loss"} <= set(trainer.evaluate())
    found = trainer.predict(data).predictions
    assert all_right(seen)
    for row, tokens in zip(data, found):
        with nspec.task(model, row["task"]):
            ids = torch.tensor([row["input_ids"]])
            alone = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_length=6, num_beams=2)
        assert tokens[: alone.shape[1]].tolist() == alone[0].tolist()


def test_the_loss_alone_is_that_of_the_tasks(tmp_path: Path) -> None:
    model, data = specialised(), rows(MIXED)[:2]
    trainer = MyTrainer(model, arguments(tmp_path), train_dataset=data)
    inputs = next(iter(trainer.get_train_dataloader()))
    tasks = list(inputs["task"])
    loss = trainer.compute_loss(model, inputs)
    assert list(inputs["task"]) == tasks  # it is left in the caller's batch
    for under, same in (tasks, True), (None, False):
        with nspec.task(model, under):
            assert torch.equal(loss, model(input_ids=inputs["input_ids"], labels=inputs["labels"]).loss) == same


def test_a_stream_is_trained_and_the_column_may_have_another_name(tmp_path: Path) -> None:
    class Other(nspec.TaskTrainerMixin, Trainer):
        task_column = "direction"

    model, data = specialised("update"), Stream(rows(MIXED, "direction"))
    seen = spied(model)
    trainer = Other(model, arguments(tmp_path, max_steps=4), train_dataset=data, eval_dataset=data)
    trainer.train()
    assert "eval_loss" in trainer.evaluate()
    assert all_right(seen)
    assert len(seen) == 8


class Began(TrainerCallback):
    """Notes that training began."""

    def on_train_begin(self, *given: Any, **named: Any) -> None:
        raise AssertionError("training began")


@pytest.mark.parametrize("where", ["train_dataset", "eval_dataset"])
def test_a_wrong_task_is_found_before_training(tmp_path: Path, where: str) -> None:
    data = rows(MIXED)
    sets = {"train_dataset": data, "eval_dataset": data} | {where: [*data, data[0] | {"task": "en-dd"}]}
    trainer = MyTrainer(specialised(), arguments(tmp_path, eval_strategy="epoch"), callbacks=[Began()], **sets)
    with pytest.raises(ValueError, match=f"row 7 of {where}, column 'task': there are no masks of task 'en-dd'"):
        trainer.train()


def test_a_wrong_task_of_a_stream_is_found_in_its_batch(tmp_path: Path) -> None:
    model = specialised()
    for data, message in [
        ([*rows(["en-de"]), *rows(["en-de"], "x")], "row 1 of the batch has no column 'task', only input_ids, labels"),
        ([{**rows(["en-de"])[0], "task": "en-dd"}] * 2, "row 0 of the batch: there are no masks of task 'en-dd'"),
    ]:
        with pytest.raises(ValueError, match=message):
            MyTrainer(model, arguments(tmp_path, max_steps=2), train_dataset=Stream(data)).train()


def test_a_batch_without_tasks_or_a_model_without_masks_is_an_error(tmp_path: Path) -> None:
    model, data = specialised(), rows(MIXED)
    trainer = MyTrainer(model, arguments(tmp_path), train_dataset=data)
    with pytest.raises(ValueError, match="no column 'task' .found input_ids.*needs nspec.task_collator"):
        trainer.training_step(model, {"input_ids": torch.tensor([[5]])})
    nspec.despecialize(model)
    with pytest.raises(ValueError, match="is not specialised: call nspec.specialize"):
        trainer.train()


def test_columns_of_datasets_are_looked_through_and_class_labels_count_by_name(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="no datasets here")
    model, tasks = specialised(), [task or "en-de" for task in MIXED]
    seen = spied(model)
    names = datasets.ClassLabel(names=["en-fr", "en-de", "de-en"])  # in another order than the model's
    data = datasets.Dataset.from_list(rows(tasks)).cast_column("task", names)
    MyTrainer(model, arguments(tmp_path, eval_strategy="epoch"), train_dataset=data, eval_dataset=data).train()
    assert all_right(seen)
    wrong = datasets.Dataset.from_list([*rows(tasks), rows(tasks)[0] | {"task": "xx"}])
    with pytest.raises(ValueError, match="train_dataset, column 'task': there are no masks of task 'xx'"):
        MyTrainer(model, arguments(tmp_path), train_dataset=wrong).train()
    with pytest.raises(ValueError, match="train_dataset has no column 'task', only input_ids, labels, note"):
        MyTrainer(model, arguments(tmp_path), train_dataset=wrong.remove_columns("task")).train()
    filtered = wrong.filter(lambda row: row["task"] != "xx")
    MyTrainer(model, arguments(tmp_path, max_steps=1), train_dataset=filtered).train()


def test_a_trainer_that_sets_no_task_is_warned_of(tmp_path: Path) -> None:
    class Plain(Seq2SeqTrainer):
        pass

    trainer = Plain(specialised(), arguments(tmp_path, max_steps=2), train_dataset=rows(MIXED))
    with pytest.warns(UserWarning, match="is specialised, and a training pass runs without a task") as told:
        trainer.train()
    assert len([one for one in told if "without a task" in str(one.message)]) == 1


def test_a_collator_that_sets_the_task_is_refused(tmp_path: Path) -> None:
    model, padded = specialised(), padding(None)

    def collate(given: list[dict[str, Any]]) -> Any:
        nspec.set_task(model, [row.pop("task") for row in given])
        return padded([{name: row[name] for name in ("input_ids", "labels")} for row in given])

    options = arguments(tmp_path, remove_unused_columns=False)
    trainer = Seq2SeqTrainer(model, options, train_dataset=rows(MIXED), data_collator=collate)
    with pytest.raises(RuntimeError, match="fetches one ahead: the task is that of the next batch"):
        trainer.train()


def test_the_example_of_the_docstring_runs() -> None:
    found = doctest.testmod(nspec.integrations.trainer, extraglobs={"nspec": nspec, "torch": torch})
    assert (found.failed, found.attempted > 5) == (0, True)


def test_several_gpus_in_one_process_take_one_task_at_a_time(tmp_path: Path) -> None:
    model = specialised()
    trainer = MyTrainer(model, arguments(tmp_path), train_dataset=rows(MIXED))
    trainer.args._n_gpu = 2
    with pytest.raises(ValueError, match=r"nn.DataParallel cuts it into parts for 2 GPUs: start a process for each"):
        trainer.compute_loss(model, {"input_ids": torch.tensor([[5], [6]]), "task": ["en-de", "en-fr"]})


PROCESSES = """
import sys
import torch
sys.path.insert(0, sys.argv[1])
from training import MyTrainer, all_right, arguments, rows, specialised, spied, weights

class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(rows(["en-de", None, "de-en", "en-fr", "en-de", "en-de", "en-fr"]))  # the last batch is not full

made, listed = {}, rows(["en-de", None, "de-en", "en-fr", "en-de", "en-de", "de-en", None])
for name, data in {"list": listed, "stream": Stream()}.items():
    model = specialised()
    seen = spied(model)
    options = {"ddp_backend": "gloo", "predict_with_generate": True, "generation_max_length": 5, "max_steps": 2}
    trainer = MyTrainer(
        model, arguments(sys.argv[2], **options), train_dataset=data, eval_dataset=data, compute_metrics=lambda _: {}
    )
    trainer.train()
    trainer.evaluate()
    assert all_right(seen), seen
    made[name] = weights(model), seen
torch.save(made, f"{sys.argv[2]}/{trainer.args.process_index}.pt")
trainer.accelerator.end_training()
"""


@pytest.mark.slow
def test_two_processes_have_the_tasks_of_their_own_batches(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESSES, str(Path(__file__).parent), str(tmp_path)],
            env=shared | {"RANK": rank, "LOCAL_RANK": rank, "ACCELERATE_USE_CPU": "true"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    errors = [process.communicate(timeout=200)[1] for process in processes]
    assert not any(process.returncode for process in processes), "\n".join(errors)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in "01")
    for name in ("list", "stream"):
        assert first[name][1] != second[name][1]
        assert all(torch.equal(first[name][0][each], second[name][0][each]) for each in first[name][0])


def test_the_sft_trainer_of_trl_runs_under_the_tasks(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="TRL is not installed here")
    datasets = pytest.importorskip("datasets", reason="no datasets here")
    from transformers import OPTConfig, OPTForCausalLM

    class Tuning(nspec.TaskTrainerMixin, trl.SFTTrainer):
        pass

    sizes = {"hidden_size": 8, "ffn_dim": 40, "num_hidden_layers": 1, "num_attention_heads": 2, "dropout": 0.0}
    model = OPTForCausalLM(OPTConfig(vocab_size=40, word_embed_proj_dim=8, max_position_embeddings=32, **sizes))
    layer = "model.decoder.layers.0.fc1"
    masks = {task: {layer: torch.rand(40) < 0.4} for task in TASKS}
    nspec.specialize(model, nspec.NeuronMasks(masks))
    seen = []
    model.model.decoder.layers[0].register_forward_pre_hook(lambda *_: seen.append(model.get_submodule(layer).task))
    vocabulary = {"<pad>": 1, "</s>": 2} | {str(i): i for i in range(3, 40)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(vocabulary)), pad_token="<pad>", eos_token="</s>"
    )
    data = datasets.Dataset.from_list([{"input_ids": [5, 6, 7], "task": task} for task in PAIRED[:6]])
    kept = {"report_to": [], "save_strategy": "no", "use_cpu": True, "bf16": False, "eval_strategy": "epoch"}
    settings = trl.SFTConfig(
        str(tmp_path),
        num_train_epochs=1,
        train_sampling_strategy="sequential",
        per_device_train_batch_size=2,
        per_device_eval_batch_size=6,
        gradient_checkpointing=False,
        **kept,
    )
    Tuning(model, settings, train_dataset=data, eval_dataset=data, processing_class=tokenizer).train()
    assert seen == ["en-de", "en-fr", "de-en", tuple(PAIRED[:6])]

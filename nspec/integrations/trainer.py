"""The task of each batch in a Trainer of Transformers."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from nspec.specialization.tasks import specialized_layers, task

from .collator import TaskCollator, check_column, labels_of, tasks_of_batch

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object  # whatever Trainer the mixin is put before: this module does not import Transformers


class TaskTrainerMixin(_Trainer):
    """Has a Trainer train and evaluate a specialised model with the task that stands in a column of the data set.

    To be put before ``transformers.Trainer``, ``Seq2SeqTrainer`` or one made of them (TRL's ``SFTTrainer``). Each row of
    every data set has a column ``task``: the name of its task, its number in ``masks.tasks`` (of class labels their names
    count) or None for the base. Batches may mix tasks. The column is kept when others are removed, goes past the data
    collator, whichever it is, and is taken out of the batch again; the training step, or prediction step with
    ``predict_with_generate`` too, then runs under ``nspec.task``. So does ``compute_loss`` if it is called by itself.

    A ``DataLoader`` that a subclass makes needs ``nspec.task_collator`` around its collator. With several GPUs in one
    process (``nn.DataParallel``) batches cannot mix tasks; with one process for each they can.

    Attributes:
        task_column: the name of the column.
        task_options: of ``nspec.task`` for a batch of several tasks: ``batch_dim``, ``flattened``.

    Raises:
        ValueError: in ``train``, ``evaluate`` or ``predict``: the model is not specialised, a row has no task or one that
            the model does not know. Lists and ``datasets.Dataset`` are looked through before training starts, other data
            sets as batches come.
        TypeError: a row holds something else than a task.

    Example:
        >>> import tempfile
        >>> from transformers import M2M100Config, M2M100ForConditionalGeneration, Trainer, TrainingArguments
        >>> sizes = dict(encoder_layers=1, decoder_layers=1, encoder_ffn_dim=8, decoder_ffn_dim=8, activation_dropout=0.0)
        >>> heads = dict(encoder_attention_heads=2, decoder_attention_heads=2)
        >>> model = M2M100ForConditionalGeneration(M2M100Config(vocab_size=20, d_model=8, **sizes, **heads))
        >>> layers = [f"model.{side}.layers.0.fc1" for side in ("encoder", "decoder")]
        >>> masks = {task: dict.fromkeys(layers, torch.arange(8) < 4) for task in ("en-de", "en-fr")}
        >>> model = nspec.specialize(model, nspec.NeuronMasks(masks))
        >>> class MyTrainer(nspec.TaskTrainerMixin, Trainer):
        ...     pass
        >>> rows = [{"input_ids": [5, 6], "labels": [7, 8], "task": task} for task in ("en-de", "en-fr")]
        >>> options = dict(max_steps=2, disable_tqdm=True, use_cpu=True, report_to=[], save_strategy="no")
        >>> arguments = TrainingArguments(tempfile.mkdtemp(), logging_strategy="no", **options)
        >>> MyTrainer(model, arguments, train_dataset=rows).train().global_step  # doctest: +ELLIPSIS
        {'train_runtime': ...}
        2
    """

    task_column: str = "task"
    task_options: Mapping[str, Any] = {}
    _signature_columns: Any
    _under_task: bool = False

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's, under the task of the batch."""
        with self._switched(model, inputs) as rest:
            return super().training_step(model, rest, *args, **kwargs)

    def prediction_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's, under the task of the batch."""
        with self._switched(model, inputs) as rest:
            return super().prediction_step(model, rest, *args, **kwargs)

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's, under the task of the batch."""
        with self._switched(model, inputs) as rest:
            return super().compute_loss(model, rest, *args, **kwargs)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The Trainer's, of batches with their tasks. Looks through the data sets first, where that is cheap."""
        if self.args.eval_strategy != "no" or self.args.eval_on_start:
            named = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"": self.eval_dataset}
            for name, dataset in named.items():
                self._check(dataset, f"eval_dataset {name}".rstrip())
        with self._collating(self.train_dataset, "train_dataset"):
            return super().get_train_dataloader()

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """The Trainer's, of batches with their tasks."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, str) and isinstance(self.eval_dataset, dict):
            dataset = self.eval_dataset.get(dataset)
        with self._collating(dataset, "eval_dataset"):
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader[Any]:
        """The Trainer's, of batches with their tasks."""
        with self._collating(test_dataset, "test_dataset"):
            return super().get_test_dataloader(test_dataset)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        kept: Any = self._signature_columns
        if self.task_column not in kept:
            self._signature_columns = [*kept, self.task_column]

    def _tasks(self) -> list[str]:
        assert self.model is not None
        return specialized_layers(self.model)[0].tasks

    def _check(self, dataset: Any, what: str) -> None:
        if dataset is not None:
            check_column(dataset, self.task_column, self._tasks(), what)

    @contextlib.contextmanager
    def _collating(self, dataset: Any, what: str) -> Iterator[None]:
        """Within the block the data collator keeps the tasks; others see theirs, as they look at what it is."""
        self._check(dataset, what)
        own = self.data_collator
        inner = own.collator if isinstance(own, TaskCollator) else own
        # The loader that sends batches to other processes knows tensors alone; else names spare a wait for the device.
        sent = self.accelerator.dispatch_batches
        sent = isinstance(dataset, IterableDataset) if sent is None else sent
        tasks, labels = self._tasks() if sent else None, labels_of(dataset, self.task_column)
        self.data_collator = TaskCollator(inner, self.task_column, tasks, labels)
        try:
            yield
        finally:
            self.data_collator = own

    @contextlib.contextmanager
    def _switched(self, model: nn.Module, inputs: Any) -> Iterator[Any]:
        """Within the block the model is under the task of the batch; gives the batch without it."""
        if self._under_task:  # compute_loss, called by a step
            yield inputs
            return
        if not isinstance(inputs, Mapping) or self.task_column not in inputs:
            found = ", ".join(map(str, inputs)) if isinstance(inputs, Mapping) else type(inputs).__name__
            raise ValueError(
                f"the batch has no column {self.task_column!r} (found {found}): give each row of the data set one with the "
                "name of its task, or None for the base; a DataLoader of your own needs nspec.task_collator around its "
                "collator"
            )
        rest: Any = copy.copy(inputs)  # the caller's batch may be used again
        tasks = tasks_of_batch(rest.pop(self.task_column))
        mixed = any(one != tasks[0] for one in tasks)
        if mixed and self.args.n_gpu > 1:
            raise ValueError(
                f"a batch has several tasks, and nn.DataParallel cuts it into parts for {self.args.n_gpu} GPUs: start a "
                "process for each GPU (torchrun or accelerate launch), or batches of one task"
            )
        self._under_task = True
        try:
            with task(model, tasks if mixed or not tasks else tasks[0], **self.task_options):
                yield rest
        finally:
            self._under_task = False

"""The updates of a training, top to bottom: gradient, step, log, validation, checkpoint; in one process or several."""

from __future__ import annotations

import math
import random
import signal
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, set_seed

import nspec
from nspec import processes
from nspec.files import disk_error
from nspec.mt.methods import Method
from nspec.mt.model_files import load_weights, quiet_transformers
from nspec.mt.text.batches import TaskBatchSampler
from nspec.mt.text.collate import IGNORED, collate
from nspec.mt.text.prepared import Examples, PreparedData
from nspec.mt.training import checkpoints
from nspec.mt.training.checkpoints import TrainingLog
from nspec.mt.training.config import TrainConfig
from nspec.mt.training.loss import label_smoothed_loss
from nspec.mt.training.precision import autocast
from nspec.mt.training.recipe import Recipe
from nspec.mt.training.resuming import ResumePoint
from nspec.mt.training.surgery import Surgery
from nspec.mt.training.validation import Validator
from nspec.terminal import Display, duration

_MOST_SKIPPED = 30
"""Updates in a row that loss scaling may skip: each halves the scale, which is below 1e-4 by then, fairseq's limit."""

# What a validation, and a line of the log, change of the progress.
_BEST = ("best_value", "best_step", "worse")
_WINDOW = ("window_loss", "window_targets", "window_tokens", "window_start")

# What the state of NumPy's generator is pickled with.
_NUMPY: list[Any] = [np.empty(0).__reduce__()[0], np.ndarray, np.dtype, type(np.dtype(np.uint32))]


class TrainingDiverged(ValueError):
    """A loss or gradient that is not finite."""


@dataclass
class Loop:
    """Trains a model until nothing is left to do; every process runs one, and all decide alike."""

    settings: TrainConfig
    data: PreparedData
    model: PreTrainedModel  # on its device, with the method attached
    method: Method | None  # what makes the system other than dense
    precision: str  # fp32, bf16 or fp16
    seed: int  # of sampling and dropout
    validator: Validator
    folder: Path  # of the system
    point: ResumePoint  # where training stands; its progress is counted on, and tells the caller what came of it
    shown: str | None  # name of the system in the display; None: no display
    recipe: Recipe | None = None  # what makes the training other than plain

    def __post_init__(self) -> None:
        s, model, self.progress = self.settings, self.model, self.point.progress
        self.rank, self.world, self.device = processes.rank(), processes.world(), model.device
        plan = (s.batch_tokens, s.temperature, s.updates * s.accumulate, self.seed)
        sampling = self.recipe.sampling(s) if self.recipe else {}
        self.sampler = TaskBatchSampler(self.data, "train", *plan, tasks_per_batch=s.tasks_per_batch, **sampling)
        self.examples, self.place = Examples(self.data, "train"), self.folder / "checkpoints"
        self.optimizer = build_optimizer(model, s, self.method)
        self.scheduler = LambdaLR(self.optimizer, lambda done: inverse_square_root(done + 1, s.warmup))
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        self.stored: dict[str, Any] = {"optimizer.pt": self.optimizer, "scheduler.pt": self.scheduler}
        self.stored |= {"scaler.pt": self.scaler} if self.scaler.is_enabled() else {}
        self.surgery: Surgery | None = None
        if self.recipe and (how := self.recipe.surgery) is not None:
            self.surgery = Surgery(self.recipe.name, how, model, self.data.tasks, self.seed)
            self.stored["surgery.pt"] = self.surgery
        self.random_file = "rng_state.pth" if self.world == 1 else f"rng_state_{self.rank}.pth"
        self.display = Display(quiet=self.shown is None or self.rank > 0)  # its import draws random numbers
        set_seed(self.seed + self.rank)  # dropout must differ between processes
        if self.point.checkpoint is not None:
            self._load(self.point.checkpoint)
        if s.compile:
            model.compile(dynamic=True)
        self.parallel: Any = model
        if self.world > 1:
            unused = self.method is not None and self.method.leaves_parameters
            self.parallel = DistributedDataParallel(model, find_unused_parameters=unused)
        self.log = TrainingLog(self.folder, self.progress.step, self.point.undone) if self.rank == 0 else None
        self.row: dict[str, Any] = {}  # the last one of the log about training
        self.terminated = False

    def run(self) -> None:
        """Trains to the end.

        SIGTERM lets the update under way end and a checkpoint be saved; only in a single process, whose signals are its
        own (several would have to agree on the update), in the main thread, and where nobody else handles the signal.

        Raises:
            TrainingDiverged: a loss or gradient is not finite; the checkpoints are intact.
            OSError: a checkpoint or the log cannot be written; earlier checkpoints are intact.
            SystemExit: SIGTERM came.
        """
        progress, settings = self.progress, self.settings
        self.model.train()
        self.begun = self.since = time.perf_counter()
        self.first = progress.step
        with ExitStack() as at_end:
            at_end.callback(setattr, self.model, "_compiled_call_impl", None)
            at_end.callback(self.optimizer.zero_grad)
            at_end.callback(self.log.close if self.log is not None else lambda: None)
            alone = self.world == 1 and threading.current_thread() is threading.main_thread()
            if alone and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
                signal.signal(signal.SIGTERM, lambda *_: setattr(self, "terminated", True))
                at_end.callback(signal.signal, signal.SIGTERM, signal.SIG_DFL)
            at_end.enter_context(quiet_transformers())
            move = at_end.enter_context(self.display.bar(self.shown or "", "updates"))
            while progress.step < settings.updates and not progress.stopped and not self.terminated:
                self._update()
                step, last = progress.step, progress.step == settings.updates
                # What only the end brings is extra: a longer training goes on without it.
                if last or step % settings.log_every == 0:
                    self._log_training(extra=step % settings.log_every > 0)
                move(f"loss {self.row['loss']:.3f}" if self.row else "", step, settings.updates)
                if valid := last or step % settings.valid_every == 0:
                    self._validate(extra=step % settings.valid_every > 0)
                    progress.stopped = last or 0 < settings.patience <= progress.worse
                if valid or self.terminated:
                    self._save()
        if self.terminated:  # also in the last update: its checkpoint is there, and becomes the model next time
            raise SystemExit(143)

    def _update(self) -> None:
        """An update: a step of the optimiser, or a meta-update of Reptile, which is several and a way back."""
        progress, recipe, first = self.progress, self.recipe, self.progress.step * self.settings.accumulate
        numbers = range(first + self.rank, first + self.settings.accumulate, self.world)
        batches = [collate([self.examples[key] for key in self.sampler.batch(number)]) for number in numbers]
        if recipe is not None and progress.step < recipe.meta_updates(self.settings):
            done = self._meta_update(recipe, batches)
        else:
            done = self._descend(batches, self.optimizer)
        if done:
            self.scheduler.step()
        progress.step += 1

    def _meta_update(self, recipe: Recipe, batches: list[dict[str, Any]]) -> bool:
        """Inner steps of one direction, of whose way the weights go a part; whether the training's optimiser took them.

        This is Reptile (Nichol et al., On First-Order Meta-Learning Algorithms, 2018), a direction at a time.
        """
        assert recipe.reptile is not None
        trained = [p for p in self.model.parameters() if p.requires_grad]
        before = [p.detach().clone() for p in trained]
        sgd = torch.optim.SGD(trained, recipe.reptile.lr) if recipe.reptile.optimizer == "sgd" else None
        size = len(batches) // recipe.inner_steps(self.settings)
        for start in range(0, len(batches), size):
            self._descend(batches[start : start + size], sgd or self.optimizer)
        with torch.no_grad():
            for parameter, old in zip(trained, before):
                parameter.copy_(torch.lerp(old, parameter, recipe.reptile.rate))
        return sgd is None  # AdamW, which has not begun then, does so with a warm-up

    def _descend(self, batches: list[dict[str, Any]], optimizer: torch.optim.Optimizer) -> bool:
        """A step of the optimiser along the gradient of the micro-batches of all processes; whether it was taken.

        A loss or gradient that is not finite stops before the optimiser could take it in. With loss scaling (fp16) the
        scaler skips a step whose gradient is not finite, and the learning rate stays where it was.
        """
        progress, method = self.progress, self.method
        if self.surgery is not None:  # those of a direction one after another: their gradients are added on the model
            places = list(dict.fromkeys(b["task"] for b in batches))
            batches = sorted(batches, key=lambda b: places.index(b["task"]))
        tasks = [[b["task"]] if isinstance(b["task"], str) else list(dict.fromkeys(b["task"])) for b in batches]
        # Tokens with a loss, and those of both sides, over all processes; not read from the device before all is computed.
        own = sum(int(b["labels"].ne(IGNORED).sum()) for b in batches)
        read = sum(int(b[name].sum()) for b in batches for name in ("decoder_attention_mask", "attention_mask"))
        counts = torch.tensor([own, read], device=self.device)
        if self.world > 1:
            torch.distributed.all_reduce(counts)
        losses = []
        for number, batch in enumerate(batches, 1):
            losses.append(self._add_gradient(batch, counts[0], last=batch is batches[-1]))
            if self.surgery is not None and tasks[number : number + 1] != [tasks[number - 1]]:
                self.surgery.take(tasks[number - 1][0])
        if self.surgery is not None:
            self.surgery.put(progress.step)
        self.rate = optimizer.param_groups[0]["lr"]
        self.own_rate = optimizer.param_groups[-1]["lr"] if self.method is not None and self.method.lr else None
        self.scaler.unscale_(optimizer)
        norm = clip_grad_norm_(self.model.parameters(), self.settings.clip_norm or math.inf)
        targets, tokens, self.norm, *parts = torch.cat([counts.double(), torch.stack([norm, *losses])]).tolist()
        names = [" + ".join(each) for each in tasks]
        for name, loss in zip(names, parts):
            if not math.isfinite(loss):
                raise self._diverged(f"the loss of a batch of {name} is {loss}")
        if not math.isfinite(self.norm) and not self.scaler.is_enabled():
            raise self._diverged(f"the norm of the gradient is {self.norm} (batches of {', '.join(names)})")
        progress.window_loss += math.fsum(parts) * targets
        progress.window_targets += targets
        progress.window_tokens += int(tokens)
        progress.tokens += int(tokens)
        scale, used = self.scaler.get_scale(), {name for each in tasks for name in each}
        with nullcontext() if method is None else method.stepping(self.model, optimizer, used):
            self.scaler.step(optimizer)
        self.scaler.update()
        optimizer.zero_grad()
        if self.scaler.get_scale() < scale:
            progress.skipped += 1
            progress.skipped_in_row += 1
            if (often := progress.skipped_in_row) > _MOST_SKIPPED:
                scaled = f"now at a loss scale of {self.scaler.get_scale():.3g}"
                raise self._diverged(f"the gradient overflows in fp16 for {often} updates in a row, {scaled}")
            return False
        progress.skipped_in_row = 0
        return True

    def _add_gradient(self, batch: dict[str, Any], targets: Tensor, last: bool) -> Tensor:
        """The forward and backward pass of a micro-batch; its loss, divided by the target tokens of the whole update."""
        task = batch.pop("task")
        inputs = {name: value.to(self.device) for name, value in batch.items()}
        labels = inputs.pop("labels")
        switched = nullcontext() if self.method is None else nspec.task(self.model, task)
        with switched, nullcontext() if last or self.world == 1 else self.parallel.no_sync():
            with autocast(self.device, self.precision):
                logits = self.parallel(**inputs, use_cache=False).logits
            loss = label_smoothed_loss(logits, labels, self.settings.label_smoothing, targets)
            self.scaler.scale(loss * self.world).backward()  # of which the processes take the mean
        return loss.detach()

    def _diverged(self, what: str) -> TrainingDiverged:
        scaled = ", or precision bf16 or fp32" if self.scaler.is_enabled() else ""
        own = "" if self.own_rate is None else f" ({self.own_rate:.3g} of what the directions have of their own)"
        return TrainingDiverged(
            f"training diverged at update {self.progress.step + 1}: {what}, at a learning rate of {self.rate:.3g}{own}. "
            f"Nothing was changed by this update and the checkpoints in {self.place} are intact; take a lower lr, a "
            f"longer warmup or a smaller clip_norm{scaled}"
        )

    def _seconds(self) -> float:
        """The training time until now."""
        since, self.since = self.since, time.perf_counter()
        self.progress.seconds += self.since - since
        return self.progress.seconds

    def _log_training(self, extra: bool) -> None:
        p, now = self.progress, self._seconds()
        (loss,) = processes.all_sum([p.window_loss])
        if extra:
            p.without_end |= {name: getattr(p, name) for name in _WINDOW} | {"window_loss": loss}
        self.row = {
            "step": p.step,
            "updates": p.step,
            "loss": loss / p.window_targets,
            "lr": self.rate,
            **({} if self.own_rate is None else {"own_lr": self.own_rate}),
            "grad_norm": self.norm if math.isfinite(self.norm) else None,
            "tokens_per_second": p.window_tokens / max(now - p.window_start, 1e-9),
            "seconds": now,
        }
        if self.scaler.is_enabled():
            self.row |= {"skipped": p.skipped, "loss_scale": self.scaler.get_scale()}
        if self.log is not None:
            self.log.write(self.row, extra=extra)
        p.window_loss, p.window_targets, p.window_tokens, p.window_start = 0.0, 0.0, 0, now

    def _validate(self, extra: bool) -> None:
        self._seconds()
        progress, sign = self.progress, -1 if self.settings.best == "bleu" else 1
        if extra:
            progress.without_end |= {name: getattr(progress, name) for name in _BEST}
        measured = self.validator.measure()
        if not math.isfinite(measured["valid_loss"]):
            raise TrainingDiverged(
                f"training diverged before update {progress.step}: the validation loss is {measured['valid_loss']}. "
                f"The checkpoints in {self.place} are intact; take a lower lr or a longer warmup"
            )
        value = measured[f"valid_{self.settings.best}"]
        progress.worse += 1
        if progress.best_value is None or sign * value < sign * progress.best_value:
            progress.best_value, progress.best_step, progress.worse = value, progress.step, 0
        if self.log is not None:
            self.log.write({"step": progress.step, **measured}, extra=extra)
        row, to_do, done = self.row, self.settings.updates - progress.step, progress.step - self.first
        parts = [
            f"{self.shown}: update {progress.step}/{self.settings.updates}",
            f"loss {row['loss']:.3f}" if row else "",
            f"valid loss {measured['valid_loss']:.3f}",
            "" if measured["valid_bleu"] is None else f"valid BLEU {measured['valid_bleu']:.1f}",
            f"best was update {progress.best_step}" if progress.worse else "best so far",
            f"{row['tokens_per_second']:.0f} tokens/s" if row else "",
            f"{progress.skipped} updates skipped by loss scaling" if progress.skipped else "",
            f"{duration(to_do * (time.perf_counter() - self.begun) / done)} left",
        ]
        self.display.line("  ".join(filter(None, parts)))
        self.since = time.perf_counter()

    def _save(self) -> None:
        """Writes a checkpoint, then deletes those no longer needed."""
        self._seconds()
        folder = self.place / f"checkpoint-{self.progress.step}"
        together = replace(self.progress, window_loss=processes.all_sum([self.progress.window_loss])[0])
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if self.log is not None:
                self.model.save_pretrained(folder)
                for name, part in self.stored.items():
                    torch.save(part.state_dict(), folder / name)
            torch.save({name: state() for name, (state, _) in self._generators().items()}, folder / self.random_file)
            processes.barrier()  # every process has written its random state
            if self.log is not None:
                self.log.noted(together)
                checkpoints.finish(folder, together)
                checkpoints.keep_only(self.place, checkpoints.with_best(checkpoints.whole(self.place)[-2:]))
        except Exception as error:  # a full disk comes as three different types from three libraries
            raise disk_error(error, folder, "; those before it are intact") from error
        self.since = time.perf_counter()

    def _load(self, checkpoint: Path) -> None:
        load_weights(self.model, checkpoint)
        for name, part in self.stored.items():
            part.load_state_dict(torch.load(checkpoint / name, map_location="cpu", weights_only=True))
        if (checkpoint / self.random_file).is_file():  # not where there was another number of processes
            with torch.serialization.safe_globals(_NUMPY):
                states = torch.load(checkpoint / self.random_file, map_location="cpu", weights_only=True)
            for name, (_, put_back) in self._generators().items():
                if name in states:
                    put_back(states[name])

    def _generators(self) -> dict[str, tuple[Callable[[], Any], Callable[[Any], None]]]:
        """How the state of each generator of random numbers is taken and put back."""
        found: dict[str, Any] = {"python": (random.getstate, random.setstate)}
        found["numpy"] = np.random.get_state, np.random.set_state
        found["cpu"] = torch.get_rng_state, torch.set_rng_state
        if self.device.type == "cuda":
            gpu = self.device

            def put_back(state: Any) -> None:  # of each GPU, where an older version had several processes
                torch.cuda.set_rng_state(state[gpu.index] if isinstance(state, list) else state, gpu)

            found["cuda"] = partial(torch.cuda.get_rng_state, gpu), put_back
        return found


def inverse_square_root(update: int, warmup: int) -> float:
    """The factor on the learning rate at an update (from 1) after ``w`` of warm-up, ``min(u / w, sqrt(w / u))``.

    It is fairseq's. transformers' ``get_inverse_sqrt_schedule`` is one update behind, so that the first one does
    nothing. A warm-up of 0 counts as 1.
    """
    warmup = max(warmup, 1)
    return min(update / warmup, math.sqrt(warmup / update))


def build_optimizer(model: nn.Module, settings: TrainConfig, method: Method | None = None) -> torch.optim.Optimizer:
    """The optimiser that ``settings`` names. Weight decay is for matrices, not for biases and norms.

    What a method has brought comes last, and may have a learning rate of its own.

    Raises:
        ValueError: ``row_sparse_adamw`` for a model that is not specialised.
    """
    brought = {id(p) for p in method.own_parameters(model)} if method is not None and method.lr else set()
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = []
    for own in (False, True):
        mine = [p for p in parameters if (id(p) in brought) == own]
        rate = {"lr": method.lr} if own and method is not None else {}
        groups += [
            {"params": [p for p in mine if p.dim() > 1], "weight_decay": settings.weight_decay, **rate},
            {"params": [p for p in mine if p.dim() <= 1], "weight_decay": 0.0, **rate},
        ]
    groups = [group for group in groups if group["params"]]
    options: dict[str, Any] = {"lr": settings.lr, "betas": tuple(settings.betas), "eps": settings.eps}
    if settings.optimizer == "row_sparse_adamw":
        return nspec.RowSparseAdamW(groups, **options)
    # With loss scaling the fused one would skip a step by itself, where nobody sees it and the schedule goes on.
    return torch.optim.AdamW(groups, fused=settings.precision != "fp16", **options)

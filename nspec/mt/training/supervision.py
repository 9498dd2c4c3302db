"""What happens around the updates of a training: clipping, log, validation, checkpoints, early stopping, display."""

from __future__ import annotations

import math
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm
from transformers import TrainerCallback

from nspec import processes
from nspec.mt.training import checkpoints
from nspec.mt.training.checkpoints import Progress, TrainingLog

if TYPE_CHECKING:
    from nspec.mt.training.trainer import TaskTrainer
    from nspec.mt.training.validation import Validator


_MOST_SKIPPED = 30
"""Updates in a row that loss scaling may skip: each halves the scale, which is below 1e-4 by then, fairseq's limit."""

# What a validation, and a line of the log, change of the progress.
_BEST = ("best_value", "best_step", "worse")
_WINDOW = ("window_loss", "window_targets", "window_tokens", "window_start")


class TrainingDiverged(ValueError):
    """A loss or gradient that is not finite."""


class Supervisor(TrainerCallback):
    """Steers a :class:`TaskTrainer`; every process has one, and all decide alike.

    Args:
        trainer: whose losses, tasks and tokens of an update are read (and reset) before the optimiser step.
        validator: measures the model every ``valid_every`` updates.
        progress: counted on from here; what a checkpoint stores.
        log: where rows go; None on other processes than the first.
        shown: name of the system in the display; None: no display.
    """

    def __init__(
        self,
        trainer: TaskTrainer,
        validator: Validator,
        progress: Progress,
        log: TrainingLog | None,
        shown: str | None,
    ) -> None:
        self.trainer, self.validator, self.progress, self.log = trainer, validator, progress, log
        self.settings = trainer.settings
        self.folder = Path(trainer.args.output_dir or "")
        self.terminated = self.saving = False
        self.rate = self.norm = 0.0
        self._step = ExitStack()  # what lasts as long as the optimiser step
        self._since: float | None = None  # when the clock of training time was started
        self._display = _Display(shown, self.settings.updates, progress.step)

    # Time

    def _pause(self) -> None:
        if self._since is not None:
            self.progress.seconds += time.perf_counter() - self._since
            self._since = None

    def _go(self) -> None:
        self._since = time.perf_counter()

    # What the Trainer calls

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._go()

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Clips, and stops before the optimiser could take in a loss or gradient that is not finite.

        With loss scaling (fp16) the scaler skips a step whose gradient is not finite.
        """
        trainer, progress = self.trainer, self.progress
        assert trainer.optimizer is not None
        assert trainer.targets is not None
        self.rate = trainer.optimizer.param_groups[0]["lr"]
        norm = trainer.accelerator.clip_grad_norm_(  # which divides by the loss scale first
            trainer.model_wrapped.parameters(), self.settings.clip_norm or math.inf
        )
        # One copy from the device an update, not one a micro-batch.
        self.norm, *losses = torch.stack([norm, *trainer.losses]).tolist()
        for task, loss in zip(trainer.tasks, losses):
            if not math.isfinite(loss):
                raise self._diverged(f"the loss of a batch of {task} is {loss}")
        if not math.isfinite(self.norm) and trainer.accelerator.scaler is None:
            raise self._diverged(f"the norm of the gradient is {self.norm} (batches of {', '.join(trainer.tasks)})")
        targets = float(trainer.targets)
        progress.window_loss += math.fsum(losses) * targets
        progress.window_targets += targets
        progress.window_tokens += trainer.tokens
        progress.tokens += trainer.tokens
        if trainer.method is not None and trainer.model is not None:
            stepping = trainer.method.stepping(trainer.model, trainer.optimizer, trainer.used)
            self._step.enter_context(stepping)
        trainer.reset()

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Counts an update that loss scaling has skipped; the Trainer leaves the learning rate where it was."""
        trainer, progress = self.trainer, self.progress
        self._step.close()
        if not trainer.accelerator.optimizer_step_was_skipped:
            progress.skipped_in_row = 0
            return
        assert trainer.optimizer is not None
        trainer.optimizer.zero_grad()  # the Trainer asks the model alone, and the optimiser may remember what was used
        progress.skipped += 1
        progress.skipped_in_row += 1
        if progress.skipped_in_row > _MOST_SKIPPED:
            raise self._diverged(
                f"the gradient overflows in fp16 for {progress.skipped_in_row} updates in a row, now at a loss scale of "
                f"{trainer.accelerator.scaler.get_scale():.3g}",
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """After an update: log, validate, and ask the Trainer for a checkpoint."""
        progress, settings = self.progress, self.settings
        progress.step = state.global_step
        last = progress.step >= settings.updates
        # What only the end brings is noted, as a longer training goes on without it.
        if last or progress.step % settings.log_every == 0:
            self._log_training(extra=progress.step % settings.log_every > 0)
        self._display.advance(progress.step)
        if last or progress.step % settings.valid_every == 0:
            self._pause()
            self._validate(extra=progress.step % settings.valid_every > 0)
            if last or 0 < settings.patience <= progress.worse:
                progress.stopped = control.should_training_stop = True
            control.should_save = self.saving = True
        elif self.terminated:
            self._pause()
            control.should_training_stop = control.should_save = self.saving = True

    def on_save(self, *_: Any, **__: Any) -> None:
        """The checkpoint's files are written: makes it a whole one, then deletes those no longer needed."""
        newest = self.folder / f"checkpoint-{self.progress.step}"
        together = self._over_all_processes()
        processes.barrier()  # every process has written its random state
        if processes.rank() == 0:
            if self.log is not None:
                self.log.noted(together)
            checkpoints.finish(newest, together)
            checkpoints.keep_only(self.folder, checkpoints.needed(self.folder))
        self.saving = False
        self._go()

    # The parts

    def _diverged(self, what: str) -> TrainingDiverged:
        scaled = self.trainer.accelerator.scaler is not None
        return TrainingDiverged(
            f"training diverged at update {self.progress.step + 1}: {what}, at a learning rate of {self.rate:.3g}. "
            f"Nothing was changed by this update and the checkpoints in {self.folder} are intact; take a lower lr, a "
            f"longer warmup or a smaller clip_norm{', or precision bf16 or fp32' if scaled else ''}"
        )

    def _over_all_processes(self) -> Progress:
        """The progress with the sums of all processes."""
        p = self.progress
        loss, window, tokens = processes.all_sum([p.window_loss, p.window_tokens, p.tokens])
        return Progress(**{**vars(p), "window_loss": loss, "window_tokens": int(window), "tokens": int(tokens)})

    def _log_training(self, extra: bool) -> None:
        p = self._over_all_processes()
        if extra:
            self.progress.without_end |= {name: getattr(p, name) for name in _WINDOW}
        now = p.seconds + (0.0 if self._since is None else time.perf_counter() - self._since)
        row = {
            "step": p.step,
            "updates": p.step,
            "loss": p.window_loss / p.window_targets,
            "lr": self.rate,
            "grad_norm": self.norm if math.isfinite(self.norm) else None,
            "tokens_per_second": p.window_tokens / max(now - p.window_start, 1e-9),
            "seconds": now,
        }
        if self.trainer.accelerator.scaler is not None:
            row |= {"skipped": p.skipped, "loss_scale": self.trainer.accelerator.scaler.get_scale()}
        if self.log is not None:
            self.log.write(row, extra=extra)
        self._display.training = row
        self.progress.window_loss = self.progress.window_targets = 0.0
        self.progress.window_tokens, self.progress.window_start = 0, now

    def _validate(self, extra: bool) -> None:
        progress = self.progress
        if extra:
            progress.without_end |= {name: getattr(progress, name) for name in _BEST}
        measured = self.validator.measure()
        bleu = self.settings.best == "bleu"
        value = measured["valid_bleu" if bleu else "valid_loss"]
        if not math.isfinite(measured["valid_loss"]):
            raise TrainingDiverged(
                f"training diverged before update {progress.step}: the validation loss is {measured['valid_loss']}. "
                f"The checkpoints in {self.folder} are intact; take a lower lr or a longer warmup"
            )
        better = progress.best_value is None or (value > progress.best_value if bleu else value < progress.best_value)
        if better:
            progress.best_value, progress.best_step, progress.worse = value, progress.step, 0
        else:
            progress.worse += 1
        if self.log is not None:
            self.log.write({"step": progress.step, **measured}, extra=extra)
        self._display.validated(measured, progress)

    def close(self) -> None:
        """Ends log and display."""
        if self.log is not None:
            self.log.close()
        self._display.close()


class _Display:
    """Progress on standard error: a bar with the time left on a terminal, else a line for each validation."""

    def __init__(self, system: str | None, updates: int, step: int) -> None:
        self.system, self.updates, self.first = system, updates, step
        self.training: dict[str, Any] = {}  # the last row of the log
        self._begun = time.monotonic()
        self._bar = None
        if system is not None and sys.stderr.isatty():
            self._bar = tqdm(total=updates, initial=step, desc=system, unit="update", dynamic_ncols=True)

    def advance(self, step: int) -> None:
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
            if self.training and self.training["step"] == step:
                self._bar.set_postfix(loss=f"{self.training['loss']:.3f}", refresh=False)

    def validated(self, measured: dict[str, Any], progress: Progress) -> None:
        if self.system is None:
            return
        parts = [f"{self.system}: update {progress.step}/{self.updates}"]
        if self.training:
            parts.append(f"loss {self.training['loss']:.3f}")
        parts.append(f"valid loss {measured['valid_loss']:.3f}")
        if measured["valid_bleu"] is not None:
            parts.append(f"valid BLEU {measured['valid_bleu']:.1f}")
        parts.append("best so far" if progress.worse == 0 else f"best was update {progress.best_step}")
        if self.training:
            parts.append(f"{self.training['tokens_per_second']:.0f} tokens/s")
        if progress.skipped:
            parts.append(f"{progress.skipped} updates skipped by loss scaling")
        if self._bar is not None:
            self._bar.write("  ".join(parts), file=sys.stderr)
            return
        left = (self.updates - progress.step) * (time.monotonic() - self._begun) / max(progress.step - self.first, 1)
        print("  ".join([*parts, f"{tqdm.format_interval(left)} left"]), file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


@contextmanager
def stopping_on_sigterm(supervisor: Supervisor) -> Iterator[None]:
    """SIGTERM lets the update under way end, and a checkpoint be saved.

    Only in a single process, whose signals are its own: several would have to agree on the update, with a message in
    each. Nothing is done outside the main thread, or where somebody else handles the signal.
    """
    alone = processes.world() == 1 and threading.current_thread() is threading.main_thread()
    if not alone or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def terminate(*_: Any) -> None:
        supervisor.terminated = True

    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

"""Where a training goes on: the newest checkpoint that is as it was written, and which options may be others now."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any, NamedTuple

from nspec import processes
from nspec.files import read_json
from nspec.mt.methods import Method
from nspec.mt.training import checkpoints
from nspec.mt.training.checkpoints import TrainingState
from nspec.mt.training.config import TrainConfig
from nspec.mt.training.recipe import Recipe

logger = logging.getLogger(__name__)

# What may be different when a training goes on: it changes what is measured and when it ends, not the updates.
_FREE = {"updates", "valid_every", "valid_bleu_sentences", "patience", "log_every", "compile"}


class ResumePoint(NamedTuple):
    """Where a training stands."""

    progress: TrainingState  # so far; of no update where nothing was trained yet
    checkpoint: Path | None  # to go on from; None: from the start
    undone: tuple[str, ...] = ()  # keys of the lines in the log that only the former end of the training made
    trained: bool = False  # nothing is left to do, and the model and its summary are there
    kept: tuple[Path, ...] = ()  # the checkpoints that this needs; the others can be deleted
    best: Path | None = None  # folder to take the best weights so far from, where these are not among the checkpoints

    def tidy(self, folder: Path) -> None:
        """Deletes the checkpoints in ``folder`` that training does not go on from, and takes the best weights in."""
        checkpoints.keep_only(folder, self.kept)
        if self.best is not None:
            state = TrainingState(self.progress.best_step, best_value=self.progress.best_value)
            checkpoints.adopt_weights(folder / f"checkpoint-{state.step}", self.best, state)


def resume_point(
    system: str,
    folder: Path,
    settings: TrainConfig,
    seed: int,
    method: Method | None = None,
    recipe: Recipe | None = None,
) -> ResumePoint:
    """Where the training of a system goes on. Nothing is changed: :meth:`ResumePoint.tidy` does that.

    A damaged checkpoint is named in a warning, and training goes on from the one before it.

    Args:
        system: its name, for messages.
        folder: of the system.
        settings: the options now.
        seed: of the run.
        method: what makes the system other than dense.
        recipe: what makes the training other than plain.

    Raises:
        ValueError: no checkpoint is whole, they are of a training with other options or with more updates than wanted,
            or a finished training that is to go on has none; a file is in the place of a folder.
    """
    checkpoints.check_places(folder)
    options = {k: v for k, v in dataclasses.asdict(settings).items() if k not in _FREE}
    options |= {"seed": seed, "mode": method and (method.mode or method.name), "masks": method and method.digest()}
    options |= {"own_lr": method.lr} if method and method.lr else {}
    options["recipe"] = recipe and recipe.described(settings)
    place, summary = folder / "checkpoints", _summary(folder)
    found = checkpoints.whole(place)
    if not found:
        return _without_checkpoints(folder, settings, options, summary)
    if summary is not None and (state := _left_alone(found[-1], settings)) is not None:
        _check(place, state, settings, options)
        # A kill may have come between the last checkpoint of a longer training and its model.
        if summary.get("updates") == state.step and _is_of(folder, summary):
            if state.step < settings.updates:
                logger.warning(
                    "%s: %s stopped early after update %d, as %d validations had brought nothing better; a higher "
                    "patience lets it go on",
                    *(system, folder, state.step, state.worse),
                )
            return ResumePoint(state, found[-1], trained=True)
    # Only one process looks, as each would read all files.
    looked = _newest_sound(folder, found, settings) if processes.rank() == 0 else None
    chosen, damages = processes.gather(looked)[0]
    if chosen is None:
        model = "" if summary is None else f"; the model in it is that of {summary.get('updates')} updates"
        raise ValueError(
            f"{'; '.join(damages)}. No checkpoint is whole, so that training cannot go on: delete "
            f"{folder if model else place}, and it is trained anew{model}"
        )
    state = TrainingState.read(chosen)
    _check(place, state, settings, options)
    if processes.rank() == 0:
        for damage in damages:
            logger.warning(
                "%s: %s; training goes on from %s, and what came after is deleted", system, damage, chosen.name
            )
    undone: tuple[str, ...] = ()
    if _goes_on(state, settings):
        lines = {"window_loss": "loss", "best_step": "valid_loss"}
        undone = tuple(key for name, key in lines.items() if name in state.without_end)
        state = state.going_on()
    if processes.rank() > 0:
        state.window_loss = 0.0  # the stored one is that of all processes; rank 0 carries it on
    kept = checkpoints.with_best(found[: found.index(chosen) + 1])
    stored = checkpoints.is_stored(place / f"checkpoint-{state.best_step}")
    return ResumePoint(
        state, chosen, undone, kept=tuple(kept), best=None if stored or state.best_step == 0 else folder / "model"
    )


def _summary(folder: Path) -> dict[str, Any] | None:
    """The summary of a training that was finished; None where it was not."""
    if not (folder / "summary.json").is_file() or not (folder / "model" / "config.json").is_file():
        return None
    summary = read_json(folder / "summary.json")
    if not isinstance(summary, dict):
        raise ValueError(f"{folder / 'summary.json'} holds {summary!r:.60}; expected an object")
    return summary


def _without_checkpoints(
    folder: Path, settings: TrainConfig, options: dict[str, Any], summary: dict[str, Any] | None
) -> ResumePoint:
    done = 0 if summary is None else int(summary.get("updates") or 0)
    if summary is None or done == 0 < settings.updates:  # a model that was taken as it is has nothing to go on from
        return ResumePoint(TrainingState(options=options), None)
    if done == settings.updates or summary.get("stopped_early"):
        if not _is_of(folder, summary):
            raise ValueError(
                f"the weights in {folder / 'model'} are not those that {folder / 'summary.json'} is of; put them back as "
                f"they were, or delete {folder}, and it is trained anew"
            )
        return ResumePoint(TrainingState(options=options), None, trained=True)
    raise ValueError(
        f"{folder} was trained for {done} updates and has no checkpoint to go on from to {settings.updates}; take "
        f"{done} updates, or another folder"
    )


def _is_of(folder: Path, summary: dict[str, Any]) -> bool:
    """Whether the model is the one that the summary is of; older versions did not note it."""
    return summary.get("weights_sha256") in (None, checkpoints.weights_digest(folder / "model"))


def _goes_on(state: TrainingState, settings: TrainConfig) -> bool:
    worse = state.without_end.get("worse", state.worse)
    return state.step < settings.updates and not 0 < settings.patience <= worse


def _left_alone(newest: Path, settings: TrainConfig) -> TrainingState | None:
    """The progress of a training that has ended and does not go on; None for another, or a broken file."""
    try:
        state = TrainingState.read(newest)
    except ValueError:
        return None
    return state if state.stopped and not _goes_on(state, settings) else None


def _newest_sound(folder: Path, found: list[Path], settings: TrainConfig) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that can be gone on from, and what is wrong with those after it, the newest first."""
    damages: list[str] = []
    for path in reversed(found):
        damage = checkpoints.damage(path) or _damage_of_best(folder, path, settings)
        if damage is None:
            return path, list(dict.fromkeys(damages))
        damages.append(damage)
    return None, list(dict.fromkeys(damages))


def _damage_of_best(folder: Path, checkpoint: Path, settings: TrainConfig) -> str | None:
    """What is wrong with the weights that a checkpoint knows as the best so far."""
    state = TrainingState.read(checkpoint)
    step = (state.going_on() if _goes_on(state, settings) else state).best_step
    best = checkpoint.with_name(f"checkpoint-{step}")
    if step in (0, state.step):
        return None
    if checkpoints.is_stored(best):
        return checkpoints.damage(best, weights=True)
    summary = _summary(folder)  # of a training that an older version finished they are in the model's folder alone
    if summary is not None and summary.get("best_step") == step:
        return None if _is_of(folder, summary) else f"{folder / 'model'} has other weights than were written"
    return f"{best}, the best up to {checkpoint.name}, is gone"


def _check(place: Path, state: TrainingState, settings: TrainConfig, options: dict[str, Any]) -> None:
    # An option that came after a checkpoint was written had its default's meaning then.
    before = dataclasses.asdict(type(settings)()) | state.options
    if changed := [f"{k} was {before.get(k)!r}, is {v!r}" for k, v in options.items() if before.get(k) != v]:
        raise ValueError(
            f"{place} is of a training with other options: {'; '.join(changed)}; take those again, or another folder"
        )
    if state.step > settings.updates:
        wanted = f"at least {state.step}" if settings.updates else "none for updates = 0"
        raise ValueError(
            f"{place} has a training of {state.step} updates; expected {wanted}, found updates = {settings.updates}; "
            "take another folder for fewer"
        )

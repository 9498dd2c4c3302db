"""Directions that were not trained: the encoder of one direction with the decoder of another (Lin et al. 2021).

A model with masks or adapters for de-en and en-fr translates de-fr with the encoder's of de-en and the decoder's of en-fr:
the one has learned to read German, the other to write French.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from torch import nn

from nspec.baselines.adapters import TaskAdapters
from nspec.mt.text.prepared import languages_of_task
from nspec.specialization.layers import nearest
from nspec.specialization.tasks import specialized_layers, task_by_layer

_SIDES = ("encoder", "decoder")


def parts_of(task: str, known: Sequence[str], pivot: str = "") -> tuple[str, str]:
    """The two directions that stand in for one that was not trained.

    Args:
        task: the direction, such as ``de-fr``.
        known: the directions that were trained.
        pivot: the language in the middle; empty: the only one that fits.

    Returns:
        The direction whose encoder is used, and that whose decoder is: ``("de-en", "en-fr")``.

    Raises:
        ValueError: no language fits, the one asked for does not, or there are several; the message names what there is.
    """
    source, target = languages_of_task(task)
    into, out_of = _languages_beside(known, source, 0), _languages_beside(known, target, 1)
    fitting = [language for language in into if language in out_of]
    if pivot:
        if missing := [each for each in (f"{source}-{pivot}", f"{pivot}-{target}") if each not in known]:
            through = f"; {_choices(fitting)} would do" if fitting else ""
            raise ValueError(
                f"{task} through {pivot} needs {' and '.join(missing)}, which this model was not trained on{through}"
            )
        return f"{source}-{pivot}", f"{pivot}-{target}"
    if not fitting:
        found = [f"only {source}-{_choices(into)}" if into else f"none from {source}"]
        found.append(f"only {_choices(out_of)}-{target}" if out_of else f"none to {target}")
        raise ValueError(
            f"there are no masks of task {task!r}; {nearest(task, known)}; two directions that meet in one language would "
            f"do, {source}-X and X-{target}, but there is {' and '.join(found)}"
        )
    if len(fitting) > 1:
        raise ValueError(
            f"{task} was not trained, and its encoder and decoder can meet in several languages: give --pivot "
            f"{_choices(fitting)}"
        )
    return f"{source}-{fitting[0]}", f"{fitting[0]}-{target}"


def _languages_beside(known: Sequence[str], language: str, place: int) -> list[str]:
    """The other languages of the directions that have this one as their source (place 0) or target (1)."""
    pairs = [task.split("-") for task in known]
    return [pair[1 - place] for pair in pairs if len(pair) == 2 and pair[place] == language]


def _choices(languages: Sequence[str]) -> str:
    *most, last = languages
    return f"{', '.join(most)} or {last}" if most else last


def sides_of(model: nn.Module) -> dict[str, str]:
    """The side, ``encoder`` or ``decoder``, of each layer that knows tasks, by its qualified name.

    Raises:
        ValueError: the model is not specialised, or the name of a layer does not say its side.
    """
    switched = set(specialized_layers(model))
    sides = {}
    for name, module in model.named_modules():
        if module in switched:
            found = [side for side in _SIDES if side in name.split(".")]
            if len(found) != 1:
                raise ValueError(
                    f"two directions cannot be combined here: layer {name!r} is not said to be in the encoder or in the "
                    "decoder, unlike model.encoder.layers.0.fc1"
                )
            sides[name] = found[0]
    return sides


@contextlib.contextmanager
def combined(model: nn.Module, encoder: str, decoder: str) -> Iterator[None]:
    """Within the block the encoder is switched to one direction and the decoder to another; after it, back.

    Args:
        model: with masks or adapters; its layers' qualified names have a part ``encoder`` or ``decoder``.
        encoder: the direction whose masks or adapters the encoder uses.
        decoder: that of the decoder, cross-attention included.

    Raises:
        ValueError: see :func:`sides_of`; or the model does not know a direction.
    """
    sides = sides_of(model)
    with task_by_layer(model, lambda name: encoder if sides[name] == "encoder" else decoder):
        yield


def description(model: nn.Module, task: str, encoder: str, decoder: str) -> str:
    """What is combined, in words, for the user to know."""
    what = "adapters" if all(isinstance(layer, TaskAdapters) for layer in specialized_layers(model)) else "masks"
    there = set(sides_of(model).values())
    parts = [f"{what} of {part} in the {side}" for side, part in zip(_SIDES, (encoder, decoder)) if side in there]
    return f"{task} is translated with {' and '.join(parts)}"

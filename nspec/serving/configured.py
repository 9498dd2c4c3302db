"""Models of Transformers, whose feed-forward widths stand in a configuration: which option makes which layer.

An option is found by building the model anew, without values (on the meta device), with another number there, and looking
which layers are of another size. So no table of families is needed, and the changed configuration is known to build what
is saved.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from nspec.specialization.apply import projections
from nspec.specialization.feed_forward import FeedForward, is_transposed

_UNSET = re.compile(r"inner|ffn|intermediate|d_?ff$")
"""Options that may be None where the width is a multiple of another size (GPT-2's n_inner)."""


class Option(NamedTuple):
    """A number in a configuration that makes the width of blocks.

    Attributes:
        path: of the configuration within the model's.
        name: of the option.
        blocks: names of the blocks.
        alone: whether it makes the size of nothing else.
    """

    path: tuple[str, ...]
    name: str
    blocks: frozenset[str]
    alone: bool


class Configured:
    """A model of Transformers and the options that make its blocks.

    Args:
        model: plain, as wide as its configuration says.
        prefix: the name of the model within the module that names blocks; empty: it is that.
        blocks: those in the model.

    Raises:
        ValueError: the model cannot be built from its configuration, or has blocks that no option makes.
    """

    def __init__(self, model: Any, prefix: str, blocks: Sequence[FeedForward]) -> None:
        self._model, self._blocks = model, {block.name: block for block in blocks}
        self._inner = {block.name: block.name[len(prefix) + 1 if prefix else 0 :] for block in blocks}
        inner = {id(module): name for name, module in model.named_modules()}
        self._own = {
            block.name: {f"{inner[id(layer)]}." for layer in (*projections(block), block.fc2)} for block in blocks
        }
        try:
            self._sizes = self._built(model.config)
        except Exception as error:
            raise self._error(f"cannot be built from its configuration alone ({_line(error)})") from error
        for name, block in self._blocks.items():
            weight: Any = block.fc1.weight
            if (found := self._sizes.get(f"{self._inner[name]}.weight")) != weight.shape:
                raise self._error(
                    f"builds {name} as {None if found is None else list(found)} from its configuration, and it is "
                    f"{list(weight.shape)} in the model"
                )
        self._options = list(self._found())
        made = {name for option in self._options for name in option.blocks}
        if missing := [name for name in self._blocks if name not in made]:
            block = self._blocks[missing[0]]
            raise self._error(f"has no option for the width of {missing[0]} ({block.d_ff})")

    def set_widths(self, needed: Mapping[str, int]) -> dict[str, int]:
        """Changes the configuration of the model; its layers are not touched.

        Args:
            needed: the least width of each block.

        Returns:
            The width of each block, that of the widest block of its option.

        Raises:
            ValueError: the configuration does not build a model of these widths.
        """
        widths = {name: block.d_ff for name, block in self._blocks.items()}
        config = copy.deepcopy(self._model.config)
        changes: list[tuple[Option, int]] = []
        for option in self._options:
            dense = max(self._blocks[name].d_ff for name in option.blocks)
            width = max(needed[name] for name in option.blocks) if option.alone else dense
            if width < dense:
                changes.append((option, width))
                widths |= dict.fromkeys(option.blocks, width)
                setattr(_at(config, option.path), option.name, width)
        self._check(config, widths)
        for option, width in changes:
            self._change(option, width)
        return widths

    def _found(self) -> Iterator[Option]:
        dense = {block.d_ff for block in self._blocks.values()}
        for path, config in _configurations(self._model.config):
            for name, value in list(vars(config).items()):
                numbers = dense if value is None and _UNSET.search(name) else {value} if type(value) is int else set()
                for number in sorted(numbers & dense):
                    if (option := self._asked(path, name, number)) is not None:
                        yield option
                        break

    def _asked(self, path: tuple[str, ...], name: str, width: int) -> Option | None:
        """The option, where another number there makes blocks of another width and is their width."""
        for other in (width + 8, 2 * width):
            config = copy.deepcopy(self._model.config)
            try:
                setattr(_at(config, path), name, other)
                sizes = self._built(config)
            except Exception:  # the number must fit others: it is no width, or the next one fits
                continue
            changed = {key for key in self._sizes.keys() | sizes.keys() if self._sizes.get(key) != sizes.get(key)}
            blocks = {block for block in self._blocks if self._makes(block, sizes, other)}
            own = tuple(prefix for block in blocks for prefix in self._own[block])
            return (
                Option(path, name, frozenset(blocks), all(key.startswith(own) for key in changed)) if blocks else None
            )
        return None

    def _makes(self, block: str, sizes: Mapping[str, torch.Size], width: int) -> bool:
        """Whether the block has that width, and was of the width that it has, everything else being the same."""
        key = f"{self._inner[block]}.weight"
        before = self._sizes[key]
        return sizes.get(key) == self._wanted(block, self._inner[block], "weight", before, width) != before

    def _built(self, config: Any) -> dict[str, torch.Size]:
        """The sizes of the parameters and buffers of a model of that configuration."""
        with torch.device("meta"):
            model: nn.Module = type(self._model)(copy.deepcopy(config))
        return {name: value.shape for name, value in (*model.named_parameters(), *model.named_buffers())}

    def _check(self, config: Any, widths: Mapping[str, int]) -> None:
        sizes = self._built(config)
        own = {prefix: name for name, prefixes in self._own.items() for prefix in prefixes}
        for key in self._sizes.keys() | sizes.keys():
            layer, _, parameter = key.rpartition(".")
            name, size = own.get(f"{layer}."), self._sizes.get(key)
            if name is not None and size is not None:
                size = self._wanted(name, layer, parameter, size, widths[name])
            if sizes.get(key) != size:
                raise self._error(f"has options that make {key} {sizes.get(key)}, where {size} is wanted")

    def _wanted(self, name: str, layer: str, parameter: str, size: torch.Size, width: int) -> torch.Size:
        """The size of a parameter of a layer of the block ``name``, in that width."""
        block = self._blocks[name]
        module = self._model.get_submodule(layer)
        last = module is block.fc2
        if last and parameter != "weight":
            return size
        times = 2 if block.fused and not last else 1
        at = int(last) if parameter == "weight" else 0
        at = 1 - at if parameter == "weight" and is_transposed(module) else at
        return torch.Size([times * width if place == at else one for place, one in enumerate(size)])

    def _change(self, option: Option, width: int) -> None:
        """Sets an option in the configuration, and in copies of it that parts of the model have (T5's stacks)."""
        owner = _at(self._model.config, option.path)
        before = getattr(owner, option.name)
        known = {id(config) for _, config in _configurations(self._model.config)}
        mine = {id(self._blocks[name].fc1) for name in option.blocks}
        others = {id(block.fc1) for name, block in self._blocks.items() if name not in option.blocks}
        setattr(owner, option.name, width)
        for module in self._model.modules():
            config = module.__dict__.get("config")
            within = {id(layer) for layer in module.modules()} if type(config) is type(owner) else set()
            apart = id(config) not in known and getattr(config, option.name, None) == before
            if apart and within & mine and not within & others:
                setattr(config, option.name, width)

    def _error(self, why: str) -> ValueError:
        return ValueError(
            f"{type(self._model).__name__} {why}, so that from_pretrained could load no model of other widths: "
            "ragged=True makes one that is kept with torch.save"
        )


def _configurations(config: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """A configuration and those within it (of a text model, of an encoder), with their paths."""
    yield path, config
    for name, value in list(vars(config).items()):
        if any(base.__name__ in ("PreTrainedConfig", "PretrainedConfig") for base in type(value).__mro__):
            yield from _configurations(value, (*path, name))


def _at(config: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        config = getattr(config, name)
    return config


def _line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]

"""The blocks that a caller names with ``layers=``: by name, by pattern, or by their linear layers."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from .feed_forward import FeedForward, features, is_linear
from .patterns import matches, nearest

Layer = str | tuple[str, str] | tuple[str, str, str]
"""A block that a caller names: by fc1 where it is found by structure, (fc1, fc2), or (gate, up, down); or patterns."""
_WILDCARD = re.compile(r"\*|\?|\[[^\]]+\]")


def chosen(
    modules: Mapping[str, nn.Module], structural: Sequence[FeedForward], layers: Iterable[Layer]
) -> list[FeedForward]:
    """The blocks that a caller names, of those that are found by structure and of others; see ``find_blocks``."""
    if isinstance(layers, str):
        raise TypeError(f"layers is {layers!r}, expected a list of names such as [{layers!r}]")
    known = {block.name: block for block in structural}
    found: dict[str, FeedForward] = {}
    for layer in layers:
        if isinstance(layer, str):
            check_no_adapter(layer, modules.get(layer))
            names = [layer] if layer in known else [name for name in known if matches(name, layer)]
            if not names:
                raise ValueError(
                    f"{layer!r} is not fc1 of a feed-forward block here, nor a pattern that matches one; "
                    f"{nearest(layer, known)}"
                )
            found |= {name: known[name] for name in names}
            continue
        if not isinstance(layer, tuple) or len(layer) not in (2, 3) or not all(isinstance(n, str) for n in layer):
            raise TypeError(f"layers has {layer!r}, expected a name, (fc1, fc2) or (gate, up, down)")
        for names_of_block in _expanded(layer, modules):
            block = _given(names_of_block, modules, structural)
            found[block.name] = block
    return list(found.values())


def _expanded(patterns: tuple[str, ...], modules: Mapping[str, nn.Module]) -> list[tuple[str, ...]]:
    """The names that a tuple of patterns stands for: those of a block have the same text for the same wildcard."""
    wild = [_WILDCARD.findall(pattern) for pattern in patterns]
    if not any(wild):
        return [patterns]
    if any(of_pattern != wild[0] for of_pattern in wild):
        raise ValueError(
            f"the patterns {patterns} have different wildcards, expected the same ones in each, in one order"
        )
    first, *others = patterns
    groups = {"*": "(.*)", "?": "(.)"}
    pieces = [re.escape(piece) for piece in _WILDCARD.split(first)]
    marks = [groups.get(mark, f"({mark.replace('[!', '[^')})") for mark in wild[0]]
    shape = re.compile("".join(piece + mark for piece, mark in zip(pieces, [*marks, ""])))
    matched = [name for name in modules if shape.fullmatch(name)]
    found = []
    for name in matched:
        texts = shape.fullmatch(name).groups()  # type: ignore[union-attr]
        block = (name, *(_filled(other, texts) for other in others))
        if all(is_linear(modules.get(part)) for part in block):
            found.append(block)
    if not found:
        names = [name for name, module in modules.items() if is_linear(module)]
        why = f"{len(matched)} modules match {first!r}, none with linear layers of the other names" if matched else ""
        raise ValueError(
            f"no block matches {patterns}: {why or f'no module matches {first!r}; {nearest(first, names)}'}"
        )
    return found


def _filled(pattern: str, texts: Sequence[str]) -> str:
    pieces = _WILDCARD.split(pattern)
    return "".join(piece + text for piece, text in zip(pieces, [*texts, ""]))


def _given(names: tuple[str, ...], modules: Mapping[str, nn.Module], known: Sequence[FeedForward]) -> FeedForward:
    """The block of linear layers that the caller names: (fc1, fc2) or (gate, up, down)."""
    for name in names:
        check_no_adapter(name, modules.get(name))
        if not is_linear(modules.get(name)):
            linears = [n for n, module in modules.items() if is_linear(module)]
            raise ValueError(f"{name!r} is not a linear layer of the model; {nearest(name, linears)}")
    fc1, *ups, fc2 = [modules[name] for name in names]
    for block in known:
        if block.fc2 is not fc2 or not block.gated:
            continue
        if block.fc1 is fc1 and (not ups or ups[0] is block.up):
            return block
        if ups and fc1 is block.up and ups[0] is block.fc1:
            return FeedForward(names[0], block.parent, fc1, fc2, ups[0])  # what profiling sees shows which is the gate
        up = next((f"{name!r}, " for name, module in modules.items() if module is block.up), "")
        raise ValueError(
            f"{names} are not the parts of the gated block around {names[-1]} in their order: expected "
            f"({block.name!r}, {up}{names[-1]!r}), with the projection first that the activation function sees"
        )
    (d_in, width), (d_ff, _) = features(fc1), features(fc2)
    fused = not ups and width == 2 * d_ff
    if width != d_ff and not fused:
        raise ValueError(f"{names[0]} has {width} outputs, but {names[-1]} has {d_ff} inputs")
    if ups and features(ups[0]) != (d_in, width):
        raise ValueError(
            f"{names[0]} is a layer of {d_in} inputs and {width} outputs, but {names[1]} one of {features(ups[0])[0]} and "
            f"{features(ups[0])[1]}: expected the two projections of a gated block to be equal in size"
        )
    around = ".".join(_common([name.split(".")[:-1] for name in names]))
    return FeedForward(names[0], modules[around], fc1, fc2, ups[0] if ups else None, fused)


def _common(paths: Sequence[Sequence[str]]) -> list[str]:
    """The parts that all paths begin with."""
    return [parts[0] for parts in itertools.takewhile(lambda parts: len({*parts}) == 1, zip(*paths))]


def check_no_adapter(name: str, module: Any) -> None:
    """Raises ValueError where a linear layer of a block is wrapped by an adapter, as PEFT does."""
    if is_linear(getattr(module, "base_layer", None)):
        raise ValueError(
            f"{name} carries an adapter ({type(module).__module__}.{type(module).__name__} around a linear layer): merge "
            "it first (merge_and_unload()), or specialise first and put adapters on the attention alone (target_modules)"
        )

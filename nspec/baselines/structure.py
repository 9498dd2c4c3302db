"""Where the feed-forward blocks of a model lie: in its Transformer layers themselves, or in modules inside of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn


def within(parent: str, names: Iterable[str]) -> list[str]:
    """The qualified names of a module and of what is inside of it; all of them for the empty name of the model."""
    return [name for name in names if not parent or name == parent or name.startswith(f"{parent}.")]


def layer_around(parent: str, modules: Mapping[str, nn.Module]) -> str | None:
    """The Transformer layer around a module that holds a feed-forward block and no other linear layer, as in T5.

    Args:
        parent: qualified name of the module with the block.
        modules: those of the model, by qualified name.

    Returns:
        The outermost item of an ``nn.ModuleList`` around it, where that has more linear layers; None where the module
        stands for the whole layer.
    """
    linears = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
    whole = _item_of_list(parent, modules)
    return whole if len(within(parent, linears)) == 2 < len(within(whole, linears)) else None


def _item_of_list(name: str, modules: Mapping[str, nn.Module]) -> str:
    """The outermost item of an ``nn.ModuleList`` that holds the module; else the module itself."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        if isinstance(modules[".".join(parts[: end - 1])], nn.ModuleList):
            return ".".join(parts[:end])
    return name

"""Blocks whose activations go through a ``torch.autograd.Function``, which takes tensors alone.

BLOOM's activation is such, and so are the forwards that Liger and others put in place of a layer's own. What a function
does to the value that stands for the activations cannot be seen from inside where it returns them as they are, and its
backward would be left out: that is told before anything runs.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from .feed_forward import FeedForward
from .layers import activation_of


def ordinary(block: FeedForward) -> list[tuple[nn.Module, str, Any]]:
    """Activations that compute their gradient by a function of their own in training, each with the ordinary one.

    BLOOM's is such: in evaluation it calls an ordinary function that computes the same.
    """
    found: list[tuple[nn.Module, str, Any]] = []
    for module in block.parent.children():
        if type(module).__name__ == "BloomGelu":
            function = getattr(sys.modules[type(module).__module__], "bloom_gelu_forward", None)
            if function is not None and "forward" not in module.__dict__:
                found.append((module, "forward", function))
    return found


def check(block: FeedForward, replaced: Iterable[nn.Module]) -> None:
    """Raises ValueError where the forward of a block, or of its activation, names a ``torch.autograd.Function``.

    Of modules that compute more than the block (a whole Transformer layer) it is not known what the function is for: there
    the first pass finds it.

    Args:
        block: the block.
        replaced: modules that will not run their own forward.
    """
    layers = {id(layer) for layer in (block.fc1, block.up, block.fc2)}
    alone = not any(id(child) not in layers and [*child.parameters()] for child in block.parent.children())
    activation = activation_of(block)
    looked_at = [block.parent] if alone else []
    looked_at += [activation] if isinstance(activation, nn.Module) else []
    for module in looked_at:
        if any(module is one for one in replaced) or (function := _named_in(module)) is None:
            continue
        put_on = module is block.parent and "forward" in module.__dict__
        way = "take that forward off first (del its .forward; Liger: swiglu=False)" if put_on else "take another class"
        raise ValueError(
            f"{block.name}: the forward of {type(module).__name__} {block.name.rpartition('.')[0]} gives activations to "
            f"{function.__module__}.{function.__name__}, a torch.autograd.Function, and mode 'forward' needs functions of "
            f"PyTorch there: {way}, or use mode='update'"
        )


def _named_in(module: nn.Module) -> type[torch.autograd.Function] | None:
    """The first ``torch.autograd.Function`` that the code of a module's forward names."""
    forward: Any = inspect.unwrap(module.__dict__.get("_old_forward") or module.forward)
    code = getattr(forward, "__code__", None)
    for name in () if code is None else code.co_names:
        found = forward.__globals__.get(name)
        if isinstance(found, type) and issubclass(found, torch.autograd.Function):
            return found
    return None

"""Finds the feed-forward layers of a model: pairs of linear layers with a ReLU between them."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

# Attribute names of the first and the second linear layer, as they are found in the field.
PAIR_NAMES = (
    ("fc1", "fc2"),  # fairseq, M2M100, NLLB, mBART, BART, OPT
    ("linear1", "linear2"),  # torch.nn.TransformerEncoderLayer
    ("wi", "wo"),  # T5 with ReLU
    ("w_1", "w_2"),  # OpenNMT, The Annotated Transformer
    ("lin1", "lin2"),  # DistilBERT, XLM
    ("c_fc", "c_proj"),  # nanoGPT and its kin
    ("up_proj", "down_proj"),
)
_ACTIVATIONS = ("activation_fn", "activation", "act_fn", "act", "activation_function", "activation_func")
_GATES = ("gate_proj", "wi_1", "w3", "gate")


@dataclass(frozen=True)
class Pair:
    """A feed-forward layer: ``name`` is the qualified name of fc1, ``parent`` the module that computes with both."""

    name: str
    parent: nn.Module
    fc1: nn.Linear
    fc2: nn.Linear

    @property
    def d_ff(self) -> int:
        """Number of neurons."""
        return self.fc1.out_features


def find_pairs(model: nn.Module, layers: Iterable[str | tuple[str, str]] | None = None) -> list[Pair]:
    """The feed-forward layers of ``model``, in the order of its modules.

    Args:
        model: any module.
        layers: names of the fc1 modules to take, or pairs of names (fc1, fc2) for layers with other attribute names.
            None: all pairs of linear layers with names in ``PAIR_NAMES``, and ``nn.Sequential`` runs of
            Linear, ReLU, (Dropout,) Linear.

    Raises:
        ValueError: nothing was found (the message lists the linear layers there are), a name that is not there, two
            layers that do not fit together, or a weight that is shared with another module.
    """
    found = list(_pairs_by_structure(model)) if layers is None else [_named_pair(model, layer) for layer in layers]
    if not found:
        linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        shown = ", ".join(linears[:12]) + (f", ... ({len(linears)} in all)" if len(linears) > 12 else "")
        raise ValueError(
            f"no feed-forward pair found in {type(model).__name__}: looked for linear layers named "
            f"{', '.join('/'.join(names) for names in PAIR_NAMES)} in one module, and for Linear-ReLU-Linear sequences. "
            f"Its linear layers: {shown or 'none'}. Name them with layers=[(fc1, fc2), ...]"
        )
    _check_not_shared(model, found)
    return found


def _pairs_by_structure(model: nn.Module) -> Iterator[Pair]:
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if any(hasattr(module, gate) for gate in _GATES):
            continue  # gated blocks multiply two projections: not the method's feed-forward layer
        for first, second in PAIR_NAMES:
            fc1, fc2 = getattr(module, first, None), getattr(module, second, None)
            if isinstance(fc1, nn.Linear) and isinstance(fc2, nn.Linear) and fc1.out_features == fc2.in_features:
                yield Pair(prefix + first, module, fc1, fc2)
        if isinstance(module, nn.Sequential):
            children = [(n, m) for n, m in module.named_children() if not isinstance(m, (nn.Dropout, nn.Identity))]
            for (n1, fc1), (_, act), (_, fc2) in zip(children, children[1:], children[2:]):
                if isinstance(fc1, nn.Linear) and isinstance(act, nn.ReLU) and isinstance(fc2, nn.Linear):
                    yield Pair(prefix + n1, module, fc1, fc2)


def _named_pair(model: nn.Module, layer: str | tuple[str, str]) -> Pair:
    modules = dict(model.named_modules())
    if isinstance(layer, str):
        known = {pair.name: pair for pair in _pairs_by_structure(model)}
        if layer not in known:
            raise ValueError(f"{layer!r} is not fc1 of a feed-forward layer here; {nearest(layer, known)}")
        return known[layer]
    first, second = layer
    for name in layer:
        if not isinstance(modules.get(name), nn.Linear):
            linears = [n for n, m in modules.items() if isinstance(m, nn.Linear)]
            raise ValueError(f"{name!r} is not a linear layer of the model; {nearest(name, linears)}")
    fc1, fc2 = modules[first], modules[second]
    assert isinstance(fc1, nn.Linear)
    assert isinstance(fc2, nn.Linear)
    if fc1.out_features != fc2.in_features:
        raise ValueError(f"{first} has {fc1.out_features} outputs, but {second} has {fc2.in_features} inputs")
    return Pair(first, modules[first.rpartition(".")[0]], fc1, fc2)


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for a message: the known names, the nearest first."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.3)
    shown = close or names[:3]
    return f"known: {', '.join(shown)}{', ...' if len(names) > len(shown) else ''}" if names else "there are none"


def _check_not_shared(model: nn.Module, pairs: Sequence[Pair]) -> None:
    mine = {id(pair.fc1.weight): pair.name for pair in pairs}
    seen: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in mine and id(parameter) in seen:
            raise ValueError(f"{name} and {seen[id(parameter)]} are one parameter: a shared fc1 cannot be specialised")
        seen[id(parameter)] = name


def check_relu(pair: Pair, dropout: bool = True) -> None:
    """Raises ValueError if the layer says that its activation is not ReLU, or that it drops activations out.

    Args:
        pair: the layer.
        dropout: whether an activation dropout above 0 is an error. It breaks the constant output of a masked neuron.
    """
    for attribute in _ACTIVATIONS:
        activation = getattr(pair.parent, attribute, None)
        if activation is not None and not _is_relu(activation):
            shown = getattr(activation, "__name__", None) or type(activation).__name__
            raise ValueError(
                f"{pair.name}: the activation is {shown}, expected ReLU: the method counts neurons with an output above "
                "0. Choose a ReLU model, or name the layers that have one with layers=[...]"
            )
    rate = getattr(pair.parent, "activation_dropout", 0.0)
    rate = rate.p if isinstance(rate, nn.Dropout) else rate
    if dropout and isinstance(rate, (int, float)) and rate > 0:
        raise ValueError(
            f"{pair.name}: activation_dropout is {rate}, expected 0 in mode 'forward' (the method trains without it); "
            "set it to 0 on the layer, or use mode='update'"
        )


def _is_relu(activation: Any) -> bool:
    if isinstance(activation, str):
        return activation == "relu"
    if isinstance(activation, nn.Module):
        return isinstance(activation, nn.ReLU)
    return activation in (nn.functional.relu, torch.relu, torch.relu_, nn.functional.relu_)


@contextlib.contextmanager
def without_fast_path(pairs: Sequence[Pair], model: nn.Module | None = None) -> Iterator[None]:
    """Keeps ``nn.TransformerEncoderLayer`` from its fused inference path, which would not call fc1 and fc2."""
    changed = disable_fast_path(pairs, model)
    try:
        yield
    finally:
        restore_fast_path(changed)


def disable_fast_path(pairs: Sequence[Pair], model: nn.Module | None = None) -> list[tuple[nn.Module, Any]]:
    """Switches it off for good; returns what :func:`restore_fast_path` needs.

    With ``model``, every ``nn.TransformerEncoder`` in it that holds one of the layers no longer makes nested tensors of
    padded batches either, which the layers take on the fused path alone.
    """
    changed: list[tuple[nn.Module, Any]] = []
    layers = {id(pair.parent) for pair in pairs if isinstance(pair.parent, nn.TransformerEncoderLayer)}
    for pair in pairs:
        if isinstance(pair.parent, nn.TransformerEncoderLayer):
            changed.append((pair.parent, pair.parent.activation_relu_or_gelu))
            pair.parent.activation_relu_or_gelu = 0
    for module in model.modules() if model is not None else ():
        if isinstance(module, nn.TransformerEncoder) and any(id(layer) in layers for layer in module.layers):
            changed.append((module, module.use_nested_tensor))
            module.use_nested_tensor = False
    return changed


def restore_fast_path(changed: Sequence[tuple[nn.Module, Any]]) -> None:
    """Undoes :func:`disable_fast_path`."""
    for module, value in changed:
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = value
        else:
            module.activation_relu_or_gelu = value

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
_ROUTERS = ("router", "gate", "gating", "gate_network", "wg", "switch")
_TIME_FIRST = ("transformers.models.fsmt.", "fairseq.modules.")  # layers that do not say so themselves
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


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
        raise ValueError(
            f"no feed-forward pair found in {type(model).__name__}: looked for linear layers named "
            f"{', '.join('/'.join(names) for names in PAIR_NAMES)} in one module, and for Linear-ReLU-Linear sequences. "
            + _what_there_is(model)
        )
    _check_not_shared(model, found)
    return found


def _what_there_is(model: nn.Module) -> str:
    """For a message where no pair was found: why not, or what to name."""
    modules = list(model.named_modules())
    gated = [name for name, m in modules if any(isinstance(getattr(m, gate, None), nn.Linear) for gate in _GATES)]
    if gated:
        return f"Its blocks are gated, such as {gated[0]}: the method needs one layer with ReLU"
    for name, module in modules:
        for first, _ in PAIR_NAMES:
            one = getattr(module, first, None)
            if isinstance(one, nn.Module) and not isinstance(one, nn.Linear):
                kind = f"{type(one).__module__}.{type(one).__name__}"
                way = (
                    "; specialise before adapters are put on, or merge them first" if hasattr(one, "base_layer") else ""
                )
                return f"{name}.{first} is a {kind}, expected nn.Linear{way}"
    linears = [(name, m) for name, m in modules if isinstance(m, nn.Linear)]
    likely = [
        f"({n1!r}, {n2!r})"
        for (n1, one), (n2, two) in zip(linears, linears[1:])
        if one.out_features == two.in_features > one.in_features
    ]
    if likely:
        return f"Name them with layers=[...], perhaps {', '.join(likely[:3])}{', ...' if len(likely) > 3 else ''}"
    if not linears:
        return "It has no linear layers (nn.Linear)"
    names = ", ".join(name for name, _ in linears[:3]) + (", ..." if len(linears) > 3 else "")
    return f"Its linear layers ({len(linears)}: {names}) have no two of which the first widens for the second"


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
    if gates := [gate for gate in _GATES if isinstance(getattr(pair.parent, gate, None), nn.Module)]:
        raise ValueError(
            f"{pair.name}: the block is gated ({', '.join(gates)} beside it), expected one layer with ReLU: masks of a "
            "gated block are not supported; leave its layers out, or use mode='update' with masks of your own"
        )
    for attribute in _ACTIVATIONS:
        activation = getattr(pair.parent, attribute, None)
        if activation is not None and not _is_relu(activation):
            shown = getattr(activation, "__name__", None) or type(activation).__name__
            raise ValueError(
                f"{pair.name}: the activation is {shown}, expected ReLU: the method counts neurons with an output above "
                "0. Choose a ReLU model, or name the layers that have one with layers=[...]"
            )
    for module, attribute, shown in activation_dropouts(pair) if dropout else ():
        if (rate := getattr(module, attribute)) > 0:
            raise ValueError(
                f"{pair.name}: {shown} is {rate}, expected 0 in mode 'forward' (the output of a masked neuron is a "
                "constant, and the method trains without it). Set it to 0, which nspec.specialize(..., "
                "activation_dropout=0) does, or use mode='update'"
            )


def activation_dropouts(pair: Pair) -> list[tuple[Any, str, str]]:
    """The dropouts that are known to lie between fc1 and fc2: the module and attribute with the rate, and a name to show.

    A layer may have others, which its first training pass finds.
    """
    names = ["activation_dropout", "activation_dropout_module", "relu_dropout", "relu_dropout_module"]
    attribute = pair.name.rpartition(".")[2]
    if isinstance(pair.parent, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)) or attribute == "wi":
        names.append("dropout")
    if attribute == "w_1":
        names.append("dropout_1" if hasattr(pair.parent, "dropout_1") else "dropout")
    found: list[tuple[Any, str, str]] = []
    for name in names:
        value = getattr(pair.parent, name, None)
        if isinstance(value, nn.Module) and isinstance(getattr(value, "p", None), (int, float)):
            found.append((value, "p", f"the rate of {name}"))
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found.append((pair.parent, name, name))
    if isinstance(pair.parent, nn.Sequential):
        children = list(pair.parent.children())
        if pair.fc1 in children and pair.fc2 in children:
            between = children[children.index(pair.fc1) : children.index(pair.fc2)]
            found += [(m, "p", f"the rate of {type(m).__name__}") for m in between if isinstance(m, _DROPOUTS)]
    return found


def _is_relu(activation: Any) -> bool:
    if isinstance(activation, str):
        return activation == "relu"
    if isinstance(activation, nn.Module):
        return isinstance(activation, nn.ReLU)
    return activation in (nn.functional.relu, torch.relu, torch.relu_, nn.functional.relu_)


def fast_paths(model: nn.Module, pairs: Sequence[Pair]) -> list[tuple[nn.Module, str, Any]]:
    """What keeps ``nn.TransformerEncoder`` from its fused inference path, which would not call fc1 and fc2.

    Modules, each with an attribute and the value that does it; nested tensors are of that path too.
    """
    parents = {id(pair.parent) for pair in pairs if isinstance(pair.parent, nn.TransformerEncoderLayer)}
    found: list[tuple[nn.Module, str, Any]] = []
    for module in model.modules():
        if id(module) in parents:
            found.append((module, "activation_relu_or_gelu", 0))
        if isinstance(module, nn.TransformerEncoder) and any(id(layer) in parents for layer in module.layers):
            found.append((module, "use_nested_tensor", False))
    return found


@contextlib.contextmanager
def without_fast_path(model: nn.Module, pairs: Sequence[Pair]) -> Iterator[None]:
    """Within the block ``nn.TransformerEncoder`` calls fc1 and fc2 in every pass."""
    changed = [(module, name, getattr(module, name), value) for module, name, value in fast_paths(model, pairs)]
    for module, name, _, value in changed:
        setattr(module, name, value)
    try:
        yield
    finally:
        for module, name, before, _ in changed:
            setattr(module, name, before)


def batch_dim_of(pair: Pair) -> int | None:
    """The dimension of sentences in the layer's input, where the module around it says so (``batch_first``)."""
    if type(pair.parent).__module__.startswith(_TIME_FIRST):
        return 1
    attention = getattr(pair.parent, "self_attn", None)
    batch_first = getattr(attention, "batch_first", None) if isinstance(attention, nn.MultiheadAttention) else None
    return None if batch_first is None else 0 if batch_first else 1


def flattens(pair: Pair) -> bool:
    """Whether the layer is one of a model that is known to flatten a batch ``[sentences, length, d]`` to tokens."""
    return type(pair.parent).__name__ in ("OPTDecoderLayer",)


def is_routed(model: nn.Module, name: str) -> bool:
    """Whether a router chooses the tokens of the layer of that name: it is an expert, or one of several beside a router."""
    parts = name.split(".")
    if any("expert" in part.lower() for part in parts):
        return True
    for end in range(1, len(parts)):
        holder, items = model.get_submodule(".".join(parts[: end - 1])), model.get_submodule(".".join(parts[:end]))
        if isinstance(items, (nn.ModuleList, nn.ModuleDict)) and len(items) > 1:
            routers = (getattr(holder, router, None) for router in _ROUTERS)
            if any(isinstance(router, nn.Linear) and router.out_features == len(items) for router in routers):
                return True
    return False

"""Taking masked neurons out of the feed-forward blocks of a plain model, and adding what they give to fc2's bias."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from nspec.specialization.apply import check_plain, projections
from nspec.specialization.feed_forward import FeedForward, is_transposed

from .configured import Configured
from .constants import is_pretrained, pretrained_within

_OWN_WIDTH = ("intermediate_size", "intermediate_dim", "ffn_dim", "ffn_hidden_size", "inner_dim", "d_ff", "hidden_dim")
"""Attributes in which modules of Transformers note how many neurons they have."""


@dataclass(frozen=True)
class Reduced:
    """A block without its masked neurons.

    Attributes:
        block: as it is.
        kept: int64 ``[n]``, the neurons that stay.
        added: ``[d_out]``, what the others add to every token's output, in float32 or more; None where that is 0.
        carrier: the masked neuron that gives ``added`` where fc2 has no bias and can get none; None: none does.
        value: what that neuron gives.
    """

    block: FeedForward
    kept: Tensor
    added: Tensor | None
    carrier: int | None = None
    value: float = 0.0

    @property
    def needed(self) -> int:
        """The least width, at least 1: nobody takes layers of none."""
        return max(1, len(self.kept) + (self.carrier is not None))


def drop_masked(
    model: nn.Module,
    blocks: Sequence[FeedForward],
    active: Mapping[str, Tensor],
    constants: Mapping[str, Tensor | float],
    *,
    ragged: bool,
    multiple: int,
) -> None:
    """Drops the neurons of a plain model that are not active. In place.

    Args:
        model: plain.
        blocks: its blocks.
        active: bool ``[d_ff]`` for each block.
        constants: what a masked neuron gives: ``[d_ff]``, or one number for all.
        ragged: whether every block has a width of its own, in models of Transformers too.
        multiple: widths are rounded up to a multiple of it, up to the dense one.

    Raises:
        ValueError: a layer is no plain linear one, or shares a parameter with another; a model of Transformers has no
            option for the width.
    """
    _check_layers(model, blocks)
    pretrained = pretrained_within(model)
    inside = {name: [b for b in blocks if not name or b.name.startswith(f"{name}.")] for name, _ in pretrained}
    stock = {block.name for of_model in inside.values() for block in of_model} if not ragged else set()
    with torch.inference_mode(False), torch.no_grad():
        reduced = {b.name: _reduced(b, active[b.name], constants[b.name], may_add=b.name not in stock) for b in blocks}
        widths = {name: min(one.block.d_ff, _rounded(one.needed, multiple)) for name, one in reduced.items()}
        for name, module in pretrained:
            if inside[name] and not ragged:
                configured = Configured(module, name, inside[name])
                widths |= configured.set_widths({block.name: widths[block.name] for block in inside[name]})
        for name, one in reduced.items():
            _shrink(one, widths[name])
    firsts = {id(block.fc1) for block in blocks}
    for module in model.modules() if ragged else ():
        if is_pretrained(module) and any(id(layer) in firsts for layer in module.modules()):
            module.save_pretrained = cannot_save_ragged  # type: ignore[assignment]


def _rounded(width: int, multiple: int) -> int:
    return -(-width // multiple) * multiple


def _check_layers(model: nn.Module, blocks: Iterable[FeedForward]) -> None:
    """Raises ValueError unless each block has plain layers whose parameters are its own."""
    names = {id(module): name for name, module in model.named_modules()}
    owners: dict[int, list[tuple[str, str]]] = {}
    for name, module in model.named_modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((name, attribute))
    taken: dict[int, str] = {}
    for block in blocks:
        for layer in (*projections(block), block.fc2):
            name = names[id(layer)]
            check_plain(layer, name)
            if (before := taken.setdefault(id(layer), block.name)) != block.name:
                raise ValueError(
                    f"{name} is in the blocks of {before} and {block.name}, which may need it in two widths: give each a "
                    "layer of its own, or merge without compact=True"
                )
            for attribute in ("weight", "bias"):
                if getattr(layer, attribute) is None:
                    continue
                if attribute not in layer._parameters:
                    raise ValueError(
                        f"{name}.{attribute} is made anew in each pass (prune, weight_norm, spectral_norm): make it "
                        "permanent first (prune.remove, remove_weight_norm, remove_spectral_norm)"
                    )
                others = [other for other in owners[id(layer._parameters[attribute])] if other != (name, attribute)]
                if others:
                    raise ValueError(
                        f"{name}.{attribute} and {'.'.join(others[0])} are one parameter, and neurons cannot be dropped "
                        "from one of them: give each its own, or merge without compact=True"
                    )


def _reduced(block: FeedForward, active: Tensor, constant: Tensor | float, may_add: bool) -> Reduced:
    """What stays of a block, and what the rest adds."""
    weight: Any = block.fc2.weight
    active = active.to(weight.device)
    masked = (~active).nonzero().squeeze(1)
    kept = active.nonzero().squeeze(1)
    exact = torch.promote_types(weight.dtype, torch.float32)
    if isinstance(constant, Tensor):
        values = constant.to(weight.device, exact)[masked]
    else:
        values = torch.full((len(masked),), constant, device=weight.device, dtype=exact)
    columns = (weight if is_transposed(block.fc2) else weight.t()).to(exact)[masked]  # [masked, d_out]
    added = values @ columns
    if not bool(added.count_nonzero()):
        return Reduced(block, kept, None)
    if block.fc2.bias is not None or may_add:
        return Reduced(block, kept, added)
    largest = int(values.abs().argmax())
    return Reduced(block, kept, added, int(masked[largest]), float(values[largest]))


def _shrink(reduced: Reduced, width: int) -> None:
    """Gives the layers of a block the neurons that stay, and zero neurons up to ``width``."""
    block, kept = reduced.block, reduced.kept
    last: Any = block.fc2
    parts = 2 if block.fused else 1
    for layer in projections(block):
        _set(layer, "weight", _rows(layer, reduced, width, parts), out_features=parts * width)
        if layer.bias is not None:
            stay = kept if reduced.carrier is None else torch.cat([kept, kept.new_tensor([reduced.carrier])])
            _set(layer, "bias", _padded(layer.bias.unflatten(0, (parts, -1))[:, stay], width).flatten())  # type: ignore[operator]
    weight = last.weight if is_transposed(last) else last.weight.t()  # [d_ff, d_out]
    rows = weight[kept]
    if reduced.carrier is not None:
        assert reduced.added is not None
        rows = torch.cat([rows, (reduced.added / reduced.value).to(rows.dtype)[None]])
    rows = _padded(rows.t(), width)
    _set(last, "weight", rows.t() if is_transposed(last) else rows, in_features=width)
    if reduced.added is not None and reduced.carrier is None:
        bias = reduced.added if last.bias is None else last.bias.to(reduced.added.dtype) + reduced.added
        _set(last, "bias", bias.to(last.weight.dtype if last.bias is None else last.bias.dtype))
    for attribute in _OWN_WIDTH:
        if block.parent.__dict__.get(attribute) == len(weight):
            setattr(block.parent, attribute, width)


def _rows(layer: Any, reduced: Reduced, width: int, parts: int) -> Tensor:
    """The weight of a projection; the row of the carrier is zero as those of all masked neurons are."""
    weight = layer.weight if is_transposed(layer) else layer.weight.t()  # [d_in, parts * d_ff]
    stay = weight.unflatten(1, (parts, -1))[:, :, reduced.kept]
    columns = _padded(stay, width).flatten(1)
    return columns if is_transposed(layer) else columns.t()


def _padded(values: Tensor, width: int) -> Tensor:
    """Zeros behind the last dimension."""
    return nn.functional.pad(values, (0, width - values.shape[-1]))


def _set(layer: nn.Module, attribute: str, value: Tensor, **sizes: int) -> None:
    """Puts a parameter in the place of one, trainable as that is."""
    before: Any = layer._parameters.get(attribute)
    trains = bool(layer.weight.requires_grad) if before is None else before.requires_grad
    setattr(layer, attribute, nn.Parameter(value.contiguous(), requires_grad=trains))
    for name, size in sizes.items():
        name = {"in_features": "nx", "out_features": "nf"}[name] if is_transposed(layer) else name
        if name in layer.__dict__:
            setattr(layer, name, size)


def cannot_save_ragged(*_: Any, **__: Any) -> NoReturn:
    """In the place of ``save_pretrained`` of a ragged model.

    Raises:
        ValueError: always.
    """
    raise ValueError(
        "this model was merged with ragged=True: its layers differ in width, which no configuration says, so "
        "from_pretrained could not load what is saved. Merge without ragged=True, or keep it with torch.save(model, path)"
    )

"""What to say of linear layers that are not found as a feed-forward block: layers that may be meant, experts not taken."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn

from .feed_forward import features, is_linear

_SHOWN = 4
_ATTENTION = re.compile(r"attn|attention|query|key|value|qkv|(^|[._])(self_)?(att|[qkvo])($|[._])", re.IGNORECASE)


def what_there_is(model: nn.Module) -> str:
    """For a message where no block was found: why not, or what to name."""
    experts = experts_not_taken(model)
    linears = {name: module for name, module in model.named_modules() if is_linear(module)}
    if not linears:
        return experts or "It has no linear layers (nn.Linear)"
    patterns: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for block in _candidates(linears):
        patterns.setdefault(tuple(map(_pattern, block)), []).append(block)
    # Attention may widen too.
    likely = [pattern for pattern in patterns if not any(map(_ATTENTION.search, pattern))] or [*patterns]
    shown = [
        f"{pattern} ({len(patterns[pattern])} layers)" if len(patterns[pattern]) > 1 else str(patterns[pattern][0])
        for pattern in likely
    ]
    if shown:
        more = f", and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
        other = f"{experts}. " if experts else ""
        return f"{other}Name its blocks with layers=[...], perhaps {', '.join(shown[:_SHOWN])}{more}"
    if experts:
        return experts
    names = [*dict.fromkeys(_pattern(name) or "the model itself" for name in linears)]
    some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return (
        f"Its linear layers ({len(linears)}: {some}) have no two of which the first widens and the second narrows back"
    )


def _candidates(linears: dict[str, nn.Module]) -> Iterator[tuple[str, ...]]:
    """Linear layers in one module or in two that lie in one, the first as wide as the later one takes, which narrows again.

    With another one of the first one's shape between them it is a gated block: three names.
    """
    used: set[str] = set()
    order = {name: number for number, name in enumerate(linears)}
    around: dict[str, list[str]] = {}
    for name in linears:
        holder = name.rpartition(".")[0]
        for place in {holder, holder.rpartition(".")[0]} if holder else {""}:
            around.setdefault(place, []).append(name)
    for name, module in linears.items():
        d_in, width = features(module)
        holder = name.rpartition(".")[0]
        near = [n for n in [*around[holder], *around[holder.rpartition(".")[0]]] if order[n] > order[name]]
        second = next((n for n in near if width > d_in and features(linears[n]) == (width, d_in)), None)
        if name in used or second is None or second in used:
            continue
        beside = [
            n for n in near if n not in used and features(linears[n]) == (d_in, width) and order[n] < order[second]
        ]
        used |= {name, second, *beside}
        yield (name, *beside[:1], second)


def _pattern(name: str) -> str:
    """The name with what differs from layer to layer, up to the last number in it, as a wildcard."""
    found = re.fullmatch(r"(?:.*\.)?\d+\.(.+)", name)
    return f"*.{found[1]}" if found else name


def experts_not_taken(model: nn.Module) -> str:
    """The experts that are held as one parameter of three dimensions, which no block can be made of; empty: none."""
    found = [
        (name, parameter)
        for name, module in model.named_modules()
        for parameter in module.parameters(recurse=False)
        if parameter.dim() == 3 and "expert" in f"{name} {type(module).__name__}".lower()
    ]
    if not found:
        return ""
    names = [*dict.fromkeys(name for name, _ in found)]
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return (
        f"The experts of {names[0]}{more} are not taken: all of a layer are one parameter ({list(found[0][1].shape)}), "
        "expected a module with linear layers for each"
    )

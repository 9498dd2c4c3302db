"""What every differentiable operator keeps, whatever it computes: tracing, autocast, torch.func, saying what runs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from active_sets import LAYOUTS
from torch import Tensor

from nspec.kernels.common.active import active_index
from nspec.kernels.compact_fc1 import compact_fc1
from nspec.kernels.compact_fc2 import compact_fc2
from nspec.kernels.compact_ffn import compact_ffn
from nspec.kernels.gated_activation import gated_activation
from nspec.kernels.linear_relu_count import linear_relu_count

Shapes = tuple[tuple[int, ...], ...]

# What an operator takes before the active set, for an index of so many columns. Those of the last two have no set.
SHAPES: dict[str, Callable[[int], Shapes]] = {
    "compact_fc1": lambda width: ((6, 7), (200, 7), (200,)),
    "compact_fc2": lambda width: ((6, width), (200,), (4, 200), (4,)),
    "compact_ffn": lambda width: ((6, 7), (200, 7), (200,), (4, 200), (4,)),
    "linear_relu_count": lambda width: ((6, 7), (200, 7), (200,)),
    "gated_activation": lambda width: ((6, 7), (6, 7)),
}
WITH_SETS: dict[str, Any] = {"compact_fc1": compact_fc1, "compact_fc2": compact_fc2, "compact_ffn": compact_ffn}


def call(operator: str, tensors: Sequence[Tensor], active: Tensor, **options: Any) -> Any:
    if operator == "linear_relu_count":
        found: Any = linear_relu_count(*tensors, **options)
        return found[0] if isinstance(found, tuple) else found
    if operator == "gated_activation":
        return gated_activation(*tensors, "gelu_tanh", **options)
    return WITH_SETS[operator](*tensors, active, **options)


@pytest.fixture(params=list(SHAPES))
def operator(request: pytest.FixtureRequest) -> str:
    return request.param


def inputs(draw: Any, operator: str, active: Tensor) -> list[Tensor]:
    shapes = SHAPES[operator](active_index(active).shape[1])
    return [draw.integers(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes)]


def test_it_compiles_to_one_graph_with_changing_sets(place: Any, draw: Any, operator: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(functools.partial(call, operator), fullgraph=True, backend="aot_eager")
    for n in (70, 130, 200) if operator in WITH_SETS else (70,):
        active = draw.active(200, n)
        tensors = inputs(draw, operator, active)
        # The columns that fc2 takes are those of an index that was made before.
        options = {"index": active_index(active)} if operator == "compact_fc2" else {}
        y, want = (function(tensors, active, **options) for function in (compiled, functools.partial(call, operator)))
        assert torch.equal(y, want)
        for a, b in zip(torch.autograd.grad(y.sum(), tensors), torch.autograd.grad(want.sum(), tensors)):
            assert torch.equal(a, b)


def test_autocast_computes_in_its_dtype_and_gives_gradients_in_theirs(place: Any, draw: Any, operator: str) -> None:
    if operator == "gated_activation":
        pytest.skip("elementwise: it computes in the dtype that it gets")
    active = draw.active(200, 70)
    tensors = inputs(draw, operator, active)
    with torch.autocast(place.device, dtype=place.low):
        y = call(operator, tensors, active)
    assert y.dtype == place.low
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(y.float().sum(), tensors))


def test_explain_names_the_backend_that_then_runs(place: Any, draw: Any, operator: str, ran: list[str]) -> None:
    active = draw.active(200, 70)
    tensors = inputs(draw, operator, active)
    assert call(operator, tensors, active, explain=True).backend == place.backend
    assert ran == []
    y = call(operator, tensors, active)
    assert ran == ["forward"]
    y.sum().backward()
    assert ran[1:] == ["backward"] * hasattr(place.module, "backward")


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("operator", ["compact_fc1", "compact_fc2"])
def test_torch_func_takes_derivatives_where_the_backend_is_free(
    operator: str, in_place: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NSPEC_BACKEND", raising=False)
    active = torch.arange(200) % 3 > 0
    index = LAYOUTS[in_place](active)
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in SHAPES[operator](index.shape[1])]

    def total(*tensors: Tensor) -> Tensor:
        return (call(operator, tensors, active, index=index) ** 2).sum()

    leaves = [t.clone().requires_grad_() for t in tensors]
    want = torch.autograd.grad(total(*leaves), leaves)
    for a, c in zip(torch.func.grad(total, argnums=tuple(range(len(tensors))))(*tensors), want):
        torch.testing.assert_close(a, c)

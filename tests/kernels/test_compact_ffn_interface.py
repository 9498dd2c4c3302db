"""compact_ffn as an operator: index layout, packed weights, tracing, autocast, and errors that name what was found."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nspec.kernels.common.active import IN_PLACE_ABOVE, active_index, padded_width
from nspec.kernels.compact_ffn import compact_ffn
from nspec.kernels.compact_ffn.op import _compact_ffn
from nspec.kernels.compact_ffn.reference import forward_packed, pack

OPERATOR = "compact_ffn"
NAMES = ("x", "w1", "b1", "w2", "b2")
SHAPES = ((6, 7), (200, 7), (200,), (4, 200), (4,))


@pytest.fixture
def tensors(place: Any, draw: Any) -> list[Tensor]:
    return [draw.integers(*s, seed=i).requires_grad_() for i, s in enumerate(SHAPES)]


def plain(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(s, dtype=dtype) for s in SHAPES]


def some(d_ff: int, n: int) -> Tensor:
    return torch.zeros(d_ff, dtype=torch.bool).index_fill_(0, torch.randperm(d_ff)[:n], True)


def test_index_holds_the_active_neurons_in_order_with_padding(place: Any, draw: Any) -> None:
    active = draw.active(400, 130)
    index = active_index(active)
    assert index.shape == (1, padded_width(130, 400)) == (1, 192)
    assert torch.equal(index[0, :130], active.nonzero().squeeze(1))
    assert (index[0, 130:] == -1).all()
    nearly_all = draw.active(400, round(400 * IN_PLACE_ABOVE) + 1)
    assert torch.equal(active_index(nearly_all)[0], torch.where(nearly_all, torch.arange(400, device=place.device), -1))


def test_packed_weights_compute_the_same() -> None:
    x, *weights = plain()
    for n in (70, 197):
        active = some(200, n)
        packed = pack(*weights, active_index(active)[0])
        torch.testing.assert_close(forward_packed(x, packed)[0], compact_ffn(x, *weights, active))


def test_gradients_pass_gradcheck(place: Any, draw: Any) -> None:
    place.skip_unless(torch.float64)
    shapes = ((5, 3), (70, 3), (70,), (4, 70), (4,))
    tensors = [draw.normal(*s, dtype=torch.float64, seed=i).requires_grad_() for i, s in enumerate(shapes)]
    active, offsets = torch.stack([draw.active(70, 30), draw.active(70, 69)]), draw.offsets((2, 3))
    assert torch.autograd.gradcheck(lambda *t: compact_ffn(*t, active[0]), tensors)
    assert torch.autograd.gradcheck(lambda *t: compact_ffn(*t, active, task_offsets=offsets), tensors)


def test_schema_fake_and_autograd_pass_opcheck(place: Any, draw: Any, tensors: list[Tensor]) -> None:
    two = torch.stack([draw.active(200, 70), draw.active(200, 9)])
    for active, offsets in ((two[0], None), (two, draw.offsets((2, 4)))):
        torch.library.opcheck(_compact_ffn, (*tensors, active_index(active), offsets))


def test_offsets_that_do_not_cover_the_tokens_are_named(place: Any, draw: Any, tensors: list[Tensor]) -> None:
    two = torch.stack([draw.active(200, 5), draw.active(200, 6)])
    for offsets in ([0, 7, 6], [0, 3, 5], [1, 3, 6]):
        with pytest.raises(ValueError, match=r"task_offsets is .*, expected numbers that rise from 0 to the 6 tokens"):
            compact_ffn(*tensors, two, task_offsets=torch.tensor(offsets))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": (6, 8)}, r"x has shape \[6, 8\], expected \[6, 7\]"),
        ({"w2": (4, 199)}, r"w2 has shape \[4, 199\], expected \[any, 200\]"),
        ({"b1": (199,)}, r"b1 has shape \[199\]"),
        ({"b2": (5,)}, r"b2 has shape \[5\]"),
    ],
)
def test_shapes_that_do_not_fit_are_named(change: dict[str, tuple[int, ...]], message: str) -> None:
    named = dict(zip(NAMES, plain()))
    named |= {name: torch.zeros(shape, dtype=torch.float64) for name, shape in change.items()}
    with pytest.raises(ValueError, match=message):
        compact_ffn(*named.values(), some(200, 5))


def test_wrong_sets_and_dtypes_are_named() -> None:
    tensors = plain()
    with pytest.raises(TypeError, match=r"active has dtype torch.int64, expected torch.bool"):
        compact_ffn(*tensors, torch.ones(200, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"active has shape \[199\]"):
        compact_ffn(*tensors, some(199, 5))
    with pytest.raises(ValueError, match=r"task_offsets has shape \[2\], expected \[3\]"):
        compact_ffn(*tensors, torch.stack([some(200, 5)] * 2), task_offsets=torch.tensor([0, 6]))
    with pytest.raises(TypeError, match="expected one dtype"):
        compact_ffn(tensors[0].float(), *tensors[1:], some(200, 5))

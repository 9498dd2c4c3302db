"""row_sparse_wgrad as an operator: gradients of its own, tracing, and errors that name what was found."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nspec.kernels.common.active import active_index, padded_width
from nspec.kernels.row_sparse_wgrad import row_sparse_wgrad
from nspec.kernels.row_sparse_wgrad.op import _row_sparse_wgrad, _row_sparse_wgrad_add

OPERATOR = "row_sparse_wgrad"


def test_it_has_gradients_of_its_own(place: Any, draw: Any) -> None:
    place.skip_unless(torch.float64)
    dh, x = (
        draw.normal(6, 7, dtype=torch.float64).requires_grad_(),
        draw.normal(6, 4, dtype=torch.float64, seed=1).requires_grad_(),
    )
    active, offsets = torch.stack([draw.active(7, 3), draw.active(7, 5, seed=1)]), draw.offsets((2, 4))
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda a, b: row_sparse_wgrad(a, b, active[0]), (dh, x))
        assert check(lambda a, b: row_sparse_wgrad(a, b, active, task_offsets=offsets), (dh, x))


def test_schema_fake_and_autograd_pass_opcheck(place: Any, draw: Any) -> None:
    dh, x = draw.integers(6, 130).requires_grad_(), draw.integers(6, 4, seed=1).requires_grad_()
    one, two = draw.active(130, 40), torch.stack([draw.active(130, 64), draw.active(130, 9)])
    torch.library.opcheck(_row_sparse_wgrad, (dh, x, active_index(one), None))
    # Its gradient reads the offsets, which cannot be traced: grouped calls are checked without gradients.
    dh, x = dh.detach(), x.detach()
    for index, offsets in ((active_index(one), None), (active_index(two), draw.offsets((2, 4)))):
        torch.library.opcheck(_row_sparse_wgrad, (dh, x, index, offsets))
        torch.library.opcheck(_row_sparse_wgrad_add, (draw.integers(130, 4), dh, x, index, offsets))


def test_it_compiles_to_one_graph(place: Any, draw: Any) -> None:
    torch._dynamo.reset()
    dh, x, active, total = (
        draw.integers(6, 130),
        draw.integers(6, 4, seed=1),
        draw.active(130, 40),
        draw.integers(130, 4),
    )

    def both(dh: Tensor, x: Tensor, active: Tensor, total: Tensor) -> tuple[Tensor, ...]:
        return (*row_sparse_wgrad(dh, x, active), *row_sparse_wgrad(dh, x, active, add_to=total))

    got = torch.compile(both, fullgraph=True, backend="aot_eager")(dh, x, active, total.clone())
    for a, b in zip(got, both(dh, x, active, total.clone())):
        assert torch.equal(a, b)


def test_explain_names_the_backend_that_then_runs(place: Any, draw: Any, ran: list[str]) -> None:
    dh, x, active, asked = draw.integers(6, 70), draw.integers(6, 4, seed=1), draw.active(70, 30), row_sparse_wgrad
    options: dict[str, Any] = {"explain": True}
    total = draw.integers(70, 4)
    kept = total.clone()
    assert asked(dh, x, active, **options).backend == asked(dh, x, active, add_to=total, **options).backend == place.backend  # type: ignore[attr-defined]  # fmt: skip
    assert ran == []
    assert torch.equal(total, kept)
    asked(dh, x, active)
    asked(dh, x, active, add_to=total)
    assert ran == ["forward", "accumulate"]


def test_errors_name_what_was_found(place: Any, draw: Any) -> None:
    make, rows = draw.integers, draw.active
    with pytest.raises(ValueError, match=r"x has shape \[5, 4\], expected \[6, any\]"):
        row_sparse_wgrad(make(6, 7), make(5, 4), rows(7, 3))
    with pytest.raises(ValueError, match=r"active has shape \[8\], expected \[7\]"):
        row_sparse_wgrad(make(6, 7), make(6, 4), rows(8, 3))
    with pytest.raises(TypeError, match="dh has dtype torch.float32 and x torch.float64"):
        row_sparse_wgrad(make(6, 7), make(6, 4).double(), rows(7, 3))
    with pytest.raises(ValueError, match=r"add_to has shape \[7, 5\], expected \[7, 4\]"):
        row_sparse_wgrad(make(6, 7), make(6, 4), rows(7, 3), add_to=make(7, 5))
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        with pytest.raises(TypeError, match=f"add_to has dtype {dtype}, expected torch.float32"):
            row_sparse_wgrad(make(6, 7), make(6, 4), rows(7, 3), add_to=make(7, 4, dtype=dtype))
    two = torch.stack([rows(7, 3), rows(7, 4)])
    for offsets in ([0, 7, 6], [0, 3, 5], [1, 3, 6]):
        for options in ({}, {"add_to": make(7, 4)}):
            with pytest.raises(ValueError, match=r"expected numbers that rise from 0 to the 6 tokens"):
                row_sparse_wgrad(make(6, 7), make(6, 4), two, task_offsets=torch.tensor(offsets), **options)


def test_widths_are_those_of_the_layout() -> None:
    assert [padded_width(n, 200) for n in (0, 1, 64, 65, 128, 129)] == [0, 64, 64, 128, 128, 192]
    assert padded_width(193, 200) == 200

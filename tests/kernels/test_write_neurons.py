"""write_neurons_ puts rows into weights, as rows and as columns, and touches nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nspec.kernels.write_neurons import write_neurons_

OPERATOR = "write_neurons"


def places(width: int, k: int, device: str, seed: int = 5) -> Tensor:
    return torch.randperm(width, generator=torch.Generator().manual_seed(seed))[:k].sort().values.to(device)


@pytest.mark.parametrize(("k", "d", "width"), [(0, 5, 7), (1, 1, 1), (7, 130, 40), (17, 33, 17), (40, 129, 300)])
def test_rows_come_to_their_places_and_the_others_stay(
    place: Any, draw: Any, compare: Any, k: int, d: int, width: int
) -> None:
    for dtype in place.dtypes:
        for own in {dtype, torch.float32}:
            weights = [draw.normal(width, d, dtype=dtype, seed=i) for i in range(2)] + [
                draw.normal(d, width, dtype=dtype)
            ]
            rows = [draw.normal(k, d, dtype=own, seed=3 + i) for i in range(3)]
            index = [places(width, k, place.device, seed=i) for i in range(3)]
            want = [weight.clone() for weight in weights]
            for weight, mine, at, columns in zip(want, rows, index, (False, False, True)):
                for j, neuron in enumerate(at.tolist()):
                    weight[(slice(None), neuron) if columns else neuron] = mine[j].to(dtype)
            write_neurons_(weights, rows, index, [False, False, True])
            assert all(compare.same_bits(a, b) for a, b in zip(weights, want))


def test_matrices_of_several_sizes_are_written_in_one_call(place: Any, draw: Any) -> None:
    sizes = [(9, 20), (9, 20), (9, 20), (9, 20), (4, 20), (9, 21)]
    weights = [torch.zeros(50, d, device=place.device) for _, d in sizes]
    rows = [draw.normal(k, d, seed=i) for i, (k, d) in enumerate(sizes)]
    index = [places(50, k, place.device, seed=i) for i, (k, _) in enumerate(sizes)]
    write_neurons_(weights, rows, index, [False] * 6)
    assert all(torch.equal(weight[at], mine) for weight, mine, at in zip(weights, rows, index))
    assert all(int(weight.count_nonzero()) == mine.numel() for weight, mine in zip(weights, rows))


def test_views_are_written_through(place: Any, draw: Any) -> None:
    whole = torch.zeros(30, 40, device=place.device)
    rows, at = draw.normal(5, 11), places(20, 5, place.device)
    write_neurons_([whole[3:23, 8:19]], [rows.t().contiguous().t()], [at], [False])
    assert torch.equal(whole[3 + at, 8:19], rows)
    assert int(whole.count_nonzero()) == rows.numel()


def test_a_backward_pass_may_use_a_weight_that_is_written_in_between(place: Any, draw: Any) -> None:
    """As the base's weights are: their ``.data`` has a version of its own."""
    weight, x = torch.nn.Parameter(draw.normal(6, 5)), draw.normal(3, 5, seed=1).requires_grad_()
    y = x @ weight.t()
    write_neurons_([weight.data], [weight.data[1:3].clone()], [torch.tensor([1, 2], device=place.device)], [False])
    (dx,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(dx, weight.sum(0).expand(3, 5))


def test_wrong_shapes_are_named() -> None:
    index = torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"rows has shape \[2, 3\], expected \[2, 4\]"):
        write_neurons_([torch.ones(5, 4)], [torch.ones(2, 3)], [index], [False])
    with pytest.raises(ValueError, match="there are 1 weights, 0 rows"):
        write_neurons_([torch.ones(5, 4)], [], [index], [False])
    with pytest.raises(ValueError, match="index holds -1, expected numbers from 0 to 4"):
        write_neurons_([torch.ones(5, 4)], [torch.ones(2, 4)], [torch.tensor([1, -1])], [False])
    with pytest.raises(ValueError, match="index holds 4, expected numbers from 0 to 3"):
        write_neurons_([torch.ones(5, 4)], [torch.ones(1, 5)], [torch.tensor([4])], [True])


def test_nothing_is_written_beside_a_weight_where_nobody_looks_at_the_index(place: Any) -> None:
    """As on a GPU, where a look at it would wait for the device."""
    if place.backend != "triton":
        pytest.skip("looked at before")
    for columns in (False, True):
        whole = torch.zeros(9, 9, device=place.device)
        at = torch.tensor([-1, 1, 3], device=place.device)
        place.module.write([whole[3:6, 3:6]], [torch.ones(3, 3, device=place.device)], [at], [columns])
        want = torch.zeros(3, 3, device=place.device)
        (want.t() if columns else want)[1] = 1
        assert torch.equal(whole[3:6, 3:6], want)
        assert int(whole.count_nonzero()) == 3

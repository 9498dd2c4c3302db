"""neuron_wgrad gives the rows of the full weight gradient, and nothing of a weight's size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nspec.kernels.neuron_wgrad import neuron_wgrad

OPERATOR = "neuron_wgrad"


def columns_of(width: int, k: int) -> Tensor:
    return torch.randperm(width, generator=torch.Generator().manual_seed(5))[:k].sort().values


def test_integers_are_exact_for_every_number_of_neurons(place: Any, draw: Any, poison: Any) -> None:
    for tokens, width, d, k in ((0, 7, 5, 3), (1, 1, 1, 1), (3, 7, 5, 0), (37, 130, 19, 11), (1500, 33, 20, 33)):
        for dtype in place.dtypes:
            dz, x = (
                draw.integers(tokens, width, dtype=dtype, seed=1, size=1),
                draw.integers(tokens, d, dtype=dtype, size=1),
            )
            index = columns_of(width, k).to(place.device)
            want = (dz.double().t() @ x.double())[index]
            with poison((k, d), (tokens, k)):
                rows, apart = neuron_wgrad(dz, x, index, dtype=torch.float32), neuron_wgrad(dz[:, index], x, None)
            assert rows.dtype == torch.float32
            assert apart.dtype == dtype
            assert torch.equal(rows.double(), want)
            assert torch.equal(apart, want.to(dtype))


def test_sums_are_in_float32_whatever_the_operands_are(place: Any, draw: Any) -> None:
    for dtype in place.dtypes:
        if dtype.itemsize == 2:
            dz, x = (draw.normal(3000, 20, dtype=dtype, seed=i) for i in range(2))
            want = dz.double().t() @ x.double()
            found = neuron_wgrad(dz, x, None, dtype=torch.float32).double()
            assert float((found - want).abs().max()) < 2e-3


def test_layouts_in_memory_do_not_matter(place: Any, draw: Any, layout: Any) -> None:
    dz, x, index = draw.normal(37, 30), draw.normal(37, 19, seed=1), columns_of(30, 8).to(place.device)
    torch.testing.assert_close(neuron_wgrad(layout(dz), layout(x), index), neuron_wgrad(dz, x, index))


def test_columns_of_other_neurons_are_not_read(place: Any, draw: Any) -> None:
    dz, x, index = draw.normal(37, 130), draw.normal(37, 19, seed=1), columns_of(130, 11).to(place.device)
    want = neuron_wgrad(dz, x, index)
    poisoned = torch.full_like(dz, float("nan"))
    poisoned[:, index] = dz[:, index]
    assert torch.equal(neuron_wgrad(poisoned, x, index), want)


def test_the_same_bits_come_every_time(place: Any, draw: Any) -> None:
    dz, x, index = draw.normal(513, 130), draw.normal(513, 64, seed=1), columns_of(130, 11).to(place.device)
    first = neuron_wgrad(dz, x, index)
    assert all(torch.equal(neuron_wgrad(dz, x, index), first) for _ in range(3))


def test_explain_names_the_backend(place: Any, draw: Any) -> None:
    asked: Any = neuron_wgrad
    assert asked(draw.normal(5, 7), draw.normal(5, 3), None, explain=True).backend == place.backend


def test_wrong_shapes_are_named() -> None:
    with pytest.raises(ValueError, match=r"x has shape \[4, 2\], expected \[3, any\]"):
        neuron_wgrad(torch.ones(3, 5), torch.ones(4, 2), None)

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


def test_it_is_added_to_what_is_there_and_rounded_once(place: Any, draw: Any, poison: Any) -> None:
    for tokens, width, d, k in ((0, 7, 5, 3), (1, 1, 1, 1), (3, 7, 5, 0), (37, 130, 19, 11), (1500, 33, 20, 33)):
        for dtype in place.dtypes:
            dz, x = (draw.integers(tokens, n, dtype=dtype, seed=n, size=1) for n in (width, d))
            index = columns_of(width, k).to(place.device)
            want = (dz.double().t() @ x.double())[index]
            for own in {dtype, torch.float32}:
                before = draw.integers(k, d, dtype=own, seed=3)
                for at, given in ((index, dz), (None, dz[:, index])):
                    total, version = before.clone(), 0
                    with poison((k, d), (tokens, k)):
                        version = total._version
                        assert neuron_wgrad(given, x, at, add_to=total) is total
                    assert torch.equal(total, (want + before.double()).to(own))
                    assert total._version > version


def test_a_total_in_16_bits_is_rounded_once(place: Any) -> None:
    for dtype in place.dtypes:
        if dtype.itemsize == 2:
            bits = {torch.bfloat16: 8, torch.float16: 11}[dtype]
            dz = torch.tensor([[1.0], [2.0 ** -(bits + 1)]], dtype=dtype, device=place.device)
            total = torch.full((1, 4), 2.0**bits, dtype=dtype, device=place.device)
            neuron_wgrad(dz, torch.ones(2, 4, dtype=dtype, device=place.device), None, add_to=total)
            # Half of the distance to the next number and a little more; rounded to 16 bits, the half, which goes to even.
            assert total.unique().tolist() == [2.0**bits + 2]


def test_four_parts_that_are_added_are_the_sum_of_all_tokens(place: Any, draw: Any) -> None:
    for dtype in place.dtypes:
        dz, x = draw.normal(400, 30, dtype=dtype), draw.normal(400, 24, dtype=dtype, seed=1)
        index = columns_of(30, 9).to(place.device)
        total = torch.zeros(9, 24, dtype=torch.float32, device=place.device)
        for part in range(0, 400, 100):
            neuron_wgrad(dz[part : part + 100], x[part : part + 100], index, add_to=total)
        torch.testing.assert_close(total.double(), (dz.double().t() @ x.double())[index], rtol=1e-4, atol=1e-4)


def test_a_view_is_added_to_and_nothing_beside_it(place: Any, draw: Any) -> None:
    dz, x, whole = draw.normal(40, 6), draw.normal(40, 11, seed=1), torch.ones(9, 30, device=place.device)
    neuron_wgrad(dz, x, None, add_to=whole[1:7, 4:26:2])
    torch.testing.assert_close(whole[1:7, 4:26:2], (dz.double().t() @ x.double()).float() + 1)
    whole[1:7, 4:26:2] = 1
    assert torch.equal(whole, torch.ones_like(whole))


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


def test_columns_that_are_padded_give_what_others_give(place: Any, draw: Any) -> None:
    """As ``gated_gradients`` writes them on a GPU; what lies between rows is not in the result."""
    for dtype in place.dtypes:
        dz, x = draw.normal(37, 11, dtype=dtype), draw.normal(37, 24, dtype=dtype, seed=1)
        wide = torch.full((37, 16), 96.0, dtype=dtype, device=place.device)
        wide[:, :11] = dz
        assert torch.equal(neuron_wgrad(wide[:, :11], x, None), neuron_wgrad(dz, x, None))
        # The last row ends with the memory: nothing behind it may be read.
        end = wide.reshape(-1)[5:].clone()[: 36 * 16 + 11].as_strided((37, 11), (16, 1))
        end.copy_(dz)
        assert torch.equal(neuron_wgrad(end, x, None), neuron_wgrad(dz, x, None))


def test_the_product_reads_rows_of_whole_16_bytes(place: Any) -> None:
    if place.backend != "triton":
        pytest.skip("others take rows of any stride")
    for stride in (16, 17, 18, 20):
        wide = torch.zeros(37, stride, device=place.device)
        rows = place.module._whole_rows(wide[:, :11])
        assert (rows.data_ptr() % 16, rows.stride(0) % 4, rows.shape[0]) == (0, 0, 37)
        assert (rows.data_ptr() == wide.data_ptr()) == (stride % 4 == 0)  # no copy where there need not be one


def test_sums_are_in_float32_under_autocast_too(place: Any, draw: Any) -> None:
    dz, x = draw.normal(3000, 20), draw.normal(3000, 8, seed=1)
    want = dz.double().t() @ x.double()
    with torch.autocast(place.device, torch.bfloat16):
        found = neuron_wgrad(dz, x, None)
    assert float((found.double() - want).abs().max()) < 2e-3


def test_on_a_gpu_the_kernel_is_for_what_the_library_reads_in_pieces_or_goes_over_again() -> None:
    pytest.importorskip("triton")
    from nspec.kernels.neuron_wgrad.triton import by_library

    half = torch.bfloat16
    assert by_library(2048, 144, 4096, half, False) is not None
    assert by_library(2048, 143, 4096, half, False) is None
    assert by_library(2048, 144, 4095, half, False) is None
    assert by_library(2048, 144, 4096, half, True) is None
    assert by_library(65536, 144, 4096, half, True) is not None
    assert by_library(2048, 720, 4096, half, True) is not None
    assert by_library(2048, 143, 4096, torch.float32, True) is not None


def test_explain_names_the_backend(place: Any, draw: Any) -> None:
    asked: Any = neuron_wgrad
    assert asked(draw.normal(5, 7), draw.normal(5, 3), None, explain=True).backend == place.backend


def test_wrong_shapes_are_named() -> None:
    with pytest.raises(ValueError, match=r"x has shape \[4, 2\], expected \[3, any\]"):
        neuron_wgrad(torch.ones(3, 5), torch.ones(4, 2), None)
    with pytest.raises(ValueError, match=r"add_to has shape \[3, 2\], expected \[5, 2\]"):
        neuron_wgrad(torch.ones(3, 5), torch.ones(3, 2), None, add_to=torch.zeros(3, 2))
    with pytest.raises(TypeError, match=r"add_to has dtype torch.float32, expected torch.float64"):
        neuron_wgrad(torch.ones(3, 5), torch.ones(3, 2), None, dtype=torch.float64, add_to=torch.zeros(5, 2))
    with pytest.raises(ValueError, match="add_to is a leaf that requires a gradient"):
        neuron_wgrad(torch.ones(3, 5), torch.ones(3, 2), None, add_to=torch.zeros(5, 2, requires_grad=True))
    for wrong in ([5], [0, -1, 2]):
        with pytest.raises(
            ValueError, match=f"index holds {wrong[-1] if wrong == [5] else -1}, expected numbers from 0 to 4"
        ):
            neuron_wgrad(torch.ones(3, 5), torch.ones(3, 2), torch.tensor(wrong))
    with pytest.raises(TypeError, match=r"index is torch.int32 \[1\], expected torch.int64 \[k\]"):
        neuron_wgrad(torch.ones(3, 5), torch.ones(3, 2), torch.tensor([1], dtype=torch.int32))
    with pytest.raises(TypeError, match="dtype is torch.int32, expected a floating dtype"):
        neuron_wgrad(torch.ones(3, 5), torch.ones(3, 2), None, dtype=torch.int32)


def test_a_number_of_no_column_is_nan_where_nobody_looks_at_it(place: Any) -> None:
    """As on a GPU, where a look at the index would wait for it; what lies beside the matrix is not read."""
    if place.backend != "triton":
        pytest.skip("looked at before")
    dz, x = torch.ones(3, 5, device=place.device), torch.ones(3, 2, device=place.device)
    found = place.module.forward(dz, x, torch.tensor([-1, 1, 5], device=place.device), torch.float32)
    assert found.isnan().all(1).tolist() == [True, False, True]
    assert found[1].tolist() == [3.0, 3.0]

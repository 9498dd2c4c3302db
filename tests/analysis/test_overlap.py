from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nspec.analysis import overlap

LAYERS = [f"model.{side}.layers.{i}.fc1" for side in ("decoder", "encoder") for i in (10, 2, 0)]


class FakeMasks(dict):
    """The mapping face of NeuronMasks."""

    @property
    def tasks(self) -> list[str]:
        return list(self)

    @property
    def layers(self) -> list[str]:
        return list(next(iter(self.values())))


def random_masks(tasks: int, d_ff: int, seed: int = 0) -> FakeMasks:
    generator = torch.Generator().manual_seed(seed)
    return FakeMasks(
        {f"t{i}-en": {layer: torch.rand(d_ff, generator=generator) < 0.6 for layer in LAYERS} for i in range(tasks)}
    )


def brute_iou(a: np.ndarray, b: np.ndarray) -> float:
    one, other = {i for i, x in enumerate(a) if x}, {i for i, x in enumerate(b) if x}
    return len(one & other) / len(one | other) if one | other else 1.0


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 7), st.integers(1, 40), st.floats(0, 1), st.integers(0, 10_000))
def test_pairwise_iou_is_the_definition_on_sets(tasks: int, d_ff: int, share: float, seed: int) -> None:
    matrix = np.random.default_rng(seed).random((tasks, d_ff)) < share
    iou = overlap.pairwise_iou(matrix)
    expected = [[brute_iou(a, b) for b in matrix] for a in matrix]
    np.testing.assert_allclose(iou, expected, rtol=0, atol=1e-12)
    assert np.array_equal(iou, iou.T)
    assert (np.diag(iou) == 1).all()


def test_two_empty_masks_are_equal_and_an_empty_and_a_full_one_share_nothing() -> None:
    iou = overlap.pairwise_iou(np.array([[False] * 4, [False] * 4, [True] * 4]))
    assert iou[0, 1] == 1
    assert iou[0, 2] == 0


def test_density_is_the_share_kept_per_task_and_layer() -> None:
    masks = random_masks(3, 64)
    layers = overlap.sort_layers(masks.layers)
    shares = overlap.density(masks)
    assert shares.shape == (3, 6)
    for i, task in enumerate(masks.tasks):
        for j, layer in enumerate(layers):
            assert shares[i, j] == pytest.approx(masks[task][layer].float().mean().item())
    chosen = overlap.density(masks, layers=layers[4:5], tasks=["t2-en", "t0-en"])
    np.testing.assert_array_equal(chosen, shares[[2, 0], 4:5])


def test_mean_pairwise_leaves_the_diagonal_out() -> None:
    masks = random_masks(4, 50, seed=3)
    layers = overlap.side_layers(masks, "encoder")
    iou = overlap.layer_iou(masks, layers)
    assert iou.shape == (3, 4, 4)
    for index, layer in enumerate(layers):
        rows = [masks[task][layer].numpy() for task in masks.tasks]
        pairs = [brute_iou(rows[i], rows[j]) for i in range(4) for j in range(i)]
        assert overlap.mean_pairwise(iou)[index] == pytest.approx(np.mean(pairs))
    assert np.isnan(overlap.mean_pairwise(iou[:, :1, :1])).all()


def test_chance_iou_is_what_independent_masks_have() -> None:
    rng = np.random.default_rng(1)
    shares = np.array([0.78, 0.5, 0.3])
    matrix = rng.random((3, 200_000)) < shares[:, None]
    measured, expected = overlap.pairwise_iou(matrix), overlap.chance_iou(shares)
    above = np.triu_indices(3, 1)
    np.testing.assert_allclose(measured[above], expected[above], atol=0.005)
    assert overlap.chance_iou(np.array([0.78, 0.78]))[0, 1] == pytest.approx(0.78**2 / (2 * 0.78 - 0.78**2))
    assert overlap.chance_iou(np.zeros(2))[0, 1] == 1


def test_layers_sort_by_number_with_the_encoder_first() -> None:
    assert overlap.sort_layers(LAYERS) == [
        f"model.{side}.layers.{i}.fc1" for side in ("encoder", "decoder") for i in (0, 2, 10)
    ]
    assert overlap.side_layers(random_masks(1, 4), "decoder") == [f"model.decoder.layers.{i}.fc1" for i in (0, 2, 10)]


def test_layers_keep_their_number_where_only_some_are_specialised() -> None:
    assert overlap.layer_numbers(["model.decoder.layers.2.fc1", "model.decoder.layers.10.fc1"]) == [2, 10]
    assert overlap.layer_numbers(["decoder.block.3.layer.2.DenseReluDense.wi"]) == [3]
    assert overlap.layer_numbers(["encoder.first.fc1", "encoder.second.fc1"]) == [0, 1]
    assert overlap.layer_numbers(["encoder.a.0.fc1", "encoder.b.0.fc1"]) == [0, 1]
    assert overlap.layer_numbers([]) == []


def test_layer_side_comes_from_a_part_of_the_name() -> None:
    assert overlap.layer_side("model.encoder.layers.3.fc1") == "encoder"
    assert overlap.layer_side("decoder.block.3.layer.2.DenseReluDense.wi") == "decoder"
    for name in ("model.layers.0.fc1", "encoder.decoder.fc1", "my_encoder_layers.0.fc1"):
        with pytest.raises(ValueError, match=r"names neither encoder nor decoder"):
            overlap.layer_side(name)


def test_tasks_are_ordered_by_direction_then_language() -> None:
    tasks = ["pl-en", "en-pl", "de-en", "de-pl", "en-de"]
    assert overlap.order_tasks(tasks, "en") == ["en-de", "en-pl", "de-en", "pl-en", "de-pl"]
    assert overlap.order_tasks(tasks, "") == ["de-en", "de-pl", "en-de", "en-pl", "pl-en"]

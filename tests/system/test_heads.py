"""Attention heads of a run's dense model, measured on its validation text."""

from __future__ import annotations

from typing import Any

from nspec.report.measured_heads import measure_heads

Tiny = Any  # tests/system/conftest.py


def test_every_attention_layer_is_measured_for_every_direction(tiny: Tiny) -> None:
    found = measure_heads(tiny.folder, 4)
    assert sorted(found.tasks) == ["de-en", "en-de"]
    assert {layer.rpartition(".")[2] for layer in found.layers} == {"self_attn", "encoder_attn"}
    assert len(found.layers) == 3
    for task in found.tasks:
        for layer in found.layers:
            assert found[task][layer].shape == (2,)
            assert bool((found[task][layer] > 0).all())

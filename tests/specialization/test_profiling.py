"""Profiling counts real tokens, exactly as a hook on fc2's input would, however the text is split."""

from __future__ import annotations

import pytest
import torch
from models import batch, m2m100, masks_for
from torch import nn

import nspec


def by_hooks(model: nn.Module, batches: list[dict], padding: bool = False) -> dict[str, torch.Tensor]:
    """The definition: non-zeros of fc2's input over real tokens."""
    totals: dict[str, torch.Tensor] = {}
    current: dict = {}

    def hook(name: str):
        def count(module: nn.Module, args: tuple) -> None:
            real = current["labels"] != -100 if "decoder" in name else current["attention_mask"].bool()
            fired = args[0] != 0
            fired = fired.flatten(0, 1) if padding else fired[real]
            totals[name] = totals.get(name, 0) + fired.long().sum(0)

        return count

    handles = [
        module.register_forward_pre_hook(hook(name.replace("fc2", "fc1")))
        for name, module in model.named_modules() if name.endswith("fc2")
    ]  # fmt: skip
    model.eval()
    with torch.no_grad():
        for current in batches:
            model(**current)
    for handle in handles:
        handle.remove()
    return totals


@pytest.mark.parametrize("padding", ["exclude", "include"])
def test_counts_equal_a_hook_on_fc2(padding: str) -> None:
    model = m2m100(torch.float32)
    batches = [batch(seed, source=4 + seed) for seed in range(3)]
    counts = nspec.profile(model, {"en-de": batches}, padding=padding)
    want = by_hooks(model, batches, padding == "include")
    assert counts.layers == list(want)
    for layer, count in want.items():
        assert torch.equal(counts["en-de"][layer], count), layer
        assert 0 < int(count.sum()) < 200 * 3 * 9 * 3


def test_any_split_into_batches_gives_the_same_counts() -> None:
    model = m2m100()
    whole = batch(sentences=6)
    single = [{key: value[i : i + 1] for key, value in whole.items()} for i in range(6)]
    together = nspec.profile(model, {"t": [whole]})
    apart = nspec.profile(model, {"t": single})
    added = nspec.profile(model, {"t": single[:2]}) + nspec.profile(model, {"t": single[2:]})
    for layer in together.layers:
        assert torch.equal(together["t"][layer], apart["t"][layer])
        assert torch.equal(together["t"][layer], added["t"][layer])


def test_padding_is_read_from_masks_labels_or_ids() -> None:
    model = m2m100()
    full = batch()
    want = nspec.profile(model, {"t": [full]})
    decoder_ids = torch.cat([torch.full((3, 1), 2), full["labels"][:, :-1]], 1).masked_fill_(full["labels"] == -100, 1)
    decoder_ids = decoder_ids.masked_fill(decoder_ids == -100, 1)
    variants = [
        {**full, "decoder_attention_mask": (full["labels"] != -100).long()},
        {"input_ids": full["input_ids"], "attention_mask": full["attention_mask"], "decoder_input_ids": decoder_ids},
    ]
    for variant in variants:
        got = nspec.profile(model, {"t": [variant]})
        for layer in want.layers:
            if "encoder" in layer or "decoder_attention_mask" not in variant:
                assert torch.equal(got["t"][layer], want["t"][layer]), (layer, list(variant))


def test_the_model_is_as_before_afterwards() -> None:
    model = m2m100().train()
    model.model.encoder.layers[0].eval()
    modes = [m.training for m in model.modules()]
    nspec.specialize(model, masks_for(model))
    nspec.set_task(model, "en-de")
    dense = nspec.profile(m2m100(), {"t": [batch()]})
    counts = nspec.profile(model, {"t": [batch()]})
    assert [m.training for m in model.modules()] == modes
    assert model.model.encoder.layers[0].fc1.task == "en-de"
    assert all(torch.equal(counts["t"][layer], dense["t"][layer]) for layer in dense.layers)
    with nspec.task(model, "en-de"):
        model(**batch()).loss.backward()


def test_any_model_any_batch() -> None:
    model = nn.Sequential(nn.Linear(3, 80), nn.ReLU(), nn.Dropout(0.5), nn.Linear(80, 3))
    x = torch.randn(50, 3)
    want = (torch.relu(model[0](x)) > 0).sum(0)
    for one in (x, (x,), [x], {"input": x}):
        counts = nspec.profile(model, {"t": [one]}, layers=[("0", "3")])
        assert torch.equal(counts["t"]["0"], want)
    chosen = nspec.profile(model, {"t": [x]}, valid=lambda layer, batch: torch.arange(50) < 10)
    assert torch.equal(chosen["t"]["0"], (torch.relu(model[0](x[:10])) > 0).sum(0))


def test_what_cannot_be_profiled_is_one_clear_error() -> None:
    model = m2m100()
    with pytest.raises(ValueError, match="task t has no batches"):
        nspec.profile(model, {"t": []})
    with pytest.raises(ValueError, match="no task"):
        nspec.profile(model, {})
    with pytest.raises(ValueError, match=r"padding is 'maybe'"):
        nspec.profile(model, {"t": [batch()]}, padding="maybe")
    with pytest.raises(ValueError, match=r"no feed-forward block found in MultiheadAttention.*out_proj"):
        nspec.profile(nn.MultiheadAttention(4, 2), {"t": [torch.ones(1, 4)]})
    with pytest.raises(
        ValueError, match=r"is not fc1 of a feed-forward block here, .*; known: model.encoder.layers.1.fc1"
    ):
        nspec.profile(model, {"t": [batch()]}, layers=["model.encoder.layers.9.fc1"])


def test_an_error_in_the_model_leaves_it_usable() -> None:
    model = m2m100().train()
    with pytest.raises(IndexError):
        nspec.profile(model, {"t": [{**batch(), "input_ids": torch.full((3, 9), 10**6)}]})
    assert model.training
    assert "forward" not in model.model.encoder.layers[0].fc1.__dict__
    model(**batch())

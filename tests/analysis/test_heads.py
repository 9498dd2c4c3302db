from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

from nspec.analysis import clustering, heads, mantel, overlap
from nspec.analysis.heads import HeadImportance, head_importance
from tests.specialization.models import batch, m2m100

HEADS, SIZE = 4, 6  # of the small M2M100: width 24


def losses(model: nn.Module, data: dict[str, Tensor]) -> Tensor:
    """The loss of each sentence: float64 [sentences]."""
    logits = model(**data).logits
    each = nn.functional.cross_entropy(logits.transpose(1, 2), data["labels"], reduction="none")
    return each.sum(1)


@torch.no_grad()
def by_finite_differences(model: nn.Module, data: dict[str, Tensor], layer: str, step: float = 1e-4) -> Tensor:
    """|dL / d gate| of each head, mean over sentences, with gates that are put into the columns of out_proj."""
    weight = model.get_submodule(layer).out_proj.weight
    whole = weight.clone()
    found = []
    for head in range(HEADS):
        moved = []
        for gate in (1 + step, 1 - step):
            weight[:, head * SIZE : (head + 1) * SIZE] *= gate
            moved.append(losses(model, data))
            weight.copy_(whole)
        found.append(((moved[0] - moved[1]) / (2 * step)).abs().mean())
    return torch.stack(found)


def values(importance: HeadImportance, task: str) -> Tensor:
    return torch.cat(list(importance[task].values()))


def test_importance_is_the_derivative_by_a_gate_on_each_head() -> None:
    model, data = m2m100().eval(), batch()
    assert not data["attention_mask"].all()
    found = head_importance(model, {"en-de": [data]})
    sides = [f"model.encoder.layers.{i}.self_attn" for i in range(2)]
    sides += [f"model.decoder.layers.{i}.{kind}" for i in range(2) for kind in ("self_attn", "encoder_attn")]
    assert found.layers == sides
    for layer in found.layers:
        expected = by_finite_differences(model, data, layer)
        assert expected.min() > 1e-6
        torch.testing.assert_close(found["en-de"][layer], expected, rtol=1e-5, atol=1e-9)


def test_padding_and_batching_change_nothing() -> None:
    model, data = m2m100(), batch()
    longer = {
        "input_ids": nn.functional.pad(data["input_ids"], (0, 4), value=1),
        "attention_mask": nn.functional.pad(data["attention_mask"], (0, 4)),
        "labels": nn.functional.pad(data["labels"], (0, 3), value=-100),
    }
    singles = [{key: value[i : i + 1] for key, value in data.items()} for i in range(3)]
    found = head_importance(model, {"whole": [data], "padded": [longer], "single": singles})
    assert values(found, "whole").min() > 0
    torch.testing.assert_close(values(found, "padded"), values(found, "whole"), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(values(found, "single"), values(found, "whole"), rtol=1e-9, atol=1e-12)


def test_a_head_that_out_proj_does_not_read_has_importance_0() -> None:
    model = m2m100()
    layer = "model.decoder.layers.1.encoder_attn"
    with torch.no_grad():
        model.get_submodule(layer).out_proj.weight[:, 2 * SIZE : 3 * SIZE] = 0
    found = head_importance(model, {"en-de": [batch()]})
    assert (found["en-de"][layer] == 0).tolist() == [False, False, True, False]
    assert int((values(found, "en-de") == 0).sum()) == 1
    assert found.top(1.0)["en-de"][layer].tolist() == [True, True, False, True]


def test_the_model_is_as_before_also_after_an_error() -> None:
    model, data = m2m100(dropout=0.5), batch()
    model.train()
    model.model.encoder.eval()
    model.lm_head.weight.requires_grad_(False)
    kept = torch.full_like(model.model.encoder.layers[0].fc1.weight, 7.0)
    model.model.encoder.layers[0].fc1.weight.grad = kept
    modes = [module.training for module in model.modules()]
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    weights = [parameter.clone() for parameter in model.parameters()]
    first = head_importance(model, {"a": [data]})
    torch.testing.assert_close(values(first, "a"), values(head_importance(model, {"a": [data]}), "a"))  # no dropout
    with pytest.raises(ValueError, match="no labels"):
        head_importance(model, {"a": [{"input_ids": data["input_ids"]}]})
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == wanted
    assert all(torch.equal(now, before) for now, before in zip(model.parameters(), weights))
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert len(grads) == 1
    assert torch.equal(grads[0], torch.full_like(kept, 7.0))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_it_works_where_the_caller_wants_no_gradients_and_on_specialised_models() -> None:
    from nspec import specialize, task
    from tests.specialization.models import masks_for

    model, data = m2m100(), batch()
    dense = head_importance(model, {"en-de": [data]})
    specialize(model, masks_for(model))
    with torch.no_grad():
        torch.testing.assert_close(
            values(head_importance(model, {"en-de": [data]}), "en-de"), values(dense, "en-de"), rtol=1e-9, atol=1e-12
        )
        with task(model, "en-de"):
            own = head_importance(model, {"en-de": [data]})
            expected = by_finite_differences(model.eval(), data, own.layers[0])
    torch.testing.assert_close(own["en-de"][own.layers[0]], expected, rtol=1e-5, atol=1e-9)
    assert not torch.allclose(values(own, "en-de"), values(dense, "en-de"), rtol=1e-3)


def planted() -> HeadImportance:
    one, two = torch.tensor([3.0, 0.0, 4.0, 1.0]), torch.zeros(4)
    return HeadImportance({"a": {"x": one, "y": two}, "b": {"x": 5 * one, "y": two}, "c": {"x": one.flip(0), "y": one}})


def test_similarity_is_the_cosine_and_its_distance_serves_mantel_and_trees() -> None:
    found = planted()
    similarity = found.similarity("x")
    cosine = (3 * 1 + 0 * 4 + 4 * 0 + 1 * 3) / 26
    assert similarity == pytest.approx(np.array([[1, 1, cosine], [1, 1, cosine], [cosine, cosine, 1]]), abs=1e-15)
    assert found.similarity("y").tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 1]]
    far = 1 - similarity
    assert mantel.mantel(far, far, method="pearson").r == pytest.approx(1)
    assert clustering.average_linkage(far)[0, :2].tolist() == [0, 1]


def test_normalized_layers_have_length_1_and_silent_ones_stay_0() -> None:
    found = planted().normalized()
    assert found["b"]["x"].tolist() == pytest.approx((np.array([3, 0, 4, 1]) / np.sqrt(26)).tolist())
    assert found["b"]["y"].tolist() == [0, 0, 0, 0]
    model, data = m2m100(), {"t": [batch()]}
    torch.testing.assert_close(
        values(head_importance(model, data, normalize=True), "t"),
        values(head_importance(model, data).normalized(), "t"),
    )


def test_top_heads_are_the_smallest_set_with_the_share() -> None:
    found = planted()
    kept = {k: found.top(k)["a"]["x"].nonzero().flatten().tolist() for k in (0.5, 0.51, 7 / 8, 0.9, 1.0)}
    assert kept == {0.5: [2], 0.51: [0, 2], 7 / 8: [0, 2], 0.9: [0, 2, 3], 1.0: [0, 2, 3]}
    assert not found.top(0.9)["a"]["y"].any()
    tied = HeadImportance({"a": {"x": torch.ones(4)}})
    assert tied.top(0.5)["a"]["x"].tolist() == [True, True, False, False]
    iou = overlap.layer_iou(found.top(0.9), ["x"])[0]
    assert iou[0].tolist() == [1, 1, 2 / 4]
    for k in (0, 1.1):
        with pytest.raises(ValueError, match="expected a share above 0"):
            found.top(k)


def test_saved_importance_comes_back_bit_by_bit(tmp_path: Path) -> None:
    found = head_importance(m2m100(), {"en-de": [batch()], "de-en": [batch(1)]})
    found.save(tmp_path)
    again = HeadImportance.load(tmp_path)
    assert (again.tasks, again.layers) == (["en-de", "de-en"], found.layers)
    assert all(torch.equal(again[t][n], found[t][n]) for t in found for n in found.layers)
    assert again["en-de"][again.layers[0]].dtype == torch.float64
    assert "en-de" in (tmp_path / "heads.json").read_text()
    planted().top(0.9).save(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"heads.safetensors"):
        HeadImportance.load(tmp_path / "other")


class Shared(nn.Module):
    """A model that runs one attention module twice."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.Module()
        self.attention.head_dim, self.attention.out_proj = 2, nn.Linear(6, 6)

    def forward(self, x: Tensor, times: int) -> Tensor:
        for _ in range(times):
            x = self.attention.out_proj(x)
        return x.sum()


def test_what_cannot_be_measured_is_said() -> None:
    model = Shared()
    assert heads.attention_layers(model) == {"attention": 3}
    run = lambda m, b: m(**b)
    x = torch.ones(2, 5, 6)
    assert head_importance(model, {"a": [{"x": x, "times": 1}]}, loss=run)["a"]["attention"].shape == (3,)
    for batches, message in [
        ({}, "no task"),
        ({"a": []}, "task a has no sentences"),
        ({"a": [{"x": x, "times": 2}]}, "attention runs twice"),
        ({"a": [{"x": x.requires_grad_(), "times": 0}]}, "did not run the attention module attention"),
    ]:
        with pytest.raises(ValueError, match=message):
            head_importance(model, batches, loss=run)
    with pytest.raises(ValueError, match="give loss="):
        head_importance(model, {"a": [{"x": x, "labels": x}]})
    with pytest.raises(ValueError, match="no attention module"):
        heads.attention_layers(nn.Linear(2, 2))
    model.attention.num_heads = 4
    with pytest.raises(ValueError, match="4 heads, which do not divide the 6 inputs"):
        heads.attention_layers(model)
    for value, error in ((torch.tensor([-1.0]), ValueError), (torch.tensor([1]), TypeError)):
        with pytest.raises(error, match="importance of a, x"):
            HeadImportance({"a": {"x": value}})


def test_the_kind_of_attention_is_told_by_its_name() -> None:
    kinds = {
        "model.encoder.layers.0.self_attn": "encoder self",
        "model.decoder.layers.0.self_attn": "decoder self",
        "model.decoder.layers.0.encoder_attn": "cross",
        "transformer.decoder.layers.1.multihead_attn": "cross",
    }
    assert {name: heads.attention_kind(name) for name in kinds} == kinds
    with pytest.raises(ValueError, match="names neither encoder nor decoder"):
        heads.attention_kind("layers.0.self_attn")

"""Which attention heads a direction keeps, and which stages say so."""

from __future__ import annotations

import pytest
import torch
from toy_translation import Toy

from nspec.analysis.heads import HeadImportance
from nspec.mt.config import HeadsConfig
from nspec.run.checks import validate
from nspec.run.config import Config
from nspec.run.head_masks import importance_of, kept_heads
from nspec.run.stages import stages_of

IMPORTANCE = HeadImportance(
    {"en-de": {f"decoder.{kind}": torch.tensor([0.1, 0.5, 0.3, 0.3]) for kind in ("self_attn", "encoder_attn")}}
)


@pytest.mark.parametrize(("share", "kept"), [(0.01, [1]), (0.5, [1, 2]), (0.75, [1, 2, 3]), (1.0, [0, 1, 2, 3])])
def test_a_share_of_the_heads_that_matter_most_is_kept(share: float, kept: list[int]) -> None:
    found = kept_heads(IMPORTANCE, HeadsConfig(share=share))
    for layer in IMPORTANCE.layers:
        assert found["en-de"][layer].nonzero().squeeze(1).tolist() == kept
    assert kept_heads(IMPORTANCE, HeadsConfig(layers=["encoder_attn"])).layers == ["decoder.encoder_attn"]
    with pytest.raises(ValueError, match=r"heads\.layers: no layer matches"):
        kept_heads(IMPORTANCE, HeadsConfig(layers=["cross"]))


def test_a_limit_of_sentences_measures_these_alone(toy: Toy) -> None:
    model, seen = toy.model(), []
    few, tokens = importance_of(model, toy.data, 512, 2, lambda *progress: seen.append(progress)), 512
    assert few.tasks == toy.data.tasks
    assert seen[-1][1] == seen[-1][2]
    whole = importance_of(model, toy.data, tokens, 0)
    layer = whole.layers[0]
    assert not torch.equal(whole[whole.tasks[0]][layer], few[whole.tasks[0]][layer])


def test_random_heads_take_the_numbers_of_the_others_and_a_variant_measures_its_own() -> None:
    config = Config()
    config.run.systems = ["dense", "heads", "random_heads"]
    config.run.variants = ["half = random_heads heads.share=0.5 heads.layers=[encoder_attn, decoder]", "long = heads"]
    validate(config)
    stages = {stage.name: stage for stage in stages_of(config)}
    assert stages["specialize:random_heads"].after == stages["specialize:heads"].after == ("train", "head_masks")
    assert "run.seed" in stages["specialize:random_heads"].options
    assert stages["specialize:half"].after == ("train", "head_masks:half")
    assert stages["head_masks:half"].folder == "variants/half/head_masks"
    assert stages["specialize:long"].after == ("train", "head_masks")
    assert list(stages).index("head_masks:half") < list(stages).index("specialize:heads")
    config.run.variants = ["a = heads heads.layers=[decoder.layers.9]"]
    with pytest.raises(ValueError, match=r"heads\.layers of a: no layer matches 'decoder\.layers\.9'"):
        validate(config)

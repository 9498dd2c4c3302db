"""The rule ``loss``: the smallest k that is good enough, and what is written of it."""

from __future__ import annotations

import pytest
import torch

import nspec
from nspec.mt.config import SelectConfig
from nspec.run.checks import validate
from nspec.run.config import Config
from nspec.run.loss_rule import ByLoss
from nspec.run.selecting import select_neurons
from nspec.run.stages import stages_of

LAYERS = [f"model.{side}.layers.{i}.fc1" for side in ("encoder", "decoder") for i in range(2)]
COUNTS = nspec.ActivationCounts(
    {
        task: {name: torch.randint(1, 99, (60,), generator=torch.Generator().manual_seed(seed)) for name in LAYERS}
        for seed, task in enumerate(["en-de", "de-en"])
    }
)
DENSE = {"en-de": 2.0, "de-en": 1.0}
GRID = [0.9, 0.3, 0.6]


class Loss:
    """Each masked neuron costs 0.01 nats in the encoder, 0.02 in the decoder; de-en has no use for masks in the decoder."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, tuple[str, ...]]] = []

    def __call__(self, task: str, masks: nspec.NeuronMasks | None = None) -> float:
        if masks is None:
            return DENSE[task]
        self.asked.append((task, tuple(masks.layers)))
        assert masks.tasks == [task]
        cost = sum((0.01 + 0.01 * ("decoder" in layer)) * int((~mask).sum()) for layer, mask in masks[task].items())
        return DENSE[task] + cost + 9 * (task == "de-en" and any("decoder" in layer for layer in masks.layers))


@pytest.mark.parametrize("by", ["half", "layer"])
@pytest.mark.parametrize("tolerance", [0.8, 1.5])
def test_each_part_of_a_direction_has_the_smallest_k_that_is_good_enough(by: str, tolerance: float) -> None:
    select = SelectConfig(rule="loss", by=by, tolerance=tolerance, grid=GRID)
    seen: list[tuple[str, int, int]] = []
    loss = Loss()
    rule = ByLoss(loss, lambda *progress: seen.append(progress))
    found = select_neurons(COUNTS, select, "en", by_loss=rule)
    parts = {"encoder": LAYERS[:2], "decoder": LAYERS[2:]} if by == "half" else {layer: [layer] for layer in LAYERS}
    assert seen[-1] == ("de-en", 2 * len(parts), 2 * len(parts))
    assert {layers for _, layers in loss.asked} == {tuple(layers) for layers in parts.values()}
    for task in COUNTS.tasks:
        assert rule.record["dense_loss"][task] == DENSE[task]
        for part, layers in parts.items():
            good = [1.0]
            for k in GRID:
                masks = nspec.select(COUNTS, k)
                own = nspec.NeuronMasks({task: {layer: masks[task][layer] for layer in layers}})
                good += [k] if Loss()(task, own) <= DENSE[task] + tolerance else []
            chosen = rule.record["chosen"][task][part]
            assert chosen["k"] == min(good)
            assert chosen["loss"] <= DENSE[task] + tolerance
            for layer in layers:
                want = nspec.select(COUNTS, min(good))[task][layer] if min(good) < 1 else torch.ones(60).bool()
                assert torch.equal(found[task][layer], want)
    assert rule.record["chosen"]["de-en"][list(parts)[-1]]["k"] == 1
    random = select_neurons(COUNTS, SelectConfig(**vars(select) | {"rule": "random", "like": "loss"}), "en", 1, rule)
    assert random.density() == found.density()


def test_a_tolerance_that_nothing_meets_is_an_error() -> None:
    with pytest.raises(
        ValueError, match=r"no k of select.grid \(0.3, 0.6, 0.9\) keeps the loss of any direction within 0 "
    ):
        select_neurons(COUNTS, SelectConfig(rule="loss", tolerance=0, grid=GRID), "en", by_loss=ByLoss(Loss()))


def test_the_rule_is_a_line_of_the_configuration_and_depends_on_what_it_measures() -> None:
    config = Config()
    config.run.systems = ["dense", "forward"]
    config.run.variants = [
        "a = forward_decoder select.rule=loss select.tolerance=0.02 select.grid=[0.5, 0.9] select.by=layer"
    ]
    validate(config)
    stages = {stage.name: stage for stage in stages_of(config)}
    assert "systems/dense/model/*.safetensors" in stages["select:a"].inputs
    assert "profile.sentences" in stages["select:a"].options
    assert stages["select"].inputs == ("profile/counts.*",)
    for line, says in {
        "a = forward select.rule=loss select.grid=[]": "expected one k or more",
        "a = neurons select.rule=loss": "loss says what masking does",
        "a = forward select.rule=loss select.k=0.5": "select.k is not of select.rule loss",
    }.items():
        config.run.variants = [line]
        with pytest.raises(ValueError, match=says):
            validate(config)

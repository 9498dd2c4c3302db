"""Which neurons a run selects, and which lines of ``run.variants`` say so."""

from __future__ import annotations

import warnings

import pytest
import torch

import nspec
from nspec.mt.config import SelectConfig
from nspec.run.checks import validate
from nspec.run.config import Config
from nspec.run.readiness import check_rules
from nspec.run.selecting import select_neurons
from nspec.run.stages import stages_of
from nspec.run.systems import config_of

ENCODER, DECODER = "model.encoder.layers.0.fc1", "model.decoder.layers.0.fc1"
TASKS = ["en-de", "de-en", "en-fr", "fr-en"]


def counts() -> nspec.ActivationCounts:
    generator = torch.Generator().manual_seed(1)
    found = {t: {name: torch.randint(1, 99, (40,), generator=generator) for name in (ENCODER, DECODER)} for t in TASKS}
    return nspec.ActivationCounts(found, dict.fromkeys(TASKS, 1000))


def config(*variants: str) -> Config:
    found = Config()
    found.run.systems, found.run.variants = ["dense"], list(variants)
    return found


def of_variant(meaning: str) -> nspec.NeuronMasks:
    found = config(f"a = {meaning}")
    validate(found)
    return select_neurons(counts(), config_of(found, "a").select, "en")


def test_each_of_the_four_parts_has_its_own_k() -> None:
    ks = {("from", ENCODER): 0.3, ("from", DECODER): 0.5, ("to", ENCODER): 0.7, ("to", DECODER): 0.9}
    given = " ".join(f"select.k_{way}_{layer.split('.')[1]}={k}" for (way, layer), k in ks.items())
    found = of_variant(f"forward {given}")
    for task in TASKS:
        for layer in (ENCODER, DECODER):
            want = nspec.select(counts(), ks["from" if task.startswith("en-") else "to", layer])
            assert torch.equal(found[task][layer], want[task][layer])


def test_the_rule_conflict_takes_its_share_of_the_whole_model_and_none_that_is_trained_along() -> None:
    generator = torch.Generator().manual_seed(3)
    conflict = {t: {name: torch.randn(40, generator=generator) for name in (ENCODER, DECODER)} for t in TASKS}
    for task in TASKS:
        conflict[task][DECODER] += 1  # where most of it is
    conflict["en-fr"] = {name: -value.abs() for name, value in conflict["en-fr"].items()}
    conflict["en-fr"][ENCODER][[4, 9]] = 1.0
    apart = "a = neurons+shared select.rule=conflict select.share=0.2"
    found = config(apart, "b = update select.rule=random select.like=conflict select.share=0.2")
    validate(found)
    stages = {stage.name: stage for stage in stages_of(found)}
    assert "systems/dense/model/*.safetensors" in stages["select:b"].inputs
    masks = select_neurons(counts(), config_of(found, "a").select, "en", conflict=conflict)
    for task in TASKS[:2]:
        values = torch.cat([conflict[task][ENCODER], conflict[task][DECODER]])
        kept = torch.cat([masks[task][ENCODER], masks[task][DECODER]])
        assert int(kept.sum()) == 16
        assert values[kept].min() > values[~kept].max()
    assert masks["en-fr"][ENCODER].nonzero().flatten().tolist() == [4, 9]
    assert not masks["en-fr"][DECODER].any()
    select = config_of(found, "b").select
    assert select_neurons(counts(), select, "en", conflict=conflict).density() == masks.density()
    conflict["en-fr"][ENCODER][[4, 9]] = -1.0
    with pytest.raises(ValueError, match="no neuron of en-fr would train better apart"):
        select_neurons(counts(), select, "en", conflict=conflict)
    found.profile.path = "news"
    with pytest.raises(
        ValueError, match="profile.path of a: select.rule conflict takes gradients on the run's own text"
    ):
        validate(found)
    with pytest.raises(ValueError, match="conflict, which compares directions, and the run has en-de alone"):
        check_rules(found, ["en-de"])


@pytest.mark.parametrize("rule", ["select.rule=specific", "select.rule=random", "select.rule=random select.like=share"])
def test_directions_from_or_to_the_pivot_alone_may_have_neurons_of_their_own(rule: str) -> None:
    every = of_variant(f"neurons+shared {rule}")
    for way in ("from", "to"):
        some = of_variant(f"neurons+shared {rule} select.directions={way}")
        for task in TASKS:
            wanted = every[task] if task.startswith("en-") == (way == "from") else None
            for layer, mask in some[task].items():
                assert int(mask.sum()) == (0 if wanted is None else int(wanted[layer].sum()))
    found = config("a = neurons+shared select.directions=to")
    with pytest.raises(ValueError, match=r"select.directions of a is to, and no direction goes to the pivot \(en\)"):
        check_rules(found, ["en-de", "en-fr"])
    for system in ("neurons", "forward", "update"):
        with pytest.raises(
            ValueError, match="select.directions of b: a direction without neurons has nothing to compute"
        ):
            validate(config(f"b = {system} select.directions=from"))


def test_the_decoder_out_of_the_pivot_alone_is_one_line() -> None:
    found = of_variant("forward_decoder select.k_from_decoder=0.7 select.k_to_decoder=1")
    whole = "select.k_from_encoder=1 select.k_to_encoder=1 select.k_to_decoder=1"
    alone, random = of_variant(f"forward select.k=0.7 {whole}"), of_variant(f"random select.k=0.7 {whole}")
    assert alone.layers == random.layers == [DECODER]  # a layer without any specialised direction stays as it is
    want = nspec.select(counts(), 0.7)
    for task in TASKS:
        kept = alone[task][DECODER]
        assert torch.equal(kept, found[task][DECODER])
        assert torch.equal(kept, want[task][DECODER]) if task.startswith("en-") else bool(kept.all())
    drawn = nspec.random_masks(random, seed=3)
    assert drawn.density() == alone.density()
    assert all(0 < alone.density()[task][DECODER] < 0.8 for task in TASKS if task.startswith("en-"))


def test_a_part_without_a_k_of_its_own_has_that_of_all() -> None:
    found, want = of_variant("forward select.k=0.6 select.k_to_encoder=0.2"), nspec.select(counts(), 0.6)
    assert torch.equal(found["de-en"][DECODER], want["de-en"][DECODER])
    assert torch.equal(found["en-de"][ENCODER], want["en-de"][ENCODER])
    assert not torch.equal(found["de-en"][ENCODER], want["de-en"][ENCODER])


@pytest.mark.parametrize(
    ("meaning", "says"),
    [
        ("forward_encoder select.k_from_encoder=1 select.k_to_encoder=1", "no layer is left that is specialised"),
        ("forward select.layers=[decoder] select.k_from_decoder=1 select.k_to_decoder=1", "no layer is left"),
        ("neurons select.k_to_decoder=1", "all neurons of a layer would get parameters"),
        ("forward select.rule=top select.k_to_decoder=0.5", "select.k_to_decoder is not of select.rule top"),
        ("forward select.k_to_decoder=1.5", r"select.k_to_decoder: expected a number in \[0, 1\]"),
    ],
)
def test_ks_that_leave_nothing_to_specialise_are_an_error(meaning: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        validate(config(f"a = {meaning}"))


@pytest.mark.parametrize("system", ["neurons", "neurons+shared"])
@pytest.mark.parametrize("rule", ["specific", "top", "lape select.rate", "share select.k"])
def test_every_rule_has_a_random_control_of_its_sizes_in_one_line(system: str, rule: str) -> None:
    name, _, number = rule.partition(" ")
    for share in (0.01, 0.05, 0.1, 0.25):
        given = f"{number or 'select.share'}={share}"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # lape may leave directions without neurons
            own = of_variant(f"{system} select.rule={name} {given}")
            random = of_variant(f"{system} select.rule=random select.like={name} {given}")
        assert random.density() == own.density()
    assert any(not torch.equal(random[task][layer], own[task][layer]) for task in TASKS for layer in own.layers)


def test_random_neurons_are_a_share_of_each_layer_and_follow_the_seed_of_the_run() -> None:
    one, other = SelectConfig(rule="random", share=0.25), SelectConfig(rule="random", share=0.25, like="top")
    for select in (one, other):
        masks, again = (select_neurons(counts(), select, "en", seed=7) for _ in range(2))
        assert {int(mask.sum()) for layers in masks.values() for mask in layers.values()} == {10}
        assert all(torch.equal(masks[t][layer], again[t][layer]) for t in TASKS for layer in masks.layers)
        third = select_neurons(counts(), select, "en", seed=8)
        assert any(not torch.equal(masks[t][layer], third[t][layer]) for t in TASKS for layer in masks.layers)
    stages = {stage.name: stage for stage in stages_of(config("a = neurons select.rule=random", "b = neurons"))}
    assert "run.seed" in stages["select:a"].options
    assert "run.seed" not in stages["select"].options


def test_silent_neurons_are_of_systems_that_mask_both_passes() -> None:
    found = config("a = random specialize.silent=true select.k=0.7")
    found.run.systems += ["continued", "forward"]
    validate(found)
    assert config_of(found, "a").specialize.silent
    found.specialize.silent = True
    validate(found)
    for line in ("b = update specialize.updates=5", "b = neurons specialize.silent=true"):
        found.run.variants = [line]
        with pytest.raises(ValueError, match="specialize.silent of b: all neurons compute in it"):
            validate(found)


def test_a_learning_rate_of_neurons_is_of_systems_whose_neurons_have_parameters() -> None:
    validate(config("a = neurons specialize.neurons_lr=0.1", "b = neurons+shared specialize.neurons_lr=0.1"))
    with pytest.raises(ValueError, match="specialize.neurons_lr of c: no neurons have parameters of their own"):
        validate(config("c = forward specialize.neurons_lr=0.1"))


def test_a_direction_beside_the_pivot_has_no_part() -> None:
    found = config("a = forward select.k_to_decoder=0.5")
    check_rules(found, TASKS)
    with pytest.raises(ValueError, match=r"direction de-fr goes neither from nor to corpus\.pivot \(en\)"):
        check_rules(found, [*TASKS, "de-fr"])
    found.corpus.pivot = ""
    with pytest.raises(ValueError, match="corpus.pivot is empty"):
        validate(found)


def test_directions_that_are_all_dense_in_the_parts_given_are_an_error() -> None:
    select = SelectConfig(k_from_encoder=1, k_from_decoder=1)
    out = {task: counts()[task] for task in TASKS if task.startswith("en-")}
    with pytest.raises(ValueError, match="no layer is left in which a direction is specialised"):
        select_neurons(nspec.ActivationCounts(out), select, "en")

"""Which stages a run has, what each depends on, and the helpers around them."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import nspec
from nspec.files import sha256, write_json
from nspec.mt.scoring import decoded
from nspec.processes import World, _portable
from nspec.run import pipeline
from nspec.run.checks import validate
from nspec.run.config import Config
from nspec.run.folder import NEUTRAL
from nspec.run.readiness import check_adapters, check_rules
from nspec.run.stages import Stage
from nspec.run.systems import SYSTEMS, variants_of
from nspec.run.yaml import flatten, parse, render
from nspec.terminal import Display, duration, show


def config_of(*systems: str, **values: object) -> Config:
    config = Config()
    config.run.systems = list(systems) or config.run.systems
    for name, value in values.items():
        section, _, key = name.partition("_")
        setattr(getattr(config, section), key, value)
    return config


def stages(*systems: str, **values: object) -> dict[str, Stage]:
    return {stage.name: stage for stage in pipeline.stages_of(config_of(*systems, **values))}


def test_every_option_that_changes_results_belongs_to_a_stage() -> None:
    """Else changing it in a finished run would be ignored without a word."""
    depended = {name for stage in stages(*SYSTEMS).values() for name in stage.options}
    free = [name for name in flatten(Config()) if name not in depended and name.partition(".")[0] not in depended]
    assert set(free) <= NEUTRAL


def test_neutral_options_exist() -> None:
    assert set(flatten(Config())) >= NEUTRAL


@pytest.mark.parametrize(
    "systems",
    [["dense"], ["dense", "random"], ["dense", "continued"], ["dense", "update"], [], list(SYSTEMS), ["dense", "lass"]],
)
def test_stages_come_after_those_that_they_need(systems: list[str]) -> None:
    seen: set[str] = set()
    for stage in pipeline.stages_of(config_of(*systems)):
        assert set(stage.after) <= seen, stage.name
        seen.add(stage.name)


def test_no_two_stages_share_a_record() -> None:
    variants = ["a = forward select.k=0.5", "b = random profile.split=train", "c = lass lass.alpha=0.5"]
    found = stages(*SYSTEMS, run_variants=variants)
    places = [(stage.folder, stage.record) for stage in found.values()]
    assert {"profile:b", "select:a", "random_masks:b", "weight_masks:c", "specialize:c", "score:a"} <= set(found)
    assert len(places) == len(set(places))


def test_without_specialised_systems_nothing_is_profiled() -> None:
    names = stages("dense", "continued")
    assert not {"profile", "select", "random_masks"} & set(names)
    assert "random_masks" not in stages("dense", "forward")
    assert {"profile", "select", "random_masks"} <= set(stages("dense", "random"))


def test_systems_read_their_own_masks() -> None:
    found = stages()
    assert "masks/masks.*" in found["specialize:forward"].inputs
    assert "masks/masks.*" in found["specialize:update"].inputs
    assert "random_masks/masks.*" in found["specialize:random"].inputs
    assert not any(pattern.endswith("masks/masks.*") for pattern in found["specialize:continued"].inputs)
    assert found["specialize:random"].after == ("train", "random_masks")


def test_a_variant_shares_what_it_does_not_change() -> None:
    variants = ["low = forward select.k=0.5", "rows = update specialize.optimizer=row_sparse_adamw"]
    variants += ["tenth = random profile.share=0.1", "half = lass lass.alpha=0.5"]
    found = stages("dense", "forward", "lass", run_variants=variants)
    assert found["select:low"].inputs == ("profile/counts.*",)
    assert "variants/low/masks/masks.*" in found["specialize:low"].inputs
    assert "masks/masks.*" in found["specialize:rows"].inputs
    assert "variants/tenth/random_masks/masks.*" in found["specialize:tenth"].inputs
    assert found["random_masks:tenth"].after == ("select:tenth",)
    assert found["profile:tenth"].overrides == {"profile.share": 0.1}
    assert found["weight_masks:half"].inputs == found["weight_masks"].inputs
    assert {"profile:low", "select:rows", "profile:rows"}.isdisjoint(found)


def test_lass_brings_the_fine_tuned_models_that_it_prunes() -> None:
    found = stages("dense", "lass")
    assert list(found).index("specialize:finetuned") < list(found).index("weight_masks")
    assert list(found).index("weight_masks") < list(found).index("specialize:lass")
    assert "evaluate:finetuned" not in found
    assert "weight_masks/weight_masks.*" in found["specialize:lass"].inputs


def test_a_variant_of_lass_prunes_models_that_were_fine_tuned_alike() -> None:
    pair = ["long = finetuned finetune.updates=900", "lass-long = lass finetune.updates=900 lass.alpha=0.5"]
    assert stages("dense", run_variants=pair)["weight_masks:lass-long"].after == ("specialize:long",)
    with pytest.raises(ValueError, match="add a variant of finetuned"):
        stages("dense", run_variants=pair[1:])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("forward select.k=0.5", "expected NAME = SYSTEM"),
        ("a = sideways select.k=0.5", "expected a variant of one of"),
        ("a = dense select.k=0.5", "expected a variant of one of"),
        ("forward = update select.k=0.5", "name of another system"),
        ("a = forward model.d_ff=8", "shared by all systems"),
        ("a = forward select.j=0.5", "unknown option select.j"),
        ("a = forward select.k=many", "expected a number"),
    ],
)
def test_a_variant_that_cannot_be_meant_is_an_error(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        variants_of(config_of("dense", run_variants=[text]))


def test_values_of_variants_are_checked_like_others() -> None:
    config = config_of("dense", "forward", run_variants=["a = forward select.k=1.5"])
    config.train.valid_bleu_sentences = 1
    with pytest.raises(ValueError, match="run.variants: a: select.k"):
        validate(config)


@pytest.mark.parametrize(
    ("value", "layers"),
    [
        ("[decoder.layers.2]", ["decoder.layers.2"]),
        ("[encoder,decoder.layers.2]", ["encoder", "decoder.layers.2"]),
        ("[encoder, decoder.layers.2] select.k=0.5", ["encoder", "decoder.layers.2"]),
        ('["layers.[45]", "x.[1]"]', ["layers.[45]", "x.[1]"]),
        ('["decoder.layers.[12]"]', ["decoder.layers.[12]"]),
        ("['*.1?']", ["*.1?"]),
        ("[]", []),
    ],
)
def test_a_variant_may_be_of_some_layers(value: str, layers: list[str]) -> None:
    config = config_of("dense", run_variants=[f"top = forward select.layers={value}"])
    for found in (config, parse(render(config))):
        overrides = variants_of(found)["top"].overrides
        assert overrides["select.layers"] == layers
        assert set(overrides) - {"select.layers"} == ({"select.k"} if " select.k" in value else set())


@pytest.mark.parametrize("value", ["decoder", "[decoder.layers.[12]]", "[*.1]", "[1]"])
def test_layers_that_are_no_list_of_texts_are_an_error(value: str) -> None:
    with pytest.raises(ValueError, match=r"^run\.variants: select\.layers"):
        variants_of(config_of("dense", run_variants=[f"top = forward select.layers={value}"]))


class Selecting(pipeline.Pipeline):
    """A run in which counts are there, and stages are done whenever they are asked for."""

    def __init__(self, folder: Path, *variants: str, **values: object) -> None:
        super().__init__(config_of("dense", run_folder=str(folder), run_variants=list(variants), **values))
        layers = [f"model.{side}.layers.{i}.fc1" for side in ("encoder", "decoder") for i in range(2)]
        counts = {layer: torch.tensor([4, 3, 2, 1]) * (i != 1) for i, layer in enumerate(layers)}  # one is dead
        nspec.ActivationCounts({"en-de": counts}).save(folder / "profile")

    def _do(self, name: str, work: Callable[[Path], None], everyone: bool = False) -> None:
        work(self.folder / self.run.stages[name].folder)

    def layers(self, place: str) -> list[str]:
        return nspec.NeuronMasks.load(self.folder / place).layers


def test_masks_and_random_masks_are_of_the_selected_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    variants = ['top = forward select.layers=["decoder.layers.[01]"]', "some = random select.layers=[layers.0]"]
    run = Selecting(tmp_path, *variants, select_k=0.7)
    run.select()
    assert run.layers("variants/top/masks") == [f"model.decoder.layers.{i}.fc1" for i in range(2)]
    first = [f"model.{side}.layers.0.fc1" for side in ("encoder", "decoder")]
    assert run.layers("variants/some/masks") == run.layers("variants/some/random_masks") == first
    assert "keeps 50.0% of the neurons of 2 of 4 layers on average" in capsys.readouterr().err


def test_a_run_selects_by_the_rule_that_it_is_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [
        "own = forward",
        "tells = forward select.rule=lape select.rate=0.1",
        "some = random select.rule=lape select.rate=0.1",
    ]
    run = Selecting(tmp_path, *lines, "few = forward select.rule=specific", select_rule="top", select_share=0.05)
    layers = [f"model.{side}.layers.0.fc1" for side in ("encoder", "decoder")]
    fired = {layer: torch.arange(20) for layer in layers}
    fired[layers[0]] = torch.tensor([50, *[1] * 19])
    other = {layer: torch.ones(20, dtype=torch.int64) for layer in layers}
    counts = nspec.ActivationCounts({"en-de": fired, "de-en": other}, {"en-de": 60, "de-en": 60})
    counts.save(tmp_path / "profile")
    run.select()
    said = capsys.readouterr().err
    for place, rule in {
        "masks": {"rule": "top", "share": 0.05},
        "variants/tells/masks": {"rule": "lape", "rate": 0.1},
        "variants/few/masks": {"rule": "specific", "share": 0.01},
    }.items():
        found = nspec.NeuronMasks.load(tmp_path / place)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            want = nspec.select(counts, **rule)
        assert all(torch.equal(found[t][layer], want[t][layer]) for t in want for layer in want.layers), place
    tells, random = (
        nspec.NeuronMasks.load(tmp_path / f"variants/{name}") for name in ("tells/masks", "some/random_masks")
    )
    assert not any(mask.any() for mask in tells["de-en"].values())
    assert random.density() == tells.density()
    assert "no neuron is of de-en" in said


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a = forward select.rule=lape select.k=0.5", "a: select.k is not of select.rule lape, which uses select.rate"),
        ("a = forward select.rule=random select.k=0.5", "random, which uses select.like and select.share"),
        (
            "a = forward select.rule=random select.like=lape select.share=0.5",
            "like lape, which uses select.like and select.r",
        ),
        ("a = forward select.like=top", "a: select.like is not of select.rule share, which uses select.k"),
        ("a = forward select.share=0.5", "a: select.share is not of select.rule share, which uses select.k"),
        ("a = forward select.rule=best", "select.rule: expected one of share, lape, top, specific"),
    ],
)
def test_a_variant_whose_number_is_of_another_rule_is_an_error(text: str, says: str) -> None:
    config = config_of("dense", "forward")
    config.train.valid_bleu_sentences, config.run.variants = 1, [text]
    with pytest.raises(ValueError, match=says):
        validate(config)


def test_a_pattern_without_a_layer_is_an_error_that_names_the_layers(tmp_path: Path) -> None:
    run = Selecting(tmp_path, "top = forward select.layers=[decoder.layers.2]")
    with pytest.raises(ValueError, match=r"^select.layers: no layer matches 'decoder.layers.2'; there are model\.enc"):
        run.select()


def test_a_language_without_a_family_is_told_before_the_dense_model_is_trained() -> None:
    check_adapters(config_of("dense", "adapters"), ["en-de", "xx-en"])
    with pytest.raises(ValueError, match="the family of language 'xx' is not known"):
        check_adapters(config_of("dense", "adapters_family"), ["en-de", "xx-en"])


def test_decoding_matters_to_training_only_where_bleu_picks_the_checkpoint() -> None:
    assert not any(name.startswith("decode") for name in stages()["train"].options)
    found = stages(train_best="bleu")
    assert "decode.max_length_ratio" in found["train"].options
    assert "decode.max_length_ratio" not in found["specialize:forward"].options


def test_the_baseline_is_dense_where_the_one_asked_for_is_not_there() -> None:
    assert pipeline.baseline_of(config_of()) == "continued"
    assert pipeline.baseline_of(config_of("dense", "forward")) == "dense"
    assert pipeline.baseline_of(config_of("dense", "forward", score_baseline="forward")) == "forward"


def test_a_lone_process_leads_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    world = World()
    assert (world.rank, world.size) == (0, 1)
    assert world.lead(lambda: 3) == 3
    with pytest.raises(ValueError, match="as it is"):
        world.lead(lambda: (_ for _ in ()).throw(ValueError("as it is")).send(None))
    world.wait()
    world.close()


def test_rank_and_size_come_from_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "2")
    assert (World().rank, World().size) == (2, 4)


class Stubborn(ValueError):
    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} {second}")


def test_an_error_that_cannot_be_sent_keeps_its_kind_and_text() -> None:
    sent = _portable(Stubborn("no", "masks"))
    assert type(sent) is ValueError
    assert str(pickle.loads(pickle.dumps(sent))) == "no masks"
    kept = _portable(FileNotFoundError(2, "gone"))
    assert isinstance(kept, FileNotFoundError)
    assert kept.errno == 2


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (59.94, "59.9 s"), (60, "1 min 0 s"), (250, "4 min 10 s"), (7500, "2 h 5 min")],
)
def test_durations_are_for_people(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_progress_is_told_on_standard_error_only(capsys: pytest.CaptureFixture[str]) -> None:
    display = Display()
    display.line("train: [starts] " + "x" * 200)
    with display.bar("train", "sentences") as move:
        move("reading", 1, 10)
        move("writing", 0, 0)
        move("writing", 5, 20)
    Display(quiet=True).line("rank 1")
    written = capsys.readouterr()
    assert written.out == ""
    assert written.err == "train: [starts] " + "x" * 200 + "\n"


def test_translations_that_changed_since_they_were_written_are_not_scored(tmp_path: Path) -> None:
    hypotheses = tmp_path / "en-de.hyp.txt"
    hypotheses.write_text("eins\nzwei\n")
    facts = {"sentences": 2, "seconds": 0.5}
    write_json(tmp_path / "en-de.decode.json", facts | {"sha256": sha256(hypotheses)})
    assert decoded.decoding(tmp_path, "en-de")["seconds"] == 0.5
    hypotheses.write_text("eins\ndrei\n")
    with pytest.raises(ValueError, match=r"en-de\.hyp\.txt has other contents than were written"):
        decoded.decoding(tmp_path, "en-de")
    write_json(tmp_path / "en-de.decode.json", facts)  # as older versions wrote it
    assert decoded.decoding(tmp_path, "en-de") == facts


@pytest.mark.parametrize(("system", "section"), [("finetuned", "specialize"), ("bilingual", "train")])
def test_models_of_single_directions_may_be_given_more_patience(system: str, section: str) -> None:
    stage = stages("dense", system)[f"specialize:{system}"]
    assert f"{section}.patience" in stage.options
    assert stage.raisable == (f"{section}.patience",)
    assert stage.summaries == "*/summary.json"


def test_a_rule_that_compares_directions_needs_several_before_anything_is_trained() -> None:
    config = config_of("dense", "forward")
    config.select.rule = "specific"
    check_rules(config, ["en-de", "de-en"])
    with pytest.raises(
        ValueError, match="select.rule of forward is specific, which compares directions, .* en-de alone"
    ):
        check_rules(config, ["en-de"])


def test_a_line_is_shown_letter_for_letter(capsys: pytest.CaptureFixture[str]) -> None:
    display = Display()
    display.line("select:top: starts [x]")
    show("tune:soon:cy [y]")
    said = capsys.readouterr()
    assert (said.err, said.out) == ("select:top: starts [x]\n", "tune:soon:cy [y]\n")


def test_the_folder_of_another_command_is_left_alone(tmp_path: Path) -> None:
    config = config_of("dense")
    config.run.folder = str(tmp_path)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "stage.json").write_text("{}")
    with (
        pytest.raises(ValueError, match="holds a run of `nspec finetune`; give another folder"),
        pipeline.Pipeline(config),
    ):
        pass
    assert not (tmp_path / "config.yaml").exists()

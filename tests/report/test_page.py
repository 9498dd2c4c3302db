from __future__ import annotations

import csv
import functools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("sacrebleu")
pytest.importorskip("matplotlib")

from fabricated_run import METHODS, SYSTEMS, TASKS, Page, edited, make_methods_run, make_run, masks, shown

from nspec import NeuronMasks
from nspec.files import write_json, write_text
from nspec.mt.scoring.config import ScoreConfig
from nspec.mt.scoring.scores import score_system
from nspec.report import build_report, score_table, words
from nspec.report.run_data import load_run
from nspec.run.config import Config
from nspec.run.yaml import parse, render


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = make_run(tmp_path_factory.mktemp("runs") / "complete")
    build_report(run)
    return run


def test_page_needs_nothing_from_elsewhere(complete: Path) -> None:
    page = Page(complete / "report" / "index.html")
    assert page.references
    outside = [r for r in page.references if not r.startswith(("#", "data:"))]
    assert sorted(outside) == ["density.tsv", "iou.tsv", "scores.tsv"]
    assert all((complete / "report" / name).is_file() for name in outside)
    assert not re.search(r"url\((?!#)|@import|<script|https?://", page.source)


def test_page_is_well_formed_and_its_links_and_ids_are_sound(complete: Path) -> None:
    page = Page(complete / "report" / "index.html")
    assert page.is_sound()


def test_page_shows_every_direction_system_score_and_signature(complete: Path) -> None:
    text = Page(complete / "report" / "index.html").words
    for system in SYSTEMS:
        scores = json.loads((complete / "scores" / system / "scores.json").read_text())
        for task, entry in scores["tasks"].items():
            assert task in text
            assert f"{entry['bleu']:.2f}" in text
            assert f"{entry['chrf_low']:.1f}–{entry['chrf_high']:.1f}" in text
            assert entry["bleu_signature"] in text
            assert entry["chrf_signature"] in text
        assert f"{scores['average']['to_en']['bleu']:.2f}" in text
    assert "tok:zh" in text
    assert "tok:13a" in text
    for name in ("Dense continued", "Specialised (forward)", "Specialised (update)", "Random masks"):
        assert name in text
    assert "4 321" in text
    assert "1 min 01 s" in text
    assert "0.812" in text
    assert "not finished" not in text


def test_words_say_which_differences_are_significant(complete: Path) -> None:
    text = Page(complete / "report" / "index.html").words
    assert "Specialised (forward) is significantly better than dense continued: +" in text
    assert "Specialised (update) shows no significant difference from dense continued: ±0.00 BLEU" in text
    assert "(p = 1.00)" in text
    assert "Random masks are significantly worse than dense continued: −" in text
    assert "another random seed" in text


def test_page_holds_settings_versions_hashes_and_figures(complete: Path) -> None:
    page = Page(complete / "report" / "index.html")
    assert "label_smoothing: 0.1" in page.words
    assert "nspec 0.1.0" in page.words
    assert "abababababab" in page.words
    labels = re.findall(r'<svg viewBox="[^"]+" role="img" aria-label="([^"]+)"', page.source)
    assert len(labels) == 8  # scores twice, rows masked, two heat maps, IoU by layer twice, loss
    assert "en→x, published" in page.words
    assert "prefers-color-scheme: dark" in page.source


def test_the_same_run_gives_the_same_bytes(complete: Path) -> None:
    before = {path.name: path.read_bytes() for path in (complete / "report").iterdir()}
    build_report(complete)
    assert {path.name: path.read_bytes() for path in (complete / "report").iterdir()} == before


def test_scores_tsv_has_a_line_per_system_and_direction_and_the_averages(complete: Path) -> None:
    with open(complete / "report" / "scores.tsv", encoding="utf-8", newline="") as file:
        rows = {(row["system"], row["direction"]): row for row in csv.DictReader(file, delimiter="\t")}
    averages = ["average:all", "average:from_en", "average:to_en"]
    assert set(rows) == {(s, d) for s in SYSTEMS for d in [*TASKS, *averages]}
    forward = json.loads((complete / "scores" / "forward" / "scores.json").read_text())["tasks"]["en-zh"]
    row = rows["forward", "en-zh"]
    assert float(row["bleu"]) == pytest.approx(forward["bleu"], rel=1e-5)
    assert float(row["chrf_p"]) == pytest.approx(forward["baseline"]["chrf_p"], rel=1e-5)
    assert float(row["bleu_p_ar"]) == pytest.approx(forward["baseline"]["bleu_p_ar"], rel=1e-5)
    assert row["bleu_signature"] == forward["bleu_signature"]
    assert "comet" not in row
    assert rows["continued", "en-zh"]["bleu_delta"] == ""


def test_scores_of_a_run_before_approximate_randomisation_are_still_read(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", systems=["dense", "continued"], with_masks=False)
    with edited(run / "scores" / "dense" / "scores.json") as scores:
        del scores["signatures"]
        for entry in [*scores["tasks"].values(), *scores["average"].values()]:
            for key in ("bleu_p_ar", "chrf_p_ar", "ar_trials"):
                del entry["baseline"][key]
    build_report(run)
    with open(run / "report" / "scores.tsv", encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file, delimiter="\t") if row["system"] == "dense"]
    assert rows
    for row in rows:
        assert row["bleu_p_ar"] == row["chrf_p_ar"] == ""
        assert float(row["bleu_p"]) > 0


def test_overlap_files_hold_every_density_and_pair(complete: Path) -> None:
    saved = masks()
    with open(complete / "report" / "density.tsv", encoding="utf-8") as file:
        density = {(r["direction"], r["layer"]): float(r["density"]) for r in csv.DictReader(file, delimiter="\t")}
    assert len(density) == len(TASKS) * 4
    assert density["fa-en", "model.decoder.layers.1.fc1"] == pytest.approx(
        saved["fa-en"]["model.decoder.layers.1.fc1"].float().mean().item()
    )
    with open(complete / "report" / "iou.tsv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert len(rows) == 4 * 6 * 5 // 2
    a, b = (saved[rows[0][key]][rows[0]["layer"]] for key in ("direction_a", "direction_b"))
    assert float(rows[0]["iou"]) == pytest.approx(((a & b).sum() / (a | b).sum()).item(), rel=1e-5)


def test_terminal_table_fits_eighty_columns_and_has_every_system(complete: Path) -> None:
    text = shown(score_table(complete), 80)
    assert "…" not in text
    for system in SYSTEMS:
        average = json.loads((complete / "scores" / system / "scores.json").read_text())["average"]
        assert re.search(rf"^\s*{system} +{average['all']['bleu']:.2f}", text, re.M)
        assert f"{average['from_en']['bleu']:.2f}" in text
    assert "▲" in text
    assert "▼" in text


def test_the_terminal_table_loads_neither_scipy_nor_torch() -> None:
    code = "import sys, nspec.report; print(sorted({'scipy', 'torch', 'matplotlib'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "[]\n"


def test_systems_that_the_configuration_no_longer_names_are_said_to_be_of_before(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", ["dense", "continued", "forward", "random"])
    build_report(run)
    assert "earlier start" not in Page(run / "report" / "index.html").words
    config = parse((run / "config.yaml").read_text(encoding="utf-8"), "config.yaml")
    config.run.systems = ["dense", "continued"]
    write_text(run / "config.yaml", render(config))
    build_report(run)
    said = "From an earlier start of this run, and no longer in run.systems or run.variants: "
    assert f"{said}Specialised (forward), Random masks." in Page(run / "report" / "index.html").words


def test_models_that_lass_needs_are_not_of_before(tmp_path: Path) -> None:
    run = make_methods_run(tmp_path / "methods")
    config = parse((run / "config.yaml").read_text(encoding="utf-8"), "config.yaml")
    config.run.systems, config.run.variants = ["continued", "lass"], []
    write_text(run / "config.yaml", render(config))
    earlier = load_run(run).earlier
    assert "adapters" in earlier
    assert not {"dense", "finetuned", "lass"} & set(earlier)


def test_a_run_that_has_only_begun_gets_a_page_that_says_what_is_missing(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", systems=["dense", "continued"], scored=["dense"], with_masks=False)
    with open(run / "systems" / "continued" / "log.jsonl", "a") as file:
        file.write('{"step": 350, "lo')  # a kill while writing
    text = Page(build_report(run)).words
    assert "This run is not finished" in text
    assert "the training of forward, update, random; the neuron masks; the scores of continued, forward" in text
    assert "No masks have been selected yet" in text
    assert "No specialised system has been compared with a baseline yet" in text
    score_table(run)


def test_a_run_folder_with_nothing_but_settings_gets_a_page(tmp_path: Path) -> None:
    write_text(tmp_path / "config.yaml", render(Config()))
    text = Page(build_report(tmp_path)).words
    assert "Still missing: the prepared text; the training of dense" in text
    assert "Nothing has been trained yet" in text
    assert "No system has been scored yet" in text
    assert (tmp_path / "report" / "scores.tsv").read_text().startswith("system\tdirection")
    score_table(tmp_path)


def test_one_direction_without_a_pivot_and_a_system_of_another_name(tmp_path: Path) -> None:
    config = Config()
    config.run.systems, config.corpus.pivot = ["dense", "adapters"], ""
    write_text(tmp_path / "config.yaml", render(config))
    lines = {"de-fr": ["eins zwei drei vier fünf"] * 3}
    for system in config.run.systems:
        scores = score_system(
            lines, lines, ScoreConfig(bootstrap=60), "", ("dense", lines) if system != "dense" else None
        )
        write_json(tmp_path / "scores" / system / "scores.json", {"system": system, **scores})
    one = torch.tensor([True, False, True])
    NeuronMasks({"de-fr": {"model.encoder.layers.0.fc1": one}}).save(tmp_path / "masks")
    text = Page(build_report(tmp_path)).words
    assert "1 direction among de, fr" in text
    assert "adapters" in text
    assert "0.667" in text
    assert "Overlap of two directions" not in text
    score_table(tmp_path)


def test_a_run_of_another_rule_says_so_and_may_have_directions_and_layers_without_neurons(tmp_path: Path) -> None:
    lines = ["wide = forward select.rate=0.05", "all = forward select.rule=share"]
    run = make_methods_run(tmp_path / "run", variants=lines, layers=1)
    config = parse((run / "config.yaml").read_text())
    config.select.rule = "lape"
    write_text(run / "config.yaml", render(config))
    full = NeuronMasks.load(run / "masks")
    kept = {task: {layer: task != "en-de" and layer != full.layers[0] for layer in full.layers} for task in full}
    NeuronMasks({t: {layer: m & kept[t][layer] for layer, m in full[t].items()} for t in full}).save(run / "masks")
    page = Page(build_report(run))
    assert "the 1 % of feed-forward neurons are kept whose firing differs most between directions" in page.words
    assert "this run (lape, rate = 0.01)" in page.words
    assert "lape, rate = 0.05" in page.words
    assert "published" not in page.words
    assert "nan" not in page.words.lower().split()


def test_text_from_the_run_cannot_break_the_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "<b>run & co", systems=["dense", "continued", "forward"])
    evil = '<script>alert("x")</script> $\\frac{1}{'
    write_text(run / "scores" / "forward" / "en-de.hyp.txt", evil + "\n")
    (run / "systems" / "we$ird_{<i>").mkdir()
    page = Page(build_report(run))
    assert "<script" not in page.source
    assert "<i>" not in page.source
    assert 'alert("x")' in page.words
    assert page.open == []


def test_what_redo_set_aside_is_not_shown(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", systems=["dense", "continued"])
    (run / "systems" / "dense").rename(run / "systems" / "dense.old-1")
    (run / "scores" / "dense").rename(run / "scores" / "dense.old-1")
    text = Page(build_report(run)).words
    assert "old-1" not in text
    assert "the training of dense, forward" in text


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("tasks", None, "should be an object with directions, found nothing"),
        ("average.all", None, "should be an object, found nothing"),
        ("average.all.bleu", float("nan"), "should be a number, found nan"),
        ("average.all.chrf", 10**400, "should be a number, found 1000"),
        ("average.all.baseline", -1, "should be an object or null, found -1"),
        ("tasks.en-de.bleu", "high", "should be a number, found 'high'"),
        ("tasks.en-de.chrf_low", None, "should be a number, found nothing"),
        ("tasks.en-de.sentences", None, "should be a number, found nothing"),
        ("tasks.en-de.bleu_signature", None, "should be a signature, found nothing"),
        ("tasks.en-de.baseline.bleu_p", None, "should be a number, found nothing"),
        ("tasks.en-de.baseline.chrf_p_ar", "low", "should be a number, found 'low'"),
        ("warnings", [1], "text should be text, found nothing"),
    ],
)
def test_broken_scores_are_one_error_that_names_file_and_place(
    tmp_path: Path, place: str, value: object, message: str
) -> None:
    run = make_run(tmp_path / "run", systems=["dense", "continued"], with_masks=False)
    with edited(run / "scores" / "dense" / "scores.json") as scores:
        *above, key = place.split(".")
        holder = functools.reduce(dict.__getitem__, above, scores)
        holder[key] = value
        if value is None:
            del holder[key]
    with pytest.raises(ValueError, match=re.escape(f"dense/scores.json: {place}") + rf"[ .]{message}"):
        build_report(run)
    assert not (run / "report").exists()


def test_spbleu_and_what_sacrebleu_warned_of_stand_on_page_and_table(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", systems=["dense", "continued", "forward"])
    for path in run.glob("scores/*/scores.json"):
        with edited(path) as scores:
            for entry in scores["tasks"].values():
                entry["bleu_signature"] = re.sub(r"tok:\w+", "tok:flores200", entry["bleu_signature"])
            scores["warnings"] = [{"text": "an <odd> test set", "directions": ["en-de", "de-en"]}]
    page = Page(build_report(run))
    assert "spBLEU signature" in page.words
    visible = page.words.replace(" ".join((run / "config.yaml").read_text().split()), "")
    assert [where for where in re.findall(r".{20}\bBLEU\b.{20}", visible) if "BLEU, chrF++ how much" not in where] == []
    assert "Warning (Dense: en-de, de-en; " in page.words
    assert "an <odd> test set" in page.words
    assert "spBLEU" in shown(score_table(run), 120)


@pytest.mark.parametrize("name", ["config.yaml", "systems/dense/summary.json", "scores/dense/scores.json"])
@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"updates": 1' + b"1" * 5000 + b"}", b'{"updates": "\xe9"}'])
def test_a_file_that_nobody_could_have_written_is_one_error_that_names_it(
    tmp_path: Path, name: str, content: bytes
) -> None:
    run = make_run(tmp_path / "run", systems=["dense", "continued"], with_masks=False)
    (run / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(run / name))):
        score_table(run)


def test_a_summary_whose_numbers_are_none_is_one_error(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", systems=["dense"], with_masks=False)
    path = run / "systems" / "dense" / "summary.json"
    summary = json.loads(path.read_text())
    for value in ("fast", [], float("nan"), 10**400, True):
        write_json(path, summary | {"tokens_per_second": value})
        with pytest.raises(ValueError, match=r"dense/summary.json: tokens_per_second should be a number, found "):
            score_table(run)


def test_files_that_are_not_json_and_folders_that_are_no_run_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is not a run folder: it has no config.yaml"):
        build_report(tmp_path)
    run = make_run(tmp_path / "run", systems=["dense"], with_masks=False)
    scores = run / "scores" / "dense" / "scores.json"
    scores.write_text(scores.read_text()[:200])
    with pytest.raises(ValueError, match=r"dense/scores.json is not valid JSON"):
        score_table(run)
    scores.write_text("[]")
    with pytest.raises(ValueError, match=r"dense/scores.json holds list, expected a JSON object"):
        score_table(run)
    scores.unlink()
    log = run / "systems" / "dense" / "log.jsonl"
    log.write_text("{broken\n" + log.read_text())
    with pytest.raises(ValueError, match=r"dense/log.jsonl line 1 is not JSON"):
        build_report(run)


def test_page_of_a_comparison_of_methods_has_every_part_and_stays_whole(tmp_path: Path) -> None:
    page = Page(build_report(make_methods_run(tmp_path / "run", layers=2)))
    assert page.is_sound()
    assert {"levels", "costs", "ablations", "masks", "relations"} <= set(page.ids)
    for name in [
        *(words.SYSTEMS[system][0] for system in METHODS),
        "forward-k70: Specialised (forward), select.k = 0.7",
    ]:
        assert name in page.words
    labels = re.findall(r'<svg viewBox="[^"]+" role="img" aria-label="([^"]+)"', page.source)
    for part in (
        "published values",
        "level of training sentences",
        "against an option",
        "variants",
        "Tree of languages",
    ):
        assert any(part in label for label in labels), part
    assert "this run (k = 0.95)" in page.words
    assert "published (k = 0.95)" in page.words
    assert "published (k = 0.7)" in page.words
    assert "Germanic" in page.words


def test_models_that_only_another_system_needs_do_not_make_a_run_unfinished(tmp_path: Path) -> None:
    run = tmp_path / "run"
    make_methods_run(run)
    before = load_run(run).missing
    write_json(run / "systems" / "needed" / "summary.json", {"system": "needed", "updates": 1})
    data = load_run(run)
    assert data.systems["needed"].scores is None
    assert data.missing == before == []


def test_the_page_begins_with_the_picture_of_scores_and_prints_whole(complete: Path) -> None:
    source = (complete / "report" / "index.html").read_text(encoding="utf-8")
    assert source.index("<h1>") < source.index("BLEU of every system") < source.index('class="headline"')
    printed = source.partition("@media print {")[2].partition("</style>")[0]
    for rule in (
        r"section \{[^}]*break-before: page",
        r"thead \{ display: table-header-group",  # the head of a table on each of its pages
        r"tr,[^{]*\{ break-inside: avoid",
        r"\.scroll, \.tall \{ overflow: visible",  # paper does not scroll
        r"details::details-content \{ content-visibility: visible",
    ):
        assert re.search(rule, printed), rule

from __future__ import annotations

import csv
import io
import json
import math
import statistics
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

pytest.importorskip("matplotlib")

from nspec import cli
from nspec.files import read_json, write_json, write_text
from nspec.report import drawing, seeds_write
from nspec.report.seeds import SeedComparison, compare_seeds
from nspec.run.config import Config
from nspec.run.yaml import render

TASKS = ["en-de", "de-en"]
SYSTEMS = ["dense", "continued", "forward", "random"]
# BLEU of each seed. forward - continued: 0.9, 1.1, 1.0; random - continued: 0, 0, 0
SCORES = {
    1: {"dense": 19.0, "continued": 20.0, "forward": 20.9, "random": 20.0},
    2: {"dense": 19.5, "continued": 21.0, "forward": 22.1, "random": 21.0},
    3: {"dense": 21.2, "continued": 20.5, "forward": 21.5, "random": 20.5},
}


def entry(value: float, test: dict[str, Any] | None) -> dict[str, Any]:
    scores = {
        f"{m}{end}": value + (30 if m == "chrf" else 0) for m in ("bleu", "chrf") for end in ("", "_low", "_high")
    }
    return scores | {"baseline": test}


def make_run(folder: Path, seed: int, systems: list[str] | None = None, **changes: Any) -> Path:
    """A finished run with ``SCORES``; ``changes`` are options such as ``train__lr=1e-3``."""
    config = Config()
    config.run.folder, config.run.seed, config.run.systems = str(folder), seed, systems or SYSTEMS
    for name, value in changes.items():
        section, _, key = name.partition("__")
        setattr(getattr(config, section), key, value)
    write_text(folder / "config.yaml", render(config))
    for system in config.run.systems:
        value = SCORES[seed].get(system, 20.0)
        delta = value - SCORES[seed]["continued"]
        # By the bootstrap all differ; by the two-sided test, which counts, only forward does, and not in seed 1.
        p_ar = 0.01 if system == "forward" and seed > 1 else 0.2
        test = {"system": "continued"} | {f"{m}_delta": delta for m in ("bleu", "chrf")}
        test |= {f"{m}_p": 0.001 for m in ("bleu", "chrf")} | {f"{m}_p_ar": p_ar for m in ("bleu", "chrf")}
        found = entry(value, None if system == "continued" else test)
        signed = {"sentences": 9, "bleu_signature": "bleu|v1", "chrf_signature": "chrf|v1"}
        groups = ("all", "from_en", "to_en")
        scores = {"tasks": {t: found | signed for t in TASKS}, "average": {group: found for group in groups}}
        write_json(folder / "scores" / system / "scores.json", scores)
        summary: dict[str, Any] = {"updates": 100 * seed, "tokens": 5000, "train_seconds": 10.0 * seed}
        summary |= {"tokens_per_second": 500.0 * seed, "density": 0.75 if system == "forward" else None, "threads": 2}
        write_json(folder / "systems" / system / "summary.json", summary)
    return folder


@pytest.fixture
def three(tmp_path: Path) -> list[Path]:
    return [make_run(tmp_path / f"s{seed}", seed) for seed in (3, 1, 2)]


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


def test_differences_are_paired_by_seed_and_tested_over_seeds(three: list[Path]) -> None:
    found = compare_seeds(three)
    assert found.seeds == (1, 2, 3)
    assert (found.baseline, found.systems, found.groups) == ("continued", tuple(SYSTEMS), ("all", "from_en", "to_en"))
    forward = found.find("forward")
    assert forward.scores == (20.9, 22.1, 21.5)
    assert forward.mean == pytest.approx(21.5)
    assert forward.sd == pytest.approx(statistics.stdev([20.9, 22.1, 21.5]))
    d = forward.difference
    assert d is not None
    assert d.values == pytest.approx((0.9, 1.1, 1.0))
    # mean 1, standard error 0.1 / sqrt(3), 2 degrees of freedom: t = 17.32, quantile 4.302653
    assert d.t == pytest.approx(math.sqrt(300))
    assert (d.low, d.high) == pytest.approx((1 - 4.302653 * 0.1 / math.sqrt(3), 1 + 4.302653 * 0.1 / math.sqrt(3)))
    assert d.p == pytest.approx(1 - math.sqrt(300 / 302))
    assert d.p_holm == pytest.approx(3 * d.p)  # the smallest of three systems
    assert found.find("continued").difference is None


def test_seeds_are_counted_by_the_two_sided_test_of_the_run(three: list[Path]) -> None:
    d = compare_seeds(three).find("forward", "chrf", "to_en").difference
    assert d is not None
    assert (d.tested, d.above, d.below) == (3, 2, 0)
    for run in three:  # as runs wrote them before there was that test: the bootstrap counts
        for system in SYSTEMS:
            path = run / "scores" / system / "scores.json"
            path.write_text(path.read_text(encoding="utf-8").replace("_p_ar", "_unknown"), encoding="utf-8")
    older = compare_seeds(three)
    assert [getattr(older.find("forward").difference, key) for key in ("tested", "above", "below")] == [3, 3, 0]
    assert [getattr(older.find("dense").difference, key) for key in ("tested", "above", "below")] == [3, 1, 2]


def test_a_system_that_equals_the_baseline_in_every_seed_has_p_1(three: list[Path]) -> None:
    d = compare_seeds(three).find("random").difference
    assert d is not None
    assert (d.mean, d.low, d.high, d.t, d.p, d.p_holm) == (0, 0, 0, 0, 1, 1)


def test_costs_are_means_over_seeds_and_unknown_where_a_run_does_not_say(three: list[Path]) -> None:
    costs = compare_seeds(three).costs
    expected = {"updates": 200, "tokens": 5000, "train_seconds": 20, "tokens_per_second": 1000, "density": 0.75}
    assert costs["forward"] == expected
    assert costs["dense"]["density"] is None
    (three[0] / "systems" / "forward" / "summary.json").unlink()
    assert set(compare_seeds(three).costs["forward"].values()) == {None}


def test_a_system_that_one_run_lacks_is_left_out_with_a_note(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a", 1), make_run(tmp_path / "b", 2, [*SYSTEMS[:3], "update"])]
    found = compare_seeds(runs)
    assert found.systems == ("dense", "continued", "forward")
    assert [note.split(" ")[0] for note in found.notes] == ["random", "update"]
    assert str(runs[1]) in found.notes[0]
    assert str(runs[0]) in found.notes[1]
    assert found.notes[0] in seeds_write.markdown(found)


def test_times_of_unlike_machines_are_noted(three: list[Path]) -> None:
    edit(three[1] / "systems" / "dense" / "summary.json", '"threads": 2', '"threads": 8')
    assert compare_seeds(three).notes == ("Times are not of like runs: threads is 8, 2.",)


def test_runs_that_do_not_belong_together_are_refused(tmp_path: Path, three: list[Path]) -> None:
    with pytest.raises(ValueError, match="found 1 run, expected 2 or more"):
        compare_seeds(three[:1])
    with pytest.raises(ValueError, match="both have run.seed 1"):
        compare_seeds([*three, make_run(tmp_path / "again", 1)])
    other = make_run(tmp_path / "lr", 1, train__lr=0.25, decode__beam=3)
    with pytest.raises(ValueError, match=r"differ in train.lr \(0.25, .*\), decode.beam \(3, 5\)$"):
        compare_seeds([other, three[0]])
    with pytest.raises(ValueError, match=r"not every run has scores of continued.*ended"):
        compare_seeds([three[0], make_run(tmp_path / "ended", 1, ["dense", "forward"])])
    empty = make_run(tmp_path / "empty", 1)
    for system in SYSTEMS:
        (empty / "scores" / system / "scores.json").unlink()
    with pytest.raises(ValueError, match="empty has no scores yet"):
        compare_seeds([empty, three[0]])


def test_scores_that_cannot_be_compared_are_refused(three: list[Path]) -> None:
    path = three[0] / "scores" / "forward" / "scores.json"
    whole = path.read_text(encoding="utf-8")
    edit(path, "chrf|v1", "chrf|v2")
    with pytest.raises(ValueError, match=r"s3, forward, en-de: chrf_signature is chrf\|v2, in .*s1 chrf\|v1"):
        compare_seeds(three)
    path.write_text(whole, encoding="utf-8")
    edit(path, '"de-en"', '"fr-en"')
    with pytest.raises(ValueError, match=r"s3, forward: other directions .*\(de-en, fr-en\)"):
        compare_seeds(three)


def test_a_variant_of_another_meaning_is_refused(tmp_path: Path) -> None:
    runs = []
    for seed, k in ((1, 0.7), (2, 0.8)):
        run = make_run(tmp_path / f"v{seed}", seed, run__variants=[f"own = forward select.k={k}"])
        scores = read_json(run / "scores" / "forward" / "scores.json")
        write_json(run / "scores" / "own" / "scores.json", scores)
        runs.append(run)
    with pytest.raises(ValueError, match=r"own is not the same variant in .*v1 and .*v2"):
        compare_seeds(runs)


LEVELS = {"level:high": ["en-de"], "level:low": ["de-en"]}
# BLEU above the baseline of each seed, by level
ABOVE = {
    "forward": {"level:high": [0.0, 0.1, -0.1], "level:low": [0.9, 1.1, 1.0]},
    "random": {"level:high": [-0.1, 0.1, 0.3], "level:low": [-1.0, -1.2, -1.4]},
}


def add_levels(runs: list[Path]) -> None:
    """Gives the scores of runs with seeds 1, 2 and 3 two levels, with halves; dense is at the baseline in both."""
    for run in runs:
        seed = int(run.name[1:])
        for system in SYSTEMS:
            path = run / "scores" / system / "scores.json"
            scores = read_json(path)
            for group in LEVELS:
                value = 20.0 + (ABOVE[system][group][seed - 1] if system in ABOVE else 0.0)
                scores["average"] |= {group: entry(value, None), f"{group}/to_en": entry(value, None)}
            write_json(path, scores | {"groups": LEVELS})


def test_levels_are_adjusted_over_all_systems_and_levels_of_a_side(three: list[Path]) -> None:
    add_levels(three)
    found = compare_seeds(three)
    assert found.groups[3:] == ("level:high", "level:high/to_en", "level:low", "level:low/to_en")

    def difference(system: str, group: str) -> Any:
        return found.find(system, "bleu", group).difference

    # mean 1, standard error 0.1 / sqrt(3): as of the average of all, but the smallest of six tests instead of three
    low = difference("forward", "level:low")
    assert low.values == pytest.approx((0.9, 1.1, 1.0))
    assert low.p == pytest.approx(1 - math.sqrt(300 / 302))
    assert low.p_holm == pytest.approx(6 * low.p)
    assert difference("random", "level:low").p_holm == pytest.approx(5 * difference("random", "level:low").p)
    assert difference("forward", "level:low/to_en").p_holm == low.p_holm
    assert difference("forward", "all").p_holm == pytest.approx(3 * difference("forward", "all").p)


def test_levels_have_one_table_a_metric_and_no_figures(three: list[Path], tmp_path: Path) -> None:
    add_levels(three)
    found = compare_seeds(three)
    text = seeds_write.markdown(found).partition("## By level of training data")[2].partition("## Costs")[0]
    tables = [block.split("\n") for block in text.split("\n\n") if block.startswith("|")]
    assert [table[0] for table in tables] == [f"| {m} | high-resource | low-resource |" for m in ("BLEU", "chrF++")]
    for table in tables:
        assert [row.split(" |")[0] for row in table[2:]] == ["| Dense", "| Specialised (forward)", "| Random masks"]
        (row,) = [row for row in table if row.startswith("| Specialised")]
        cells = row.split(" | ")
        assert cells[1].startswith("±0.00 [−0.25, +0.25] p = 1.00 (1.00)")
        assert cells[2].startswith("+1.00 [+0.75, +1.25]▲ p = 0.003 (0.020)")
    assert "level" not in seeds_write.markdown(found).partition("## By level")[0]
    seeds_write.write(found, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*level*"))
    assert "level:low/to_en" in (tmp_path / "out" / "seeds.tsv").read_text(encoding="utf-8")


def test_levels_that_are_not_the_same_in_every_run_are_left_out_with_a_note(three: list[Path]) -> None:
    add_levels(three[:2])
    found = compare_seeds(three)
    assert found.groups == ("all", "from_en", "to_en")
    assert found.notes[0].startswith("high-resource, low-resource left out")
    add_levels(three)
    for system in SYSTEMS:
        path = three[0] / "scores" / system / "scores.json"
        write_json(path, read_json(path) | {"groups": LEVELS | {"level:low": ["de-en", "en-de"]}})
    found = compare_seeds(three)
    assert found.groups[3:] == ("level:high", "level:high/to_en")
    assert found.notes[0].startswith("low-resource left out")


@pytest.fixture
def written(three: list[Path], tmp_path: Path) -> tuple[SeedComparison, Path]:
    found = compare_seeds(three)
    seeds_write.write(found, tmp_path / "out")
    return found, tmp_path / "out"


def test_files_hold_what_was_found(written: tuple[SeedComparison, Path]) -> None:
    out = written[1]
    names = ["costs.tsv", "seeds.md", "seeds.tsv", "seeds_all.svg", "seeds_from_en.svg", "seeds_to_en.svg"]
    assert sorted(path.name for path in out.iterdir()) == names
    rows = list(csv.DictReader(io.StringIO((out / "seeds.tsv").read_text(encoding="utf-8")), delimiter="\t"))
    assert len(rows) == len(SYSTEMS) * 2 * 3
    (row,) = [r for r in rows if (r["system"], r["metric"], r["average"]) == ("forward", "bleu", "all")]
    assert [row[f"delta:{seed}"] for seed in (1, 2, 3)] == ["0.9", "1.1", "1"]
    assert (row["delta"], row["above"], row["below"], row["baseline"]) == ("1", "2", "0", "continued")
    (base,) = [r for r in rows if (r["system"], r["metric"], r["average"]) == ("continued", "bleu", "all")]
    assert base["delta"] == base["p"] == base["delta:1"] == ""
    costs = list(csv.DictReader(io.StringIO((out / "costs.tsv").read_text(encoding="utf-8")), delimiter="\t"))
    assert (costs[2]["system"], costs[2]["updates"], costs[2]["density"]) == ("forward", "200", "0.75")


def test_markdown_tables_are_whole_and_say_the_difference(written: tuple[SeedComparison, Path]) -> None:
    text = (written[1] / "seeds.md").read_text(encoding="utf-8")
    tables = [block.split("\n") for block in text.split("\n\n") if block.startswith("|")]
    assert [len(table) for table in tables] == [2 + len(SYSTEMS)] * 4
    assert all(len({line.count("|") for line in table}) == 1 for table in tables)
    (line,) = [line for line in tables[0] if line.startswith("| Specialised (forward) |")]
    assert "21.50 ± 0.60" in line
    assert "+1.00 [+0.75, +1.25]" in line
    assert "| ▲2 ▼0 of 3 |" in line
    assert "`bleu|v1`" in text


def test_the_figure_shows_every_system_but_the_baseline_the_same_each_time(
    written: tuple[SeedComparison, Path],
) -> None:
    found, out = written
    svg = (out / "seeds_from_en.svg").read_text(encoding="utf-8")
    labels = ["".join(node.itertext()) for node in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
    for name in ("Dense", "Specialised (forward)", "Random masks", "BLEU above Dense continued"):
        assert name in labels
    assert "Dense continued" not in labels
    assert svg == drawing.svg_file(seeds_write.differences, "seeds", found, "from_en")


def test_the_command_prints_the_comparison_and_writes_it_where_asked(
    three: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["seeds", *map(str, three), "--out", str(tmp_path / "new")]) == 0
    printed = capsys.readouterr().out
    assert (
        printed
        == seeds_write.markdown(compare_seeds(three))
        == (tmp_path / "new" / "seeds.md").read_text(encoding="utf-8")
    )
    assert cli.main(["seeds", str(three[0])]) == 2
    assert "found 1 run, expected 2 or more" in capsys.readouterr().err


def with_losses(folder: Path, seed: int, systems: list[str]) -> Path:
    """A run with validation losses; forward is 0.10, 0.12 and 0.11 nats below continued from en, and 0.02 above to en."""
    run = make_run(folder, seed, systems)
    write_json(run / "prepared" / "meta.json", {"counts": {"train": {"en-de": 900, "de-en": 100}}})
    for system in systems:
        folder = run / "systems" / system
        parts = {f"{task}/": [task] for task in TASKS} if system == "finetuned" else {"": TASKS}
        for part, tasks in parts.items():
            losses = {"en-de": 3.0 + seed / 10, "de-en": 2.0 + seed / 10}
            if system == "forward":
                losses = {"en-de": losses["en-de"] - (0.10, 0.12, 0.11)[seed - 1], "de-en": losses["de-en"] + 0.02}
            row = {"step": 20, "valid_loss": 2.5, "loss_of": "text"}
            best = row | {"tasks": {t: {"loss": losses[t], "bleu": None} for t in tasks}}
            later = row | {"step": 40, "valid_loss": 2.6, "tasks": {t: {"loss": 9.0, "bleu": None} for t in tasks}}
            write_text(folder / part / "log.jsonl", "".join(json.dumps(row) + "\n" for row in (best, later)))
            write_json(folder / part / "summary.json", {"updates": 40, "best_step": 20})
    return run


def test_validation_losses_are_those_of_the_best_checkpoint_paired_by_seed(tmp_path: Path) -> None:
    systems = [*SYSTEMS, "finetuned"]
    found = compare_seeds([with_losses(tmp_path / f"l{seed}", seed, systems) for seed in (1, 2, 3)])
    losses = {(r.system, r.group): r for r in found.losses}
    assert {group for _, group in losses} == {"all", "from_en", "to_en", "level:high", "level:low"}
    assert {system for system, _ in losses} == set(systems)
    assert losses["continued", "all"].scores == pytest.approx((2.6, 2.7, 2.8))
    d = losses["forward", "from_en"].difference
    assert d is not None
    assert d.values == pytest.approx((-0.10, -0.12, -0.11))
    assert d.p == pytest.approx(stats.ttest_1samp([-0.10, -0.12, -0.11], 0).pvalue)
    assert d.p_holm == pytest.approx(4 * d.p)
    low = losses["forward", "level:low"].difference
    assert low is not None
    assert low.mean == pytest.approx(0.02)
    other = losses["finetuned", "all"].difference
    assert other is not None
    assert other.mean == pytest.approx(0)
    text = seeds_write.markdown(found)
    assert "| Dense continued | 2.700 ± 0.100 | 3.200 ± 0.100 |" in text
    assert "−0.110 [−0.135, −0.085] p = 0.003 (0.011)" in text


def test_a_system_without_losses_in_some_run_is_not_in_their_table(tmp_path: Path) -> None:
    runs = [with_losses(tmp_path / f"l{seed}", seed, SYSTEMS) for seed in (1, 2)]
    (runs[1] / "systems" / "forward" / "log.jsonl").unlink()
    found = compare_seeds(runs)
    assert {r.system for r in found.losses} == set(SYSTEMS) - {"forward"}
    assert "Validation losses of forward are left out: a run does not say them." in found.notes
    (runs[1] / "systems" / "continued" / "log.jsonl").unlink()
    assert compare_seeds(runs).losses == ()


def test_other_test_sentences_are_said(three: list[Path]) -> None:
    for run in three:
        write_text(run / "prepared" / "text" / "test" / "de-en.de.txt", "eins\nzwei\n")
    assert compare_seeds(three).notes == ()
    write_text(three[1] / "prepared" / "text" / "test" / "de-en.de.txt", "eins\ndrei\n")
    (note,) = compare_seeds(three).notes
    assert note.startswith("Runs have other test sentences each")


def test_what_was_declared_stands_first(three: list[Path], tmp_path: Path) -> None:
    declared = {"run__hypothesis": "Neurons help.", "run__primary": "forward chrf from_en"}
    runs = [make_run(tmp_path / f"d{seed}", seed, **declared) for seed in (1, 2, 3)]
    lines = seeds_write.markdown(compare_seeds(runs)).split("\n")
    assert lines[2] == "**Hypothesis.** Neurons help."
    assert lines[4].startswith(
        "**Declared comparison.** Specialised (forward) against dense continued, chrF++, en→x: "
        "+1.00 [+0.75, +1.25] (points), "
    )
    assert "not corrected" in lines[4]
    late = {"hypothesis": "Neurons help.", "primary": "", "date": "2026-11-29", "scored": ["dense"]}
    write_json(runs[1] / "protocol.json", [late])
    (note,) = [note for note in compare_seeds(runs).notes if "declared" in note]
    assert note == f"What is declared was declared in {runs[1]} when there were scores of dense already."
    runs = [make_run(tmp_path / f"l{seed}", seed, run__primary="forward loss all") for seed in (1, 2)]
    assert "validation loss, all directions: not every run says it." in seeds_write.markdown(compare_seeds(runs))
    assert "Declared" not in seeds_write.markdown(compare_seeds(three))

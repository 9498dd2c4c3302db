from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

pytest.importorskip("sacrebleu")

from scored_files import SAMPLES, TASKS, WORDS, score, texts, write

from nspec import cli
from nspec.mt.scoring.config import ScoreConfig
from nspec.mt.scoring.scores import score_system
from nspec.report import tables


def test_files_get_the_scores_that_a_run_gives(place: Path) -> None:
    references, theirs, ours = texts()
    scored = score(place, baseline="theirs", pivot="en")
    assert list(scored) == ["theirs", "ours"]
    config = ScoreConfig(bootstrap=SAMPLES)
    assert scored["theirs"] == score_system(theirs, references, config, "en")
    assert scored["ours"] == score_system(ours, references, config, "en", ("theirs", theirs))
    assert scored["ours"]["average"]["all"]["baseline"]["bleu_delta"] > 10


@pytest.mark.parametrize(
    "names",
    [
        {"en-de": "en-de.ref.txt", "de-en": "de-en.txt"},
        {"en-de": "en-de.de", "de-en": "de-en.en"},
        {"en-de": "en-de.de", "de-en": "en-de.en"},  # Moses: two files for both directions
        {"en-de": "de-en.de.txt", "de-en": "de-en.en.txt"},  # prepared/text/test of a run
    ],
)
def test_references_may_be_called_in_each_way(place: Path, names: dict[str, str]) -> None:
    expected = score(place)
    for task, name in names.items():
        (place / "refs" / f"{task}.ref.txt").rename(place / "refs" / name)
    assert score(place) == expected


def test_line_ends_marks_and_compression_change_nothing(place: Path) -> None:
    expected = score(place)
    path = place / "ours" / "en-de.hyp.txt"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n").removesuffix(b"\r\n"))
    other = place / "ours" / "de-en.hyp.txt"
    (place / "ours" / "de-en.hyp.txt.gz").write_bytes(gzip.compress(other.read_bytes()))
    other.unlink()
    assert score(place) == expected


def test_a_reference_pair_may_have_a_side_that_is_not_scored(place: Path) -> None:
    for path in ("refs/de-en.ref.txt", "theirs/de-en.en", "ours/de-en.hyp.txt"):
        (place / path).unlink()
    (place / "refs/en-de.ref.txt").rename(place / "refs/en-de.de")
    write(place / "refs", {"en-de.en": ["a source"] * 20})
    assert list(score(place)["ours"]["tasks"]) == ["en-de"]


def test_a_direction_with_files_of_its_own_does_not_take_those_of_the_opposite_one(place: Path) -> None:
    """Two test sets, each with source and target: the source of de-en is no reference of en-de."""
    expected = score(place)
    for task, other in (("en-de", "de-en"), ("de-en", "en-de")):
        (place / "refs" / f"{task}.ref.txt").rename(place / "refs" / f"{task}.{task[3:]}")
        write(place / "refs", {f"{other}.{task[3:]}": ["another text"] * 20})
    assert score(place) == expected


Change = Callable[[Path], object]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda p: (p / "refs/en-de.ref.txt").unlink(),
            "there are no references of direction en-de: expected en-de.ref.txt, en-de.txt or en-de.de in {p}/refs",
        ),
        (
            lambda p: write(p / "refs", {"en-fr.ref.txt": ["x"]}),
            "--references: {p}/refs/en-fr.ref.txt is of a direction that the systems have not; they have de-en, en-de",
        ),
        (
            lambda p: write(p / "refs", {"en-de.de": ["x"]}),
            "{p}/refs has en-de.ref.txt and en-de.de, which could all be the references of en-de; leave one",
        ),
        (
            lambda p: write(p / "ours", {"en-de.txt": ["x"]}),
            "{p}/ours has en-de.hyp.txt and en-de.txt, which could all be the translations of en-de; leave one",
        ),
        (
            lambda p: (p / "ours/en-de.hyp.txt").unlink(),
            "system theirs has {p}/theirs/en-de.de, but system ours no translations of en-de: expected en-de.hyp.txt,",
        ),
        (
            lambda p: write(p / "ours", {"en-fr.hyp.txt": ["x"]}),
            "system ours has {p}/ours/en-fr.hyp.txt, but system theirs no translations of en-fr: expected en-fr.hyp",
        ),
        (
            lambda p: [path.unlink() for path in (p / "ours").glob("*.txt")],
            "system ours: {p}/ours has no translations: expected en-de.hyp.txt, en-de.txt or en-de.de for direction "
            "en-de, and so on; it has en-de.decode.json, scores.json",
        ),
        (
            lambda p: write(p / "ours", {"en-de.hyp.txt": ["x"] * 19}),
            "{p}/ours/en-de.hyp.txt has 19 lines and {p}/refs/en-de.ref.txt has 20; expected a line for each reference",
        ),
        (lambda p: (p / "ours/en-de.hyp.txt").write_bytes(b""), "{p}/ours/en-de.hyp.txt is empty; expected a sentence"),
        (lambda p: (p / "refs/en-de.ref.txt").write_bytes(b""), "{p}/refs/en-de.ref.txt is empty; expected a sentence"),
        (lambda p: write(p / "refs", {"en-de.ref.txt": [" "] * 20}), "{p}/refs/en-de.ref.txt has blank lines only"),
        (
            lambda p: (p / "ours/en-de.hyp.txt").write_bytes("ein Café\n".encode("latin-1") * 20),
            "{p}/ours/en-de.hyp.txt, line 1: not valid UTF-8 (byte 0xe9 at position 8)",
        ),
        (
            lambda p: (p / "ours/en-de.hyp.txt").write_bytes("ein Haus\n".encode("utf-16-le") * 20),
            "{p}/ours/en-de.hyp.txt has zero bytes, which text has not (UTF-16?)",
        ),
    ],
)
def test_files_that_do_not_fit_are_one_error_that_names_them(place: Path, change: Change, message: str) -> None:
    change(place)
    with pytest.raises(ValueError) as caught:
        score(place, baseline="theirs")
    assert str(caught.value).startswith(message.format(p=place))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--system", "ours"], "--system ours: expected NAME=FOLDER"),
        (["--system", "=ours"], "--system =ours: expected NAME=FOLDER"),
        (["--system", "../a={p}/ours"], "--system ../a={p}/ours: expected NAME=FOLDER"),
        (["--system", "a={p}/ours", "--system", "a={p}/theirs"], "--system a is there twice"),
        (["--system", "a={p}/nowhere"], "--system {p}/nowhere: there is no such folder"),
        (["--system", "a={p}/ours", "--baseline", "b"], "--baseline b: there are the systems a"),
        (["--system", "a={p}/ours", "--pivot", "fr"], "--pivot fr is in none of the directions de-en, en-de"),
        (["--system", "a={p}/ours", "--bootstrap", "39"], "--bootstrap: expected at least 40, found 39"),
        (["--system", "a={p}/ours", "--bootstrap", "1000000000000"], "--bootstrap: expected at most 100000"),
        (["--system", "a={p}/ours", "--tokenize", "13b"], "BLEU tokenizer 13b: sacreBLEU "),
        (["--system", "a={p}/ours", "--tokenize", ""], "BLEU tokenizer : sacreBLEU "),
        (
            ["--system", "a={p}/ours", "--groups", "{p}/deep.yaml"],
            "{p}/deep.yaml line 1, column 25 is not valid YAML: nested",
        ),
        (["--system", "a={p}/ours", "--groups", "{p}/number.yaml"], "low: found a whole number of 5000 digits"),
        (
            ["--system", "a={p}/ours", "--groups", "{p}/laughs.yaml"],
            "{p}/laughs.yaml line 5, column 8 is not valid YAML: aliases",
        ),
        (["--system", "scores.tsv={p}/ours", "--out", "{p}/o"], "--system scores.tsv: with --out its scores would lie"),
        (["--system", "Scores.TSV={p}/ours", "--out", "{p}/o"], "--system Scores.TSV: with --out its scores would lie"),
        (
            ["--system", "a={p}/ours", "--system", "A={p}/theirs", "--out", "{p}/o"],
            "--system A: with --out its scores would lie where system a is",
        ),
        (
            ["--system", "{long}={p}/ours", "--out", "{p}/o"],
            "--system aaaaaaaaaaaaaaaaaaaa...: expected a name of 200 bytes",
        ),
        (["--system", ".={p}/ours", "--out", "{p}/o"], "--system .={p}/ours: expected NAME=FOLDER"),
        (["--system", "..={p}/ours", "--out", "{p}/o"], "--system ..={p}/ours: expected NAME=FOLDER"),
        (["--system", "a/b={p}/ours", "--out", "{p}/o"], "--system a/b={p}/ours: expected NAME=FOLDER"),
        (["--system", "a={p}/ours", "--out", "{p}/g.yaml"], "--out {p}/g.yaml is not a folder"),
        (
            ["--system", "a={p}/ours", "--out", "{p}/g.yaml/o"],
            "--out {p}/g.yaml/o: there is no folder {p}/g.yaml",
        ),
        (["--system", "g.yaml={p}/ours", "--out", "{p}"], "--out {p}: {p}/g.yaml is there and is no folder"),
        (["--system", "a={p}/ours", "--out", "{p}/table"], "--out {p}/table: {p}/table/scores.tsv is a folder"),
        (["--system", "a={p}/ours", "--references", "{p}/x"], "--references {p}/x: there is no such folder"),
        (["--system", "ours={p}/ours", "--out", "{p}"], "--out {p}: scores of ours would lie among the translations"),
        (["--system", "a={p}/ours", "--comet", "x"], "--comet needs --sources FOLDER"),
        (["--system", "a={p}/ours", "--sources", "x"], "--sources needs --comet PATH"),
        (["--system", "a={p}/ours", "--groups", "{p}/g.yaml"], "low: expected a list of texts such as [is, mt]"),
        (["--system", "a={p}/ours", "--groups", "{p}/empty.yaml"], "{p}/empty.yaml is empty; expected lines such as"),
        (["--system", "a={p}/ours", "--groups", "{p}/twice.yaml"], "low is given twice in {p}/twice.yaml"),
        (["--system", "a={p}/ours", "--groups", "{p}/other.yaml"], "group low: no is not a language or direction"),
        ([], "Missing option '--system'."),
    ],
)
def test_wrong_options_are_one_line(
    place: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    groups = {"g": "low: de\n", "empty": "", "twice": "low: [de]\nlow: [en]\n", "other": "low: [no]\n"}
    groups |= {"deep": f"low: {'[' * 5000}{']' * 5000}", "number": f"low: [{'1' * 5000}]"}
    doubled = (f"{after}: &{after} [{', '.join([f'*{name}'] * 9)}]\n" for name, after in zip("abcdef", "bcdefg"))
    groups["laughs"] = f"a: &a [{', '.join('x' * 9)}]\n{''.join(doubled)}"
    for name, text in groups.items():
        (place / f"{name}.yaml").write_text(text)
    (place / "table" / "scores.tsv").mkdir(parents=True)
    given = [argument.format(p=place, long="a" * 201) for argument in arguments]
    assert cli.main(["score", "--references", str(place / "refs"), *given]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.splitlines()[-1].startswith(f"nspec: error: {message.format(p=place)}")
    assert len(shown.err) < 2000
    assert not (place / "o").exists(), "an error comes before anything is written"


def test_a_code_with_a_hyphen_is_the_one_with_an_underscore(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, end in (("refs", "ref"), ("ours", "hyp")):
        write(tmp_path / name, {f"{task}.{end}.txt": WORDS for task in ("zh_Hans-de", "de-zh_Hans", "de-en")})
    (tmp_path / "g.yaml").write_text("han: [zh-Hans-de]\n")
    given = ["--references", tmp_path / "refs", "--system", f"a={tmp_path / 'ours'}", "--groups", tmp_path / "g.yaml"]
    given += ["--pivot", "zh-Hans", "--bootstrap", SAMPLES, "--out", tmp_path / "out"]
    assert cli.main(["score", *map(str, given)]) == 0
    averages = json.loads((tmp_path / "out" / "a" / "scores.json").read_text())["average"]
    assert list(averages) == ["all", "from_zh_Hans", "to_zh_Hans", "han"]
    capsys.readouterr()


def test_a_group_that_would_break_the_table_is_one_line(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "tab.yaml").write_text('"a\\tb": [de]\n')
    given = ["--references", place / "refs", "--system", f"a={place / 'ours'}", "--groups", place / "tab.yaml"]
    assert cli.main(["score", *map(str, given)]) == 2
    assert "group 'a\\tb': expected a name of printable characters" in capsys.readouterr().err


def test_the_verb_shows_tables_and_writes_files(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "groups.yaml").write_text("low: [de]\ninto: [en-de]\n")
    arguments = ["--references", place / "refs", "--system", f"theirs={place / 'theirs'}"]
    arguments += ["--system", f"ours={place / 'ours'}", "--baseline", "theirs", "--pivot", "en", "--bootstrap", SAMPLES]
    arguments += ["--groups", place / "groups.yaml", "--out", place / "out"]
    assert cli.main(["score", *map(str, arguments)]) == 0
    shown = capsys.readouterr().out
    scores = {name: json.loads((place / "out" / name / "scores.json").read_text()) for name in ("theirs", "ours")}
    groups = ["all", "from_en", "to_en", "low", "low/from_en", "low/to_en", "into"]
    assert list(scores["ours"]["average"]) == groups
    for metric, name in (("bleu", "BLEU"), ("chrf", "chrF++")):
        part = shown[shown.index(f"{name}, with 95 % bootstrap intervals") :]
        for row, entry in {
            "all directions": scores["ours"]["average"]["all"],
            "en→x": scores["ours"]["average"]["from_en"],
            "low, x→en": scores["ours"]["average"]["low/to_en"],
            "en-de": scores["ours"]["tasks"]["en-de"],
        }.items():
            line, below = part[part.index(f"\n {row} ") + 1 :].splitlines()[:2]
            test = entry["baseline"]
            assert f"{entry[metric]:.2f}" in line
            assert f"{test[f'{metric}_delta']:+.2f}▲" in line
            assert f"{entry[f'{metric}_low']:.1f}–{entry[f'{metric}_high']:.1f}" in below
            p_values = [test[f"{metric}_p"], test[f"{metric}_p_ar"]]
            assert " / ".join("<0.001" if p < 0.001 else f"{p:.3f}" for p in p_values) in below
        assert f"{name} signature: {scores['ours']['tasks']['en-de'][f'{metric}_signature']}\n" in shown
    assert "Δ: difference from theirs" in shown
    assert "COMET" not in shown
    with open(place / "out" / "scores.tsv", encoding="utf-8", newline="") as file:
        rows = {(row["system"], row["direction"]): row for row in csv.DictReader(file, delimiter="\t")}
    directions = [*TASKS, *(f"average:{group}" for group in groups)]
    assert set(rows) == {(system, row) for system in scores for row in directions}
    p_ar = scores["ours"]["average"]["low"]["baseline"]["bleu_p_ar"]
    assert float(rows["ours", "average:low"]["bleu_p_ar"]) == pytest.approx(p_ar, rel=1e-5)


def test_a_system_alone_is_not_tested(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--references", place / "refs", "--system", f"ours={place / 'ours'}", "--bootstrap", SAMPLES]
    assert cli.main(["score", *map(str, arguments)]) == 0
    shown = capsys.readouterr().out
    assert "Δ" not in shown
    assert "en→x" not in shown
    assert "all directions" in shown


def test_arrows_go_by_approximate_randomisation(place: Path) -> None:
    scored = score(place, baseline="theirs")
    for task, p, p_ar in (("en-de", 0.9, 0.01), ("de-en", 0.01, 0.9)):
        scored["ours"]["tasks"][task]["baseline"].update(bleu_p=p, bleu_p_ar=p_ar)
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(tables.comparison_tables(scored, "")[0])
    lines = {line.split()[0]: line for line in console.export_text().splitlines() if line.strip()}
    assert "▲" in lines["en-de"]
    assert "▲" not in lines["de-en"]


# What sacreBLEU warns of


def test_warnings_show_once_each_with_system_and_direction(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("refs/{}.ref.txt", "theirs/{0}.{1}", "ours/{}.hyp.txt"):
        for task in TASKS:
            path = place / name.format(task, task[3:])
            end = "\n" if "ours" in name or task == "de-en" else " .\n"
            path.write_text("".join(f"{line}{end}" for line in path.read_text().splitlines() * 6))
    arguments = ["--references", place / "refs", "--bootstrap", SAMPLES, "--out", place / "out", "--baseline", "theirs"]
    arguments += ["--system", f"theirs={place / 'theirs'}", "--system", f"ours={place / 'ours'}"]
    assert cli.main(["score", *map(str, arguments)]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "tokenized period" in line]
    assert lines == ["nspec: warning, theirs (en-de): sacreBLEU: That's 100 lines that end in a tokenized period ('.')"]
    kept = {
        name: json.loads((place / "out" / name / "scores.json").read_text())["warnings"] for name in ("theirs", "ours")
    }
    assert kept["ours"] == []
    assert kept["theirs"][0]["directions"] == ["en-de"]


def test_bleu_by_sentencepiece_is_called_spbleu(place: Path) -> None:
    scored = score(place, baseline="theirs", tokenize="char")
    console = Console(width=160, record=True, file=io.StringIO())
    for text in ("tok:char", "tok:flores200"):
        for scores in scored.values():
            for entry in scores["tasks"].values():
                entry["bleu_signature"] = entry["bleu_signature"].replace("tok:char", text)
        for part in tables.comparison_tables(scored, ""):
            console.print(part)
        shown = console.export_text()
        assert ("spBLEU, with 95 %" in shown) == ("spBLEU signature: " in shown) == ("flores" in text)

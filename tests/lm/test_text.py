"""Text of one language at a time."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from tiny import lines_of, write

from nspec.lm.config import LinesConfig
from nspec.lm.text import Lines, read_lines_of


def read(**options: object) -> dict[str, Lines]:
    return dict(read_lines_of(LinesConfig(**options), 1))  # type: ignore[arg-type]


def of_files(folder: Path, **options: object) -> dict[str, Lines]:
    return read(type="files", languages=["aa", "bb"], path=str(folder), held_out=0.2, **options)


def test_no_line_is_on_both_sides_and_none_is_lost(tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / "aa.txt"
    path.write_text(path.read_text() + "\n  \n" + path.read_text())  # every line twice, and empty ones
    found = of_files(tmp_path)["aa"]
    assert not set(found.train) & set(found.test)
    assert sorted(found.train + found.test) == sorted(2 * lines_of("aa"))
    assert 0.05 < len(found.test) / 120 < 0.4


def test_a_test_file_is_the_held_out_text_and_its_lines_are_not_trained_on(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "aa.test.txt").write_text(f"{lines_of('aa')[3]}\nfresh words\n")
    found = of_files(tmp_path)["aa"]
    assert found.test == [lines_of("aa")[3], "fresh words"]
    assert found.train == [line for line in lines_of("aa") if line != lines_of("aa")[3]]


def test_files_may_be_compressed_and_limits_hold(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "aa.txt.gz").write_bytes(gzip.compress((tmp_path / "aa.txt").read_bytes()))
    plain = of_files(tmp_path)["aa"]
    (tmp_path / "aa.txt").unlink()
    assert of_files(tmp_path)["aa"] == plain
    few = of_files(tmp_path, train_lines=3, test_lines=2)["aa"]
    assert few == Lines(plain.train[:3], plain.test[:2])


def test_composed_text_of_a_language_is_not_in_both_splits() -> None:
    pytest.importorskip("babel", reason="composed text needs Babel")
    found = read(languages=["de", "es"], train_lines=30, test_lines=5)
    assert [(len(lines.train), len(lines.test)) for lines in found.values()] == [(30, 5), (30, 5)]
    assert not set(found["de"].train) & set(found["de"].test)
    assert found["de"].train != found["es"].train


def test_what_is_wrong_with_files_is_one_line_that_names_them(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no folder; expected one with CODE.txt"):
        of_files(tmp_path / "none")
    write(tmp_path)
    (tmp_path / "bb.txt").rename(tmp_path / "cc.txt")
    with pytest.raises(ValueError, match=r"has no bb\.txt .* found aa\.txt, cc\.txt; .* take bb out of"):
        of_files(tmp_path)
    (tmp_path / "bb.txt").write_text("\n \n")
    with pytest.raises(ValueError, match=r"no training text of bb in .*bb\.txt"):
        of_files(tmp_path)
    (tmp_path / "bb.txt").write_text("one line alone\n")
    with pytest.raises(ValueError, match=r"no (training|held-out) text of bb"):
        of_files(tmp_path)
    (tmp_path / "bb.test.txt").write_text("one line alone\n")
    with pytest.raises(ValueError, match=r"all 1 training lines of bb in .*bb\.txt are in its held-out text too"):
        of_files(tmp_path)
    (tmp_path / "bb.test.txt").unlink()
    (tmp_path / "bb.txt").write_bytes("über\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"bb\.txt, line 1: not valid UTF-8"):
        of_files(tmp_path)


def test_a_dataset_has_a_configuration_for_each_language(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets", reason="the hub needs datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    lines = ["---", "configs:"]
    for code in ("aa", "bb"):
        rows = "".join(f"{json.dumps({'text': line})}\n" for line in lines_of(code))
        (tmp_path / f"{code}.jsonl").write_text(rows)
        lines += [f"- config_name: {code}", f"  data_files: {code}.jsonl"]
    (tmp_path / "README.md").write_text("\n".join([*lines, "---", ""]))
    options = {"type": "hub", "languages": ["aa", "bb"], "name": str(tmp_path), "held_out": 0.2}
    for code, found in read(**options).items():
        assert sorted(found.train + found.test) == sorted(lines_of(code))
    with pytest.raises(ValueError, match="has no column body, found text"):
        read(**options, column="body")
    with pytest.raises(ValueError, match="has no dev, found train"):
        read(**options, split="dev")

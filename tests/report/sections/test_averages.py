from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from fabricated_run import SIZES, make_methods_run

from nspec.report.run_data import load_run
from nspec.report.sections.averages import level_section, transfer_section


def test_each_level_has_the_mean_change_of_its_directions(tmp_path: Path) -> None:
    section = level_section(load_run(make_methods_run(tmp_path / "run", variants=[])))
    assert section["reason"] == ""
    assert [(head["name"], head["range"], head["directions"]) for head in section["heads"]] == [
        ("high", "5\u202f000", 4),
        ("medium", "1\u202f000", 4),
        ("low", "100", 4),
    ]
    rows = {row["name"]: [(cell["text"], cell["up"]) for cell in row["cells"]] for row in section["rows"]}
    assert "Dense continued" not in rows
    bleu = [("+1.00", "4 of 4 up"), ("−3.00", "0 of 4 up"), ("−3.00", "0 of 4 up")]
    assert rows["Bilingual models"] == bleu + [("+2.00", "4 of 4 up"), ("−6.00", "0 of 4 up"), ("−6.00", "0 of 4 up")]
    assert "<svg" in section["figure"]


def test_equal_data_are_said_in_one_sentence_and_have_no_levels(tmp_path: Path) -> None:
    run = make_methods_run(tmp_path / "run", sizes=dict.fromkeys(SIZES, 700), variants=[])
    section = level_section(load_run(run))
    assert section == {"reason": "All directions have the same 700 training pairs, so there are no levels."}
    (run / "prepared" / "meta.json").write_text("{}")
    assert "is not known" in level_section(load_run(run))["reason"]


def test_multilingual_minus_bilingual_is_transfer_or_interference(tmp_path: Path) -> None:
    run = make_methods_run(tmp_path / "run", variants=[])
    section = transfer_section(load_run(run))
    assert section is not None
    names = [head["name"] for head in section["heads"]]
    assert "Bilingual models" not in names
    cells = {row["task"]: dict(zip(names, row["cells"])) for row in section["rows"]}
    assert cells["en-de"]["Dense"] == {"text": "−2.00", "beside": "−4.00", "kind": "interference"}
    assert cells["ru-en"]["Dense"] == {"text": "+2.00", "beside": "+4.00", "kind": "transfer"}
    assert cells["mean"]["Dense"]["text"] == "+0.67"  # 8 directions of 12 by +2, 4 by -2
    (run / "scores" / "bilingual" / "scores.json").unlink()
    assert transfer_section(load_run(run)) is None

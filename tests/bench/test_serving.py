"""The bench of decoding: what it times does what it says, and its rows come into pages."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import bench.serving.__main__ as bench
from bench.report.serving import fragments
from bench.rows import read
from bench.serving import memory, models

pytest.importorskip("ctranslate2")
pytestmark = pytest.mark.usefixtures("one_thread")
TINY = models.SHAPES["tiny"]


def test_rows_of_every_model_and_their_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "peaks_of", lambda one, folder, shape, threads, searches: [2**20] * len(searches))
    path, page = tmp_path / "rows.jsonl", tmp_path / "page.md"
    given = ["--shape", "tiny", "--densities", "0.5", "--batches", "2", "--beams", "1", "2", "--threads", "1"]
    assert bench.main([*given, "--rounds", "3", "--seconds", "0", "--json", str(path)]) == 0
    rows = read([path])
    assert len(rows) == 3 * 3 * 2
    assert {(row["engine"], row["dtype"]) for row in rows} == {
        ("transformers", "float32"),
        ("ctranslate2", "float32"),
        ("ctranslate2", "int8"),
    }
    saved = {(row["engine"], row["dtype"], row["form"]): row["saved_bytes"] for row in rows}
    for engine, dtype in {key[:2] for key in saved}:
        assert saved[engine, dtype, "compact"] < 0.95 * saved[engine, dtype, "dense"]
    assert all(row["rounds"] == 3 and row["speedup"] == 1 for row in rows if row["form"] == "dense")
    assert "ctranslate2 int8, compact 0.5" in capsys.readouterr().out

    page.write_text(
        "".join(f"<!-- serving:{n}:begin -->\n\n<!-- serving:{n}:end -->\n" for n in ("headline", "tables"))
    )
    assert bench.main(["--from", str(path), "--update", str(page)]) == 0
    text = page.read_text()
    assert "| decoding in CTranslate2, beam 2, 2 sentences a batch |" in text
    assert text.count("| 2, 1 ") == 3
    assert "compact, 0.5 | " in text
    page.write_text("none")
    with pytest.raises(ValueError, match=r"no markers; put <!-- serving:NAME:begin -->"):
        fragments(rows, [path], [page])


def test_a_model_that_computes_something_else_is_not_timed(tmp_path: Path) -> None:
    model = models.specialised(TINY, [0.5, 1.0])
    kept = models.Served("transformers", "float32", "compact", 0.5)
    models.write(model, replace(kept, form="merged"), TINY, tmp_path / "merged")
    layer = model.model.decoder.layers[0].fc2
    layer.bias.data[0] += 0.1
    models.write(model, kept, TINY, tmp_path / "compact")
    found = [models.Decoder(one, tmp_path / one.form, TINY, 1) for one in (replace(kept, form="merged"), kept)]
    with pytest.raises(ValueError, match=r"compact-0.5: log-probabilities differ from those of transformers-.*merged"):
        models.check(found, TINY)
    models.check(found[1:], TINY)


def test_memory_is_that_of_a_process_which_serves_the_model(tmp_path: Path) -> None:
    shape = replace(TINY, vocabulary=100_000)  # 12.8 MB of embeddings
    one = models.Served("ctranslate2", "float32", "dense", 1.0)
    models.write(models.specialised(shape, [1.0]), one, shape, tmp_path / "model")
    [small, large] = memory.measure(one, tmp_path / "model", shape, 1, [models.Search(1, 1), models.Search(8, 4)])
    if small is None or large is None:
        pytest.skip("this system does not tell the peak of a process")
    assert 12.8e6 < small <= large < 200e6

from __future__ import annotations

import errno
import json
import os
import stat
import threading
from pathlib import Path

import pytest

from nspec import files
from nspec.files import check_output, replacing, write_text


def test_a_link_stays_one_and_what_it_points_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    for content in ("new", "newer"):  # the first makes the file
        link = tmp_path / "link"
        if not link.is_symlink():
            link.symlink_to(Path("far") / "real")
        write_text(link, content)
        assert link.is_symlink()
        assert (tmp_path / "far" / "real").read_text() == content
        assert os.listdir(tmp_path / "far") == ["real"]


def test_a_named_pipe_is_written_to_and_stays_one(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    found: list[str] = []
    reader = threading.Thread(target=lambda: found.append(pipe.read_text()))
    reader.start()
    write_text(pipe, "text\n")
    reader.join(10)
    assert found == ["text\n"]
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert os.listdir(tmp_path) == ["pipe"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_device_is_an_error_and_stays_a_device(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/dev/full")
    for path in ("/dev/full", tmp_path / "link"):
        with pytest.raises(OSError, match=rf"cannot write {path}: No space left on device$") as caught:
            write_text(path, "text")
        assert caught.value.errno == errno.ENOSPC
        assert stat.S_ISCHR(os.stat("/dev/full").st_mode)


def test_a_folder_is_not_written_over(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=f"cannot write {tmp_path}"):
        write_text(tmp_path, "text")
    assert list(tmp_path.iterdir()) == []


def test_an_error_on_the_way_leaves_the_old_file(tmp_path: Path) -> None:
    write_text(tmp_path / "file", "old")
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "file") as part:
        part.write_text("half")
        raise ZeroDivisionError
    assert (tmp_path / "file").read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_an_output_is_checked_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    check_output("--output", tmp_path / "file")
    check_output("--output", tmp_path / "new")
    check_output("--output", "/dev/null")
    check_output("--out", tmp_path / "new", folder=True)
    for path, folder, message in (
        ("nope/x", False, "there is no folder .*nope; make it first"),
        ("nope/x", True, "there is no folder .*nope; make it first"),
        ("file/x", False, "there is no folder"),
        (".", False, "is a folder; give the name of a file in it"),
        ("file", True, "is not a folder"),
    ):
        with pytest.raises(ValueError, match=f"--out .*{message}"):
            check_output("--out", tmp_path / path, folder=folder)
    (tmp_path / "link").symlink_to("nope/x")
    with pytest.raises(ValueError, match="there is no folder .*nope"):
        check_output("--output", tmp_path / "link")


@pytest.mark.parametrize("value", ["\ud800", ["a\udfff"], {"\udce9": 1}, {"a": {"b": "\udc00\ud800"}}])
def test_half_a_character_is_refused_where_json_is_read_and_written(tmp_path: Path, value: object) -> None:
    path = tmp_path / "x.json"
    files.write_json(path, "old")
    with pytest.raises(
        ValueError, match=rf"^cannot write {path}: the text has half a character \(the lone surrogate U\+D"
    ):
        files.write_json(path, value)
    assert files.read_json(path) == "old"
    path.write_text(json.dumps(value))
    with pytest.raises(ValueError, match=rf"^{path} has half a character \(the lone surrogate U\+D[8-F]"):
        files.read_json(path)


def test_characters_beyond_16_bits_are_whole_however_they_are_written(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    for text in (json.dumps("😀"), json.dumps("😀", ensure_ascii=False)):
        path.write_text(text, encoding="utf-8")
        assert files.read_json(path) == "😀"
    path.write_text(json.dumps(r"\ud800"))  # the six characters of an escape
    assert files.read_json(path) == r"\ud800"

"""The command line: help, exit codes, and one clear line for what the user got wrong."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nspec import cli
from nspec.run.checks import load
from nspec.run.config import Config
from nspec.run.yaml import find_config, parse

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = [
    "seeds",
    "run",
    "prepare",
    "train",
    "profile",
    "select",
    "specialize",
    "evaluate",
    "score",
    "translate",
    "analyze",
    "report",
    "env",
    "config",
]

TEST = b"ein Baum\ta tree\n"

Fails = Callable[..., str]


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Fails:
    """Runs a command line that the user got wrong, and returns the one line that says so."""

    def call(*arguments: str) -> str:
        assert cli.main(list(arguments)) == 2
        output = capsys.readouterr()
        assert output.out == ""
        line = output.err.splitlines()[-1]
        assert line.startswith("nspec: error: ")
        assert output.err.count("error:") == 1
        assert "Traceback" not in output.err
        return line.removeprefix("nspec: error: ")

    return call


def config_file(folder: Path, text: str = "") -> str:
    path = folder / "config.yaml"
    path.write_text(f"run:\n  folder: {folder / 'run'}\n{text}", encoding="utf-8")
    return str(path)


def parallel_config(folder: Path, **files: bytes) -> str:
    """A configuration for parallel files, and those files; a valid German-English corpus where they are not given."""
    corpus = folder / "corpus"
    corpus.mkdir()
    train = "".join(f"das Haus {n} ist {n * n}\tthe house {n} is {n * n}\n" for n in range(40)).encode()
    for name, content in ({"train": train, "valid": b"ein Haus\ta house\n", "test": TEST} | files).items():
        (corpus / f"{name}.de-en.tsv").write_bytes(content)
    return config_file(
        folder,
        f"corpus: {{type: files, path: {corpus}, languages: [de, en]}}\ntokenizer: {{vocab_size: 40}}\n",
    )


def test_help_names_every_command_without_loading_torch() -> None:
    code = (
        "import sys, nspec.cli; code = nspec.cli.main(['--help']);"
        "heavy = {'torch', 'transformers', 'numpy', 'matplotlib'} & set(sys.modules);"
        "sys.exit(f'loaded {heavy}' if heavy else code)"
    )
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    seconds = time.monotonic() - begun
    assert done.returncode == 0, done.stderr
    for command in COMMANDS:
        assert f"\n  {command} " in done.stdout
    assert seconds < 2, "half a second on a machine that is not busy"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command, "--help"]) == 0
    assert f"Usage: nspec {command}" in capsys.readouterr().out


def test_without_a_command_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    assert "Commands:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["frobnicate"], "No such command 'frobnicate'."),
        (["run"], "Missing argument 'CONFIG'."),
        (["run", "cldr8", "--fast"], "No such option: --fast"),
        (["run", "cldr9"], "no file cldr9, and no configuration of that name comes with nspec: cldr8, compare"),
        (["run", "cldr8", "--set", "train.lrr=1"], "unknown option train.lrr in --set; did you mean train.lr?"),
        (["run", "cldr8", "--set", "select.k=1.5"], "select.k: expected a number in (0, 1], found 1.5"),
        (["run", "cldr8", "--set", "select.k=0"], "select.k: expected a number in (0, 1], found 0.0"),
        (["run", "multi30k"], "corpus.path: a corpus of type files needs the folder with the text; give corpus.path"),
        (["translate", "--task", "en-de"], "translate needs either --model FOLDER or --run RUN --system NAME"),
        (["translate", "--model", "x"], "Missing option '--task'."),
        (["translate", "--task", "en-de", "--model", "nowhere"], "--model nowhere: there is no such folder"),
        (["translate", "--task", "en-de", "--run", "nowhere"], "--run nowhere: there is no such folder"),
        (["translate", "--task", "en-de", "--run", "."], "--run .: there is no run in that folder"),
        (["export", "nowhere", "--all"], "RUN nowhere: there is no such folder"),
        (["config", "--set", "decode.beam=0"], "decode.beam: expected at least 1, found 0"),
        (["config", "--set", "train.lr=1" + "0" * 400], "train.lr: expected a finite number, found 1000"),
        (["config", "--set", "model.encoder_layers=1000000000"], "model.encoder_layers: expected at most 1000, found"),
        (["run", "cldr8", "--seeds", "1,01"], "--seeds 1,01: expected two or more different whole numbers"),
        (["run", "cldr8", "--seeds", "1,99999999999"], "run.seed: expected at most 4294967295, found 99999999999"),
        (["run", "~nobody-at-all/c.yaml"], "there is no home folder ~nobody-at-all; "),
        (["seeds", "a", "~nobody-at-all/b"], "there is no home folder ~nobody-at-all; "),
    ],
)
def test_a_wrong_command_line_is_one_line(arguments: list[str], message: str, fails: Fails) -> None:
    assert fails(*arguments).startswith(message)


def test_an_unknown_key_in_a_file_is_named_with_the_nearest(tmp_path: Path, fails: Fails) -> None:
    path = config_file(tmp_path, "train:\n  learning: 3\n  lrr: 3\n")
    assert "unknown option train.learning" in fails("run", path)
    path = config_file(tmp_path, "train:\n  lrr: 3\n")
    assert fails("run", path) == f"unknown option train.lrr in {path} line 4; did you mean train.lr?"
    assert not (tmp_path / "run").exists()


def test_debug_shows_the_traceback_before_the_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "cldr9", "--debug"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("Traceback")
    assert error.splitlines()[-1].startswith("nspec: error: no file cldr9")


@pytest.mark.parametrize(
    ("error", "code", "last"),
    [
        (KeyboardInterrupt(), 130, "nspec: interrupted; the same command goes on from here"),
        (ValueError("two\n lines"), 2, "nspec: error: two lines"),
        (
            PermissionError(13, "cannot write x: Permission denied"),
            2,
            "nspec: error: [Errno 13] cannot write x: Permission denied",
        ),
        (
            MemoryError(),
            2,
            "nspec: error: out of memory; take smaller batches (*.batch_tokens), fewer samples or a smaller model "
            "(MemoryError); --debug shows where",
        ),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes"),
            2,
            "nspec: error: out of memory; take smaller batches (*.batch_tokens), fewer samples or a smaller model "
            "(DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes); --debug shows where",
        ),
        (
            RecursionError("maximum depth"),
            2,
            "nspec: error: the input is nested too deeply (maximum depth); --debug shows where",
        ),
        (
            OverflowError("int too large"),
            2,
            "nspec: error: a number is too large to compute with (int too large); --debug shows where",
        ),
        (ValueError("x" * 9999), 2, f"nspec: error: {'x' * 3989} ..."),
        (RuntimeError("a mistake of ours"), 1, "RuntimeError: a mistake of ours"),
        (TypeError("a mistake of ours"), 1, "TypeError: a mistake of ours"),
    ],
)
def test_exit_codes(
    error: BaseException, code: int, last: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("nspec.run.kinds.find_config_for", fail)
    assert cli.main(["run", "cldr8"]) == code
    written = capsys.readouterr().err
    assert written.splitlines()[-1] == last
    assert written.startswith("Traceback") == (code == 1)


def test_home_is_the_same_folder_for_all_parts_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = parallel_config(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert cli.main(["prepare", "~/config.yaml", "--set", "run.folder=~/runs/x"]) == 0
    assert cli.main(["prepare", path, "--set", "run.folder=5e-4"]) == 0
    assert not Path("~").exists()
    for folder, written in [("runs/x", str(tmp_path / "runs/x")), ("5e-4", "5e-4")]:
        assert (tmp_path / folder / "prepared/stage.json").is_file()
        assert load(tmp_path / folder / "config.yaml").run.folder == written
    capsys.readouterr()
    assert cli.main(["score", "--references=~/gone", "--system", "ours=~/gone"]) == 2
    assert f"{tmp_path}/gone" in capsys.readouterr().err


@pytest.mark.parametrize("number", ["39", "100001", "1000000000000"])
def test_bootstrap_samples_have_two_ends(number: str, tmp_path: Path, fails: Fails) -> None:
    (tmp_path / "en-de.txt").write_text("a\n")
    message = fails("score", "--references", str(tmp_path), "--system", f"a={tmp_path}", "--bootstrap", number)
    assert message.startswith("--bootstrap")


def test_memory_and_threads_are_looked_at_before_the_text(
    tmp_path: Path, fails: Fails, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nspec.run import machine

    path = parallel_config(tmp_path)
    monkeypatch.setattr(machine, "memory", lambda: 2**20)
    for verb in ("run", "prepare", "train"):
        assert "optimiser of 4.4" in fails(verb, path, "--set", "run.device=cpu")
    monkeypatch.undo()
    assert fails("run", path, "--set", "run.threads=1024").startswith("run.threads (--threads): expected at most ")
    assert not (tmp_path / "run/prepared/stage.json").exists()


def test_config_prints_what_reads_back(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config"]) == 0
    assert parse(capsys.readouterr().out) == Config()
    assert cli.main(["config", "cldr8", "--set", "train.lr=0.25", "--set", "run.systems=[dense]"]) == 0
    config = parse(capsys.readouterr().out)
    assert (config.train.lr, config.run.systems, config.corpus.pivot) == (0.25, ["dense"], "en")
    assert config.model == load(find_config("cldr8")).model


def test_env_names_versions_and_each_operator(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    from nspec.kernels.common.backend import OPERATORS

    assert cli.main(["env"]) == 0
    shown = capsys.readouterr().out
    assert torch.__version__ in shown
    for operator in OPERATORS:
        assert f"\n  {operator}, cpu, float32 " in shown


# Corpora that cannot be used


def test_after_a_bad_corpus_is_mended_the_run_goes_on(tmp_path: Path, fails: Fails) -> None:
    path = parallel_config(tmp_path, test=b"ein Haus\n")
    assert "line 1" in fails("prepare", path)
    (tmp_path / "corpus/test.de-en.tsv").write_bytes(TEST)
    assert cli.main(["prepare", path]) == 0
    assert (tmp_path / "run/prepared/stage.json").is_file()


def test_a_stage_says_which_one_comes_before_it(tmp_path: Path, fails: Fails) -> None:
    message = fails("train", parallel_config(tmp_path))
    assert message == f"train needs prepare, which is not finished in {tmp_path / 'run'}; `nspec run` does every stage"


def test_a_full_disk_is_one_line_and_nothing_half_written_stays(tmp_path: Path) -> None:
    path = parallel_config(tmp_path)
    # No file may grow over 2 kB: writing fails as on a full disk (EFBIG for ENOSPC).
    code = (
        "import resource, signal, sys, nspec.cli;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000));"
        "sys.exit(nspec.cli.main(sys.argv[1:]))"
    )
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, "prepare", path], capture_output=True, text=True, cwd=ROOT, env=environment
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("nspec: error: ")
    assert "File too large" in done.stderr
    assert not (tmp_path / "run/prepared/stage.json").exists()
    assert not list((tmp_path / "run").glob("**/*.part"))
    assert cli.main(["prepare", path]) == 0


def test_a_full_disk_under_standard_output_is_one_line() -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "nspec.cli", "config"], stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT
        )
    assert done.returncode == 2
    assert done.stderr == "nspec: error: cannot write to standard output: No space left on device\n"


def test_a_reader_that_leaves_is_no_error() -> None:
    command = f"{sys.executable} -m nspec.cli config | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT)
    assert done.stderr == ""
    assert done.stdout.count("\n") == 1


@pytest.mark.parametrize(
    ("redirection", "message"),
    [
        ("translate --task en-de --model . <&-", "standard input is closed; give the text with --input FILE"),
        ("translate --task en-de --model . >&-", "standard output is closed; redirect it, such as > /dev/null"),
        ("config >&-", "standard output is closed; redirect it, such as > /dev/null"),
        ("config >&- <&-", "standard output is closed; redirect it, such as > /dev/null"),
    ],
)
def test_a_closed_stream_is_one_line(redirection: str, message: str) -> None:
    command = ["bash", "-c", f"exec {sys.executable} -m nspec.cli {redirection}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"nspec: error: {message}")
    assert done.stderr.count("\n") == 1


def test_without_standard_error_nothing_else_goes_to_standard_output() -> None:
    command = ["bash", "-c", f"exec {sys.executable} -m nspec.cli config --set train.lr=x 2>&-"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert (done.returncode, done.stdout) == (2, "")

"""The command line: ``nspec run CONFIG`` for the whole chain, and a command for each of its stages.

Nothing here imports torch before a command needs it, so that help and mistakes answer at once.
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nspec.cli_tools import ConfigArgument, SetOption, tools
from nspec.files import expand_path
from nspec.options import cut

if TYPE_CHECKING:
    from nspec.run.pipeline import Pipeline

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from nspec import __version__

        print(f"nspec {__version__}")
        raise typer.Exit


@app.callback()
def top(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Neuron specialisation for multilingual translation: profile, select, specialise, compare."""


RedoOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="STAGE",
        help="Makes a stage and all that follows from it anew; the old folders are kept as *.old-N. Repeatable.",
    ),
]
SystemOption = Annotated[
    str, typer.Option("--system", metavar="NAME", help="Only this system; all of them if not given.")
]


def _pipeline(config: str, overrides: list[str] | None, redo: list[str] | None) -> Pipeline:
    from nspec.run.checks import load
    from nspec.run.kinds import find_config_for
    from nspec.run.pipeline import Pipeline

    return Pipeline(load(find_config_for("run", config), overrides or ()), tuple(redo or ()))


@app.command()
def run(
    config: ConfigArgument,
    set_: SetOption = None,
    redo: RedoOption = None,
    seeds: Annotated[
        str, typer.Option(metavar="1,2,3", help="A run for each seed, in FOLDER/seed-N, and then their comparison.")
    ] = "",
) -> None:
    """The whole chain, from text to a report.

    Started again, it skips what is done and goes on with what is not.
    """
    if seeds:
        _run_seeds(config, list(set_ or ()), redo, _seeds(seeds))
        return
    with _pipeline(config, set_, redo) as pipeline:
        page = pipeline.all()
        if pipeline.world.rank == 0:
            _show(pipeline.folder, page)


def _seeds(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    whole = all(part.isdecimal() and len(part) < 20 for part in parts)
    if len(parts) < 2 or not whole or len(set(map(int, parts))) < len(parts):
        raise ValueError(f"--seeds {cut(text)}: expected two or more different whole numbers such as 1,2,3")
    return [int(part) for part in parts]


def _run_seeds(config: str, overrides: list[str], redo: list[str] | None, seeds: list[int]) -> None:
    """A run for each seed in a folder of its own; then ``FOLDER/seeds`` with what they have in common."""
    from nspec.run.checks import load
    from nspec.run.kinds import find_config_for

    path = find_config_for("run", config)
    base = Path(load(path, overrides).run.folder)
    folders = [base / f"seed-{seed}" for seed in seeds]
    changes = [[*overrides, f"run.seed={seed}", f"run.folder={folder}"] for seed, folder in zip(seeds, folders)]
    for change in changes:  # a wrong seed shows before the runs of the others
        load(path, change)
    for change in changes:
        with _pipeline(config, change, redo) as pipeline:
            page = pipeline.all()
            rank = pipeline.world.rank
            if rank == 0:
                _show(pipeline.folder, page)
    if rank == 0:
        from nspec.report import seeds_write
        from nspec.report.seeds import compare_seeds

        compared = compare_seeds([str(folder) for folder in folders])
        seeds_write.write(compared, base / "seeds")
        print(seeds_write.markdown(compared), end="")
        print(f"comparison: {base / 'seeds' / 'seeds.md'}", flush=True)


def _show(folder: Path, page: Path) -> None:
    """The score table and where the page is, on standard output."""
    from nspec.report import score_table
    from nspec.terminal import show

    show(score_table(folder))
    print(f"report: {page}", flush=True)


def _stage(verb: str, help: str) -> None:
    """A command that does one stage of the chain."""

    def command(config: ConfigArgument, set_: SetOption = None, redo: RedoOption = None) -> None:
        with _pipeline(config, set_, redo) as pipeline:
            page = getattr(pipeline, verb)()
            if verb == "report" and pipeline.world.rank == 0:
                _show(pipeline.folder, page)

    def of_systems(
        config: ConfigArgument, system: SystemOption = "", set_: SetOption = None, redo: RedoOption = None
    ) -> None:
        with _pipeline(config, set_, redo) as pipeline:
            getattr(pipeline, verb)(system or None)

    app.command(verb, help=help)(of_systems if verb in ("specialize", "evaluate") else command)


_stage("prepare", "Text to token ids, and the vocabulary.")
_stage("train", "Trains the dense model.")
_stage("profile", "Counts how often each neuron fires, by direction.")
_stage("select", "Selects the neurons of each direction.")
_stage("specialize", "Trains the other systems on from the dense one.")
_stage("evaluate", "Translates and scores the test sets.")
_stage("report", "Makes the page and shows the table.")
app.add_typer(tools)  # without a name: its commands stand beside those above


@app.command()
def finetune(config: ConfigArgument, set_: SetOption = None, redo: RedoOption = None) -> None:
    """Fine-tunes a language model for each of several languages: neurons, LoRA, all of it.

    Perplexity on held-out text of every language says what was gained and what was forgotten. Started again, it skips what
    is done. The configuration of its own kind that comes with nspec is finetune.
    """
    from nspec.run.finetune import TuningRun
    from nspec.run.finetune_config import load
    from nspec.run.kinds import find_config_for
    from nspec.terminal import show

    with TuningRun(load(find_config_for("finetune", config), set_ or ()), tuple(redo or ())) as tuning:
        page = tuning.all()
        from nspec.report.finetuned import summary_table

        show(summary_table(tuning.folder))
        print(f"report: {page}", flush=True)


# What options and arguments that are paths are called in the help.
_PATHS = {"CONFIG", "[CONFIG]", "RUN", "RUN...", "FOLDER", "FILE", "PATH", "NAME=FOLDER"}


def _command() -> Any:
    """The command line, with a word on ``--debug``; ``~`` is the home folder in every path: shells leave ``--out=~/x``."""
    command = typer.main.get_command(app)
    for verb in command.commands.values():  # type: ignore[attr-defined]
        verb.epilog = "With --debug every command shows the traceback of an error."
        for parameter in verb.params:
            if parameter.metavar in _PATHS:
                parameter.callback = _expand
    return command


def _expand(_context: object, parameter: Any, value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_expand(_context, parameter, each) for each in value]
    if value is None:
        return None
    name, equals, path = value.partition("=") if "=" in parameter.metavar else ("", "", value)
    return f"{name}{equals}{expand_path(path)}"


# What click calls a wrong command line; typer brings its own copy of click or uses the installed one.
_USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[2]


_LONGEST = 4000  # characters of an error


def _user_error(error: BaseException) -> bool:
    """Whether the user can mend it, so that one line says more than a traceback."""
    # ImportError: an optional library (Babel, datasets) is not installed; the message says which.
    return isinstance(error, (ValueError, OSError, ImportError)) or bool(_too_large(error))


def _too_large(error: BaseException) -> str:
    """What to do where the input was too large for memory, the stack or a number; empty for other errors."""
    # torch's own error for GPUs has this name, and its allocator for the CPU has none.
    if (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "t allocate memory" in str(error)
    ):
        return "out of memory; take smaller batches (*.batch_tokens), fewer samples or a smaller model"
    if isinstance(error, RecursionError):
        return "the input is nested too deeply"
    if isinstance(error, OverflowError):
        return "a number is too large to compute with"
    return ""


def main(arguments: list[str] | None = None) -> int:
    """Runs a command line.

    Args:
        arguments: without the program's name; None: those of the process.

    Returns:
        0; 1 after an unexpected error, which shows its traceback; 2 after one that the user can mend, which is one line
        on standard error (``--debug`` shows the traceback too); 130 after Ctrl-C; 143 after SIGTERM in training.
    """
    given = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in given
    arguments = [argument for argument in given if argument != "--debug"] or ["--help"]
    _fill_closed_streams()
    if sys.stdout is None:
        return _say("error: standard output is closed; redirect it, such as > /dev/null", 2)
    # The tokenizers library warns when a process that used its threads is forked.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        result = _command()(args=arguments, prog_name="nspec", standalone_mode=False)
        sys.stdout.flush()
        if result == 130:  # what typer makes of Ctrl-C
            raise KeyboardInterrupt
        return result if isinstance(result, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        return _say("interrupted; the same command goes on from here", 130)
    except (BrokenPipeError, SystemExit) as error:
        if isinstance(error, SystemExit) and not isinstance(error.__context__, BrokenPipeError):
            if error.code == 143:
                _say("terminated; the same command goes on from here", 143)
            raise
        # Who read our output has what they wanted. Python would complain once more when it closes the stream.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
    except _USAGE_ERROR as error:
        return _say(f"error: {error.format_message()}", 2)  # type: ignore[attr-defined]
    except Exception as error:
        if _is_of_output(error):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python would complain once more when it closes the stream
            return _say(f"error: cannot write to standard output: {error.strerror}", 2)  # type: ignore[attr-defined]
        if debug or not _user_error(error):
            traceback.print_exc()
        if not _user_error(error):
            return 1
        if advice := _too_large(error):
            return _say(f"error: {advice} ({str(error) or type(error).__name__}); --debug shows where", 2)
        return _say(f"error: {error}", 2)


def _is_of_output(error: Exception) -> bool:
    """Whether an error came from writing to standard output: it names no file, and that takes nothing more."""
    if not isinstance(error, OSError) or error.filename is not None or error.strerror != os.strerror(error.errno or 0):
        return False
    try:
        sys.stdout.flush()  # some of what could not be written may still be to come
        os.write(1, b"")  # a device that is full says so of nothing, too
        return os.fstatvfs(1).f_bavail == 0
    except OSError:
        return True


def _fill_closed_streams() -> None:
    """Takes the numbers of closed streams, which the next files would get: what is printed must not go into them."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            with contextlib.suppress(OSError):
                os.fstat(number)
                continue
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
    if sys.stderr is None:  # print(file=None) would write to standard output
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (as long as the process)


def _say(text: str, code: int) -> int:
    if os.environ.get("RANK", "0") == "0":  # under torchrun every process fails alike
        print(f"nspec: {cut(' '.join(text.split()), _LONGEST)}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())

"""The command line: ``nspec run CONFIG`` for the whole chain, and a command for each of its arrows.

Nothing here imports torch before a command needs it, so that help and mistakes answer at once.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from nspec.mt.config import Config
    from nspec.mt.pipeline import Pipeline

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


CONFIG_HELP = "A YAML file, or the name of a configuration that comes with nspec, such as cldr8."
ConfigArgument = Annotated[str, typer.Argument(metavar="CONFIG", help=CONFIG_HELP)]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Changes an option, such as train.lr=3e-4. Repeatable."),
]
RedoOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="STAGE",
        help="Makes a stage and all that follows from it anew; the old folders are kept as *.old-N. Repeatable.",
    ),
]
DebugOption = Annotated[bool, typer.Option("--debug", help="Shows the traceback of an error.")]
SystemOption = Annotated[
    str, typer.Option("--system", metavar="NAME", help="Only this system; all of them if not given.")
]


def _pipeline(config: str, overrides: list[str] | None, redo: list[str] | None) -> Pipeline:
    from nspec.mt.options import find_config, load
    from nspec.mt.pipeline import Pipeline

    return Pipeline(load(find_config(config), overrides or ()), tuple(redo or ()))


@app.command()
def run(
    config: ConfigArgument,
    set_: SetOption = None,
    redo: RedoOption = None,
    debug: DebugOption = False,
) -> None:
    """The whole chain, from text to a report.

    Started again, it skips what is done and goes on with what is not.
    """
    with _pipeline(config, set_, redo) as pipeline:
        page = pipeline.all()
        if pipeline.world.rank == 0:
            _show(pipeline.folder, page)


def _show(folder: Path, page: Path) -> None:
    """The score table and where the page is, on standard output."""
    from rich.console import Console

    from nspec.report import score_table

    # Without a terminal there is no width to fit into; rich would assume 80 columns and break lines.
    console = Console() if sys.stdout.isatty() else Console(width=200)
    console.print(score_table(folder))
    print(f"report: {page}", flush=True)


@app.command()
def prepare(
    config: ConfigArgument, set_: SetOption = None, redo: RedoOption = None, debug: DebugOption = False
) -> None:
    """Text to token ids, and the vocabulary."""
    with _pipeline(config, set_, redo) as pipeline:
        pipeline.prepare()


@app.command()
def train(config: ConfigArgument, set_: SetOption = None, redo: RedoOption = None, debug: DebugOption = False) -> None:
    """Trains the dense model."""
    with _pipeline(config, set_, redo) as pipeline:
        pipeline.train()


@app.command()
def profile(
    config: ConfigArgument, set_: SetOption = None, redo: RedoOption = None, debug: DebugOption = False
) -> None:
    """Counts how often each neuron fires, by direction."""
    with _pipeline(config, set_, redo) as pipeline:
        pipeline.profile()


@app.command()
def select(config: ConfigArgument, set_: SetOption = None, redo: RedoOption = None, debug: DebugOption = False) -> None:
    """Selects the neurons of each direction."""
    with _pipeline(config, set_, redo) as pipeline:
        pipeline.select()


@app.command()
def specialize(
    config: ConfigArgument,
    system: SystemOption = "",
    set_: SetOption = None,
    redo: RedoOption = None,
    debug: DebugOption = False,
) -> None:
    """Trains the other systems on from the dense one."""
    with _pipeline(config, set_, redo) as pipeline:
        pipeline.specialize(system or None)


@app.command()
def evaluate(
    config: ConfigArgument,
    system: SystemOption = "",
    set_: SetOption = None,
    redo: RedoOption = None,
    debug: DebugOption = False,
) -> None:
    """Translates and scores the test sets."""
    with _pipeline(config, set_, redo) as pipeline:
        pipeline.evaluate(system or None)


@app.command()
def report(config: ConfigArgument, set_: SetOption = None, redo: RedoOption = None, debug: DebugOption = False) -> None:
    """Makes the page and shows the table."""
    with _pipeline(config, set_, redo) as pipeline:
        page = pipeline.report()
        if pipeline.world.rank == 0:
            _show(pipeline.folder, page)


@app.command()
def translate(
    task: Annotated[str, typer.Option(metavar="en-de", help="The direction.")],
    model: Annotated[str, typer.Option(metavar="FOLDER", help="A model, such as RUN/systems/forward/model.")] = "",
    run: Annotated[str, typer.Option(metavar="RUN", help="A run folder; goes with --system.")] = "",
    system: Annotated[str, typer.Option(metavar="NAME", help="A system of the run, such as forward.")] = "",
    input: Annotated[str, typer.Option(metavar="FILE", help="Text, a sentence a line; -: standard input.")] = "-",
    output: Annotated[str, typer.Option(metavar="FILE", help="Appears when it is whole; -: standard output.")] = "-",
    beam: Annotated[int | None, typer.Option(help="Beam size [default: the run's, else 5].")] = None,
    length_penalty: Annotated[float | None, typer.Option(help="Exponent on the length [the run's, else 1].")] = None,
    max_length_ratio: Annotated[
        float | None, typer.Option(help="Longest output per source [the run's, else 2].")
    ] = None,
    batch_tokens: Annotated[int | None, typer.Option(help="Source tokens a batch [the run's, else 4096].")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    threads: Annotated[int, typer.Option(help="CPU threads of PyTorch; 0: as it chooses.", min=0)] = 0,
    debug: DebugOption = False,
) -> None:
    """Translates text, a line out for a line in.

    Lines keep their order and are written as soon as a batch of them is done.
    """
    from nspec.mt.options import validate

    folder, settings = _model_folder(model, run, system)
    given = {"beam": beam, "batch_tokens": batch_tokens, "length_penalty": length_penalty}
    given["max_length_ratio"] = max_length_ratio
    for name, value in given.items():
        if value is not None:
            setattr(settings.decode, name, value)
    validate(settings)
    with contextlib.ExitStack() as files:
        # Before the slow imports: a wrong name shows at once.
        source = files.enter_context(open(os.devnull if input == "-" else input, "rb"))

        from nspec.mt.distributed import resolve_device
        from nspec.mt.model import load_system
        from nspec.mt.pipeline import quieten
        from nspec.mt.translate import Translator

        quieten(threads)
        loaded, tokenizer = load_system(folder, resolve_device(device))
        translator = Translator(loaded, tokenizer, settings.decode)
        translator.translate([], task)  # a direction that it does not know shows before anything is read
        if input == "-":
            groups = _decode(_arriving(sys.stdin.fileno()), "standard input")
            lines: Iterator[str] = itertools.chain.from_iterable(translator.translate(group, task) for group in groups)
        else:
            text = itertools.chain.from_iterable(_decode(([line] for line in source), input))
            lines = translator.translate(text, task)
        _write_lines(lines, output)


def _model_folder(model: str, run: str, system: str) -> tuple[Path, Config]:
    """The folder with the model and the settings that belong to it."""
    from nspec.mt.config import Config
    from nspec.mt.options import load

    if bool(model) == bool(run):
        raise ValueError("translate needs either --model FOLDER or --run RUN --system NAME")
    if model:
        if system:
            raise ValueError("--system goes with --run; --model is the folder of one system")
        if not Path(model).is_dir():
            raise ValueError(f"--model {model}: there is no such folder")
        return Path(model), Config()
    trained = sorted(path.parts[-2] for path in Path(run).glob("systems/*/model"))
    if system not in trained:
        found = f"--system {system}" if system else "no --system"
        raise ValueError(f"{found}: {run} has the trained systems {', '.join(trained) or 'none'}")
    return Path(run) / "systems" / system / "model", load(Path(run) / "config.yaml")


def _arriving(descriptor: int) -> Iterator[list[bytes]]:
    """The whole lines that are there to be read, in groups: who writes one line and waits gets its translation."""
    rest = b""
    while read := os.read(descriptor, 1 << 16):
        *lines, rest = (rest + read).split(b"\n")
        if lines:
            yield lines
    if rest:
        yield [rest]


def _decode(groups: Iterable[list[bytes]], name: str) -> Iterator[list[str]]:
    """Groups of UTF-8 lines without their ends; only a line feed (with a carriage return) ends a line."""
    number = 0
    for group in groups:
        texts = []
        for line in group:
            number += 1
            try:
                texts.append(line.decode("utf-8").removesuffix("\n").removesuffix("\r"))
            except UnicodeDecodeError as error:
                wrong = f"byte {error.start + 1} is 0x{line[error.start]:02x}"
                raise ValueError(f"{name} line {number} is not UTF-8: {wrong}") from None
        yield texts


def _write_lines(lines: Iterable[str], output: str) -> None:
    from nspec.files import replacing

    if output != "-":
        with replacing(output) as part, open(part, "w", encoding="utf-8", newline="\n") as file:
            file.writelines(f"{line}\n" for line in lines)
        return
    for line in lines:
        sys.stdout.buffer.write(f"{line}\n".encode())
        sys.stdout.buffer.flush()


@app.command()
def env(debug: DebugOption = False) -> None:
    """Shows versions, devices and backends."""
    from nspec.env import main

    main()


@app.command()
def config(
    config: Annotated[str, typer.Argument(metavar="[CONFIG]", help=f"{CONFIG_HELP} The defaults if not given.")] = "",
    set_: SetOption = None,
    debug: DebugOption = False,
) -> None:
    """Prints a configuration with every option explained."""
    from nspec.mt.config import Config
    from nspec.mt.options import find_config, load, render, set_option, validate

    chosen: Config
    if config:
        chosen = load(find_config(config), set_ or ())
    else:
        chosen = Config()
        for assignment in set_ or ():
            set_option(chosen, assignment)
        validate(chosen)
    print(render(chosen), end="")


# What click calls a wrong command line; typer brings its own copy of click or uses the installed one.
_USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[2]


def _user_error(error: BaseException) -> bool:
    """Whether the user can mend it, so that one line says more than a traceback."""
    # ImportError: an optional library (Babel, datasets) is not installed; the message says which.
    return isinstance(error, (ValueError, OSError, ImportError))


def main(arguments: list[str] | None = None) -> int:
    """Runs a command line.

    Args:
        arguments: without the program's name; None: those of the process.

    Returns:
        0; 1 after an unexpected error, which shows its traceback; 2 after one that the user can mend, which is one line
        on standard error; 130 after Ctrl-C; 143 after SIGTERM in training.
    """
    arguments = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    # The tokenizers library warns when a process that used its threads is forked.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        result = app(args=arguments, prog_name="nspec", standalone_mode=False)
        sys.stdout.flush()
        if result == 130:  # what typer makes of Ctrl-C
            raise KeyboardInterrupt
        return result if isinstance(result, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        return _say("interrupted; the same command goes on from here", 130)
    except (BrokenPipeError, SystemExit) as error:
        if isinstance(error, SystemExit) and not isinstance(error.__context__, BrokenPipeError):
            raise
        # Who read our output has what they wanted. Python would complain once more when it closes the stream.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
    except _USAGE_ERROR as error:
        return _say(f"error: {error.format_message()}", 2)  # type: ignore[attr-defined]
    except Exception as error:
        if "--debug" in arguments or not _user_error(error):
            traceback.print_exc()
        if not _user_error(error):
            return 1
        return _say(f"error: {error}", 2)


def _say(text: str, code: int) -> int:
    if int(os.environ.get("RANK", "0")) == 0:  # under torchrun every process fails alike
        print(f"nspec: {' '.join(text.split())}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())

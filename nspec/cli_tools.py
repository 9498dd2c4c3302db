"""The commands beside the chain of a run: scoring files, translating, comparing masks, showing settings.

``nspec.cli`` takes them in. Nothing here imports torch before a command needs it.
"""

from __future__ import annotations

import codecs
import contextlib
import itertools
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nspec.files import check_output, replacing

if TYPE_CHECKING:
    from nspec.run.config import Config
    from nspec.serving.export import Settings

tools = typer.Typer()

CONFIG_HELP = "A YAML file, or the name of a configuration that comes with nspec, such as cldr8."
ConfigArgument = Annotated[str, typer.Argument(metavar="CONFIG", help=CONFIG_HELP)]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Changes an option, such as train.lr=3e-4. Repeatable."),
]


@tools.command()
def score(
    references: Annotated[str, typer.Option(metavar="FOLDER", help="A file per direction, such as en-de.ref.txt.")],
    system: Annotated[
        list[str], typer.Option(metavar="NAME=FOLDER", help="Its translations, such as en-de.hyp.txt. Repeatable.")
    ],
    baseline: Annotated[str, typer.Option(metavar="NAME", help="The system to test the others against.")] = "",
    pivot: Annotated[str, typer.Option(metavar="en", help="Averages from and to this language apart.")] = "",
    groups: Annotated[str, typer.Option(metavar="FILE", help="More averages: YAML, such as low: [is, en-mt].")] = "",
    out: Annotated[str, typer.Option(metavar="FOLDER", help="Writes scores.tsv and SYSTEM/scores.json there.")] = "",
    tokenize: Annotated[
        str,
        typer.Option(metavar="NAME", help="Of BLEU: a tokenizer of sacreBLEU, such as flores200; auto: by language."),
    ] = "auto",
    bootstrap: Annotated[int, typer.Option(help="Samples of intervals and of the bootstrap test.")] = 1000,
    comet: Annotated[str, typer.Option(metavar="PATH", help="A local COMET model; goes with --sources.")] = "",
    sources: Annotated[str, typer.Option(metavar="FOLDER", help="Such as en-de.src.txt, for COMET.")] = "",
) -> None:
    """Scores translations that are there as files.

    A folder has en-de.hyp.txt (.ref.txt, .src.txt), en-de.txt or en-de.de (sources: en-de.en) for each direction.
    """
    from nspec.mt.languages import normalized_code
    from nspec.mt.scoring.files import score_files
    from nspec.terminal import show

    pivot = normalized_code(pivot)
    if out:
        check_output("--out", out, folder=True)
    options = {"baseline": baseline, "pivot": pivot, "groups": groups, "out": out, "comet": comet, "sources": sources}
    scored = score_files(system, references, bootstrap=bootstrap, tokenize=tokenize, **options)

    from nspec.report import tables  # slow; a wrong option has shown before

    if out:
        tables.write_comparison(scored, pivot, Path(out))
    for line in tables.warning_lines(scored):
        print(line, file=sys.stderr, flush=True)
    show(*tables.comparison_tables(scored, pivot))


@tools.command()
def translate(
    task: Annotated[str, typer.Option(metavar="en-de", help="The direction.")],
    model: Annotated[str, typer.Option(metavar="FOLDER", help="A model, such as RUN/systems/forward/model.")] = "",
    run: Annotated[str, typer.Option(metavar="RUN", help="A run folder; goes with --system.")] = "",
    system: Annotated[str, typer.Option(metavar="NAME", help="A system of the run, such as forward.")] = "",
    pivot: Annotated[
        str, typer.Option(metavar="en", help="For de-fr: masks of de-en in the encoder, of en-fr in the decoder.")
    ] = "",
    input: Annotated[str, typer.Option(metavar="FILE", help="Text, a sentence a line; -: standard input.")] = "-",
    output: Annotated[
        str,
        typer.Option(metavar="FILE", help="Appears when it is whole; a pipe or device: at once; -: standard output."),
    ] = "-",
    beam: Annotated[int | None, typer.Option(help="Beam size [default: the run's, else 5].")] = None,
    length_penalty: Annotated[float | None, typer.Option(help="Exponent on the length [the run's, else 1].")] = None,
    max_length_ratio: Annotated[
        float | None, typer.Option(help="Longest output per source [the run's, else 2].")
    ] = None,
    no_repeat_ngram_size: Annotated[
        int | None, typer.Option(help="So many tokens never come twice; 0: they may [the run's, else 0].")
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Above 1: tokens come less often again [the run's, else 1].")
    ] = None,
    batch_tokens: Annotated[int | None, typer.Option(help="Source tokens a batch [the run's, else 4096].")] = None,
    engine: Annotated[
        str | None, typer.Option(help="auto, transformers or ctranslate2 [default: the run's, else auto].")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    threads: Annotated[int, typer.Option(help="CPU threads of PyTorch; 0: as it chooses.", min=0)] = 0,
) -> None:
    """Translates text, a line out for a line in.

    Lines keep their order and are written as soon as a batch of them is done. A direction that a system with masks or
    adapters was not trained on takes those of two others, which meet in one language.
    """
    from nspec.mt.languages import normalized_task
    from nspec.run.checks import validate

    task = normalized_task(task)
    given = {
        "beam": beam,
        "length_penalty": length_penalty,
        "max_length_ratio": max_length_ratio,
        "no_repeat_ngram_size": no_repeat_ngram_size,
        "repetition_penalty": repetition_penalty,
        "batch_tokens": batch_tokens,
        "engine": engine,
    }
    folder, settings, made_by = _model_folder(model, run, system, task)
    for name, value in given.items():
        if value is not None:
            setattr(settings.decode, name, value)
    validate(settings)
    if input == "-" and sys.stdin is None:
        raise ValueError("standard input is closed; give the text with --input FILE, or < /dev/null for none")
    if output != "-":
        check_output("--output", output)
    with contextlib.ExitStack() as files:
        # Before the slow imports: a wrong name shows at once.
        if input != "-" and not os.path.exists(input):
            raise ValueError(f"--input {input}: there is no such file")
        source = files.enter_context(open(os.devnull if input == "-" else input, "rb"))

        from nspec.mt.model import load_system
        from nspec.mt.scoring.translate import Translator, choose_for
        from nspec.processes import resolve_device
        from nspec.run.machine import quieten

        quieten(threads)
        loaded, tokenizer = load_system(folder, resolve_device(device), made_by)
        chosen = choose_for(loaded, settings.decode, task, pivot)
        translator = Translator(loaded, tokenizer, settings.decode, pivot=pivot, engine=chosen.name)
        translator.translate([], task)  # a direction that it does not know shows before anything is read
        if input == "-":
            chunks = _decode(_arriving(sys.stdin.fileno()), "standard input")
            lines: Iterator[str] = itertools.chain.from_iterable(translator.translate(chunk, task) for chunk in chunks)
        else:
            text = itertools.chain.from_iterable(_decode(([line] for line in source), input))
            lines = translator.translate(text, task)
        _write_lines(lines, output)


def _model_folder(model: str, run: str, system: str, task: str) -> tuple[Path, Config, tuple[str, str] | None]:
    """The folder with the model, the settings that belong to it, and what a system of a run must be."""
    from nspec.run.config import Config
    from nspec.run.trained import trained_model

    if bool(model) == bool(run):
        raise ValueError("translate needs either --model FOLDER or --run RUN --system NAME")
    if not model:
        found = trained_model(Path(run), system, task, translating=True)
        return found.folder, found.config, found.made_by
    if system:
        raise ValueError("--system goes with --run; --model is the folder of one system")
    if not Path(model).is_dir():
        raise ValueError(f"--model {model}: there is no such folder")
    return Path(model), Config(), None


def _arriving(descriptor: int) -> Iterator[list[bytes]]:
    """The whole lines that are there to be read, in chunks: who writes one line and waits gets its translation."""
    rest = b""
    while read := os.read(descriptor, 1 << 16):
        *lines, rest = (rest + read).split(b"\n")
        if lines:
            yield lines
    if rest:
        yield [rest]


def _decode(chunks: Iterable[list[bytes]], name: str) -> Iterator[list[str]]:
    """Chunks of UTF-8 lines without their ends; only a line feed (with a carriage return) ends a line."""
    number = 0
    for chunk in chunks:
        texts = []
        for line in chunk:
            number += 1
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            try:
                texts.append(line.decode("utf-8").removesuffix("\n").removesuffix("\r"))
            except UnicodeDecodeError as error:
                wrong = f"byte {error.start + 1} is 0x{line[error.start]:02x}"
                raise ValueError(f"{name} line {number} is not UTF-8: {wrong}") from None
        yield texts


def _write_lines(lines: Iterable[str], output: str) -> None:
    if output == "-" or _is_standard_output(output):
        for line in lines:
            sys.stdout.buffer.write(f"{line}\n".encode())
            sys.stdout.buffer.flush()
        return
    # A line at a time: who reads a pipe gets each as soon as it is there.
    with replacing(output) as part, open(part, "w", encoding="utf-8", newline="\n", buffering=1) as file:
        for line in lines:
            file.write(f"{line}\n")


def _is_standard_output(path: str) -> bool:
    """Whether a path, such as /dev/stdout, leads to where standard output goes."""
    return os.path.exists(path) and os.path.samestat(os.stat(path), os.fstat(1))


@tools.command()
def analyze(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run folder with masks.")],
    pivot: Annotated[str, typer.Option(metavar="en", help="The language of all directions [the run's].")] = "",
    permutations: Annotated[int, typer.Option(help="Relabellings a test, at most.", min=1)] = 9999,
    distances: Annotated[
        str,
        typer.Option(
            metavar="FILE",
            help="Your own language distances, lines such as: de nl 0.2; or uriel-syntax, "
            "uriel-phonology, uriel-inventory: in structure, from lang2vec.",
        ),
    ] = "",
    heads: Annotated[
        int, typer.Option(metavar="N", help="Attention heads too, measured on N sentences a direction.", min=0)
    ] = 0,
    halves: Annotated[
        bool, typer.Option("--halves", help="How stable the selection is too: from each half of the text.")
    ] = False,
) -> None:
    """Tests whether related languages keep the same neurons, and use the same heads."""
    from nspec.report.analyze import analyze_run, print_analysis

    print_analysis(analyze_run(Path(run), pivot, permutations, distances, heads, halves))


@tools.command()
def export(
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="A run folder; or neurons that were saved, which go with --base.")
    ],
    system: Annotated[
        str, typer.Option(metavar="NAME", help="A system of the run, such as forward; of `nspec finetune`: a method.")
    ] = "",
    task: Annotated[
        str, typer.Option(metavar="en-de", help="The direction, or the language of `nspec finetune`.")
    ] = "",
    all_: Annotated[bool, typer.Option("--all", help="Every direction; what is the same is there once.")] = False,
    format: Annotated[str, typer.Option(help="transformers or ctranslate2.")] = "transformers",
    quantization: Annotated[
        str, typer.Option(metavar="int8", help="Of ctranslate2: the type of the weights [as they are].")
    ] = "",
    out: Annotated[str, typer.Option(metavar="FOLDER", help="Must not be there [RUN/export/...].")] = "",
    base: Annotated[str, typer.Option(metavar="PATH", help="Of saved neurons: the model that they are beside.")] = "",
    dense_width: Annotated[
        bool, typer.Option("--dense-width", help="Keeps masked neurons, so that all directions are of one size.")
    ] = False,
    k: Annotated[
        str | None,
        typer.Option(
            "--k",
            metavar="0.5,0.9",
            help="A model for each share of the activations, and how good, fast and large it is on the validation set.",
        ),
    ] = None,
) -> None:
    """Writes a direction as a plain model that other tools serve: model, tokenizer, and a README that translates.

    Without the neurons that the direction does not use, where its masks are in the forward pass. With --k neurons are
    selected anew, without training, and the folder has a curve of size and quality.
    """
    from nspec.run.export import export_run
    from nspec.run.export_neurons import export_neurons, has_neurons
    from nspec.run.machine import quieten
    from nspec.serving.export import Settings
    from nspec.terminal import Display

    if bool(task) == all_:
        known = "a direction such as en-de; of `nspec finetune` and saved neurons a language"
        raise ValueError(f"--task {task} and --all: give one of them" if task else f"give --task ({known}) or --all")
    if k is not None and (all_ or dense_width or base or has_neurons(Path(run))):
        raise ValueError(
            "--k measures a direction of a run of translation: it goes with --system and --task, not with --all, "
            "--dense-width or --base"
        )
    settings = Settings(format, quantization or None, not dense_width)
    place = Path(out) if out else None
    quieten()
    if base or has_neurons(Path(run)):
        print(export_neurons(Path(run), base, system, task or None, place, settings), flush=True)
        return
    from nspec.mt.languages import normalized_task

    if k is not None:
        _curve(Path(run), system, normalized_task(task), k, place, settings)
        return
    with Display().bar("export", "directions") as progress:
        wanted = normalized_task(task) if task else None
        folder, tasks = export_run(Path(run), system, wanted, place, settings, progress)
    print(f"{folder}: {system} for {format}, {', '.join(tasks)}", flush=True)


def _curve(run: Path, system: str, task: str, k: str, place: Path | None, settings: Settings) -> None:
    from nspec.report.curve import table
    from nspec.run.curve import export_curve, shares_of
    from nspec.terminal import Display, show

    shares = shares_of(k)
    with Display().bar("export", "sentences") as progress:
        curve = export_curve(run, system, task, shares, place, settings, progress)
    for warning in curve.facts["warnings"]:
        print(f"warning: {warning}", file=sys.stderr, flush=True)
    show(table(curve.facts), *(f"{name}: {text}" for name, text in curve.facts["signatures"].items()))
    print(curve.folder, flush=True)


@tools.command()
def env() -> None:
    """Shows versions, devices and backends."""
    from nspec.env import main

    main()


@tools.command()
def config(
    config: Annotated[str, typer.Argument(metavar="[CONFIG]", help=f"{CONFIG_HELP} The defaults if not given.")] = "",
    set_: SetOption = None,
    finetune: Annotated[
        bool, typer.Option("--finetune", help="The defaults of `nspec finetune`; a file tells by itself.")
    ] = False,
) -> None:
    """Prints a configuration with every option explained."""
    from nspec.run.kinds import load_any
    from nspec.run.yaml import render

    print(render(load_any(config, set_ or (), finetune)), end="")


@tools.command()
def seeds(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Run folders that differ in run.seed alone.")],
    out: Annotated[str, typer.Option(metavar="FOLDER", help="Writes seeds.md, seeds.tsv, costs.tsv and figures.")] = "",
) -> None:
    """Compares the systems of runs with several seeds.

    Means and spread over seeds, and differences from the baseline with a paired t test.
    """
    from nspec.report import seeds_write
    from nspec.report.seeds import compare_seeds

    if out:
        check_output("--out", out, folder=True)
    compared = compare_seeds(runs)
    if out:
        seeds_write.write(compared, Path(out))
    print(seeds_write.markdown(compared), end="")


@tools.command()
def sweep(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="Run folders; the others are compared with the first.")
    ],
    out: Annotated[str, typer.Option(metavar="FOLDER", help="Writes sweep.md, sweep.tsv and figures.")] = "",
    systems: Annotated[
        str, typer.Option(metavar="A,B", help="Those that are compared, such as forward,random [all].")
    ] = "",
) -> None:
    """Compares runs that differ in an option: what each system gains over the baseline, by that option.

    Validation losses, which runs have before they are scored. Runs that differ in run.seed alone are one point.
    """
    from nspec.report.sweep import compare_runs, markdown, write

    if out:
        check_output("--out", out, folder=True)
    compared = compare_runs(runs, [name for part in systems.split(",") if (name := part.strip())])
    if out:
        write(compared, Path(out))
    print(markdown(compared), end="")

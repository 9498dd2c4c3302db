"""Decoding with the model of one task, by Transformers and by CTranslate2, in one process.

    python -m bench.serving --quick --json runs/serving.jsonl    # two threads, beam 5, densities 0.5 and 0.78
    python -m bench.serving --json runs/serving.jsonl            # one and two threads, batch 1 and 32, beam 1 and 5
    python -m bench.serving --from bench/results/serving/*.jsonl --update README.md docs/serving.md

On two cores the first is meant to take less than two minutes, the second less than ten. Models of M2M100's form with random
weights and masks translate random sentences, with outputs of one length; their probabilities are compared before anything
is timed. The forms:

- ``dense``: all neurons.
- ``merged``: ``nspec.merge``, masked rows zero; as much work whatever the density.
- ``compact``: ``nspec.merge(..., compact=True)``.

Every round translates one batch with each model; a speed-up is the median over rounds of the ratio *within* a round.
``speedup`` is over the dense model in the same engine and type, ``over_merged`` over the merged one there,
``over_transformers`` over the dense model in Transformers. ``peak``: most memory of a process that serves the model
alone, beyond that of one which has imported all and loaded nothing. ``saved``: bytes of its folder.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from bench import cli
from bench.report.serving import fragments, line
from bench.rows import Row, read, timing_fields
from bench.serving.memory import measure as peaks_of
from bench.serving.models import (
    SHAPES,
    Decoder,
    Search,
    Served,
    Shape,
    check,
    folder_bytes,
    served,
    sources,
    specialised,
    write,
)
from bench.timing import interleaved, paired, spread
from nspec.serving.ctranslate2 import version, why_not

DENSITIES = (0.3, 0.5, 0.78, 1.0)
QUICK_DENSITIES = (0.5, 0.78)
CPU = torch.device("cpu")
_BATCHES = 8  # different inputs


def say(text: str) -> None:
    """A line of progress, on standard error."""
    print(text, file=sys.stderr, flush=True)


def prepare(shape: Shape, densities: Sequence[float], place: Path) -> dict[Served, Path]:
    """Writes all models; returns their folders."""
    models, folders = served(densities), dict[Served, Path]()
    model = specialised(shape, sorted({*densities, 1.0}))
    for number, one in enumerate(models, start=1):
        say(f"writes {one.key} ({number} of {len(models)})")
        folders[one] = place / one.key
        write(model, one, shape, folders[one])
    return folders


def over(times: Mapping[Served, Sequence[float]], one: Served, base: Served, name: str) -> Row:
    """How many times as fast as another model: median and spread, under ``over_NAME``."""
    found = paired(times[base], times[one])
    return {f"over_{name}{end}": round(value, 4) for end, value in zip(("", "_low", "_high"), found)}


def measure(
    shape: Shape,
    densities: Sequence[float],
    threads: Sequence[int],
    searches: Sequence[Search],
    rounds: int,
    most_seconds: float,
) -> Iterator[Row]:
    """A row for each model, setting of the search and number of threads."""
    searches = sorted(searches, key=lambda search: search.batch * search.beam)
    with tempfile.TemporaryDirectory(prefix="nspec-bench-") as place:
        folders = prepare(shape, densities, Path(place))
        memory: dict[tuple[Served, Search], int | None] = {}
        for number, (one, folder) in enumerate(folders.items(), start=1):
            if one.form == "merged":  # as large as the dense model
                continue
            say(f"memory of {one.key} ({number} of {len(folders)})")
            memory |= zip(((one, search) for search in searches), peaks_of(one, folder, shape, max(threads), searches))
        sizes = {one: folder_bytes(folder) for one, folder in folders.items()}
        for count in threads:
            torch.set_num_threads(count)
            decoders = {one: Decoder(one, folder, shape, count) for one, folder in folders.items()}
            say(f"checks {len(decoders)} models on {count} threads")
            check(decoders.values(), shape)
            for search in searches:
                times = _times(decoders, shape, search, rounds, most_seconds)
                for one, mine in times.items():
                    merged = next(m for m in times if (m.engine, m.dtype, m.form) == (one.engine, one.dtype, "merged"))
                    plain = next(iter(times))
                    yield {
                        "kind": "serving",
                        **vars(one),
                        "shape": shape.name,
                        **{name: getattr(shape, name) for name in ("d_model", "d_ff", "layers", "vocabulary")},
                        "source_tokens": shape.source,
                        "target_tokens": shape.target,
                        **vars(search),
                        "threads": count,
                        **timing_fields(times[one.dense], mine),
                        **over(times, one, merged, "merged"),
                        **over(times, one, plain, "transformers"),
                        "sentences_per_second": round(search.batch / spread(mine).median, 2),
                        "peak_bytes": memory.get((one, search)),
                        "saved_bytes": sizes[one],
                        "ctranslate2": version(),
                    }


def _times(
    decoders: Mapping[Served, Decoder], shape: Shape, search: Search, rounds: int, most_seconds: float
) -> dict[Served, list[float]]:
    batches = sources(shape, _BATCHES * search.batch).split(search.batch)
    calls = {
        one.key: lambda number, decoder=decoder: decoder(batches[number % _BATCHES], search.beam)
        for one, decoder in decoders.items()
    }
    began = time.perf_counter()
    found = interleaved(calls, CPU, rounds=rounds, most_seconds=most_seconds, always=3)  # three have a median
    done = len(next(iter(found.values())))
    say(
        f"batch {search.batch}, beam {search.beam}, {torch.get_num_threads()} threads: {done} rounds in "
        f"{time.perf_counter() - began:.0f} s"
    )
    return {one: found[one.key] for one in decoders}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints, or writes pages; the exit status."""
    made = cli.parser("bench.serving", __doc__, "", "set", "device", "threads")
    add = made.add_argument
    add("--quick", action="store_true", help="two threads, beam 5, densities 0.5 and 0.78")
    add("--shape", choices=SHAPES, default="half", help="default: half, d 512, 3 + 3 layers")
    add("--densities", type=cli.share, nargs="+", help="default: 0.3 0.5 0.78 1")
    add("--batches", type=cli.count, nargs="+", default=[1, 32], help="sentences of a call (default: 1 32)")
    add("--beams", type=cli.count, nargs="+", help="default: 1 5")
    add("--threads", type=cli.count, nargs="+", help="default: 1 2")
    add("--rounds", type=cli.count, default=21, help="at least so many (default: 21)")
    add(
        "--seconds",
        type=float,
        help="of a setting: no round begins after so many, but for three (default: 35; quick: 10)",
    )
    add("--from", type=Path, nargs="+", dest="files", metavar="FILE", help="measures nothing, reads these rows")
    add("--update", type=Path, nargs="+", default=[], metavar="PAGE", help="writes tables between the markers of pages")
    args = made.parse_args(arguments)
    if args.files:
        try:
            rows = read(args.files)
            print(*(f"written: {page}" for page in fragments(rows, args.files, args.update)), sep="\n")
        except (OSError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        return 0
    if args.update:
        made.error("--update goes with --from FILE, the rows that were measured")
    if reason := why_not():
        made.error(reason)
    threads = args.threads or ([2] if args.quick else [1, 2])
    beams = args.beams or ([5] if args.quick else [1, 5])
    densities = args.densities or list(QUICK_DENSITIES if args.quick else DENSITIES)
    torch.set_num_threads(max(threads))
    args.device = "cpu"
    args.threads = 0
    _, writer = cli.started(made, args)
    shape = SHAPES[args.shape]
    say(f"{shape}")
    searches = [Search(batch, beam) for batch, beam in itertools.product(args.batches, beams)]
    seconds = args.seconds if args.seconds is not None else 10 if args.quick else 35
    for row in measure(shape, sorted(set(densities)), threads, searches, args.rounds, seconds):
        print(line(writer(row)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Counting activations over a corpus: ours, the release's way, and no counting at all, on one model and the same batches.

    python -m bench.profiling --set quick --json runs/bench/rows.jsonl

The release's way (Tan et al. 2024) is a hook on every feed-forward layer that copies the activations to the CPU, takes
``nonzero`` of them and ``bincount`` of the neurons' numbers; padding is counted. Ours is ``nspec.profile``, which counts
where fc1 and the ReLU are computed, once with padding counted and once without. "No counting" runs the model on the same
batches and is what profiling costs at least. Each runs the whole corpus in turn; before that the counts of ours are
compared with those of hooks, which have to be the same integers.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import nspec
from bench import cli
from bench.report.cells import model_name
from bench.rows import Row, line, timing_fields
from bench.steps import model as step_model
from bench.steps.model import BASE, BIG, DTYPES, END, RESERVED, Batch, Shape, batch_of, scaled_down, tiny
from bench.timing import interleaved, peak_bytes
from nspec.specialization.feed_forward import FeedForward
from nspec.specialization.layers import find_blocks

Corpus = dict[str, list[Batch]]
"""The batches of each task, on the CPU, as :func:`nspec.mt.text.collate.collate` makes them."""

BASELINE = "release"


@dataclass(frozen=True)
class Work:
    """A model and the corpus to count on: so many tasks, batches of each, and tokens of a side of a batch (padded)."""

    model: Shape
    tasks: int
    batches: int
    batch_tokens: int


SETS: dict[str, dict[str, tuple[Work, ...]]] = {
    "cpu": {
        "full": (Work(scaled_down(BASE), 4, 3, 1024), Work(scaled_down(BIG), 4, 2, 1024)),
        "quick": (Work(scaled_down(BASE), 2, 2, 768),),
        "smoke": (Work(tiny(BASE), 2, 2, 96),),
    },
    "cuda": {
        "full": (Work(BASE, 4, 4, 16384), Work(BIG, 4, 2, 16384)),
        "quick": (Work(BASE, 2, 2, 4096), Work(BIG, 2, 1, 4096)),
        "smoke": (Work(tiny(BASE), 2, 2, 96),),
    },
}
DTYPES_OF = {"cpu": ("float32", "bfloat16"), "cuda": ("bfloat16",)}
ROUNDS = {"full": (11, 120.0), "quick": (7, 5.0), "smoke": (3, 0.1)}
"""At most so many rounds of a model, and no new one after so many seconds (three are always done)."""


def build(shape: Shape, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The model of the training steps in eval mode, its weights in ``dtype``; neurons fire a sixth of the time."""
    model: nn.Module = step_model.build(shape, device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for pair in find_blocks(model):
            bias = torch.empty(pair.d_ff).normal_(-0.5, 0.5)  # unequally often, as in a trained model
            pair.fc1.get_parameter("bias").data.copy_(bias)
    return model.to(dtype).eval()


def corpus(work: Work) -> Corpus:
    """Random tokens in sentences as long as real ones are: 27 tokens on average, one in a hundred more than 90.

    Both sides of a sentence are about equally long. Batches are as the chain makes them for evaluation: sorted by length,
    and as many sentences as fit into ``batch_tokens`` with their padding.
    """
    generator = torch.Generator().manual_seed(0)

    def side(length: int) -> Tensor:
        words = torch.randint(RESERVED, work.model.vocabulary, (length,), generator=generator)
        return torch.cat([words, torch.tensor([END])])

    found: Corpus = {}
    for number in range(work.tasks):
        sentences = work.batches * work.batch_tokens // 12  # more than are needed
        source = torch.empty(sentences).log_normal_(3.15, 0.55, generator=generator).clamp(3, 120)
        target = (source * torch.empty(sentences).log_normal_(0.0, 0.15, generator=generator)).clamp(3, 120)
        batches: list[list[tuple[int, int]]] = [[]]
        for lengths in sorted(zip(source.int().tolist(), target.int().tolist()), key=max):
            if (len(batches[-1]) + 1) * (max(lengths) + 1) > work.batch_tokens:
                batches.append([])
            batches[-1].append(lengths)
        chosen = [batches[round((i + 0.5) * len(batches) / work.batches - 0.5)] for i in range(work.batches)]
        found[f"task-{number}"] = [batch_of((side(s), side(t)) for s, t in lengths) for lengths in chosen]
    return found


class HookCounts:
    """The release's way of counting, padding too. ``totals[task][layer]``: int64 ``[d_ff]``."""

    def __init__(self, pairs: Sequence[FeedForward], tasks: Sequence[str]) -> None:
        self.totals = {task: {p.name: torch.zeros(p.d_ff, dtype=torch.int64) for p in pairs} for task in tasks}
        self.task = ""
        self._pairs = pairs

    @contextmanager
    def attached(self) -> Iterator[HookCounts]:
        """Within the block every run of a layer is counted for :attr:`task`."""
        hooks = [pair.fc2.register_forward_pre_hook(self._counting(pair)) for pair in self._pairs]
        try:
            yield self
        finally:
            for hook in hooks:
                hook.remove()

    def _counting(self, pair: FeedForward) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            neurons = inputs[0].cpu().reshape(-1, pair.d_ff).nonzero()[:, 1]
            self.totals[self.task][pair.name] += torch.bincount(neurons, minlength=pair.d_ff)

        return hook


@torch.no_grad()
def run(model: nn.Module, text: Corpus, device: torch.device, counts: HookCounts | None = None) -> None:
    """The model on every batch; ``counts``, attached by the caller, is told the task."""
    for task, batches in text.items():
        if counts is not None:
            counts.task = task
        for batch in batches:
            model(**{name: tensor.to(device) for name, tensor in batch.items()})


def release(model: nn.Module, text: Corpus, device: torch.device) -> HookCounts:
    """Counts as the release does."""
    with HookCounts(find_blocks(model), list(text)).attached() as counts:
        run(model, text, device, counts)
    return counts


def verify(model: nn.Module, text: Corpus, device: torch.device) -> None:
    """Compares the counts of ours with those of hooks.

    Hooks that look on while ours computes must count the same integers. The release's count of a run of its own, whose
    products PyTorch computes, may differ where an activation is rounding noise around 0: at most one in ten thousand in
    float32 and one in a hundred in 16 bits.

    Raises:
        RuntimeError: they differ.
    """
    hooks = HookCounts(find_blocks(model), list(text))

    def told(task: str, batches: list[Batch]) -> Iterator[Batch]:
        hooks.task = task
        yield from batches

    with hooks.attached():
        ours = nspec.profile(model, {task: told(task, batches) for task, batches in text.items()}, padding="include")
    theirs = release(model, text, device).totals
    off = every = 0
    for task, layer, count in _each(ours):
        if not torch.equal(count, hooks.totals[task][layer]):
            wrong = int((count != hooks.totals[task][layer]).sum())
            raise RuntimeError(
                f"{task}, {layer}: nspec.profile counts {wrong} of {len(count)} neurons unlike hooks on the same "
                "activations; expected equal counts"
            )
        off += int((count - theirs[task][layer]).abs().sum())
        every += int(count.sum())
    bound = 1e-4 if next(model.parameters()).dtype == torch.float32 else 1e-2
    if every == 0 or off > bound * every:
        raise RuntimeError(
            f"nspec.profile counts {every} activations and the release's way differs in {off}; "
            f"expected at most one in {round(1 / bound)}"
        )


def _each(counts: Mapping[str, Mapping[str, Tensor]]) -> Iterator[tuple[str, str, Tensor]]:
    return ((task, layer, count) for task, layers in counts.items() for layer, count in layers.items())


def ways(model: nn.Module, device: torch.device) -> dict[tuple[str, str], Callable[[Corpus], object]]:
    """What is compared, by way and padding: each is called with a corpus."""
    return {
        ("no counting", "include"): lambda text: run(model, text, device),
        ("release", "include"): lambda text: release(model, text, device),
        ("ours", "include"): lambda text: nspec.profile(model, text, padding="include"),
        ("ours", "exclude"): lambda text: nspec.profile(model, text, padding="exclude"),
    }


def measure(work: Work, dtype: str, device: torch.device, rounds: int, most_seconds: float) -> Iterator[Row]:
    """One row for each way, after the counts have been compared."""
    text = corpus(work)
    model = build(work.model, DTYPES[dtype], device)
    verify(model, {task: batches[:1] for task, batches in text.items()}, device)
    batches = [batch for of_task in text.values() for batch in of_task]
    tokens = sum(batch[name].numel() for batch in batches for name in ("input_ids", "labels"))
    real = sum(int(batch[name].sum()) for batch in batches for name in ("attention_mask", "decoder_attention_mask"))
    compared = ways(model, device)
    times = interleaved(
        # The whole corpus each time: its batches are what rotates.
        {" ".join(name): lambda _, call=call: call(text) for name, call in compared.items()},  # type: ignore[misc]
        device,
        rounds=rounds,
        least_seconds=0.0,
        most_seconds=most_seconds,
        warmup=1,
    )
    largest = {"task-0": [max(batches, key=lambda batch: batch["input_ids"].numel() + batch["labels"].numel())]}
    for (way, padding), call in compared.items():
        timing = timing_fields(times["release include"], times[f"{way} {padding}"], calls=len(batches))
        yield {
            "kind": "profiling",
            "way": way,
            "baseline": BASELINE,
            **work.model.fields(),
            "tasks": work.tasks,
            "batches": len(batches),
            "sentences": sum(len(batch["input_ids"]) for batch in batches),
            "tokens": tokens,
            "padding_share": round(1 - real / tokens, 4),
            "dtype": dtype,
            "padding": padding,
            **timing,
            "tokens_per_second": round(tokens / len(batches) / (timing["milliseconds"] / 1e3), 1),
            "peak_bytes": peak_bytes(functools.partial(call, largest), device),
        }


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; the exit status."""
    parser = cli.parser("bench.profiling", __doc__)
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), help="default: float32 bfloat16; GPU: bfloat16")
    args = parser.parse_args(arguments)
    device, write = cli.started(parser, args)
    print("of a batch; speed-up over the release's way: median of paired ratios [middle 80 % of the rounds]")
    for work in SETS[device.type][args.set]:
        for dtype in args.dtypes or DTYPES_OF[device.type]:
            print(f"{model_name(work.model.fields())}, {dtype}: {work.tasks} tasks of {work.batches} batches")
            for row in measure(work, dtype, device, *ROUNDS[args.set]):
                name = f"ours, padding {row['padding']}d" if row["way"] == "ours" else row["way"]
                print(line(name, write(row)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

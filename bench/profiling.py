"""Counting activations over a corpus: ours, the release's way, and no counting at all, on one model and the same batches.

    python -m bench.profiling --set quick --json runs/bench/rows.jsonl

The release's way (Tan et al. 2024) is a hook on every feed-forward layer that copies the activations to the CPU, takes
``nonzero`` of them and ``bincount`` of the neurons' numbers; padding is counted. Ours is ``nspec.profile``, which counts
where fc1 and the ReLU are computed, once with padding counted and once without. "No counting" runs the model on the same
batches and is what profiling costs at least. Each runs the whole corpus in turn; before that the counts of ours are
compared with those of hooks, which have to be the same integers.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

import nspec
from bench import machine, rows, timing
from bench.steps import model as step_model
from bench.steps.model import BASE, BIG, RESERVED, Batch, Shape, scaled_down, tiny
from nspec.specialization.feed_forward import FeedForward
from nspec.specialization.layers import find_blocks
from nspec.specialization.padding import RealTokens

Corpus = dict[str, list[Batch]]
"""The batches of each task, on the CPU, as :func:`nspec.mt.collate.collate` makes them."""

PAD, END = 1, 2
BASELINE = "release"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
    high = work.model.vocabulary

    def side(lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
        words = [torch.randint(RESERVED, high, (n,), generator=generator) for n in lengths]
        ids = pad_sequence([torch.cat([w, torch.tensor([END])]) for w in words], batch_first=True, padding_value=PAD)
        return ids, (ids != PAD).long()

    def batch(lengths: Sequence[tuple[int, int]]) -> Batch:
        (ids, mask), (labels, target_mask) = side([s for s, _ in lengths]), side([t for _, t in lengths])
        shifted = torch.cat([torch.full((len(labels), 1), END), labels[:, :-1]], 1).masked_fill(target_mask == 0, PAD)
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "decoder_input_ids": shifted,
            "decoder_attention_mask": target_mask,
            "labels": labels.masked_fill(target_mask == 0, -100),
        }

    found: Corpus = {}
    for number in range(work.tasks):
        sentences = work.batches * work.batch_tokens // 12  # more than are needed
        source = torch.empty(sentences).log_normal_(3.15, 0.55, generator=generator).clamp(3, 120)
        target = (source * torch.empty(sentences).log_normal_(0.0, 0.15, generator=generator)).clamp(3, 120)
        lengths = sorted(zip(source.int().tolist(), target.int().tolist()), key=max)
        batches, start = [], 0
        while start < len(lengths):
            stop = start + 1
            while stop < len(lengths) and (stop + 1 - start) * (max(lengths[stop]) + 1) <= work.batch_tokens:
                stop += 1
            batches.append(lengths[start:stop])
            start = stop
        chosen = [batches[round((i + 0.5) * len(batches) / work.batches - 0.5)] for i in range(work.batches)]
        found[f"task-{number}"] = [batch(one) for one in chosen]
    return found


class HookCounts:
    """The release's way of counting, with the option to leave padding out. ``totals[task][layer]``: int64 ``[d_ff]``.

    Args:
        pairs: the feed-forward layers.
        tasks: names.
        real: for :attr:`batch`, the bool mask of real tokens of a layer; None counts padding too, as the release does.
    """

    def __init__(
        self,
        pairs: Sequence[FeedForward],
        tasks: Sequence[str],
        real: Callable[[str, Batch], Tensor | None] | None = None,
    ) -> None:
        self.totals = {task: {p.name: torch.zeros(p.d_ff, dtype=torch.int64) for p in pairs} for task in tasks}
        self.task = ""
        self.batch: Batch = {}
        self._pairs, self._real = pairs, real

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
            h = inputs[0].cpu().reshape(-1, pair.d_ff)
            mask = self._real(pair.name, self.batch) if self._real else None
            if mask is not None:
                h = h[mask.reshape(-1)]
            neurons = h.nonzero()[:, 1]
            self.totals[self.task][pair.name] += torch.bincount(neurons, minlength=pair.d_ff)

        return hook


@torch.no_grad()
def run(model: nn.Module, text: Corpus, device: torch.device, counts: HookCounts | None = None) -> None:
    """The model on every batch; ``counts``, attached by the caller, is told task and batch."""
    for task, batches in text.items():
        for batch in batches:
            if counts is not None:
                counts.task, counts.batch = task, batch
            model(**{name: tensor.to(device) for name, tensor in batch.items()})


def release(model: nn.Module, text: Corpus, device: torch.device) -> HookCounts:
    """Counts as the release does."""
    with HookCounts(find_blocks(model), list(text)).attached() as counts:
        run(model, text, device, counts)
    return counts


def verify(model: nn.Module, text: Corpus, device: torch.device) -> None:
    """Compares the counts of ours with those of hooks.

    Hooks that look on while ours computes must count the same integers, with padding and without it. The release's
    count of a run of its own, whose products PyTorch computes, may differ where an activation is rounding noise around 0:
    at most one in ten thousand in float32 and one in a hundred in 16 bits.

    Raises:
        RuntimeError: they differ.
    """
    pairs, real = find_blocks(model), RealTokens(model)
    for padding in ("include", "exclude"):
        hooks = HookCounts(pairs, list(text), real if padding == "exclude" else None)

        def told(task: str, batches: list[Batch], hooks: HookCounts = hooks) -> Iterator[Batch]:
            for batch in batches:
                hooks.task, hooks.batch = task, batch
                yield batch

        with hooks.attached():
            ours = nspec.profile(model, {t: told(t, batches) for t, batches in text.items()}, padding=padding)
        for task, layer, count in _each(ours):
            if not torch.equal(count, hooks.totals[task][layer]):
                wrong = int((count != hooks.totals[task][layer]).sum())
                raise RuntimeError(
                    f"{task}, {layer}, padding {padding}: nspec.profile counts {wrong} of {len(count)} neurons unlike "
                    "hooks on the same activations; expected equal counts"
                )
        if padding == "include":
            theirs = release(model, text, device).totals
            off = sum(int((count - theirs[task][layer]).abs().sum()) for task, layer, count in _each(ours))
            every = sum(int(count.sum()) for _, _, count in _each(ours))
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


def _on(call: Callable[[Corpus], object], text: Corpus, _: int) -> object:
    return call(text)  # the whole corpus each time: its batches are what rotates


def measure(work: Work, dtype: str, device: torch.device, rounds: int, most_seconds: float) -> Iterator[rows.Row]:
    """One row for each way, after the counts have been compared."""
    text = corpus(work)
    model = build(work.model, DTYPES[dtype], device)
    verify(model, {task: batches[:1] for task, batches in text.items()}, device)
    batches = [batch for of_task in text.values() for batch in of_task]
    tokens = sum(batch[name].numel() for batch in batches for name in ("input_ids", "labels"))
    real = sum(int(batch[name].sum()) for batch in batches for name in ("attention_mask", "decoder_attention_mask"))
    compared = ways(model, device)
    times = timing.interleaved(
        {" ".join(name): functools.partial(_on, call, text) for name, call in compared.items()},
        device,
        rounds=rounds,
        least_seconds=0.0,
        most_seconds=most_seconds,
        warmup=1,
    )
    largest = {"task-0": [max(batches, key=lambda batch: batch["input_ids"].numel() + batch["labels"].numel())]}
    for (way, padding), call in compared.items():
        taken = times[f"{way} {padding}"]
        milliseconds = timing.spread([1e3 * seconds / len(batches) for seconds in taken])
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
            **rows.timing_fields(milliseconds, timing.paired(times["release include"], taken), len(taken)),
            "tokens_per_second": round(tokens / len(batches) / (milliseconds.median / 1e3), 1),
            "peak_bytes": timing.peak_bytes(functools.partial(call, largest), device),
        }


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(prog="python -m bench.profiling", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--set", choices=("full", "quick", "smoke"), default="quick", help="how much is measured")
    parser.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu or cuda")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: as PyTorch chooses")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), help="default: float32 bfloat16; GPU: bfloat16")
    parser.add_argument("--json", type=Path, help="rows are appended to this file")
    args = parser.parse_args(arguments)
    try:
        device = machine.pick_device(args.device)
    except ValueError as error:
        parser.error(str(error))
    if args.threads:
        torch.set_num_threads(args.threads)
    rounds, seconds = ROUNDS[args.set]
    write = rows.Writer(args.json, device)
    print(f"{machine.device_name(device)}, torch {torch.__version__}")
    print("speed-up over the release's way: median of paired ratios [middle 80 % of the rounds]")
    for work in SETS[device.type][args.set]:
        for dtype in args.dtypes or DTYPES_OF[device.type]:
            for number, row in enumerate(measure(work, dtype, device, rounds, seconds)):
                if not number:
                    print(_title(row))
                _show(write(row))
    return 0


def _title(row: rows.Row) -> str:
    layers = f"{row['encoder_layers']} + {row['decoder_layers']} layers"
    return (
        f"{row['shape']}{' (scaled)' if row['scaled'] else ''}, {row['dtype']}: d {row['d_model']}, d_ff {row['d_ff']}, "
        f"{layers}; {row['tasks']} tasks, {row['batches']} batches, {row['sentences']} sentences, {row['tokens']} tokens, "
        f"{row['padding_share']:.0%} of them padding"
    )


def _show(row: rows.Row) -> None:
    name = row["way"] if row["way"] != "ours" else f"ours, padding {row['padding']}d"
    print(
        f"  {name:<24}{row['milliseconds']:10.1f} ms a batch  {rows.figure(row):<22}"
        f"{row['tokens_per_second']:12.0f} tokens/s{row['peak_bytes'] / 2**20:10.0f} MiB",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())

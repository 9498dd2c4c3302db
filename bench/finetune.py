"""A step of fine-tuning a language model: all of it, LoRA, feed-forward rows as published, and neurons, in one process.

    python -m bench.finetune           # d 512, d_ff 1376, 4 layers, 1024 tokens on a CPU: about two minutes on two cores
    python -m bench.finetune --shares 0.01 0.05 --json runs/finetune.jsonl --figure runs/finetune.svg

A step is forward, backward and fused AdamW on random tokens through a Llama with new weights. Every round runs each system
once; a speed-up is the median over rounds of the ratio of times *within* a round, so that a machine that is busy with other
things slows both alike. The systems:

- ``full``: all parameters.
- ``lora``: rank 16 on all seven linear layers of each block, by the peft library (left out where it is not installed).
- ``published``: what published code does for the same neurons: each weight cloned, rows scattered into the clone, a dense
  weight gradient indexed afterwards.
- ``neurons``: ``nspec.finetune``, at each share.

The gradients of ``published`` and ``neurons`` are compared before anything is timed. ``peak``: most memory that a step
allocates beyond the model, gradients included. ``state``: bytes of what is trained, with its gradient and the two moments
of AdamW. ``saved``: bytes of the file that holds the result; the published code saves the whole model.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import nspec
from bench import cli
from bench.report.cells import table as markdown
from bench.report.figures import style
from bench.rows import Row, timing_fields
from bench.timing import interleaved, paired, peak_bytes, spread

SHARES = (0.002, 0.01, 0.05)
RANK = 16
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
VOCABULARY = 4000


@dataclass(frozen=True)
class Shape:
    """Sizes of the model and of a step."""

    name: str
    d_model: int
    d_ff: int
    layers: int
    tokens: int
    sequence: int = 128


SHAPES = {
    "small": Shape("small", 512, 1376, 4, 1024),
    "large": Shape("large", 2048, 8192, 8, 8192, 1024),  # half of Llama-3.2-1B, for a GPU
    "tiny": Shape("tiny", 32, 64, 2, 32, 16),  # to see that all runs
}


@dataclass
class System:
    """What is timed: a model, what of it is trained, and its optimiser."""

    name: str
    share: float
    model: Any
    trained: list[Tensor]

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4, fused=True)

    @property
    def key(self) -> str:
        """Unique among the systems."""
        return f"{self.name} {self.share:g}" if self.share else self.name

    @property
    def state_bytes(self) -> int:
        """The trained numbers, their gradients and AdamW's two moments."""
        return sum(4 * p.numel() * p.element_size() for p in self.trained)

    def backward(self, ids: Tensor) -> None:
        """Forward and backward pass."""
        self.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    def step(self, ids: Tensor) -> None:
        """A step of training; leaves no gradient."""
        self.backward(ids)
        self.optimizer.step()
        self.optimizer.zero_grad()


def base(shape: Shape, device: torch.device, dtype: torch.dtype) -> Any:
    """The model that all systems start from, the same each time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    heads = max(2, shape.d_model // 64)
    config = LlamaConfig(
        hidden_size=shape.d_model,
        intermediate_size=shape.d_ff,
        num_hidden_layers=shape.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=VOCABULARY,
        max_position_embeddings=shape.sequence,
        tie_word_embeddings=True,
    )
    model: Any = LlamaForCausalLM(config)
    return model.to(device, dtype)


def neurons_of(shape: Shape, share: float) -> list[Tensor]:
    """The neurons of each layer, drawn at random: int64 ``[k]``, rising."""
    count = max(1, round(share * shape.d_ff))
    generator = torch.Generator().manual_seed(1)
    return [torch.randperm(shape.d_ff, generator=generator)[:count].sort().values for _ in range(shape.layers)]


class _Published(nn.Module):
    """A gated block whose rows are scattered into a clone of each weight at every call."""

    def __init__(self, mlp: Any, index: Tensor) -> None:
        super().__init__()
        self.mlp, self.index = mlp, index.to(mlp.gate_proj.weight.device)
        self.gate = nn.Parameter(mlp.gate_proj.weight[self.index].detach().clone())
        self.up = nn.Parameter(mlp.up_proj.weight[self.index].detach().clone())
        self.down = nn.Parameter(mlp.down_proj.weight[:, self.index].detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = (w.weight.clone() for w in (self.mlp.gate_proj, self.mlp.up_proj, self.mlp.down_proj))
        gate[self.index], up[self.index], down[:, self.index] = self.gate, self.up, self.down
        hidden = functional.silu(functional.linear(x, gate)) * functional.linear(x, up)
        return functional.linear(hidden, down)


def build(name: str, model: Any, shape: Shape, share: float = 0.0) -> System:
    """A system made of a fresh model; of ``published`` and ``neurons`` with that share of the neurons, the same ones."""
    if name == "lora":
        from peft import LoraConfig, get_peft_model

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft calls what Transformers renames
            model = get_peft_model(model, LoraConfig(r=RANK, target_modules=LINEARS))
    elif name == "published":
        model.requires_grad_(False)
        for layer, index in zip(model.model.layers, neurons_of(shape, share)):
            frozen = layer.mlp
            layer.mlp = _Published(frozen, index)
    elif name == "neurons":
        masks = {
            f"model.layers.{number}.mlp.gate_proj": torch.zeros(shape.d_ff, dtype=torch.bool).index_fill_(
                0, index, True
            )
            for number, index in enumerate(neurons_of(shape, share))
        }
        dtype = model.model.layers[0].mlp.gate_proj.weight.dtype  # as the other systems
        nspec.finetune(model, nspec.NeuronMasks({"task": masks}), dtype=dtype, quiet=True)
    return System(name, share, model, [p for p in model.parameters() if p.requires_grad])


def check(ours: System, theirs: System, ids: Tensor) -> None:
    """Whether both compute the same gradients.

    Raises:
        ValueError: they differ by more than rounding.
    """
    for system in (ours, theirs):
        system.backward(ids)
    layers = ours.model.model.layers
    for number, layer in enumerate(layers):
        block, mlp = theirs.model.model.layers[number].mlp, layer.mlp
        for mine, other in ((mlp.gate_proj, block.gate), (mlp.up_proj, block.up), (mlp.down_proj, block.down)):
            grad = mine.neurons.of("task").grad
            expected = other.grad.t() if mine is mlp.down_proj else other.grad
            worst = float((grad - expected).abs().max() / expected.abs().max())
            if not worst < (1e-3 if grad.dtype == torch.float32 else 5e-2):
                raise ValueError(
                    f"layer {number}: gradients differ from the published way's by {worst:.2g} of the largest"
                )
    for system in (ours, theirs):
        system.optimizer.zero_grad()


def saved_bytes(system: System) -> int:
    """Bytes of the file with the result."""
    if system.name in ("full", "published"):
        return sum(p.numel() * p.element_size() for p in {id(p): p for p in system.model.parameters()}.values())
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        if system.name == "neurons":
            nspec.save_neurons(system.model, folder)
            return (Path(folder) / "neurons.safetensors").stat().st_size
        system.model.save_pretrained(folder)
        return (Path(folder) / "adapter_model.safetensors").stat().st_size


def measure(
    shape: Shape, shares: Sequence[float], device: torch.device, dtype: torch.dtype, rounds: int, most_seconds: float
) -> Iterator[Row]:
    """A row for each system."""
    named = [("full", 0.0), ("lora", 0.0), ("published", max(shares)), *(("neurons", share) for share in shares)]
    if importlib.util.find_spec("peft") is None:
        print("lora is left out: peft is not installed (pip install '.[bench]')", file=sys.stderr)
        named.pop(1)
    systems = [build(name, base(shape, device, dtype), shape, share) for name, share in named]
    generator = torch.Generator().manual_seed(2)
    size = (shape.tokens // shape.sequence, shape.sequence)
    batches = [torch.randint(0, VOCABULARY, size, generator=generator).to(device) for _ in range(4)]
    theirs = next(s for s in systems if s.name == "published")
    check(next(s for s in systems if s.name == "neurons" and s.share == theirs.share), theirs, batches[0])
    calls = {system.key: lambda number, s=system: s.step(batches[number % len(batches)]) for system in systems}
    times = interleaved(calls, device, rounds=rounds, most_seconds=most_seconds)
    peaks = {system.key: peak_bytes(lambda s=system: s.step(batches[0]), device) for system in systems}  # type: ignore[misc]
    whole = sum(p.numel() for p in systems[0].trained)
    for system in systems:
        mine = times[system.key]
        row: Row = {
            "kind": "finetune",
            "system": system.name,
            "share": system.share,
            "shape": shape.name,
            **{name: getattr(shape, name) for name in ("d_model", "d_ff", "layers", "tokens")},
            "dtype": str(dtype).removeprefix("torch."),
            **timing_fields(times["full"], mine),
            "tokens_per_second": round(shape.tokens / spread(mine).median, 1),
            "trained": sum(p.numel() for p in system.trained),
            "parameters": whole,
            "peak_bytes": peaks[system.key],
            "state_bytes": system.state_bytes,
            "saved_bytes": saved_bytes(system),
        }
        for other in ("lora", "published"):
            key = next((s.key for s in systems if s.name == other), None)
            if key is not None and system.name == "neurons":
                ratio = paired(times[key], mine)
                row |= {f"over_{other}": round(ratio.median, 4)}
                row |= {f"over_{other}_low": round(ratio.low, 4), f"over_{other}_high": round(ratio.high, 4)}
        yield row


def label(row: Row) -> str:
    """A system in words."""
    names = {"full": "full fine-tuning", "lora": f"LoRA r = {RANK}, 7 linears", "published": "rows, as published"}
    return names.get(row["system"], f"neurons, {row['share']:.1%}")


def table(rows: Sequence[Row]) -> str:
    """The rows for a terminal."""

    def ratio(row: Row, name: str) -> str:
        return f"{row[name]:.2f} [{row[name + '_low']:.2f}, {row[name + '_high']:.2f}]" if name in row else ""

    header = ["system", "ms/step", "tokens/s", "x full", "x LoRA", "x published"]
    header += ["trained", "state MB", "peak MB", "saved MB"]
    body = [
        [label(row), f"{row['milliseconds']:.1f}", f"{row['tokens_per_second']:.0f}"]
        + [ratio(row, name) for name in ("speedup", "over_lora", "over_published")]
        + [f"{row['trained']:,}", *(f"{row[name] / 1e6:.2f}" for name in ("state_bytes", "peak_bytes", "saved_bytes"))]
        for row in rows
    ]
    return "\n".join(markdown(header, body))


_LABELS = {
    "full": (0, 9, "center"),
    "lora": (7, -3, "left"),
    "published": (-7, -3, "right"),
    "neurons": (0, 9, "center"),
}
"""Where the name of a system stands from its point, in points, so that those of near ones do not meet."""


def draw(rows: Sequence[Row], path: Path) -> None:
    """The share of the model that is trained against speed and against memory.

    Args:
        rows: of one shape and machine.
        path: an image file, of the kind that its name ends in.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, 2)
    least = min(row["share"] for row in rows if row["system"] == "neurons")
    colours = {"full": "#8c8c8c", "lora": "#e69f00", "published": "#cc79a7", "neurons": "#0072b2"}
    for axes, name, title in (
        (panels[0], "speedup", "times the speed of full fine-tuning"),
        (panels[1], "memory", "MB allocated by a step, and kept for what is trained"),
    ):
        for row in rows:
            kept = row["state_bytes"] + row["peak_bytes"]
            value = row["speedup"] if name == "speedup" else kept / 1e6
            share = 100 * row["trained"] / row["parameters"]
            axes.scatter([share], [value], color=colours[row["system"]], s=50, zorder=3)
            words, (x, y, align) = label(row), _LABELS[row["system"]]
            if row["system"] == "neurons" and row["share"] != least:
                words = words.removeprefix("neurons, ")
            axes.annotate(words, (share, value), xytext=(x, y), textcoords="offset points", fontsize=7.5, ha=align)
            if name == "speedup":
                axes.vlines(share, row["speedup_low"], row["speedup_high"], color=colours[row["system"]], linewidth=1)
        style(axes, title, "share of the model that is trained, %")
        axes.set_xscale("log")
        axes.margins(x=0.2, y=0.2)
    one = rows[0]
    figure.suptitle(
        f"Llama blocks, d {one['d_model']}, d_ff {one['d_ff']}, {one['layers']} layers, {one['tokens']} tokens, "
        f"{one['dtype']}; {one['device']}, {one['date'][:10]}",
        fontsize=9,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints; the exit status."""
    made = cli.parser("bench.finetune", __doc__, "", "set")
    add = made.add_argument
    add("--shape", choices=SHAPES, help="default: small on a CPU, large on a GPU")
    add("--shares", type=cli.share, nargs="+", default=list(SHARES), help="of neurons (default: 0.002 0.01 0.05)")
    add("--dtype", choices=("float32", "bfloat16"), help="default: float32 on a CPU, bfloat16 on a GPU")
    add("--rounds", type=cli.count, default=21, help="at least so many (default: 21)")
    add("--seconds", type=float, default=180, help="no round begins after so many (default: 180)")
    add("--figure", type=Path, metavar="FILE", help="draws speed and memory against the trained share")
    args = made.parse_args(arguments)
    device, write = cli.started(made, args)
    gpu = device.type == "cuda"
    shape = SHAPES[args.shape or ("large" if gpu else "small")]
    dtype = getattr(torch, args.dtype or ("bfloat16" if gpu else "float32"))
    print(f"{shape}, {dtype}", flush=True)
    rows = [write(row) for row in measure(shape, args.shares, device, dtype, args.rounds, args.seconds)]
    print(table(rows), flush=True)
    if args.figure is not None:
        draw(rows, args.figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())

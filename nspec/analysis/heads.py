"""Which attention heads matter to which task: the importance of Michel, Levy and Neubig (NeurIPS 2019).

Think of a gate of 1 on what each head puts out, before the heads are projected together. The importance of a head to a
task is how much the loss of a sentence of it changes, to first order, when its gate moves: I_h = E |∂L / ∂gate_h| with
∂L / ∂gate_h = Σ over tokens of Att_h · ∂L / ∂Att_h. One backward pass gives it for all heads.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nspec.analysis.overlap import Floats, layer_side
from nspec.analysis.proximity import Direction, task_name
from nspec.specialization.masks import NeuronMasks
from nspec.specialization.ranking import number_of
from nspec.specialization.storage import Kind, Stacked, reading, save_stacked
from nspec.specialization.tensors import TaskTensors, each

Loss = Callable[[nn.Module, Any], Tensor]
_KIND = Kind("heads", ("F64",))


class HeadImportance(TaskTensors):
    """``importance[task][layer]`` is a float64 tensor ``[heads]``, not negative. A mapping of tasks.

    Layers are the qualified names of attention modules (``model.decoder.layers.0.encoder_attn``).

    Args:
        importance: task -> {layer: floating-point tensor ``[heads]``}. Copied.

    Raises:
        ValueError: no task, tasks with different layers or numbers of heads, or a value that is negative or not finite.
        TypeError: a value that is not a floating-point tensor ``[heads]``.
    """

    def __init__(self, importance: Mapping[str, Mapping[str, Tensor]]) -> None:
        super().__init__(each(importance, _checked))

    def __repr__(self) -> str:
        return f"HeadImportance({len(self.tasks)} tasks, {len(self.layers)} layers)"

    def matrix(self, layer: str) -> Floats:
        """The importance of one layer's heads: float64 [tasks, heads]."""
        return np.stack([self[task][layer].numpy() for task in self.tasks])

    def normalized(self) -> HeadImportance:
        """Each layer of each task divided by its l2 norm, as Michel et al. do; a layer of zeros stays.

        Gradients are larger in some layers than in others, so heads of different layers compare only after this.
        """
        return HeadImportance(
            {t: {n: v / v.norm() if v.any() else v for n, v in layers.items()} for t, layers in self.items()}
        )

    def shares(self, layer: str) -> Floats:
        """Each head's share of its layer's importance: float64 [tasks, heads], rows sum to 1; a layer of zeros is 0."""
        rows = self.matrix(layer)
        total = rows.sum(1, keepdims=True)
        return np.asarray(rows / np.where(total > 0, total, 1.0), dtype=np.float64)

    def similarity(self, layer: str) -> Floats:
        """The cosine of every two tasks' importance in one layer: float64 [tasks, tasks], symmetric, in [0, 1].

        ``1 - similarity`` is a matrix of distances for :mod:`nspec.analysis.mantel` and
        :mod:`nspec.analysis.clustering`: the diagonal is 1 exactly. Two layers of zeros are equal, so their similarity
        is 1; to others theirs is 0.
        """
        rows = self.matrix(layer)
        length = np.linalg.norm(rows, axis=1, keepdims=True)
        rows = rows / np.where(length > 0, length, 1.0)
        cosine = np.clip(rows @ rows.T, 0.0, 1.0)
        silent = length[:, 0] == 0
        cosine[np.outer(silent, silent)] = 1.0
        np.fill_diagonal(cosine, 1.0)
        return np.asarray((cosine + cosine.T) / 2, dtype=np.float64)

    def top(self, k: float) -> NeuronMasks:
        """The heads that matter most: per task and layer the smallest set that holds a share ``k`` of the importance.

        The head that crosses the line is kept, as neurons are; equal ones go by the lower index. A layer of zeros has no
        head that matters. The answer is bool ``[heads]`` where masks of neurons are ``[d_ff]``, so
        :mod:`nspec.analysis.overlap` gives its IoU.

        Args:
            k: share, in (0, 1].

        Raises:
            ValueError: ``k`` is outside.
        """
        if not 0 < k <= 1:
            raise ValueError(f"k is {k}, expected a share above 0 and up to 1, such as 0.9")
        return NeuronMasks({t: {n: _top(v, k) for n, v in layers.items()} for t, layers in self.items()})

    def largest(self, share: float) -> NeuronMasks:
        """The share of each layer's heads that matter most to each task, for :func:`nspec.baselines.heads.mask_heads`.

        The number is rounded, halves up, and at least 1; equal heads go by the lower index.

        Args:
            share: in (0, 1].

        Raises:
            ValueError: ``share`` is outside.

        Example:
            >>> importance = HeadImportance({"en-de": {"self_attn": torch.tensor([0.1, 0.4, 0.2, 0.3])}})
            >>> importance.largest(0.5)["en-de"]["self_attn"].tolist()
            [False, True, False, True]
        """
        if not 0 < share <= 1:
            raise ValueError(f"share is {share}, expected a share above 0 and up to 1, such as 0.75")
        part = Fraction(repr(float(share)))

        def largest(value: Tensor) -> Tensor:
            order = torch.argsort(value, descending=True, stable=True)[: number_of(part, len(value))]
            return torch.zeros(len(value), dtype=torch.bool).index_fill_(0, order, True)

        return NeuronMasks({task: {n: largest(v) for n, v in layers.items()} for task, layers in self.items()})

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes ``heads.safetensors`` (float64 ``[tasks, heads]`` by layer) and a readable ``heads.json``.

        Raises:
            OSError: the files cannot be written; what was there is unchanged.
        """
        stacked = {layer: torch.stack([self[task][layer] for task in self.tasks]) for layer in self.layers}
        # The format has one name for the width of a layer, whatever it counts.
        widths = {layer: rows.shape[1] for layer, rows in stacked.items()}
        layers = {layer: {"d_ff": width} for layer, width in widths.items()}
        rounded = {
            task: {layer: [float(f"{x:.6g}") for x in v.tolist()] for layer, v in self[task].items()}
            for task in self.tasks
        }
        readable = {"tasks": self.tasks, "layers": layers, "importance": rounded}
        save_stacked(Path(folder), _KIND, Stacked(stacked, self.tasks, widths), readable)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> HeadImportance:
        """Reads what :meth:`save` wrote.

        Raises:
            FileNotFoundError: there is no ``heads.safetensors`` in the folder.
            ValueError: the file is broken, or is not one of head importance.
        """
        with reading(Path(folder), _KIND) as (stacked, tasks, _, _):
            return cls({task: {layer: rows[i] for layer, rows in stacked.items()} for i, task in enumerate(tasks)})


def attention_kind(layer: str) -> str:
    """``encoder self``, ``decoder self`` or ``cross``: where an attention module looks from and to, by its name.

    Cross-attention is called ``encoder_attn`` by transformers and ``multihead_attn`` by PyTorch.

    Raises:
        ValueError: the name says neither encoder nor decoder.
    """
    side = layer_side(layer)
    return "cross" if layer.rpartition(".")[2] in ("encoder_attn", "multihead_attn") else f"{side} self"


def head_similarity(
    importance: HeadImportance, layers: Sequence[str], direction: Direction, pivot: str, codes: Sequence[str]
) -> Floats:
    """How alike languages use the heads of each layer (cosine): float64 [layers, codes, codes].

    Takes the place of :func:`nspec.analysis.proximity.mask_iou` in :func:`nspec.analysis.proximity.proximity`.
    """
    places = [importance.tasks.index(task_name(direction, pivot, code)) for code in codes]
    return np.stack([importance.similarity(layer)[np.ix_(places, places)] for layer in layers])


def head_importance(
    model: nn.Module,
    batches: Mapping[str, Iterable[Mapping[str, Any]]],
    *,
    loss: Loss | None = None,
    normalize: bool = False,
    progress: Callable[[str, int], None] | None = None,
) -> HeadImportance:
    """Measures, per task, how much each attention head matters to the loss, with teacher forcing in eval mode.

    The loss of each sentence is the sum over its target tokens, and the absolute value is taken per sentence, whatever
    the batch: the same text gives the same importance however it is batched and padded. A specialised model computes as
    it is switched: measure it within ``with nspec.task(model, name)``, a task a call, or dense.

    Args:
        model: any module whose attention modules have ``out_proj`` and ``num_heads`` or ``head_dim``, with sentences
            along the first dimension. Its parameters, gradients and modes are as before afterwards.
        batches: for each task its batches: what ``model(**batch)`` takes. Tensors are moved to the model's device.
            Iterated once.
        loss: ``loss(model, batch)`` runs the model and gives the loss of the batch, a sum over sentences that do not
            touch each other. By default cross-entropy of ``logits`` against ``labels``, summed over the labels
            that are not -100.
        normalize: divides each layer by its l2 norm, as :meth:`HeadImportance.normalized`.
        progress: called as ``progress(task, batches done)`` after each batch.

    Returns:
        float64 means over the sentences of each task, in nats per sentence.

    Raises:
        ValueError: no task, a task without batches or sentences, no attention module, one that the batches do not run or
            run twice, or a model or batch that the default loss is not for.
    """
    if not batches:
        raise ValueError("no task: batches is empty")
    layers = attention_layers(model)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    measure = loss or _cross_entropy
    found: dict[str, dict[str, Tensor]] = {}
    with _undisturbed(model), _gated(model, layers) as gates:
        for task, task_batches in batches.items():
            totals = {name: torch.zeros(heads, dtype=torch.float64) for name, heads in layers.items()}
            sentences = 0
            for done, batch in enumerate(task_batches, 1):
                moved = {key: v.to(device) if isinstance(v, Tensor) else v for key, v in batch.items()}
                gates.clear()
                with torch.enable_grad():
                    value = measure(model, moved)
                if missing := [name for name in layers if name not in gates]:
                    raise ValueError(f"the batches of task {task} did not run the attention module {missing[0]}")
                gradients = torch.autograd.grad(value, [gates[name] for name in layers], allow_unused=True)
                for name, gradient in zip(layers, gradients):
                    if gradient is not None:
                        totals[name] += gradient.detach().double().abs().sum(0).cpu()
                sentences += len(next(iter(gates.values())))
                if progress is not None:
                    progress(task, done)
            if not sentences:
                raise ValueError(f"task {task} has no sentences: there is nothing to measure its heads on")
            found[task] = {name: total / sentences for name, total in totals.items()}
    importance = HeadImportance(found)
    return importance.normalized() if normalize else importance


def attention_layers(model: nn.Module) -> dict[str, int]:
    """The attention modules of a model by qualified name, with their numbers of heads, in the order of the model.

    Raises:
        ValueError: there is none, or the heads of one do not divide the width of its ``out_proj``.
    """
    found: dict[str, int] = {}
    for name, module in model.named_modules():
        projection = getattr(module, "out_proj", None)
        # torch's own attention has these names too, but reads the weights of out_proj without calling it.
        if not isinstance(projection, nn.Module) or isinstance(module, nn.MultiheadAttention):
            continue
        heads, width = getattr(module, "num_heads", None), getattr(projection, "in_features", None)
        size = getattr(module, "head_dim", None)
        if not isinstance(width, int) or not (isinstance(heads, int) or isinstance(size, int)):
            continue
        number = heads if isinstance(heads, int) else width // int(size or 1)
        if number < 1 or width % number:
            raise ValueError(f"{name} has {number} heads, which do not divide the {width} inputs of its out_proj")
        found[name] = number
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no attention module with out_proj and num_heads or head_dim: its heads cannot "
            "be told apart"
        )
    return found


@contextlib.contextmanager
def _gated(model: nn.Module, layers: Mapping[str, int]) -> Iterator[dict[str, Tensor]]:
    """While it is entered, each head's output is multiplied by a gate of 1 of its own for every sentence.

    A gate for every sentence, not one for all, because the absolute value is taken before the mean.

    Yields:
        The gates ``[sentences, heads]`` of the last forward pass, by layer.
    """
    gates: dict[str, Tensor] = {}

    def gating(name: str, heads: int) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
        def pre_hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            context = args[0]  # [sentences, ..., heads * head_dim]
            if name in gates:
                raise ValueError(
                    f"{name} runs twice in a forward pass: its heads have no importance of their own there"
                )
            gates[name] = context.new_ones(len(context), heads).requires_grad_()
            spread = gates[name].reshape(len(context), *[1] * (context.dim() - 2), heads, 1)
            return ((context.unflatten(-1, (heads, -1)) * spread).flatten(-2), *args[1:])

        return pre_hook

    with contextlib.ExitStack() as hooks:
        for name, heads in layers.items():
            projection = model.get_submodule(name).get_submodule("out_proj")
            hooks.enter_context(projection.register_forward_pre_hook(gating(name, heads)))
        yield gates


@contextlib.contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode, and no parameter wants a gradient, which saves half of the backward pass; all as before afterwards."""
    modes = {module: module.training for module in model.modules()}
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.eval()
    model.requires_grad_(False)
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        for parameter, requires in wanted.items():
            parameter.requires_grad_(requires)


def _cross_entropy(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    if not isinstance(batch.get("labels"), Tensor):
        raise ValueError(f"a batch has {', '.join(batch)} and no labels: give them, or loss= for this model")
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"{type(model).__name__} is no encoder and decoder, whose logits stand beside labels: give loss="
        )
    logits = model(**batch).logits
    # In float32 at least: sums of many log probabilities lose digits in half precision.
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return nn.functional.cross_entropy(logits.flatten(0, -2), batch["labels"].flatten(), reduction="sum")


def _top(importance: Tensor, k: float) -> Tensor:
    order = torch.argsort(importance, descending=True, stable=True)
    reached = torch.cumsum(importance[order], 0)
    mask = torch.zeros(len(importance), dtype=torch.bool)
    if len(reached) and reached[-1] > 0:
        # Up to rounding: a sum that reaches the line exactly must not take one more.
        needed = int((reached < k * reached[-1] * (1 - 1e-12)).sum()) + 1
        mask[order[:needed]] = True
    return mask


def _checked(task: str, layer: str, value: Tensor) -> Tensor:
    if not isinstance(value, Tensor) or not value.dtype.is_floating_point or value.dim() != 1:
        found = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"importance of {task}, {layer}: found {found}, expected a float64 tensor [heads]")
    if value.numel() and not (torch.isfinite(value).all() and bool((value >= 0).all())):
        raise ValueError(f"importance of {task}, {layer} is {value.tolist()}, expected finite numbers, none below 0")
    return value.detach().to("cpu", torch.float64, copy=True)

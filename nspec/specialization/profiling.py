"""Profiling: counting, for each task, how often each feed-forward neuron fires."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args, overload

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nspec.nn.task_layers import TaskLayer

from .candidates import experts_not_taken
from .counting import Counters
from .counts import ActivationCounts
from .feed_forward import FeedForward
from .layers import computes_linear, find_blocks, without_fast_path
from .losses import LossOf, SummedLoss
from .naming import Layer
from .padding import RealTokens, check_tensor, rows_are_samples
from .passes import TokenMasks
from .quantised import computes_affine, is_packed
from .scores import NeuronScores, Score, check_score
from .scoring import Scorers
from .tasks import task as switched_to


@overload
def profile(
    model: nn.Module,
    batches: Mapping[str, Iterable[Any]],
    *,
    layers: Iterable[Layer] | None = None,
    padding: str = "exclude",
    valid: Callable[[str, Any], Tensor | None] | None = None,
    progress: Callable[[str, int], None] | None = None,
    score: Literal["count"] = "count",
) -> ActivationCounts: ...


@overload
def profile(
    model: nn.Module,
    batches: Mapping[str, Iterable[Any]],
    *,
    layers: Iterable[Layer] | None = None,
    padding: str = "exclude",
    valid: Callable[[str, Any], Tensor | None] | None = None,
    progress: Callable[[str, int], None] | None = None,
    score: Score,
    loss: LossOf | None = None,
) -> NeuronScores: ...


def profile(
    model: nn.Module,
    batches: Mapping[str, Iterable[Any]],
    *,
    layers: Iterable[Layer] | None = None,
    padding: str = "exclude",
    valid: Callable[[str, Any], Tensor | None] | None = None,
    progress: Callable[[str, int], None] | None = None,
    score: Literal["count"] | Score = "count",
    loss: LossOf | None = None,
) -> ActivationCounts | NeuronScores:
    """Counts, per task, layer and neuron, the tokens that fire it, with teacher forcing in eval mode; or sums up scores.

    A neuron fires where its pre-activation is above 0: there ReLU, GELU, SiLU, squared ReLU and their like are above 0, and
    for activations that are never 0 (the sigmoid) it is the definition. Of a gated block, which is called by its gate
    projection, the pre-activation is the gate's. Experts count the tokens that a router sends to them. What the model
    computes is not changed (where the activation is ReLU alone, fc1 runs through ``linear_relu_count``).

    A specialised model is profiled dense. The model is changed only while a batch runs: what the batches' generator does
    with it (back-translation, say) is as it would be elsewhere, and does not count.

    Args:
        model: any module with feed-forward blocks: plain (fc1, activation, fc2), gated, or with both projections of a gated
            one in one layer. DataParallel and DistributedDataParallel are passed by, and compiled code runs uncompiled.
        batches: for each task the batches to run: what ``model(**batch)`` takes (a mapping), or ``model(*batch)`` (a
            tuple, named or not, or list), or one tensor. Tensors are moved to the model's device. Iterated once.
        layers: as in ``find_blocks``; None takes all.
        padding: ``exclude``: only real tokens count. ``include``: padded positions count too, as in the release of Tan
            et al. 2024.
        valid: ``valid(layer, batch)`` gives the bool mask of real tokens of a layer, in the shape of the leading
            dimensions of its activations, or None for all. By default the batch's own, under the names that
            ``model.forward`` gives its arguments. For encoders, and models that are one stack: a mask of padding
            (``src_key_padding_mask``, ``encoder_padding_mask`` and the like: True or -inf is padding), else
            ``attention_mask``, else token ids that are not padding. For decoders: ``tgt_key_padding_mask`` and the like,
            else ``decoder_attention_mask``, else ``labels`` that are neither -100 nor padding, else the decoder's token
            ids that are not padding. Layers may keep time first, or flatten a batch to tokens.
        progress: called as ``progress(task, batches done)`` after each batch.
        score: ``count``; or, of what fc2 gets, h, averaged over real tokens: ``magnitude``, ``abs(h)``; ``gradient``,
            ``abs(h * dL/dh)`` with the loss L summed over the labels of a batch, so that a token weighs the same in a
            batch of any size. That takes a backward pass, which leaves no gradient on any parameter.
        loss: for ``gradient``: ``loss(output, batch)``, the loss summed over the labels; None: the model's own
            (``output.loss``, the mean cross-entropy of the batch's ``labels``) times their number.

    Returns:
        int64 counts for each task, exact, and the same however the text is split into batches as long as the model's
        activations are; and the numbers of tokens that were counted. A layer that did not run has counts of 0. With
        another score ``NeuronScores``, of which the same holds but for rounding.

    Raises:
        ValueError: no task or a task without batches; a layer that computes something else than its weight and bias say, or
            a block that does more than an activation function between its layers, or whose activation function sees
            another projection than the one named as gate; a mask that does not fit the activations or may fit in two ways;
            padding that cannot be told among the tokens of an expert; a pre-activation of a real token that is NaN or
            infinite (one of minus infinity has not fired); an unknown score; for ``gradient``, a loss that cannot be had,
            is not finite, or does not depend on a layer.
        TypeError: batches that are no mapping of tasks to several batches, or a batch that no model takes.

    Warns:
        UserWarning: once, where padding is to be excluded and a batch says nothing about it: all positions count then;
            where a layer did not run; and where experts are left out, as they are held as one parameter.

    Example:
        >>> model = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1))
        >>> profile(model, {"a": [torch.ones(3, 1)]}).layers
        ['0']
    """
    check_score(score, ("count", *get_args(Score)))
    if loss is not None and score != "gradient":
        raise ValueError(f"loss is given, which is for score='gradient' alone; score is {score!r}")
    if padding not in ("exclude", "include"):
        raise ValueError(f"padding is {padding!r}, expected 'exclude' or 'include'")
    if not isinstance(batches, Mapping):
        raise TypeError(
            f"batches is a {type(batches).__name__}, expected the batches of each task: {{'en-de': [batch, ...], ...}}"
        )
    if not batches:
        raise ValueError("no task: batches is empty")
    blocks = find_blocks(model, layers)
    for block in blocks:
        _check_countable(block)
    if layers is None and (experts := experts_not_taken(model)):
        warnings.warn(experts, UserWarning, stacklevel=2)
    names = [block.name for block in blocks]
    real = RealTokens(model)
    tally = Counters(model, blocks) if score == "count" else Scorers(model, blocks, gradient=score == "gradient")
    summed = SummedLoss(loss, encoder_decoder=real.encoder_decoder)
    warned = padding == "include" or valid is not None
    counts: dict[str, dict[str, Tensor]] = {}
    tokens: dict[str, dict[str, int]] = {}
    silent_layers: list[str] = []
    for task, task_batches in batches.items():
        tally.start(task)
        done = 0
        for batch in _several(task, task_batches):
            batch = _to_device(task, batch, _device(model))
            if real.follows_transformers:
                for name, value in real.named(batch).items():
                    check_tensor(name, value)
            masks: TokenMasks = dict.fromkeys(names)
            if padding == "exclude":
                masks = real.masks(names, batch) if valid is None else _given(valid, names, batch)
            gradients = _gradients() if score == "gradient" else torch.no_grad()
            with gradients, _evaluating(model), without_fast_path(model, blocks), _uncompiled(model):
                alone = functools.partial(_run_alone, model, batch) if real.follows_transformers else None
                run = functools.partial(_run, model, batch)
                if score == "gradient":
                    run = functools.partial(_loss_of, run, summed, batch, real.named(batch))
                tally.count(run, masks, alone)
            if not warned:
                ran = [name for name in names if name in tally.leading]
                silent = [n for n in ran if masks[n] is None and not rows_are_samples(batch, tally.leading[n])]
                if silent:
                    warned = True
                    warnings.warn(_nothing_to_exclude(task, silent, real.named(batch)), UserWarning, stacklevel=2)
            done += 1
            if progress is not None:
                progress(task, done)
        if not done:
            raise ValueError(f"task {task} has no batches: there is nothing to profile it on")
        counts[task], tokens[task] = tally.totals()
        if not silent_layers and (silent_layers := tally.did_not_run()):
            warnings.warn(
                f"the batches of task {task} did not run {_shown(silent_layers)}: their counts are 0; leave them out with "
                "layers=[...]",
                UserWarning,
                stacklevel=2,
            )
    return ActivationCounts(counts, tokens) if score == "count" else NeuronScores(counts, tokens, score)


@contextlib.contextmanager
def _gradients() -> Iterator[None]:
    """Gradients are recorded within the block, whatever is so around it."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def _loss_of(run: Callable[[], Any], summed: SummedLoss, batch: Any, inputs: Mapping[str, Any]) -> Callable[[], Tensor]:
    """Runs a batch, and gives a function that returns its loss."""
    return functools.partial(summed, run(), batch, inputs)


def _check_countable(block: FeedForward) -> None:
    """ValueError where a block's layers compute something else than their weights say, or its gate is cut anew."""
    for layer in (block.fc1, block.up, block.fc2):
        if layer is None or isinstance(layer, TaskLayer):
            continue
        if why := computes_affine(layer) if is_packed(layer) else computes_linear(layer):
            raise ValueError(
                f"{block.name}: {'fc2' if layer is block.fc2 else 'up' if layer is block.up else 'fc1'} of this block is a "
                f"{type(layer).__name__}, expected one that computes what nn.Linear does: {why}"
            )
    if (cut := getattr(block.parent, "activation_sparsity", 0)) and cut > 0:
        raise ValueError(
            f"{block.name}: the block cuts its gate off at a threshold over the layer's neurons (activation_sparsity "
            f"{cut}), expected a function of each: leave such layers out with layers=[...]"
        )


def _shown(layers: Sequence[str]) -> str:
    return ", ".join(layers[:3]) + (f" and {len(layers) - 3} more" if len(layers) > 3 else "")


def _several(task: str, batches: Any) -> Iterable[Any]:
    """The batches of a task; TypeError where they are one batch, or none at all."""
    one = isinstance(batches, (Mapping, Tensor, str, bytes)) or hasattr(batches, "_fields")
    with contextlib.suppress(TypeError):
        if not one:
            return iter(batches)
    raise TypeError(
        f"the batches of task {task} are {'one' if one else 'of type'} {type(batches).__name__}, expected a list of "
        f"batches, or something else to iterate over: {{{task!r}: [batch, ...]}}"
    )


def _given(valid: Callable[[str, Any], Tensor | None], names: Sequence[str], batch: Any) -> TokenMasks:
    masks = {name: valid(name, batch) for name in names}
    for name, mask in masks.items():
        if mask is not None and (not isinstance(mask, Tensor) or mask.dtype != torch.bool):
            found = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"{name}: valid gave {found}, expected a bool tensor or None")
    return masks


def _nothing_to_exclude(task: str, layers: Sequence[str], inputs: Mapping[str, Any]) -> str:
    return (
        f"task {task}: nothing in a batch says which positions of {_shown(layers)} are padding, so all of them count. "
        "Looked for masks (attention_mask, decoder_attention_mask, src_key_padding_mask, tgt_key_padding_mask and the "
        f"like), labels and token ids with a known padding id; the batch has {', '.join(inputs) or 'unnamed inputs'}. Give "
        "valid=, or padding='include' where there is no padding"
    )


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode and no task, as long as the block lasts; each module's own mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    specialized = any(isinstance(module, TaskLayer) for module in model.modules())
    with switched_to(model, None) if specialized else contextlib.nullcontext():
        model.eval()
        try:
            yield
        finally:
            for module, training in modes.items():
                module.training = training


def _uncompiled(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Compiled code would have to be compiled again with the counting in it, and once more without."""
    if any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in model.modules()):
        return torch.compiler.set_stance("force_eager")
    return contextlib.nullcontext()


def _device(model: nn.Module) -> torch.device | None:
    """Where the model takes its inputs; None where it moves them itself (accelerate), as its weights are elsewhere."""
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        return None
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _to_device(task: str, batch: Any, device: torch.device | None) -> Any:
    def moved(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) and device is not None else value

    if isinstance(batch, Tensor):
        return moved(batch)
    if isinstance(batch, Mapping):
        return {key: moved(value) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*map(moved, batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(map(moved, batch))
    raise TypeError(
        f"a batch of task {task} is a {type(batch).__name__}, expected a mapping, a tuple, a list or a tensor"
    )


def _run(model: nn.Module, batch: Any) -> Any:
    if isinstance(model, (nn.DataParallel, DistributedDataParallel)):
        model = model.module  # copies on other devices have no counters, and processes have other numbers of batches
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch) if isinstance(batch, Tensor) else model(*batch)


def _run_alone(model: nn.Module, batch: Any, sentence: int, sentences: int) -> None:
    """Runs one sentence of a batch of Transformers, whose tensors all have the batch first."""

    def cut(value: Any) -> Any:
        mine = isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == sentences
        return value[sentence : sentence + 1] if mine else value

    if isinstance(batch, Mapping):
        _run(model, {key: cut(value) for key, value in batch.items()})
    else:
        _run(model, [cut(value) for value in ((batch,) if isinstance(batch, Tensor) else batch)])

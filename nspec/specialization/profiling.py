"""Profiling: counting, for each task, how often each feed-forward neuron fires."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nspec.kernels.linear_relu_count import linear_relu_count
from nspec.nn.ffn import TaskLinear

from .counts import ActivationCounts
from .layers import Pair, check_relu, find_pairs, without_fast_path
from .tasks import task as switched_to


@torch.no_grad()
def profile(
    model: nn.Module,
    batches: Mapping[str, Iterable[Any]],
    *,
    layers: Iterable[str | tuple[str, str]] | None = None,
    padding: str = "exclude",
    valid: Callable[[str, Any], Tensor | None] | None = None,
    progress: Callable[[str, int], None] | None = None,
) -> ActivationCounts:
    """Counts, per task, layer and neuron, the tokens with an activation above 0, with teacher forcing in eval mode.

    A specialised model is profiled dense. Modes (training or not) and the current task are as before afterwards.

    Args:
        model: any module with feed-forward layers (two linear layers with ReLU between them).
        batches: for each task the batches to run: what ``model(**batch)`` takes (a mapping), or ``model(*batch)`` (a
            tuple or list), or one tensor. Tensors are moved to the model's device. Iterated once.
        layers: as in ``find_pairs``; None takes all.
        padding: ``exclude``: only real tokens count. ``include``: padded positions count too, as in the release of Tan
            et al. 2024.
        valid: ``valid(layer, batch)`` gives the bool mask of real tokens of a layer, shaped as the leading dimensions of
            its activations, or None for all. By default: ``attention_mask`` for encoders (else ``input_ids`` that are not
            padding), ``decoder_attention_mask`` for decoders (else ``labels`` that are neither -100 nor padding, else
            ``decoder_input_ids`` that are not padding).
        progress: called as ``progress(task, batches done)`` after each batch.

    Returns:
        int64 counts for each task, exact, and the same however the text is split into batches as long as the model's
        activations are.

    Raises:
        ValueError: no task or a task without batches, layers that are not ReLU, a mask that does not fit the activations.

    Example:
        >>> model = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1))
        >>> profile(model, {"a": [torch.ones(3, 1)]}).layers
        ['0']
    """
    if padding not in ("exclude", "include"):
        raise ValueError(f"padding is {padding!r}, expected 'exclude' or 'include'")
    if not batches:
        raise ValueError("no task: batches is empty")
    pairs = find_pairs(model, layers)
    for pair in pairs:
        check_relu(pair, dropout=False)  # dropout is off in eval mode
    if padding == "include":
        masks_of: Callable[[str, Any], Tensor | None] = lambda layer, batch: None
    else:
        masks_of = valid or RealTokens(model)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    counts = {}
    with _evaluating(model), without_fast_path(model, pairs), _Counters(pairs) as counters:
        for task, task_batches in batches.items():
            counters.start()
            done = 0
            for batch in task_batches:
                batch = _to_device(batch, device)
                counters.masks = {pair.name: masks_of(pair.name, batch) for pair in pairs}
                _run(model, batch)
                done += 1
                if progress is not None:
                    progress(task, done)
            if not done:
                raise ValueError(f"task {task} has no batches: there is nothing to profile it on")
            counts[task] = counters.totals(task)
    return ActivationCounts(counts)


class RealTokens:
    """The default ``valid``: reads the padding of encoder and decoder from a batch of a Hugging Face model."""

    def __init__(self, model: nn.Module) -> None:
        config = getattr(model, "config", None)
        self._pad = getattr(config, "pad_token_id", None)
        self._seq2seq = bool(getattr(config, "is_encoder_decoder", False))
        get_decoder = getattr(model, "get_decoder", None)
        decoder = get_decoder() if self._seq2seq and callable(get_decoder) else None
        self._decoder = next((name for name, m in model.named_modules() if m is decoder), None) if decoder else None

    def __call__(self, layer: str, batch: Any) -> Tensor | None:
        """Bool ``[batch, length]``, or None where the batch says nothing about padding."""
        if not isinstance(batch, Mapping):
            return None
        if self._decodes(layer):
            return self._decoder_mask(batch)
        if batch.get("attention_mask") is not None:
            return self._two_dimensional("attention_mask", batch["attention_mask"])
        return self._not_padding(batch.get("input_ids"))

    def _decodes(self, layer: str) -> bool:
        if self._decoder is not None:
            return layer.startswith(self._decoder + ".")
        return self._seq2seq and "decoder" in layer.split(".")

    def _decoder_mask(self, batch: Mapping[str, Any]) -> Tensor | None:
        if batch.get("decoder_attention_mask") is not None:
            return self._two_dimensional("decoder_attention_mask", batch["decoder_attention_mask"])
        labels = batch.get("labels")
        if labels is not None:
            # Position j of the decoder reads label j - 1 and predicts label j: the two are padded alike.
            real = labels != -100
            return real if self._pad is None else real & (labels != self._pad)
        return self._not_padding(batch.get("decoder_input_ids"))

    def _not_padding(self, ids: Tensor | None) -> Tensor | None:
        return None if ids is None or self._pad is None else ids != self._pad

    @staticmethod
    def _two_dimensional(name: str, mask: Tensor) -> Tensor:
        if mask.dim() != 2:
            raise ValueError(
                f"{name} has shape {list(mask.shape)}, expected [batch, length]; give valid= for other masks"
            )
        return mask.bool()


class _Counters(contextlib.AbstractContextManager["_Counters"]):
    """While it is entered, fc1 of each pair computes through ``linear_relu_count`` and adds up what that counts."""

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self._pairs = pairs
        self._totals: dict[str, Tensor] = {}
        self._checked: dict[str, bool] = {}
        self.masks: dict[str, Tensor | None] = {}

    def __enter__(self) -> _Counters:
        self._hooks = []
        for pair in self._pairs:
            pair.fc1.forward = self._counting(pair)  # type: ignore[method-assign,assignment]
            self._hooks.append(pair.fc2.register_forward_pre_hook(self._checking(pair)))
        return self

    def __exit__(self, *_: Any) -> None:
        for pair, hook in zip(self._pairs, self._hooks):
            del pair.fc1.forward
            hook.remove()

    def start(self) -> None:
        """Begins a task."""
        self._totals = {}

    def totals(self, task: str) -> dict[str, Tensor]:
        """The counts since :meth:`start`, in the order of the layers."""
        if missing := [pair.name for pair in self._pairs if pair.name not in self._totals]:
            raise ValueError(
                f"the batches of task {task} did not run layer {missing[0]}; choose layers with layers=[...]"
            )
        return {pair.name: self._totals[pair.name].cpu() for pair in self._pairs}

    def _counting(self, pair: Pair) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            mask = self.masks.get(pair.name)
            if mask is not None:
                if mask.numel() != x[..., 0].numel():
                    raise ValueError(
                        f"{pair.name}: the mask of real tokens has shape {list(mask.shape)}, the activations have "
                        f"{list(x.shape[:-1])}; give valid= for this model, or padding='include'"
                    )
                mask = mask.to(x.device).reshape(x.shape[:-1])
            h, count = linear_relu_count(x, pair.fc1.weight, pair.fc1.bias, valid=mask)
            total = self._totals.get(pair.name)
            self._totals[pair.name] = count if total is None else total + count
            self._last = h
            return h  # the layer's own ReLU changes nothing of it

        return forward

    def _checking(self, pair: Pair) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def pre_hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            if not self._checked.get(pair.name):
                self._checked[pair.name] = True
                if args[0].shape != self._last.shape or not torch.equal(args[0], self._last.to(args[0].dtype)):
                    raise ValueError(
                        f"{pair.name}: what the layer does between fc1 and fc2 is not ReLU alone in eval mode"
                    )

        return pre_hook


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode and no task, as long as the block lasts; each module's own mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    specialized = any(isinstance(module, TaskLinear) for module in model.modules())
    with switched_to(model, None) if specialized else contextlib.nullcontext():
        model.eval()
        try:
            yield
        finally:
            for module, training in modes.items():
                module.training = training


def _to_device(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return type(batch)(value.to(device) if isinstance(value, Tensor) else value for value in batch)
    raise TypeError(f"a batch is a {type(batch).__name__}, expected a mapping, a tuple, a list or a tensor")


def _run(model: nn.Module, batch: Any) -> None:
    if isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, Tensor):
        model(batch)
    else:
        model(*batch)

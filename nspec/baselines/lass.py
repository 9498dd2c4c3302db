"""LaSS (Lin et al. 2021): for each task a sub-network of single weights, found by magnitude after fine-tuning.

    dense = ...                                                     # trained on all tasks
    parts = []
    for task in tasks:
        tuned = ...                                                 # a copy of it, fine-tuned on the task alone
        parts.append(WeightMasks({task: magnitude_masks(tuned, alpha=0.3)}))
    apply_weight_masks(dense, WeightMasks.union_of_tasks(parts))    # in place; its code is not touched
    with nspec.task(dense, "en-de"):
        dense(**batch).loss.backward()
    with kept_weights_only(dense, optimizer, ["en-de"]):            # of .kept_weights: else momentum and decay move all
        optimizer.step()

With the mask M of a task, a layer computes ``y = x (M ⊙ W)ᵀ + b``, and the gradient of a masked weight is exactly zero.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Iterable
from fractions import Fraction
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nspec.kernels.common.autocast import cast_inputs
from nspec.nn.batch import TaskBatch, reorder
from nspec.nn.captured import capturing, keep
from nspec.nn.recompute import backward_pass
from nspec.nn.state import LayerState, SwitchedTo
from nspec.nn.switched import TaskSwitched
from nspec.specialization.layers import find_blocks, nearest
from nspec.specialization.tasks import set_task

from .structure import layer_around, within
from .weight_masks import PackedMask, WeightMasks

# Modules that compute with the weights of their linear layers and do not always call them: a mask would be passed by.
_READS_WEIGHTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
_STATE = ("_masks", "_unpacked", "_product", "_nspec")


def prunable_layers(model: nn.Module) -> list[str]:
    """The linear layers that LaSS prunes: attention and feed-forward matrices of every encoder and decoder layer.

    They are found by structure: every ``nn.Linear`` inside a module that holds a feed-forward pair as its own attributes
    (``fc1`` and ``fc2``, see ``nspec.specialization.layers``). Embeddings and the output projection lie outside.

    Returns:
        Qualified names, in the order of the model's modules.

    Raises:
        ValueError: no feed-forward pair; a pair in a module of its own inside a larger layer (as in T5), whose attention
            would be missed; or ``nn.MultiheadAttention``, whose fused projection is no ``nn.Linear`` and cannot be masked.
    """
    modules = dict(model.named_modules())
    names = {id(module): name for name, module in modules.items()}
    parents = dict.fromkeys(names[id(block.parent)] for block in find_blocks(model))
    linears = {name for name, module in modules.items() if isinstance(module, nn.Linear)}
    for parent in parents:
        if fused := [name for name in within(parent, modules) if isinstance(modules[name], nn.MultiheadAttention)]:
            raise ValueError(
                f"{fused[0]} is nn.MultiheadAttention, whose fused projection cannot be masked: expected attention made of "
                "nn.Linear layers; name the layers to prune with layers=[...]"
            )
        if whole := layer_around(parent, modules):
            raise ValueError(
                f"{parent or 'the model'} holds a feed-forward pair alone, and {whole} around it more linear layers: "
                "expected both in one module; name the layers to prune with layers=[...]"
            )
    inside = {name for parent in parents for name in within(parent, linears)}
    return [name for name in modules if name in inside]


def magnitude_masks(model: nn.Module, alpha: float, layers: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Masks that drop, in each weight matrix by itself, the weights of the lowest magnitude.

    Of a matrix of n weights exactly ``floor(alpha * n)`` are dropped, with ``alpha`` the decimal number as it is written
    (0.29 of 100 is 29). Among equal magnitudes the one with the lower index, row by row, goes first; so the masks depend
    on the weights alone, not on the device.

    Args:
        model: fine-tuned on one task.
        alpha: share of the weights to drop, at least 0 and below 1.
        layers: qualified names of linear layers; None: :func:`prunable_layers`.

    Returns:
        By layer, a bool tensor ``[out, in]`` on the CPU, True for the weights that are kept.

    Raises:
        ValueError: ``alpha`` out of range, a name that is no linear layer, no layers, or a weight that is not finite.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> _ = model[0].weight.data.copy_(torch.tensor([[1.0, -4.0], [3.0, -2.0]]))
        >>> magnitude_masks(model, alpha=0.5, layers=["0"])["0"].tolist()
        [[False, True], [True, False]]
    """
    if not 0 <= alpha < 1:
        raise ValueError(f"alpha is {alpha}, expected a share of weights of at least 0 and below 1")
    names = prunable_layers(model) if layers is None else list(layers)
    if not names:
        raise ValueError("layers is empty, expected the names of linear layers")
    modules = dict(model.named_modules())
    linears = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
    masks = {}
    for name in names:
        module = modules.get(name)
        if not isinstance(module, nn.Linear):
            raise ValueError(f"{name!r} is not a linear layer of the model; {nearest(name, linears)}")
        _check_own_weight(name, module)
        if not bool(module.weight.isfinite().all()):
            raise ValueError(f"{name}.weight has values that are not finite: their order by magnitude says nothing")
        masks[name] = _lowest_dropped(module.weight.detach(), math.floor(Fraction(str(alpha)) * module.weight.numel()))
    return masks


def _check_own_weight(name: str, module: nn.Linear) -> None:
    """ValueError where the weight is made of others before each pass, and is an old one until then, or is not there."""
    if "weight" in vars(module):  # by a hook; that of a parametrised layer is made when it is asked for
        raise ValueError(
            f"{name}.weight is no parameter but is made by a hook from {', '.join(module._parameters)} (pruning, "
            "weight_norm, spectral_norm): make it one first, with torch.nn.utils.prune.remove or remove_weight_norm"
        )
    if module.weight.is_meta:
        raise ValueError(
            f"{name}.weight is on the meta device: its values are elsewhere (offloaded, or not loaded yet); load the model "
            "whole, without device_map and offloading"
        )


def _lowest_dropped(weight: Tensor, drop: int) -> Tensor:
    """True but for the ``drop`` lowest magnitudes; of equal ones the first go."""
    kept = torch.ones(weight.numel(), dtype=torch.bool, device=weight.device)
    if drop:
        magnitude = weight.abs().flatten()
        threshold = magnitude.kthvalue(drop).values
        kept = magnitude >= threshold
        equal = (magnitude == threshold).nonzero().squeeze(1)
        kept[equal[: drop - int((~kept).sum())]] = False
    return kept.view(weight.shape).cpu()


def apply_weight_masks(model: nn.Module, masks: WeightMasks) -> nn.Module:
    """Makes layers of ``model`` compute with, and train, only the weights that the current task keeps. In place.

    Modules keep their identity, parameters, hooks and state-dict keys. Until a task is set (``nspec.task``,
    ``nspec.set_task``) the model computes what it did before. Layers without masks stay as they are.

    Args:
        model: any module with the ``nn.Linear`` layers that ``masks`` names; not yet wrapped or compiled. Layers inside
            ``nn.MultiheadAttention`` or ``nn.TransformerEncoderLayer`` are refused: those read the weights themselves.
        masks: the kept weights of each task.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: masks of another model (the message names the layer and both shapes or the nearest names), a layer
            that cannot be masked, or a model that has weight masks already.
        TypeError: ``masks`` is not a :class:`WeightMasks`.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 1, bias=False))
        >>> masks = WeightMasks({"en-de": {"0": torch.tensor([[True, False]])}})
        >>> model = apply_weight_masks(model, masks)
        >>> with nspec.task(model, "en-de"):
        ...     model(torch.ones(1, 2)).sum().backward()
        >>> model[0].weight.grad.tolist()
        [[1.0, 0.0]]
    """
    if not isinstance(masks, WeightMasks):
        raise TypeError(f"masks is a {type(masks).__name__}, expected a WeightMasks")
    modules = dict(model.named_modules())
    if any(isinstance(module, TaskMaskedWeight) for module in modules.values()):
        raise ValueError("the model has weight masks already: call remove_weight_masks(model) first")
    linears = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
    for layer, shape in masks.shapes.items():
        _check_maskable(layer, shape, modules, linears)
    for layer in masks.layers:
        module = modules[layer]
        module.__class__ = TaskMaskedWeight
        assert isinstance(module, TaskMaskedWeight)
        module.attach({task: masks.packed(task, layer) for task in masks.tasks})
    return model


def _check_maskable(layer: str, shape: tuple[int, int], modules: dict[str, nn.Module], linears: list[str]) -> None:
    module = modules.get(layer)
    if module is None:
        if f"module.{layer}" in modules or f"_orig_mod.{layer}" in modules:
            raise ValueError(f"the model is wrapped: mask it first, then wrap or compile it ({layer} is inside)")
        raise ValueError(f"masks name layer {layer!r}, which the model does not have; {nearest(layer, linears)}")
    parts = layer.split(".")
    for end in range(len(parts)):
        around = modules[".".join(parts[:end])]
        if isinstance(around, _READS_WEIGHTS):
            raise ValueError(
                f"{layer} is inside nn.{type(around).__name__}, which reads the weights of its layers without calling "
                "them: expected layers that the model calls"
            )
    if type(module) is not nn.Linear:
        hint = ""
        if torch.nn.utils.parametrize.is_parametrized(module):
            hint = "; torch.nn.utils.parametrize.remove_parametrizations makes it one"
        raise ValueError(f"{layer} is {type(module).__name__}, expected a plain nn.Linear layer{hint}")
    if "forward" in vars(module):
        raise ValueError(
            f"{layer} has a forward of its own, which would pass its masks by (accelerate's device_map and offloading put "
            "one there): mask the model first, or take it off with accelerate.hooks.remove_hook_from_module(model, "
            "recurse=True)"
        )
    _check_own_weight(layer, module)
    if tuple(module.weight.shape) != shape:
        raise ValueError(
            f"masks are of another model: {layer} has weights {list(shape)} in the masks, {list(module.weight.shape)} in "
            "the model"
        )


def remove_weight_masks(model: nn.Module) -> nn.Module:
    """Makes the layers plain again, in place: the same parameters, bitwise as they are now, and the same state dict.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: the model has no weight masks.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 1))
        >>> model = apply_weight_masks(model, WeightMasks({"en-de": {"0": torch.tensor([[True, False]])}}))
        >>> type(remove_weight_masks(model)[0]) is nn.Linear
        True
    """
    masked = [module for module in model.modules() if isinstance(module, TaskMaskedWeight)]
    if not masked:
        raise ValueError(f"{type(model).__name__} has no weight masks: call apply_weight_masks(model, masks) first")
    set_task(model, None)
    for module in masked:
        module.__class__ = nn.Linear  # type: ignore[assignment]
        for name in _STATE:
            module.__dict__.pop(name, None)
    return model


class _MaskedWeight(torch.autograd.Function):
    """``x (m ⊙ W)ᵀ + b``. Saves the mask and not the product, which for many tasks would be as many models.

    A masked weight is replaced, not multiplied: 0 times a weight or gradient that is not finite would be NaN.
    """

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor) -> Tensor:
        return F.linear(x, torch.where(mask, weight, 0.0), bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias, mask = inputs
        ctx.has_bias = bias is not None
        ctx.save_for_backward(x, weight, mask)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mask = ctx.saved_tensors
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            dx = dy @ torch.where(mask, weight, 0.0)
        if ctx.needs_input_grad[1]:
            dw = torch.where(mask, dy.t() @ x, 0.0)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            db = dy.sum(0)
        return dx, dw, db, None


class TaskMaskedWeight(nn.Linear, TaskSwitched):
    """A linear layer with a mask over its weights for each task. ``nn.Linear`` modules are turned into it in place.

    Without a task it is an ordinary linear layer. Masks are kept as bits; those of the current task, or of the tasks of
    the current batch, are unpacked on first use on the weight's device, and kept until other tasks are set. Passes of one
    task without gradients keep the masked weight until the weight changes, a task is set or a pass has gradients.
    """

    _masks: dict[str, PackedMask]
    _unpacked: dict[PackedMask, Tensor]
    _product: tuple[tuple[Any, ...], weakref.ref[Tensor], Tensor] | None  # of what, of which weight; set at once

    def attach(self, masks: dict[str, PackedMask]) -> None:
        """Sets the mask of each task, ``[out_features, in_features]``; the layer is dense then."""
        self._masks, self._unpacked, self._product, self._nspec = masks, {}, None, LayerState()

    @property
    def tasks(self) -> list[str]:
        """The tasks that this layer has masks of."""
        return list(self._masks)

    @property
    def decodes_by_task(self) -> bool:
        """Always: the masks are in the forward pass."""
        return True

    @property
    def task(self) -> str | tuple[str, ...] | None:
        """The current task, or the task of each sentence of a batch; None is dense."""
        task: str | tuple[str, ...] | None = self._nspec.task
        return task

    def set_task(self, task: str | TaskBatch | None) -> None:
        """Switches to the mask of a task, or of each task of a batch; None makes the layer dense."""
        if isinstance(task, TaskBatch):
            self.switch(SwitchedTo(task.tasks, None, task, backward_pass()))
            used = [self._masks[name] for name in task.names]
        else:
            used = [] if task is None else [self._masks[task]]
            self.switch(SwitchedTo(task, used[0] if used else None, None, backward_pass()))
        if used:  # between two batches of a task the model is dense: its masks stay
            self._unpacked = {mask: bits for mask, bits in self._unpacked.items() if mask in used}

    def switch(self, to: SwitchedTo) -> None:
        """Switches to what a task, a batch or an earlier state says."""
        super().switch(to)
        self._product = None

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., in_features]`` -> ``[..., out_features]``.

        Raises:
            ValueError: the rows of ``x`` do not fit the sentences of the batch.
            RuntimeError: a CUDA graph is being captured, and the layer has not run with this task before.
        """
        (mask, batch), x, weight, bias = self._begin(x)
        if mask is None and batch is None:
            return F.linear(x, weight, bias)
        if batch is not None and batch.single:
            batch.check(x)
            mask, batch = self._masks[batch.names[0]], None
        x, weight, bias = cast_inputs(x, weight, bias)
        tokens = x.reshape(-1, self.in_features)
        if batch is None and self._may_keep(weight):
            y = F.linear(tokens, self._masked(weight, mask), bias)
        elif batch is None:
            y = _MaskedWeight.apply(tokens, weight, bias, self._on(mask, weight.device))
        else:
            order, inverse, _ = batch.layout(x)
            tokens, bounds = reorder(tokens, order, inverse), batch.bounds(x)
            parts = [
                _MaskedWeight.apply(tokens[start:stop], weight, bias, self._on(self._masks[name], weight.device))
                for name, start, stop in zip(batch.names, bounds, bounds[1:])
            ]
            y = reorder(torch.cat(parts), inverse, order)
        return y.view(*x.shape[:-1], self.out_features)

    def _begin(self, x: Tensor) -> tuple[Any, ...]:
        """What a forward pass uses, then ``x`` and the parameters, with which it goes on.

        A pass that activation checkpointing computes again uses the masks of the first, see ``nspec/nn/recompute.py``.
        """
        use: Any = self._nspec.current()
        if torch.compiler.is_compiling():
            return use, x, self.weight, self.bias
        self.check_thread()
        return use, *self._nspec.passes.note(use, x, self.weight, self.bias)

    def _on(self, mask: PackedMask, device: torch.device) -> Tensor:
        """The mask on a device, bool ``[out_features, in_features]``."""
        bits = self._unpacked.get(mask)
        if bits is None or bits.device != device:
            if capturing(device):
                raise RuntimeError(
                    "a CUDA graph is being captured with a task that the layer has not run with: run it once before the "
                    "capture, within the same nspec.task block"
                )
            bits = mask.unpack(device)
            self._unpacked = {**self._unpacked, mask: bits}
        keep(device, bits)
        return bits

    def kept_by(self, tasks: Iterable[str]) -> Tensor:
        """The weights that one of the tasks keeps at least: bool ``[out_features, in_features]`` on their device."""
        packed = [self._masks[task].packed for task in tasks]
        union = functools.reduce(torch.bitwise_or, packed, torch.zeros_like(next(iter(self._masks.values())).packed))
        return PackedMask(union, (self.out_features, self.in_features)).unpack(self.weight.device)

    def _may_keep(self, weight: Tensor) -> bool:
        """Whether the masked weight may be kept for later passes; what was kept before is dropped otherwise."""
        if torch.compiler.is_compiling():
            return False
        # What follows a training pass is an update, and wrappers write weights unseen. A graph makes its own product.
        may = not (torch.is_grad_enabled() or self.weight.is_inference() or capturing(weight.device))
        if not may:
            self._product = None
        return may

    def _masked(self, weight: Tensor, mask: PackedMask) -> Tensor:
        """The masked weight, made once: a decoding step has few rows and would be mostly masking."""
        # A version counts in-place changes, a pointer changes with .data, and another weight may come to lie there.
        of = (mask, self.weight.data_ptr(), self.weight._version, weight.dtype, weight.device)
        known = self._product
        if known is not None and known[0] == of and known[1]() is self.weight:
            return known[2]
        product = torch.where(self._on(mask, weight.device), weight, 0.0)
        self._product = of, weakref.ref(self.weight), product
        return product

    def extra_repr(self) -> str:
        """Adds the number of tasks and the current one to what ``nn.Linear`` shows."""
        return f"{super().extra_repr()}, tasks={len(self._masks)}, task={self.task}"

    def __getstate__(self) -> dict[str, Any]:
        return dict(self.__dict__) | {"_unpacked": {}, "_product": None}

"""The layers of LaSS: linear ones with a mask over their weights for each task."""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nspec.kernels.common.autocast import cast_inputs
from nspec.nn.batch import reorder
from nspec.nn.captured import capturing, keep
from nspec.nn.state import LayerState, SwitchedTo
from nspec.nn.switched import TaskSwitched
from nspec.specialization.layers import nearest
from nspec.specialization.tasks import set_task

from .masks import PackedMask, WeightMasks
from .pruning import check_own_weight

# Modules that compute with the weights of their linear layers and do not always call them: a mask would be passed by.
_READS_WEIGHTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


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
    if any(isinstance(module, LassLinear) for module in modules.values()):
        raise ValueError("the model has weight masks already: call remove_weight_masks(model) first")
    linears = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
    for layer, shape in masks.shapes.items():
        _check_maskable(layer, shape, modules, linears)
    for layer in masks.layers:
        module = modules[layer]
        module.__class__ = LassLinear
        assert isinstance(module, LassLinear)
        module._nspec = LassState({task: masks.packed(task, layer) for task in masks.tasks})
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
    check_own_weight(layer, module)
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
    masked = [module for module in model.modules() if isinstance(module, LassLinear)]
    if not masked:
        raise ValueError(f"{type(model).__name__} has no weight masks: call apply_weight_masks(model, masks) first")
    set_task(model, None)
    for module in masked:
        module.__class__ = nn.Linear  # type: ignore[assignment]
        del module.__dict__["_nspec"]
    return model


def merge_weight_masks(model: nn.Module, task: str) -> nn.Module:
    """A plain copy of the model that computes what ``task`` computes: the weights that it does not keep are zero.

    Raises:
        ValueError: the model has no weight masks, or none of that task.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 1))
        >>> model = apply_weight_masks(model, WeightMasks({"en-de": {"0": torch.tensor([[True, False]])}}))
        >>> float(merge_weight_masks(model, "en-de")[0].weight[0, 1])
        0.0
    """
    merged = copy.deepcopy(model)
    masked = [module for module in merged.modules() if isinstance(module, LassLinear)]
    with torch.no_grad():
        for module in masked:
            if task not in module.tasks:
                raise ValueError(f"there are no masks of task {task!r}; {nearest(task, module.tasks)}")
            module.weight.masked_fill_(~module._nspec.masks[task].unpack(module.weight.device), 0)
    return remove_weight_masks(merged)


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


class LassState(LayerState):
    """What is kept on a layer with masks.

    Attributes:
        masks: of each task, ``[out_features, in_features]``.
        unpacked: those of the current tasks on the weight's device. Set anew, never changed: threads read it.
        product: the masked weight, with what it was made of. Set at once, likewise.
    """

    def __init__(self, masks: dict[str, PackedMask]) -> None:
        super().__init__()
        self.masks = masks
        self.unpacked: dict[PackedMask, Tensor] = {}
        self.product: tuple[tuple[Any, ...], weakref.ref[Tensor], Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"unpacked": {}, "product": None}  # bits are enough


class LassLinear(nn.Linear, TaskSwitched):
    """A linear layer with a mask over its weights for each task. ``nn.Linear`` modules are turned into it in place.

    Without a task it is an ordinary linear layer. Masks are kept as bits; those of the current task, or of the tasks of
    the current batch, are unpacked on first use on the weight's device, and kept until other tasks are set. Passes of one
    task without gradients keep the masked weight until the weight changes, a task is set or a pass has gradients.
    """

    _nspec: LassState
    decodes_by_task = True  # the masks are in the forward pass

    @property
    def tasks(self) -> list[str]:
        """The tasks that this layer has masks of."""
        return list(self._nspec.masks)

    def use_of(self, tasks: tuple[Any, ...]) -> PackedMask | None:
        """The mask of one task; other tasks' masks are no longer kept unpacked."""
        used = [self._nspec.masks[name] for name in tasks]
        # Between two batches of a task the model is dense: its masks stay.
        self._nspec.unpacked = {mask: bits for mask, bits in self._nspec.unpacked.items() if mask in used}
        return used[0] if len(used) == 1 else None

    def switch(self, to: SwitchedTo) -> None:
        """Switches to what a task, a batch or an earlier state says."""
        super().switch(to)
        self._nspec.product = None

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., in_features]`` -> ``[..., out_features]``.

        Raises:
            ValueError: the rows of ``x`` do not fit the sentences of the batch.
            RuntimeError: a CUDA graph is being captured, and the layer has not run with this task before.
        """
        mask, batch = use = self.begin()
        x, weight, bias = self._nspec.note(use, x, self.weight, self.bias)
        if mask is None and batch is None:
            return F.linear(x, weight, bias)
        if batch is not None and batch.single:
            batch.check(x)
            batch = None
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
                _MaskedWeight.apply(tokens[start:stop], weight, bias, self._on(self._nspec.masks[name], weight.device))
                for name, start, stop in zip(batch.names, bounds, bounds[1:])
            ]
            y = reorder(torch.cat(parts), inverse, order)
        return y.view(*x.shape[:-1], self.out_features)

    def _on(self, mask: PackedMask, device: torch.device) -> Tensor:
        """The mask on a device, bool ``[out_features, in_features]``."""
        bits = self._nspec.unpacked.get(mask)
        if bits is None or bits.device != device:
            if capturing(device):
                raise RuntimeError(
                    "a CUDA graph is being captured with a task that the layer has not run with: run it once before the "
                    "capture, within the same nspec.task block"
                )
            bits = mask.unpack(device)
            self._nspec.unpacked = {**self._nspec.unpacked, mask: bits}
        keep(device, bits)
        return bits

    def kept_by(self, tasks: Iterable[str]) -> Tensor:
        """The weights that one of the tasks keeps at least: bool ``[out_features, in_features]`` on their device."""
        packed = [self._nspec.masks[task].packed for task in tasks]
        union = functools.reduce(
            torch.bitwise_or, packed, torch.zeros_like(next(iter(self._nspec.masks.values())).packed)
        )
        return PackedMask(union, (self.out_features, self.in_features)).unpack(self.weight.device)

    def _may_keep(self, weight: Tensor) -> bool:
        """Whether the masked weight may be kept for later passes; what was kept before is dropped otherwise."""
        if torch.compiler.is_compiling():
            return False
        # What follows a training pass is an update, and wrappers write weights unseen. A graph makes its own product.
        may = not (torch.is_grad_enabled() or self.weight.is_inference() or capturing(weight.device))
        if not may:
            self._nspec.product = None
        return may

    def _masked(self, weight: Tensor, mask: PackedMask) -> Tensor:
        """The masked weight, made once: a decoding step has few rows and would be mostly masking."""
        # A version counts in-place changes, a pointer changes with .data, and another weight may come to lie there.
        of = (mask, self.weight.data_ptr(), self.weight._version, weight.dtype, weight.device)
        known = self._nspec.product
        if known is not None and known[0] == of and known[1]() is self.weight:
            return known[2]
        product = torch.where(self._on(mask, weight.device), weight, 0.0)
        self._nspec.product = of, weakref.ref(self.weight), product
        return product

    def extra_repr(self) -> str:
        """Adds the number of tasks and the current one to what ``nn.Linear`` shows."""
        return f"{super().extra_repr()}, tasks={len(self._nspec.masks)}, task={self.task}"

    def _replicate_for_data_parallel(self) -> Any:
        replica: Any = super()._replicate_for_data_parallel()
        replica._nspec = self._nspec.replica()
        return replica

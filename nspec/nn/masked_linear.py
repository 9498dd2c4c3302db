"""A linear layer whose output neurons can be masked: a drop-in for ``nn.Linear`` with the same state dict."""

from __future__ import annotations

import weakref
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nspec.kernels.common.autocast import cast_inputs, compute_dtype
from nspec.kernels.row_sparse_wgrad import row_sparse_wgrad

from .active import ActiveSet
from .batch import TaskBatch
from .captured import keep
from .recompute import Use, backward_pass
from .state import LayerState, SwitchedTo
from .touched import Arrivals, TouchedRows
from .transforms import in_transform, outside_transforms

Mode = Literal["forward", "update"]
MODES = ("forward", "update")

# For optimisers that are given parameters and no model: a parameter does not know its layer, cannot be told (what is put on
# it is lost in copies and breaks pickles), and wrappers replace it. The layers are asked for the one that they have now.
_LAYERS: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def check_mode(mode: str) -> None:
    """Raises ValueError unless ``mode`` is ``forward`` or ``update``."""
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}, expected one of {MODES}")


class _MaskedLinear(torch.autograd.Function):
    """Forward over the active rows (or dense), gradient of the weight over the active rows only.

    Computes in the dtype of ``x``; under autocast the weight and its gradient are in float32.
    """

    # With a setup_context apart PyTorch would look up the signature of forward in each call.
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        active: Tensor,
        rows: Tensor,
        index: Tensor,
        places: Tensor,
        masked: bool,
        order: Tensor | None,
        task_offsets: Tensor | None,
    ) -> Tensor:
        cast = weight if weight.dtype == x.dtype else weight.to(x.dtype)
        b = bias if bias is None or bias.dtype == x.dtype else bias.to(x.dtype)
        ctx.masked, ctx.bias = masked, None if bias is None else bias.dtype
        ctx.save_for_backward(x, weight, cast, active, rows, index, places, order, task_offsets)
        if not masked:
            return F.linear(x, cast, b)
        y = x.new_zeros((x.shape[0], weight.shape[0])) if b is None else b.repeat(x.shape[0], 1)
        part = F.linear(x, cast.index_select(0, rows), None if b is None else b.index_select(0, rows))
        return y.index_copy_(1, rows, part)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, cast, active, rows, index, places, order, task_offsets = ctx.saved_tensors
        second = torch.is_grad_enabled()
        if second:
            cast = weight.to(x.dtype)
        if ctx.masked:
            dx = dy.index_select(1, rows) @ cast.index_select(0, rows)
        elif second:  # the masked rows are constants to a second derivative too
            dx = _second(dy, cast, active, order, task_offsets)
        else:
            dx = dy @ cast
        if order is not None:  # the forward pass and dx do not mind the order of the tokens
            dy, x = dy.index_select(0, order), x.index_select(0, order)
        options = {"index": index, "places": places, "task_offsets": task_offsets, "dtype": weight.dtype}
        dw, db = row_sparse_wgrad(dy.contiguous(), x, active, **options)
        return dx, dw, None if ctx.bias is None else db.to(ctx.bias), *[None] * 7


def _second(dy: Tensor, weight: Tensor, active: Tensor, order: Tensor | None, task_offsets: Tensor | None) -> Tensor:
    """``dy @ weight``, through which a gradient reaches the rows of each token's own set alone."""
    if task_offsets is None:
        return dy @ torch.where(active[:, None], weight, weight.detach())
    own = active.repeat_interleave(task_offsets.diff().to(active.device), 0)
    if order is not None:
        own = torch.empty_like(own).index_copy_(0, order, own)
    return torch.where(own, dy, 0.0) @ weight + torch.where(own, 0.0, dy) @ weight.detach()


def _composed(
    x: Tensor, weight: Tensor, bias: Tensor | None, active: ActiveSet, batch: TaskBatch | None, mode: Mode
) -> Tensor:
    """The same from operations of PyTorch, dense, for ``torch.func``: it knows their derivatives of any kind."""
    x, weight, bias = cast_inputs(x, weight, bias)
    # In mode update the masked rows are constants to every derivative.
    rest = torch.zeros_like(weight) if mode == "forward" else weight.detach()
    if batch is None:
        return F.linear(x, torch.where(active.active[:, None], weight, rest), bias)
    with outside_transforms():
        _, inverse, offsets = batch.layout(x)
        own = active.active.repeat_interleave(offsets.diff().to(active.active.device), 0)
        own = own if inverse is None else own.index_select(0, inverse)
    y = torch.where(own.view(*x.shape[:-1], -1), F.linear(x, weight), F.linear(x, rest))
    return y if bias is None else y + bias


def _is_called(module: nn.Module, inputs: Any) -> None:
    """Does nothing: ``nn.TransformerEncoderLayer`` calls layers with hooks, instead of reading their weights."""


class NeuronState(LayerState):
    """What is kept on a layer with a mask over its neurons.

    Attributes:
        mode: ``forward`` or ``update``.
        plain: the class that the layer had, where its ``forward`` is the dense layer and not that of ``nn.Linear``.
        doubled: whether the weight holds each neuron twice: gate and up of a gated block behind one another.
        touched: the rows that the gradient of the weight is made of.
        arrivals: tells of gradients.
    """

    touched: TouchedRows
    arrivals: Arrivals

    def __init__(self, mode: Mode) -> None:
        super().__init__()
        self.mode: Mode = mode
        self.plain: Any = None
        self.doubled = False

    def begin_notes(self, rows: int, device: torch.device) -> None:
        """Begins to note rows, of which nothing has a gradient."""
        self.touched, self.arrivals = TouchedRows(rows, device), Arrivals()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("touched", "arrivals")}

    def replica(self) -> Any:
        """See :meth:`LayerState.replica`; the notes are those of the layer, where it has them on its device."""
        other = self.__class__.__new__(self.__class__)
        other.__dict__.update(self.__dict__)
        return other


class Masked(nn.Module):
    """What a linear layer with a mask over its neurons does, however its weight lies.

    Attributes:
        transposed: whether the weight is ``[in_features, out_features]``.
    """

    transposed: bool = False

    weight: Tensor
    bias: Any
    _nspec: NeuronState

    @property
    def mode(self) -> Mode:
        """``forward`` or ``update``."""
        return self._nspec.mode

    def forward(self, x: Tensor) -> Any:
        """``x [..., in_features]`` -> ``[..., out_features]``."""
        active, batch = use = self._begin(x)
        if active is None:
            return self._dense(use, x)
        x, weight, bias = self._nspec.note(use, x, self.note_use(active, self.weight), self.bias)
        weight = weight.t() if self.transposed else weight
        active = active.on(weight.device)
        keep(x.device, active)
        if in_transform():
            return _composed(x, weight, bias, active, batch, self.mode)
        order, _, offsets = (None, None, None) if batch is None else batch.layout(x)
        dtype = compute_dtype(x, weight, bias)
        flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        flat = flat if flat.dtype == dtype else flat.to(dtype)
        sets = active.active, active.rows, active.index, active.places
        y: Tensor = _MaskedLinear.apply(flat, weight, bias, *sets, self.mode == "forward", order, offsets)
        return y if x.dim() == 2 else y.view(*x.shape[:-1], weight.shape[0])

    def _dense(self, use: Use, x: Tensor) -> Tensor:
        """What the layer computes without active neurons."""
        plain = self._nspec.plain
        if plain is None:
            return F.linear(*self._nspec.note(use, x, self.note_use(None, self.weight), self.bias))
        (x,) = self._nspec.note(use, x)
        y: Tensor = plain.forward(self, x)
        return self.note_use(None, y) if self.weight.requires_grad else y

    def switch(self, to: SwitchedTo) -> None:
        """Sets what the next forward passes use: the active set, and where it is of several tasks their batch."""
        self._nspec.switch(to)
        if to.use is not None:
            to.use.let_sizes_vary()

    def _begin(self, x: Tensor) -> Use:
        """Begins a forward pass: what it uses.

        Raises:
            ValueError: a nested tensor.
        """
        if x.is_nested:
            raise ValueError(
                "a masked layer got a nested tensor, expected a padded one: nn.TransformerEncoder makes them with "
                "enable_nested_tensor=True (set its use_nested_tensor to False)"
            )
        active, batch = use = self._nspec.current()
        if batch is not None:
            batch.check(x)
            use = active, None if batch.single else batch
        return use

    # What the optimiser needs to know: the rows that the gradient of the weight is made of.

    def note_use(self, active: ActiveSet | None, weight: Tensor) -> Tensor:
        """The weight with which a forward pass goes on, so that its backward pass notes the rows that it uses."""
        if self.transposed or not (torch.is_grad_enabled() and weight.requires_grad):
            return weight
        used = None if active is None else active.on(weight.device).union
        if used is not None and self._nspec.doubled and len(used) != len(weight):
            used = used.repeat(2)
        touched = self._nspec.touched
        if touched.device != weight.device:
            touched = self._rows()
        return touched.note(weight, used)

    def gradient_arrives(self, parameter: Tensor) -> None:
        """A backward pass is about to add to the gradient of the weight, ``parameter`` to the optimiser."""
        self._rows().arrive(parameter)

    def gradient_is_dropped(self) -> None:
        """The optimiser zeroes its gradients: what was noted for them goes with them."""
        self._rows().drop()

    def take_touched(self) -> tuple[Tensor, Tensor, bool]:
        """The rows of backward passes since the last call, but for those whose gradient was dropped; starts over.

        Returns:
            These rows, bool ``[out_features]``; those that were dropped, and whether there may be any.
        """
        return self._rows().take()

    def follow(self, parameter: Tensor) -> None:
        """Has :meth:`gradient_arrives` called for the parameter that an optimiser steps in place of the weight."""
        self._nspec.arrivals.follow(parameter, self)

    def _rows(self) -> TouchedRows:
        kept = self._nspec
        if kept.touched.device != self.weight.device:
            kept.touched = TouchedRows(self._neurons(), self.weight.device)
        return kept.touched

    def _neurons(self) -> int:
        return self.weight.shape[1 if self.transposed else 0]

    def _attach(self, kept: NeuronState) -> None:
        self._nspec = kept
        self._begin_notes()

    def _begin_notes(self) -> None:
        # Now and not when they are needed: a graph of torch.compile would be made again.
        self._nspec.begin_notes(self._neurons(), self.weight.device)
        _LAYERS.add(self)

    def _replicate_for_data_parallel(self) -> Any:
        replica: Any = super()._replicate_for_data_parallel()
        replica._nspec = self._nspec.replica()
        return replica

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._begin_notes()  # a copy is a layer of its own, and nobody has used it


class MaskedLinear(Masked, nn.Linear):
    """``nn.Linear`` with a mask over its output neurons, which rows of the weight it uses and trains.

    With a mask m (bool ``[out_features]``):

    * mode ``forward``: ``y = x (m ⊙ W)ᵀ + b``. Only the active rows are computed; a masked neuron gives its bias.
    * mode ``update``: ``y = x Wᵀ + b``, dense; only the gradient is sparse.

    In both, the gradient of a masked row of ``weight`` is exactly zero and is not computed; the bias stays dense. Without
    a mask it is an ordinary linear layer. The state dict has ``weight`` and ``bias`` and nothing else (no mask). Under
    ``torch.func`` (``grad``, ``jvp``, ``vmap``) it computes the same without saving work.

    The mask acts where the layer is called. As fc1 of ``nn.TransformerEncoderLayer`` it is; code that reads ``weight``
    from outside gets the whole of it (``nn.MultiheadAttention`` does so with ``out_proj``, and so do fused kernels).

    Args:
        in_features: size of each input.
        out_features: number of neurons.
        bias: whether there is a bias.
        mode: ``forward`` or ``update``.
        device: as in ``nn.Linear``.
        dtype: as in ``nn.Linear``.

    Raises:
        ValueError: an unknown mode.

    Example:
        >>> layer = MaskedLinear(4, 3)
        >>> layer.set_mask(torch.tensor([True, False, True]))
        >>> bool((layer(torch.randn(2, 4))[:, 1] == layer.bias[1]).all())
        True
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        mode: Mode = "forward",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        check_mode(mode)
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self._attach(NeuronState(mode))
        self.register_forward_pre_hook(_is_called)

    @classmethod
    def from_linear(cls, module: nn.Linear, mode: Mode = "forward") -> MaskedLinear:
        """A masked layer that shares parameters and hooks of ``module`` (the same tensors, so optimisers stay valid).

        Args:
            module: a layer that computes what ``nn.Linear`` does.
            mode: ``forward`` or ``update``.

        Raises:
            TypeError: it is no ``nn.Linear``, or has a ``forward`` of its own.
            ValueError: an unknown mode, or a weight or bias that is no parameter of the layer but computed from others.
        """
        check_mode(mode)
        kind = type(module)
        if not isinstance(module, nn.Linear):
            raise TypeError(f"module is {kind.__name__}, expected nn.Linear")
        if torch.nn.utils.parametrize.is_parametrized(module) or not {"weight", "bias"} <= set(module._parameters):
            raise ValueError(
                "the weight or the bias of the layer is parametrised, computed from other parameters, and rows of it "
                "cannot be masked: make it an ordinary parameter first, with "
                "torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight') or torch.nn.utils.remove_weight_norm"
            )
        if kind.forward not in (nn.Linear.forward, MaskedLinear.forward) or "forward" in vars(module):
            raise TypeError(
                f"module is {kind.__name__} with a forward of its own, which the masked layer would not run; expected one "
                "that computes what nn.Linear does"
            )
        masked = cls(module.in_features, module.out_features, bias=False, mode=mode, device="meta")
        masked.weight, masked.bias = module.weight, module.bias
        masked.train(module.training)
        # The dictionaries themselves, so that the handles that were given out still remove their hooks.
        masked.__dict__.update({name: value for name, value in vars(module).items() if "_hooks" in name})
        masked._is_full_backward_hook = module._is_full_backward_hook
        masked._attach(NeuronState(mode))
        masked.register_forward_pre_hook(_is_called)
        return masked

    def set_mask(self, mask: Tensor | None) -> None:
        """Sets the active neurons, bool ``[out_features]``; None makes the layer dense.

        Raises:
            TypeError: the mask is no bool tensor.
            ValueError: its length is not ``out_features``.
        """
        if mask is not None and (not isinstance(mask, Tensor) or mask.dtype != torch.bool):
            found = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(
                f"a mask must be bool [neurons], found {found}; expected a bool tensor [{self.out_features}]"
            )
        if mask is not None and tuple(mask.shape) != (self.out_features,):
            raise ValueError(f"mask has shape {list(mask.shape)}, expected [{self.out_features}]")
        self.switch(SwitchedTo(use=None if mask is None else ActiveSet(mask), set_in=backward_pass()))

    def extra_repr(self) -> str:
        """Adds mode and density to what ``nn.Linear`` shows."""
        density = (
            "dense"
            if self._nspec.use is None
            else f"density={len(self._nspec.use.rows) / max(1, self.out_features):.3f}"
        )
        return f"{super().extra_repr()}, mode={self.mode}, {density}"


def masked_layers(model: nn.Module | None) -> list[Masked]:
    """The layers of a model that can be masked; without one, all that there are in the process."""
    layers = list(_LAYERS) if model is None else model.modules()
    return [layer for layer in layers if isinstance(layer, Masked)]

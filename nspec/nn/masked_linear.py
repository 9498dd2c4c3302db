"""A linear layer whose output neurons can be masked: a drop-in for ``nn.Linear`` with the same state dict."""

from __future__ import annotations

import weakref
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from nspec.kernels.common.autocast import cast_inputs
from nspec.kernels.row_sparse_wgrad import row_sparse_wgrad

from .active import ActiveSet

Mode = Literal["forward", "update"]
MODES = ("forward", "update")

# The optimiser sees parameters, not modules. A table beside them, since an attribute would be lost when a parameter is
# copied and would stand in the way of pickling.
_OWNERS: Any = WeakTensorKeyDictionary()


def check_mode(mode: str) -> None:
    """Raises ValueError unless ``mode`` is ``forward`` or ``update``."""
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}, expected one of {MODES}")


class _MaskedLinear(torch.autograd.Function):
    """Forward over the active rows (or dense), gradient of the weight over the active rows only."""

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, active: Tensor, rows: Tensor, index: Tensor, masked: bool
    ) -> Tensor:
        if not masked:
            return F.linear(x, weight, bias)
        y = x.new_zeros((x.shape[0], weight.shape[0])) if bias is None else bias.repeat(x.shape[0], 1)
        part = F.linear(x, weight.index_select(0, rows), None if bias is None else bias.index_select(0, rows))
        return y.index_copy_(1, rows, part)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias, active, rows, index, ctx.masked = inputs
        ctx.has_bias = bias is not None
        ctx.save_for_backward(x, weight, active, rows, index)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, active, rows, index = ctx.saved_tensors
        dx = dy.index_select(1, rows) @ weight.index_select(0, rows) if ctx.masked else dy @ weight
        dw, db = row_sparse_wgrad(dy.contiguous(), x, active, index=index)
        return dx, dw, db if ctx.has_bias else None, None, None, None, None


class MaskedLinear(nn.Linear):
    """``nn.Linear`` with a mask over its output neurons, which rows of the weight it uses and trains.

    With a mask m (bool ``[out_features]``):

    * mode ``forward``: ``y = x (m ⊙ W)ᵀ + b``. Only the active rows are computed; a masked neuron gives its bias.
    * mode ``update``: ``y = x Wᵀ + b``, dense; only the gradient is sparse.

    In both, the gradient of a masked row of ``weight`` is exactly zero and is not computed; the bias stays dense. Without
    a mask it is an ordinary linear layer. The state dict has ``weight`` and ``bias`` and nothing else.

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

    mode: Mode
    _active: ActiveSet | None
    _touched: Tensor | None

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
        self._attach(mode)

    @classmethod
    def from_linear(cls, module: nn.Linear, mode: Mode = "forward") -> MaskedLinear:
        """A masked layer that shares the parameters of ``module`` (the same tensors, so optimisers stay valid)."""
        check_mode(mode)
        masked = cls(module.in_features, module.out_features, bias=False, mode=mode, device="meta")
        masked.weight, masked.bias = module.weight, module.bias
        masked.train(module.training)
        masked._attach(mode)
        return masked

    def set_mask(self, mask: Tensor | None) -> None:
        """Sets the active neurons, bool ``[out_features]``; None makes the layer dense.

        Raises:
            TypeError: the mask is not bool.
            ValueError: its length is not ``out_features``.
        """
        if mask is not None and tuple(mask.shape) != (self.out_features,):
            raise ValueError(f"mask has shape {list(mask.shape)}, expected [{self.out_features}]")
        self._use(None if mask is None else ActiveSet(mask))

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., in_features]`` -> ``[..., out_features]``."""
        self.note_use()
        if self._active is None:
            return F.linear(x, self.weight, self.bias)
        active = self._active.on(self.weight.device)
        x, weight, bias = cast_inputs(x, self.weight, self.bias)
        flat = x.reshape(-1, self.in_features)
        sets = active.active, active.rows, active.index
        y = _MaskedLinear.apply(flat, weight, bias, *sets, self.mode == "forward")
        return y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Adds mode and density to what ``nn.Linear`` shows."""
        density = (
            "dense" if self._active is None else f"density={len(self._active.rows) / max(1, self.out_features):.3f}"
        )
        return f"{super().extra_repr()}, mode={self.mode}, {density}"

    # What the optimiser needs to know: the rows that were trained since its last step.

    def note_use(self) -> None:
        """Adds the rows of this forward pass to those that the next optimiser step may touch."""
        if not (torch.is_grad_enabled() and self.weight.requires_grad):
            return
        if self._touched is None or self._touched.device != self.weight.device:
            self._touched = torch.zeros(self.out_features, dtype=torch.bool, device=self.weight.device)
        if self._active is None:
            self._touched.fill_(True)
        else:
            self._touched.logical_or_(self._active.on(self.weight.device).active)

    def take_touched(self) -> Tensor:
        """The rows used with gradients since the last call, bool ``[out_features]``; starts over."""
        if self._touched is None:
            return torch.zeros(self.out_features, dtype=torch.bool, device=self.weight.device)
        touched = self._touched.clone()
        self._touched.zero_()
        return touched

    def _attach(self, mode: Mode) -> None:
        self.mode, self._active, self._touched = mode, None, None
        self._own_weight()

    def _use(self, active: ActiveSet | None) -> None:
        self._active = active

    def _own_weight(self) -> None:
        _OWNERS[self.weight] = weakref.ref(self)

    def _apply(self, fn: Any, recurse: bool = True) -> MaskedLinear:
        super()._apply(fn, recurse)
        self._own_weight()  # .to() may have made a new parameter
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._own_weight()  # a copy has a parameter of its own

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_touched"} | {"_touched": None}


def owner_of(parameter: Tensor) -> MaskedLinear | None:
    """The masked layer whose weight this parameter is now, or None."""
    reference = _OWNERS.get(parameter)
    owner = reference() if reference is not None else None
    return owner if isinstance(owner, MaskedLinear) and owner.weight is parameter else None

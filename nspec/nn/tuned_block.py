"""A gated block some of whose neurons have parameters of their own, computed as one: less is kept, and less is computed.

The module around the three layers keeps its code and gets a ``forward`` before it that computes ``down(act(gate(x)) *
up(x))`` by the layers' own functions, bit for bit, and a backward pass of its own. Of the forward pass ``x``, gate and up
and the columns of the neurons are kept. Where nothing below is trained, ``x`` needs no gradient, and the backward pass is
over the columns of the neurons alone. Whenever something is not as it was found (hooks, other layers in place of these, a
batch of several tasks, a compiled graph), the module's own code runs, with the layers as they are.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nspec.kernels.common.columns import take_columns
from nspec.kernels.common.derivatives import once
from nspec.kernels.gated_activation import gated_gradients
from nspec.kernels.neuron_wgrad import neuron_wgrad

from .neurons import NeuronSet
from .tuned_linear import TunedLayer, cast, flat, plain_class, put

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class _Block(torch.autograd.Function):
    """``down(act(gate(x)) * up(x))``, and the gradients of the neurons' rows and biases, and of ``x``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, block: TunedBlock, uses: Any, *parameters: Tensor | None) -> Tensor:
        layers = block.projections()
        weights = [layer.weight for layer in layers]
        _bring(layers, uses, parameters[:3], parameters[3:], weights)
        gate, up, down = layers
        g, u = gate.plain_forward(x), up.plain_forward(x)
        h = _product(block._nspec_activation(g), g, u)
        y = down.plain_forward(h)
        index = next(use.index for use in uses if use is not None)
        ctx.block, ctx.layers, ctx.uses, ctx.kind, ctx.lead = block, layers, uses, block._nspec_kind, x.shape[:-1]
        ctx.weights, ctx.index = weights, index
        columns = take_columns(flat(h), index) if ctx.needs_input_grad[5] else None
        g, u = flat(g), flat(u)
        if not ctx.needs_input_grad[0]:  # all that a gradient is wanted of
            g, u = take_columns(g, index), take_columns(u, index)
        kept = flat(x) if ctx.needs_input_grad[3] or ctx.needs_input_grad[4] else None
        ctx.save_for_backward(kept, g, u, columns, *parameters)
        return y

    @staticmethod
    @once
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, g, u, columns, *parameters = ctx.saved_tensors
        rows, biases = parameters[:3], parameters[3:]
        gate, up, down = ctx.weights
        dy, index, whole = flat(dy), ctx.index, ctx.needs_input_grad[0]
        gradients: list[Tensor | None] = [None] * 6
        if ctx.needs_input_grad[5]:
            gradients[2] = neuron_wgrad(columns, dy, None, dtype=rows[2].dtype)
        dx = None
        projected = any(ctx.needs_input_grad[one] for one in (3, 4, 6, 7))
        if whole:
            _bring(ctx.layers, ctx.uses, rows, biases, ctx.weights)
            dh = dy @ cast(down, dy.dtype)
            dg, du, own_dg, own_du = gated_gradients(dh, g, u, ctx.kind, index)
            dx = torch.mm(dg, cast(gate, dg.dtype))
            dx = dx.addmm_(du, cast(up, du.dtype)).view(*ctx.lead, -1)
        elif projected:
            own = rows[2] if rows[2] is not None else down.index_select(1, index).t()
            # The base's dtype, in which the forward pass has multiplied.
            dh = dy @ cast(cast(own, down.dtype), dy.dtype).t()
            own_dg, own_du, _, _ = gated_gradients(dh, g, u, ctx.kind, None)
        for place, own_gradient in ((0, own_dg), (1, own_du)) if projected else ():
            if ctx.needs_input_grad[3 + place]:
                gradients[place] = neuron_wgrad(own_gradient, x, None, dtype=rows[place].dtype)
            if ctx.needs_input_grad[6 + place]:
                gradients[3 + place] = own_gradient.sum(0, dtype=biases[place].dtype)
        return dx, None, None, *gradients


def _bring(layers: Any, uses: Any, rows: Any, biases: Any, weights: Any) -> None:
    """Has the weights hold what the pass uses, in one write."""
    put([one for of in zip(layers, uses, rows, biases, weights) for one in of[0].to_bring(*of[1:])])


def _product(activated: Tensor, g: Tensor, u: Tensor) -> Tensor:
    """``activated * u``, into the memory of the activations where that is new."""
    fresh = activated is not g and activated.data_ptr() != g.data_ptr()
    return activated.mul_(u) if fresh and activated.dtype == u.dtype else activated * u


class TunedBlock:
    """The mixin of the module around a gated block; see :func:`tuned_block`."""

    _nspec_names: tuple[str, str, str, str]
    _nspec_kind: str
    _nspec_known: tuple[Any]

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """What the module's own class computes."""
        if not args and not kwargs and (layers := self._as_found(x)) is not None:
            found = [layer.begin(x) for layer in layers]
            uses = [use for use, _ in found]
            if all(batch is None for _, batch in found) and any(use is not None for use in uses):
                return self._at_once(x, layers, uses)
        return super().forward(x, *args, **kwargs)  # type: ignore[misc]

    def _at_once(self, x: Tensor, layers: Any, uses: list[NeuronSet | None]) -> Tensor:
        parameters: list[Any] = [layer.of(use) for layer, use in zip(layers, uses)]
        rows, biases = [rows for _, rows, _ in parameters], [bias for _, _, bias in parameters]
        for layer, use in zip(layers, uses):
            x, *own = layer._nspec.passes.note((use, None), x, *rows, *biases)
            rows, biases = own[:3], own[3:]
        uses = [None if use is None else use.on(layer.weight.device) for layer, use in zip(layers, uses)]
        y: Tensor = _Block.apply(x, self, uses, *rows, *biases)
        return y

    def _as_found(self, x: Any) -> Any:
        """The three layers where the block can be computed at once; None else."""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not isinstance(x, Tensor):
            return None
        layers = self.projections()
        activation = self._nspec_activation
        if activation is not self._nspec_known[0]:
            return None
        for layer in layers:
            if not isinstance(layer, TunedLayer) or _is_watched(layer) or not layer.in_place():
                return None
            if layer.weight.device != x.device:
                return None
        if isinstance(activation, nn.Module) and _is_watched(activation):
            return None
        return layers

    @property
    def _nspec_activation(self) -> Any:
        return getattr(self, self._nspec_names[3])

    def projections(self) -> Any:
        """Gate, up and down, whatever is in their places."""
        return [getattr(self, name) for name in self._nspec_names[:3]]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _blank, (plain_class(self, TunedBlock),), self.__dict__.copy()


def _is_watched(module: Any) -> bool:
    """Whether hooks, or a ``forward`` of its own, would miss that the module is not called."""
    return any(module.__dict__[hooks] for hooks in _HOOKS) or "forward" in module.__dict__


@functools.cache
def _class(plain: type) -> type:
    return type(plain.__name__, (TunedBlock, plain), {"__module__": plain.__module__})


def _blank(plain: type) -> Any:
    made: Any = _class(plain)
    return made.__new__(made)


def tuned_block(module: Any, names: tuple[str, str, str, str], kind: str) -> None:
    """Has a module compute its gated block at once, in place.

    Args:
        module: one that :func:`recognised` knows.
        names: of the attributes with gate, up, down and the activation.
        kind: of the activation.
    """
    plain: Any = type(module)
    module.__class__ = _class(plain)
    module._nspec_names, module._nspec_kind = names, kind
    module._nspec_known = (module._nspec_activation,)  # a tuple, or it would be a module of the model


def untuned_block(module: Any) -> None:
    """The module as it was before."""
    plain = plain_class(module, TunedBlock)
    del module._nspec_names, module._nspec_kind, module._nspec_known
    module.__class__ = plain


def recognised(module: nn.Module, gate: nn.Module, up: nn.Module, down: nn.Module) -> tuple[Any, str] | None:
    """The names of gate, up, down and activation, and the kind of the activation, of a module that is nothing else.

    It has these three layers and an activation that is one of those known, and gives on random numbers, bit for bit, what
    ``down(act(gate(x)) * up(x))`` does. None else: such a module runs its own code.
    """
    children = module._modules
    names = [next((name for name, child in children.items() if child is part), None) for part in (gate, up, down)]
    others = [(name, child) for name, child in children.items() if all(child is not part for part in (gate, up, down))]
    if None in names or len(others) != 1 or [*module._parameters, *module._buffers] or _is_watched(module):
        return None
    name, activation = others[0]
    weights: list[Any] = [part.weight for part in (gate, up, down)]
    if any(type(w) is not nn.Parameter or w.is_meta or not w.is_floating_point() for w in weights):
        return None
    if activation is None or (kind := _kind_of(activation)) is None:
        return None
    x = torch.randn(2, 3, weights[0].shape[1], generator=torch.Generator().manual_seed(0))
    x = x.to(weights[0].device, weights[0].dtype)
    training = module.training
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
            for mode in (True, False):
                module.train(mode)
                if not torch.equal(module(x), down(activation(gate(x)) * up(x))):
                    return None
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return None
    finally:
        module.train(training)
    return (*names, name), kind


def _kind_of(activation: nn.Module) -> str | None:
    """Which activation of the fused gradient a module is, by its values."""
    if [*activation.parameters(), *activation.buffers()]:
        return None
    z = torch.linspace(-12, 12, 2401, dtype=torch.float64)
    known = {
        "silu": F.silu(z),
        "gelu": F.gelu(z),
        "gelu_tanh": F.gelu(z, approximate="tanh"),
        "relu": F.relu(z),
    }
    try:
        with torch.no_grad():
            got = activation(z.clone())
    except (RuntimeError, TypeError, ValueError):
        return None
    if not isinstance(got, Tensor) or got.shape != z.shape:
        return None
    return next((kind for kind, values in known.items() if torch.allclose(got, values, rtol=0, atol=1e-10)), None)

"""A block some of whose neurons have parameters of their own, computed as one: less is kept, and less is computed.

The module around the layers keeps its code and gets a ``forward`` before it that computes ``down(act(gate(x)) * up(x))``,
or ``fc2(act(fc1(x)))``, by the layers' own functions, bit for bit, and a backward pass of its own. Of the forward pass of
a gated block ``x``, gate and up and the columns of the neurons are kept. Where nothing below is trained, ``x`` needs no
gradient, and the backward pass is over the columns of the neurons alone; a plain block is computed as one there only, as
its own code loses nothing elsewhere. Whenever something is not as it was found (hooks, those of all modules too, other
layers in place of these, a batch of several tasks, a compiled graph), the module's own code runs, with the layers as they
are.

A plain block whose layers lie in a larger module (the encoder layers of Marian and BART) runs its own code too: what it
has between its layers is open to hooks and to ``retain_grad``, which would find gradients of the neurons' columns alone.
"""

from __future__ import annotations

import functools
import inspect
import operator
from typing import Any, NamedTuple

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from nspec.kernels.common.columns import take_columns
from nspec.kernels.common.derivatives import once
from nspec.kernels.gated_activation import gated_gradients
from nspec.kernels.neuron_wgrad import neuron_wgrad

from . import global_hooks
from .neurons import NeuronSet, Unwritten
from .overlay import cast, flat
from .tuned_linear import TunedLayer, plain_class, put

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class _Block(torch.autograd.Function):
    """``down(act(gate(x)) * up(x))``, and the gradients of the neurons' rows and biases, and of ``x``.

    Its layers are gate, up and down, or gate and up in one, and down.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, block: TunedBlock, uses: Any, *parameters: Tensor | None) -> Tensor:
        layers = block.projections()
        weights, count = [layer.weight for layer in layers], len(layers)
        _bring(layers, uses, parameters[:count], parameters[count:], weights)
        *first, down = layers
        projected = [layer.plain_forward(x) for layer in first]
        g, u = projected if len(first) == 2 else projected[0].chunk(2, -1)
        h = _product(block._nspec_activation(g), g, u)
        y = down.plain_forward(h)
        index = next(use.index for use in uses[::-1] if use is not None)
        ctx.layers, ctx.uses, ctx.kind, ctx.lead = layers, uses, block._nspec_kind, x.shape[:-1]
        ctx.weights, ctx.index, ctx.unwritten = weights, index, Unwritten(weights)
        _, _, _, *needed = ctx.needs_input_grad
        columns = take_columns(flat(h), index) if needed[count - 1] else None
        g, u = flat(g), flat(u)
        if not ctx.needs_input_grad[0]:  # all that a gradient is wanted of
            g, u = take_columns(g, index), take_columns(u, index)
        ctx.save_for_backward(flat(x) if any(needed[: count - 1]) else None, g, u, columns, *parameters)
        return y

    @staticmethod
    @once
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, g, u, columns, *parameters = ctx.saved_tensors
        whole, _, _, *needed = ctx.needs_input_grad
        count, dy = len(ctx.layers), flat(dy)
        rows, biases, down = parameters[:count], parameters[count:], ctx.weights[-1]
        gradients: list[Tensor | None] = [None] * (2 * count)
        own: Any = ()
        dx = None
        ctx.unwritten.check(ctx.layers[-1].qualified_name)
        if needed[count - 1]:
            gradients[count - 1] = neuron_wgrad(columns, dy, None, dtype=rows[-1].dtype)
        if whole:
            _bring(ctx.layers, ctx.uses, rows, biases, ctx.weights)
            dh = dy @ cast(down, dy.dtype)
            dg, du, *own = gated_gradients(dh, g, u, ctx.kind, ctx.index)
            gate, up = ctx.weights[:2] if count == 3 else ctx.weights[0].chunk(2)
            dx = torch.mm(dg, cast(gate, dg.dtype))
            dx = dx.addmm_(du, cast(up, du.dtype)).view(*ctx.lead, dx.shape[1])
        elif any(needed[: count - 1]) or any(needed[count:]):
            dh = _columns_below(down, rows[-1], ctx.index, dy)
            own = gated_gradients(dh, g, u, ctx.kind, None)[2:]
        if len(own) and count == 2:
            own = [torch.cat(tuple(own), 1)]
        for place, dz in enumerate(own):
            if needed[place]:
                gradients[place] = neuron_wgrad(dz, x, None, dtype=rows[place].dtype)
            if needed[count + place]:
                gradients[count + place] = dz.sum(0, dtype=biases[place].dtype)
        return dx, None, None, *gradients


class _Lowest(torch.autograd.Function):
    """``fc2(act(fc1(x)))`` of an ``x`` without a gradient: all but the forward pass is over the columns of the neurons."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, block: TunedBlock, uses: Any, *parameters: Tensor | None) -> Tensor:
        layers = block.projections()
        fc1, fc2 = layers
        weights = [layer.weight for layer in layers]
        _bring(layers, uses, parameters[:2], parameters[2:], weights)
        z = fc1.plain_forward(x)
        h = block._nspec_activation(z)
        y = fc2.plain_forward(h)
        ctx.index = next(use.index for use in uses if use is not None)
        ctx.kind, ctx.down, ctx.unwritten = block._nspec_kind, weights[1], Unwritten(weights)
        ctx.name = fc2.qualified_name
        first, second, bias, _ = ctx.needs_input_grad[3:]
        ctx.save_for_backward(
            flat(x) if first else None,
            take_columns(flat(z), ctx.index) if first or bias else None,
            take_columns(flat(h), ctx.index) if second else None,
            *parameters,
        )
        return y

    @staticmethod
    @once
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, z, h, rows, down, bias, _ = ctx.saved_tensors
        first, second, third, _ = ctx.needs_input_grad[3:]
        dy = flat(dy)
        drows = neuron_wgrad(h, dy, None, dtype=down.dtype) if second else None
        if not (first or third):
            return None, None, None, None, drows, None, None
        ctx.unwritten.check(ctx.name)
        # The slope is that of a gated activation with 1 as its other half.
        dz = gated_gradients(_columns_below(ctx.down, down, ctx.index, dy), z, torch.ones_like(z), ctx.kind, None)[0]
        dfirst = neuron_wgrad(dz, x, None, dtype=rows.dtype) if first else None
        return None, None, None, dfirst, drows, dz.sum(0, dtype=bias.dtype) if third else None, None


def _columns_below(weight: Tensor, rows: Tensor | None, index: Tensor, dy: Tensor) -> Tensor:
    """The gradient of the neurons' outputs, ``[tokens, k]``, through a last layer with rows of their own, or without."""
    mine = rows if rows is not None else weight.index_select(1, index).t()
    # The base's dtype, in which the forward pass has multiplied.
    return dy @ cast(cast(mine, weight.dtype), dy.dtype).t()


def _bring(layers: Any, uses: Any, rows: Any, biases: Any, weights: Any) -> None:
    """Has the weights hold what the pass uses, in one write."""
    put([one for of in zip(layers, uses, rows, biases, weights) for one in of[0].to_bring(*of[1:])])


def _product(activated: Tensor, g: Tensor, u: Tensor) -> Tensor:
    """``activated * u``, into the memory of the activations where that is new."""
    fresh = activated is not g and activated.data_ptr() != g.data_ptr()
    return activated.mul_(u) if fresh and activated.dtype == u.dtype else activated * u


class TunedBlock:
    """The mixin of the module around a block; see :func:`tuned_block`."""

    _nspec_names: tuple[str, ...]
    _nspec_kind: str
    _nspec_gated: bool
    _nspec_known: _Found

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """What the module's own class computes."""
        if not args and not kwargs and (layers := self._as_found(x)) is not None:
            found = [layer.begin_with(x) for layer in layers]
            uses = [use for use, _ in found]
            if all(batch is None for _, batch in found) and self._fits(uses):
                return self._at_once(x, layers, uses)
        return super().forward(x, *args, **kwargs)  # type: ignore[misc]

    def _at_once(self, x: Tensor, layers: Any, uses: list[NeuronSet | None]) -> Tensor:
        parameters: list[Any] = [layer.of(use) for layer, use in zip(layers, uses)]
        rows, biases = [rows for _, rows, _ in parameters], [bias for _, _, bias in parameters]
        for layer, use in zip(layers, uses):
            x, *own = layer._nspec.passes.note((use, None), x, *rows, *biases)
            rows, biases = own[: len(layers)], own[len(layers) :]
        uses = [None if use is None else use.on(layer.weight.device) for layer, use in zip(layers, uses)]
        function = _Block if self._nspec_gated else _Lowest
        y: Tensor = function.apply(x, self, uses, *rows, *biases)
        return y

    def _as_found(self, x: Any) -> Any:
        """The layers where the block can be computed at once; None else."""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not isinstance(x, Tensor):
            return None
        if global_hooks.anywhere():
            return None
        if not self._nspec_gated and x.requires_grad:
            return None
        layers = self.projections()
        activation, known = self._nspec_activation, self._nspec_known
        if activation is not known.activation or id(super().forward.__func__) != known.forward:  # type: ignore[misc]
            return None
        if _settings(self, known.names, activation) != known.settings:
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
        return getattr(self, self._nspec_names[-1])

    def _fits(self, uses: list[NeuronSet | None]) -> bool:
        """Whether the parts that are trained are such that one index serves them all."""
        first, *_, last = uses
        if len(uses) == 3 or not self._nspec_gated:
            return any(use is not None for use in uses)
        return first is not None and last is not None and len(first.index) == 2 * len(last.index)

    def projections(self) -> Any:
        """Gate, up and down, or gate and up in one and down, or fc1 and fc2, whatever is in their places."""
        return [getattr(self, name) for name in self._nspec_names[:-1]]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _blank, (plain_class(self, TunedBlock),), self.__dict__.copy()


class _Found(NamedTuple):
    """What a module computed with when it was recognised; a tuple, or the activation would be twice in the model.

    Attributes:
        activation: the module.
        forward: which function that of the module's class is; its ``id``, as not every function can be pickled.
        names: of the attributes that its code may read; None: any.
        settings: see :func:`_settings`.
    """

    activation: Any
    forward: int
    names: tuple[str, ...] | None
    settings: dict[Any, int]


def _names_read(plain: Any) -> tuple[str, ...] | None:
    """The names that the ``forward`` of a class reads; None where it may read others by way of other code."""
    code = getattr(plain.forward, "__code__", None)
    if code is None or code.co_freevars or any(hasattr(one, "co_names") for one in code.co_consts):
        return None
    if any(inspect.isroutine(getattr(plain, name, None)) for name in code.co_names):
        return None
    return tuple(code.co_names)


def _settings(module: Any, names: tuple[str, ...] | None, activation: Any) -> dict[Any, int]:
    """Which objects a module's plain attributes are, those of such an attribute, and those of its activation."""
    own = (
        module.__dict__ if names is None else {name: module.__dict__[name] for name in names if name in module.__dict__}
    )
    found: dict[Any, int] = {name: id(value) for name, value in own.items() if _is_setting(name)}
    for name in [name for name in found if hasattr(own[name], "__dict__")]:
        found |= {(name, key): id(value) for key, value in vars(own[name]).items()}
    if isinstance(activation, nn.Module):
        found |= {("", name): id(value) for name, value in activation.__dict__.items() if _is_setting(name)}
    return found


def _is_setting(name: str) -> bool:
    return name[0] != "_" and name != "training"


def _is_watched(module: Any) -> bool:
    """Whether hooks, or a ``forward`` of its own, would miss that the module is not called."""
    return any(module.__dict__[hooks] for hooks in _HOOKS) or "forward" in module.__dict__


@functools.cache
def _class(plain: type) -> type:
    return type(plain.__name__, (TunedBlock, plain), {"__module__": plain.__module__})


def _blank(plain: type) -> Any:
    made: Any = _class(plain)
    return made.__new__(made)


def tuned_block(module: Any, names: tuple[str, ...], kind: str, gated: bool) -> None:
    """Has a module compute its block at once, in place.

    Args:
        module: one that :func:`recognised` knows.
        names: of the attributes with the layers and the activation.
        kind: of the activation.
        gated: whether the block is.
    """
    plain: Any = type(module)
    module.__class__ = _class(plain)
    module._nspec_names, module._nspec_kind, module._nspec_gated = names, kind, gated
    activation, read = module._nspec_activation, _names_read(plain)
    module._nspec_known = _Found(activation, id(plain.forward), read, _settings(module, read, activation))


def untuned_block(module: Any) -> None:
    """The module as it was before."""
    plain = plain_class(module, TunedBlock)
    del module._nspec_names, module._nspec_kind, module._nspec_gated, module._nspec_known
    module.__class__ = plain


def recognised(module: nn.Module, layers: list[Any], gated: bool) -> tuple[Any, str] | None:
    """The names of the layers and of the activation, and the kind of the activation, of a module that is nothing else.

    It has these layers (gate, up and down, or gate and up in one, and down, or fc1 and fc2) and an activation that is one
    of those known, calls each of them once and does nothing else than multiply and divide into chunks, and gives on random
    numbers, bit for bit, what ``down(act(gate(x)) * up(x))``, or ``fc2(act(fc1(x)))``, does. None else: such a module runs
    its own code.
    """
    children = module._modules
    names = [next((name for name, child in children.items() if child is part), None) for part in layers]
    others = [(name, child) for name, child in children.items() if all(child is not part for part in layers)]
    if isinstance(module, nn.Sequential):  # which may become longer
        return None
    if None in names or len(others) != 1 or [*module._parameters, *module._buffers] or _is_watched(module):
        return None
    name, activation = others[0]
    weights: list[Any] = [part.weight for part in layers]
    if any(type(w) is not nn.Parameter or w.is_meta or not w.is_floating_point() for w in weights):
        return None
    if not all(isinstance(part, nn.Linear) for part in layers):
        return None
    if activation is None or (kind := _kind_of(activation)) is None:
        return None
    x = torch.randn(2, 3, weights[0].shape[1], generator=torch.Generator().manual_seed(0))
    x = x.to(weights[0].device, weights[0].dtype)
    training = module.training
    *first, down = layers
    called = sorted([name, *(one for one in names if one is not None)])
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
            for mode in (True, False):
                module.train(mode)
                if gated:
                    g, u = (layer(x) for layer in first) if len(first) == 2 else first[0](x).chunk(2, -1)
                    h = activation(g) * u
                else:
                    h = activation(first[0](x))
                if not (torch.equal(module(x), down(h)) and _calls(module) == called):
                    return None
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return None
    finally:
        module.train(training)
    return (*names, name), kind


_HARMLESS = {operator.mul, operator.getitem, torch.mul, torch.chunk, "mul", "chunk"}
"""What a block may do between its layers. Numbers tell the rest, but not what comes into play far from them alone."""


class _Calls(torch.fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Every module is called, not looked into."""
        return True


def _calls(module: nn.Module) -> list[str] | None:
    """The names of the modules that a module's forward pass calls, sorted; None where it does more than that."""
    try:
        nodes = list(_Calls().trace(module).nodes)
    except Exception:  # whatever its code does with a tensor that is none: it is not what is looked for
        return None
    if any(node.op in ("call_function", "call_method") and node.target not in _HARMLESS for node in nodes):
        return None
    if any(node.op == "get_attr" for node in nodes):
        return None
    return sorted(str(node.target) for node in nodes if node.op == "call_module")


def _kind_of(activation: nn.Module) -> str | None:
    """Which activation of the fused gradient a module is, by its values."""
    if [*activation.parameters(), *activation.buffers()]:
        return None
    far = torch.logspace(1, 30, 117, dtype=torch.float64)
    z = torch.cat([torch.linspace(-12, 12, 2401, dtype=torch.float64), far, -far])
    known = {
        "silu": F.silu(z),
        "gelu": F.gelu(z),
        "gelu_tanh": F.gelu(z, approximate="tanh"),
        "relu": F.relu(z),
    }
    given = z.clone()
    try:
        with torch.no_grad():
            got = activation(given)
    except (RuntimeError, TypeError, ValueError):
        return None
    if not isinstance(got, Tensor) or got.shape != z.shape or not torch.equal(given, z):  # written to, and kept
        return None
    return next((kind for kind, values in known.items() if torch.allclose(got, values, rtol=1e-12, atol=1e-10)), None)

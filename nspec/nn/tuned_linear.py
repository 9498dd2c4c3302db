"""A linear layer some of whose neurons have parameters of their own, a set for each task, over a base that is frozen.

``W`` of the layer is that of the base. Two ways lead to the same numbers:

* *in place*, where one task computes: its rows are written into ``W`` before each use, forward and backward, so that the
  forward pass is that of the merged model bit for bit. No optimiser needs to tell of its steps (fused ones, ``.data`` and
  their like do not), and sharded weights that are gathered anew are right too. What the base had there is kept.
* *overlaid*, where sentences of several tasks are in a batch, ``W`` is trained or packed, or a graph is compiled: the
  outputs of the neurons are replaced, or, in a last layer, their inputs taken out and multiplied apart.

In both, the gradient of the neurons is computed for them alone, ``[k, d]``.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from nspec.kernels.common.checks import PLAIN
from nspec.kernels.common.columns import take_columns
from nspec.kernels.common.derivatives import once, transformed
from nspec.kernels.neuron_wgrad import neuron_wgrad
from nspec.kernels.write_neurons import write_neurons_

from .batch import TaskBatch, check_sentences
from .neurons import UNKNOWN, NeuronSet, Parameters, TunedState, Unwritten, stamps
from .overlay import cast, flat, with_inputs, with_outputs
from .recompute import backward_pass
from .state import SwitchedTo
from .switched import Shared, TaskSwitched
from .transforms import outside_transforms


class _InPlace(torch.autograd.Function):
    """A layer over the weight that holds the rows of the task; the gradient of these rows, and of the input."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, rows: Tensor | None, bias: Tensor | None, layer: TunedLayer, use: NeuronSet | None
    ) -> Tensor:
        layer.bring(use, rows, bias)
        y = layer.plain_forward(x)
        ctx.layer, ctx.use, ctx.weight, ctx.lead = layer, use, layer.weight, x.shape[:-1]
        ctx.unwritten = Unwritten([layer.weight])
        kept = None
        if use is not None and ctx.needs_input_grad[1]:
            kept = flat(x) if layer._nspec.outputs else take_columns(flat(x), use.index)
        ctx.save_for_backward(kept, rows, bias)
        return y

    @staticmethod
    @once
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        kept, rows, bias = ctx.saved_tensors
        layer, use = ctx.layer, ctx.use
        dy = flat(dy)
        dx = drows = dbias = None
        if ctx.needs_input_grad[0]:
            ctx.unwritten.check(layer.qualified_name)
            layer.bring(use, rows, bias, ctx.weight)
            dx = dy @ cast(layer.matrix(ctx.weight), dy.dtype)
            dx = dx.view(*ctx.lead, dx.shape[1])
        if ctx.needs_input_grad[1]:
            drows = rows_gradient(layer._nspec.outputs, dy, kept, use.index, rows)
        if ctx.needs_input_grad[2]:
            dbias = dy.index_select(1, use.index).sum(0, dtype=bias.dtype)
        return dx, drows, dbias, None, None


def rows_gradient(outputs: bool, dy: Tensor, kept: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """The gradient of the neurons' rows ``[k, d]``, in their dtype.

    It is returned, and autograd adds it to the one that is there, though ``neuron_wgrad(add_to=...)`` could write into
    that. Whether it may cannot be seen from here: ``torch.autograd.grad`` wants it for itself, hooks on the node that
    accumulates (of DDP, in C++, and of whoever registers one) get what is returned, and that node locks against other
    threads and waits for other streams. It costs 12 bytes a trained number and pass, 0.7 GB for 1 % of an 8B model.
    """
    if outputs:
        return neuron_wgrad(dy, kept, index, dtype=rows.dtype)
    return neuron_wgrad(kept, dy, None, dtype=rows.dtype)


Write = tuple[Tensor, Tensor, Tensor, bool]
"""A matrix, the rows of neurons that are put into it, the neurons, and whether they are its columns."""


def put(writes: list[Write]) -> None:
    """Writes rows into weights. Autograd does not see it: a version that rose would keep a backward pass from their use."""
    if writes:
        weights, rows, index, columns = zip(*writes)
        write_neurons_(weights, rows, index, columns)


class TunedLayer(TaskSwitched):
    """The mixin of a linear layer whose neurons have parameters of their own; see :func:`tuned`.

    Its parameters are ``neurons.<task>``, ``[k, d]``, and ``neuron_biases.<task>``, ``[k]``.
    """

    _nspec: TunedState
    weight: Any
    bias: Any
    neurons: Parameters
    neuron_biases: Parameters
    transposed = False

    @property
    def qualified_name(self) -> str:
        """The name of the layer in its model."""
        return self._nspec.name

    @property
    def tasks(self) -> list[str]:
        """The tasks that the model has neurons of."""
        return list(self._nspec.sets)

    def knows(self, task: str | None) -> bool:
        """Whether the model has neurons of the task; None, the base, may be among the tasks of a batch."""
        return task is None or task in self._nspec.sets

    @property
    def decodes_by_task(self) -> bool:
        """The forward pass depends on the task."""
        return True

    @property
    def task(self) -> str | tuple[str | None, ...] | None:
        """The current task, or the task of each sentence of a batch; None is the base."""
        return self._nspec.task

    def set_task(self, task: str | TaskBatch | None) -> None:
        """Switches to the neurons of a task, or of each task of a batch; None is the base."""
        sets = self._nspec.sets
        if not isinstance(task, TaskBatch):
            self.switch(SwitchedTo(task, None if task is None else sets[task], None, backward_pass()))
            return
        task = task.along(self._nspec.batch_dim)
        use: Any = tuple([None if name is None else sets[name] for name in task.names])
        # The batch of a single task is kept to be compared with the sentences that come.
        self.switch(SwitchedTo(task.tasks, use[0] if task.single else use, task, backward_pass()))

    def switch(self, to: SwitchedTo) -> None:
        """Switches; the weight does not keep what another task has written."""
        super().switch(to)
        wanted = to.use.task if isinstance(to.use, NeuronSet) else None
        if self._nspec.content not in (None, wanted):
            self.bring_current()

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., in_features]`` -> ``[..., out_features]``."""
        use, batch = self.begin_with(x)
        if batch is not None:
            return self._overlaid(x, use, batch)
        if not self.in_place():
            return self._overlaid(x, (use,), None)
        use, rows, bias = self.of(use)
        noted: Any = use, None
        if not torch.is_grad_enabled():
            self._nspec.passes.note(noted, x)
            self._nspec.written = None  # averages of weights come through .data, and are evaluated
            self.bring(use, rows, bias)
            return self.plain_forward(x)
        x, rows, bias = self._nspec.passes.note(noted, x, rows, bias)
        y: Tensor = _InPlace.apply(x, rows, bias, self, None if use is None else use.on(self.weight.device))
        return y

    def plain_forward(self, x: Tensor) -> Tensor:
        """What the layer's own class computes."""
        y: Tensor = super().forward(x)  # type: ignore[misc]
        return y

    def begin_with(self, x: Tensor) -> Any:
        """Begins a forward pass: what it uses.

        Raises:
            RuntimeError: another thread has switched the model, or the weight was parametrised.
            ValueError: ``x`` does not say which of its tokens are of which sentence.
        """
        self.check_thread()
        if "parametrizations" in self.__dict__["_modules"]:
            raise RuntimeError(
                f"{self.qualified_name}: its weight was parametrised after its neurons got parameters of their own, and is "
                "made anew in each pass, without them: remove the parametrisation, or merge the neurons first (nspec.merge)"
            )
        kept = self._nspec
        use, batch = kept.current()
        if isinstance(use, tuple):
            check_sentences(x, batch, kept)
            return use, batch
        if torch.compiler.is_compiling():  # each number of sentences of one task would cost a graph
            return use, None
        if batch is not None and not kept.routed:  # of whichever sentence a token of an expert is, its task is the same
            batch.check(x, kept.name)
        elif use is None and self._trains_untold():
            kept.shared.told = True
            warnings.warn(
                f"{kept.name}: a training pass runs without a task, and the model has neurons of several: it computes the "
                "base, and trains none of them. Set the task of each batch (with nspec.task(model, name)), or say that the "
                "base is meant (with nspec.task(model, None)). This is said once",
                stacklevel=2,
            )
        return use, None

    def _trains_untold(self) -> bool:
        if self._nspec.shared.told or not self.training:  # type: ignore[attr-defined]
            return False
        return self.is_untold() and torch.is_grad_enabled() and backward_pass() < 0

    def is_untold(self) -> bool:
        """Whether the model has neurons of several tasks, and nobody has said which, or that the base, is meant."""
        kept = self._nspec
        held = kept.block is not None and kept.block.open
        return len(kept.sets) > 1 and kept.task is None and not held

    def of(self, use: NeuronSet | None) -> tuple[NeuronSet | None, Any, Any]:
        """The set of a task, the parameter of its rows, and that of its biases."""
        if use is None:
            return None, None, None
        return use, self.neurons.of(use.task), self.neuron_biases.of(use.task)

    def in_place(self) -> bool:
        """Whether this pass may write into the weight."""
        if torch.compiler.is_compiling() or transformed() or not self.is_writable():
            return False
        if self._base_is_trained():
            self.bring(None)  # it is trained with its own rows
            return False
        return True

    def _base_is_trained(self) -> bool:
        """Whether it is, or has been: from then on the base is what the weight holds, and no rows are written into it."""
        trained = self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)
        return trained or self._nspec.base_trained

    def is_writable(self) -> bool:
        """Whether the weight is a matrix here, neither packed nor sharded, and the layer's own.

        ``torch.func.functional_call`` lends another one, which is the caller's, and is taken for the base as it is.
        """
        weight = self.weight
        own = isinstance(weight, nn.Parameter) or getattr(self, "_is_replica", False)
        return own and type(weight) in PLAIN and weight.is_floating_point() and weight.dim() == 2

    def bring(
        self, use: NeuronSet | None, rows: Tensor | None = None, bias: Tensor | None = None, weight: Any = None
    ) -> None:
        """Has the weight hold the rows of a task, or those of the base.

        They are written each time, as that a parameter has changed cannot be seen; but where an optimiser that was told to
        (``RowSparseAdamW(write_rows=True)``) has written them, and nothing tells of a change.
        """
        put(self.to_bring(use, rows, bias, weight))

    def to_bring(
        self, use: NeuronSet | None, rows: Tensor | None = None, bias: Tensor | None = None, weight: Any = None
    ) -> list[Write]:
        """The rows that :meth:`bring` writes, for :func:`put`; what another task has written is undone here."""
        kept, weight = self._nspec, self.weight if weight is None else weight
        if weight is self.weight:
            self.look()
        writes: list[Write] = []
        if kept.content is not None and (use is None or kept.content != use.task):
            for one in kept.sets.values():
                if one is not None and kept.content in (UNKNOWN, one.task):
                    there = one.on(weight.device)
                    writes += self._writes(weight, there, there.base, there.base_bias)
            put(writes)  # by itself: a launch writes its matrices side by side
            writes, kept.content, kept.written = [], None, None
        if use is not None and not (kept.written is not None and kept.written.holds((weight, self.bias), rows, bias)):
            kept.content, kept.written = use.task, None
            writes += self._writes(weight, use.on(weight.device), rows, bias)
        return writes

    def look(self) -> None:
        """Looks whether the weight may hold something else than was noted.

        Averages, broadcasts, optimisers and copies write to it, or bring rows of a task along; what is written through
        ``.data`` is not seen. The base is what it was when its neurons got parameters, unless it is trained itself.
        """
        kept, now = self._nspec, stamps((self.weight, self.bias))
        if not kept.base_trained and kept.stamps not in (None, now):
            kept.content, kept.written = UNKNOWN, None
        kept.base_trained = self._base_is_trained()
        kept.stamps = now

    def _writes(self, weight: Tensor, use: NeuronSet, rows: Tensor | None, bias: Tensor | None) -> list[Write]:
        found: list[Write] = []
        if rows is not None:
            found.append((weight.data, rows.detach(), use.index, self._nspec.dim == 1))
        if bias is not None:
            found.append((self.bias.data[None], bias.detach()[:, None], use.index, True))
        return found

    def place_of(self, parameter: Tensor, biases: bool) -> tuple[Tensor, Tensor, bool] | None:
        """Where a parameter of neurons lies in the weight, or in the bias, which an optimiser may write to; None else.

        It may where there is one task, and the weight holds its rows.
        """
        kept = self._nspec
        use = kept.use
        if len(kept.sets) != 1 or not isinstance(use, NeuronSet) or kept.content != use.task:
            return None
        if type(parameter) not in PLAIN or not self.is_writable() or self._base_is_trained():
            return None
        if parameter.device != self.weight.device:
            return None
        index = use.on(parameter.device).index
        return (self.bias.data[None], index, True) if biases else (self.weight.data, index, kept.dim == 1)

    def bring_anew(self, use: NeuronSet | None) -> None:
        """Has the weight hold the rows of a task, or of the base, whatever was written to it, through ``.data`` too."""
        self.look()
        if not self._nspec.base_trained:
            self._nspec.content = UNKNOWN
        self.bring(*self.of(use))

    def bring_current(self) -> None:
        """Has the weight hold what the model is switched to, where it may be written to now."""
        kept = self._nspec
        self._nspec.written = None
        if self.is_writable() and not self.weight.is_meta:
            one = isinstance(kept.use, NeuronSet) and not self._base_is_trained()
            self.bring(*self.of(kept.use if one else None))

    def matrix(self, weight: Tensor) -> Tensor:
        """The weight as ``[out_features, in_features]``."""
        return weight.t() if self.transposed else weight

    def _overlaid(self, x: Tensor, sets: tuple[NeuronSet | None, ...], batch: TaskBatch | None) -> Tensor:
        """The layer of the base, with the outputs of the tasks' neurons replaced, or their inputs taken out."""
        if not torch.compiler.is_compiling():
            noted: Any = sets[0] if batch is None else sets, batch
            x, *_ = self._nspec.passes.note(noted, x)
            if self.is_writable():
                with outside_transforms():
                    self.bring(None)
        parts = [self.of(one) for one in sets]
        if not any(one is not None for one, _, _ in parts):
            return self.of_base(x)
        replace = with_outputs if self._nspec.outputs else with_inputs
        return replace(x, self.of_base, parts, batch, self.bias)

    def of_base(self, x: Tensor) -> Tensor:
        """Of the base, through a node that has the weight hold its rows again in the backward pass."""
        if self.in_place() and torch.is_grad_enabled():
            y: Tensor = _InPlace.apply(x, None, None, self, None)
            return y
        y = self.plain_forward(x)
        if x.requires_grad and not y.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                f"{self.qualified_name}: no gradient goes through this {type(self).__name__}, so that what lies below it "
                "would be trained on a part of its own: its library computes this pass for inference alone"
            )
        return y

    # What copies, state dicts and replicas need.

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.bring_current()
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[misc]
        if f"{prefix}weight" in state_dict:
            # A weight that is trained itself never holds rows of a task, and what its rows were at first is of no use.
            self._nspec.content = None if self._base_is_trained() else UNKNOWN

    def _replicate_for_data_parallel(self) -> Any:
        replica: Any = super()._replicate_for_data_parallel()  # type: ignore[misc]
        replica._nspec = self._nspec.replica()
        return replica

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _blank, (plain_class(self, TunedLayer),), self.__dict__.copy()


@functools.cache
def tuned_class(plain: type) -> type:
    """The class of a layer of class ``plain`` once its neurons have parameters of their own; one of its subclasses."""
    return type(plain.__name__, (TunedLayer, plain), {"__module__": plain.__module__, "transposed": _transposed(plain)})


def _transposed(plain: type) -> bool:
    return not issubclass(plain, nn.Linear) and any(base.__name__ == "Conv1D" for base in plain.__mro__)


def plain_class(module: Any, mixin: type) -> type:
    """The class that a module had before it got the mixin; wrappers may have made a subclass of it since."""
    plain: type = next(one.__bases__[1] for one in type(module).__mro__ if one.__bases__[:1] == (mixin,))
    return plain


def _blank(plain: type) -> Any:
    made: Any = tuned_class(plain)
    return made.__new__(made)


def tuned(layer: Any, name: str, outputs: bool, shared: Shared) -> TunedLayer:
    """Turns a linear layer into one whose neurons may have parameters of their own, in place. It has none yet.

    Args:
        layer: ``nn.Linear``, one of its subclasses, or ``Conv1D``.
        name: of the layer in its model, for messages.
        outputs: whether neurons are its outputs; else they are its inputs.
        shared: what the layers of the model have in common.
    """
    plain: Any = type(layer)
    around = layer.__dict__.get("_nspec")
    layer.__class__ = tuned_class(plain)
    layer._nspec = TunedState(name, outputs, int(outputs == layer.transposed))
    layer._nspec.shared, layer._nspec.around = shared, around
    layer.neurons, layer.neuron_biases = Parameters(), Parameters()
    turned: TunedLayer = layer
    return turned


def untuned(layer: TunedLayer) -> None:
    """The layer as it was before; its weight holds what it holds now."""
    plain, module = plain_class(layer, TunedLayer), layer  # type: Any, Any
    around = module._nspec.around
    del module.neurons, module.neuron_biases, module._nspec
    if around is not None:
        module._nspec = around
    module.__class__ = plain

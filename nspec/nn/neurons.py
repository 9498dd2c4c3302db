"""Neurons with parameters of their own: where they lie in a weight, and what the base has there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .state import LayerState

UNKNOWN = "\0"  # what lies in a weight that was loaded; no name of a task


class NeuronSet:
    """The neurons of one task in one linear layer.

    Attributes:
        task: whose they are.
        index: int64 ``[k]``: outputs of the layer, or inputs of a last layer. Those of a fused projection are its rows of
            gate, then those of up.
        base: what the base has there, ``[k, d]`` in the dtype of the weight; None where the weight is packed.
        base_bias: the same of the bias, ``[k]``; None without.
    """

    def __init__(self, task: str, index: Tensor, base: Tensor | None, base_bias: Tensor | None) -> None:
        self.task, self.index, self.base, self.base_bias = task, index, base, base_bias
        self._copies: dict[torch.device, NeuronSet] = {}

    def on(self, device: torch.device) -> NeuronSet:
        """This set if it is on ``device``, else its copy there, made once."""
        if self.index.device == device:
            return self
        if device not in self._copies:
            with torch.inference_mode(False):
                moved = [None if t is None else t.to(device) for t in (self.index, self.base, self.base_bias)]
            assert moved[0] is not None
            self._copies.setdefault(device, NeuronSet(self.task, moved[0], moved[1], moved[2]))
        return self._copies[device]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_copies": {}}


class Unwritten:
    """That nothing writes to weights between a forward pass and its backward pass, which autograd knows of its own nodes.

    Rows of neurons are written through ``.data``, which it does not count.
    """

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self._weights, self._versions = list(weights), [_version(weight) for weight in weights]

    def check(self, name: str) -> None:
        """Raises RuntimeError where one was written to."""
        if [_version(weight) for weight in self._weights] != self._versions:
            raise RuntimeError(
                f"{name}: its weight has been modified by an inplace operation between the forward and the backward pass, "
                "which would give the gradient of another model: write to weights before the forward pass, or after the "
                "backward pass"
            )


class Written:
    """That a step of an optimiser has written rows into a weight: unless something has changed, no pass need do it again.

    Changes through ``.data`` are not seen.

    Args:
        base: the weight and the bias that were written into; None: there is none.
        parameters: those of its neurons that were written.
    """

    steps = 0
    """Of optimisers that write no rows; their fused kernels need not raise the version of a parameter."""

    def __init__(self, base: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> None:
        self._base, self._steps = stamps(base), Written.steps
        self._versions = {p.data_ptr(): p._version for p in parameters}

    def holds(self, base: Sequence[Tensor | None], *parameters: Tensor | None) -> bool:
        """Whether weight and bias have these parameters, as they are, and nothing was written to them since."""
        if self._steps != Written.steps or self._base != stamps(base):
            return False
        return all(p is None or self._versions.get(p.data_ptr()) == p._version for p in parameters)

    def __reduce__(self) -> Any:
        return type(None), ()  # a copy has other tensors


Stamps = list["tuple[int, int] | None"]


def stamps(tensors: Sequence[Tensor | None]) -> Stamps:
    """Where each tensor lies, and how often PyTorch has written to it."""
    return [None if tensor is None else (tensor.data_ptr(), _version(tensor)) for tensor in tensors]


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version  # those of inference mode count nothing


class TunedState(LayerState):
    """What is kept on a linear layer some of whose neurons have parameters of their own.

    Attributes:
        name: of the layer in its model.
        outputs: whether the neurons are its outputs; else they are its inputs.
        dim: along which dimension of the weight they lie.
        sets: the neurons of each task; None where it has none here.
        content: whose rows the weight holds now; None: those of the base.
        written: that they were written by an optimiser; None where a pass has done it.
        stamps: of weight and bias when ``content`` was last known; None: nothing has looked yet.
        base_trained: whether the weight is trained itself, or has been.
        routed: whether a router chooses the tokens of the layer.
        batch_dim: the dimension of sentences in the layer's input, where the model says it.
        flattens: whether the model is known to flatten a batch to tokens before the layer.
        around: what was kept on the layer before.
    """

    def __init__(self, name: str, outputs: bool, dim: int) -> None:
        super().__init__()
        self.name, self.outputs, self.dim = name, outputs, dim
        self.sets: dict[str, NeuronSet | None] = {}
        self.content: str | None = None
        self.written: Written | None = None
        self.stamps: Stamps | None = None
        self.base_trained = False
        self.routed, self.flattens = False, False
        self.batch_dim: int | None = None
        self.around: Any = None


def key_of(task: str) -> str:
    """The name of a task's parameter: the task, but for what a name cannot hold."""
    key = task.replace("%", "%25").replace(".", "%2E")
    return f"{key}%" if hasattr(_EMPTY, key) else key


class Parameters(nn.Module):
    """The parameters of a layer's neurons by task: of rows ``[k, d]``, or of biases ``[k]``."""

    def of(self, task: str) -> Any:
        """That of a task; None where it has none."""
        return self._parameters.get(key_of(task))

    def add(self, task: str, values: Tensor, trained: bool) -> None:
        """Registers one."""
        self.register_parameter(key_of(task), nn.Parameter(values, requires_grad=trained))


_EMPTY = Parameters()

"""What fine-tuning hangs on a model besides its layers: hooks that look at what embeddings and the model give."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from nspec.kernels.common.derivatives import once
from nspec.nn.tuned_linear import TunedLayer
from nspec.specialization.tuned import TuningHook

from .layers import parameters_of, tuned_layers


class _ForReentrance(TuningHook):
    """Has the output of an embedding require a gradient where a reentrant checkpoint follows.

    That leaves the parameters within it without gradients unless one of its inputs requires one, and all below is frozen.
    """

    def __init__(self, model: nn.Module | None) -> None:
        self.model = model

    def __deepcopy__(self, memo: dict[int, Any]) -> _ForReentrance:
        return _ForReentrance(memo.get(id(self.model)))  # a copy of the embedding alone is in no model

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not isinstance(output, Tensor):
            return
        if self.model is None:
            return
        if not output.requires_grad and output.is_floating_point() and any(map(_reenters, self.model.modules())):
            output.requires_grad_(True)


def _reenters(module: nn.Module) -> bool:
    if not getattr(module, "gradient_checkpointing", False):
        return False
    function = getattr(module, "_gradient_checkpointing_func", None)
    keywords = function.keywords if isinstance(function, functools.partial) else {}
    return bool(keywords.get("use_reentrant", True))


class _ForTask(TuningHook):
    """Has the gradient of a loss that no neuron has a part in say that no task was switched on, or one without neurons.

    PyTorch's own error says that a tensor requires no gradient. The forward pass stays: a loss may be wanted alone.
    """

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not module.training:
            return
        loss = output.get("loss") if isinstance(output, dict) else None
        if not isinstance(loss, Tensor) or loss.requires_grad or not loss.is_floating_point():
            return
        layers = tuned_layers(module)
        why = _why_untrained(layers) if layers else None
        trained = [parameter for parameter in parameters_of(module) if parameter.requires_grad]
        if why is not None and trained:
            start = torch.zeros((), device=loss.device, dtype=loss.dtype, requires_grad=True)
            output["loss"] = _Untrained.apply(loss, start, trained, f"nothing is trained by this loss: {why}")


def _why_untrained(layers: Sequence[TunedLayer]) -> str | None:
    """Why no neuron has a part in a loss; None: not because of the task."""
    if layers[0].is_untold():
        return (
            f"the model has neurons of {', '.join(layers[0].tasks)}, and none of them was switched on in the forward pass. "
            "Wrap it in nspec.task(model, name), name the task of each sentence (nspec.task(model, [names])), or, in a "
            "Trainer of Transformers, use nspec.TaskTrainerMixin and a column with the task"
        )
    task = layers[0].task
    names = dict.fromkeys([task] if isinstance(task, str) else task or ())
    without = [name for name in names if name is not None and all(layer._nspec.sets[name] is None for layer in layers)]
    if not without:
        return None
    return f"the masks have no neuron of {', '.join(without)}. Leave these batches out, or select neurons for them"


class _Untrained(torch.autograd.Function):
    """A loss, as it is, whose gradient is an error unless the same backward pass reaches what is trained by another way."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, start: Tensor, trained: list[nn.Parameter], why: str) -> Tensor:
        ctx.trained, ctx.why = trained, why
        return loss.view_as(loss)

    @staticmethod
    @once
    def backward(ctx: Any, dy: Tensor) -> tuple[None, ...]:
        reached: Any = True
        with contextlib.suppress(RuntimeError):  # torch.autograd.grad tells itself of parameters that it does not reach
            reached = any(torch._C._will_engine_execute_node(get_gradient_edge(p).node) for p in ctx.trained)
        if not reached:
            raise RuntimeError(ctx.why)
        return None, None, None, None


def add_hooks(model: nn.Module) -> None:
    """Has checkpoints of Transformers work with reentrance too, and a loss without a task say so in its backward pass."""
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.register_forward_hook(_ForReentrance(model))
    model.register_forward_hook(_ForTask())

"""AdamW that leaves alone the rows of specialised layers which no task of the step used."""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw
from torch.optim.optimizer import register_optimizer_step_post_hook

from nspec.kernels.row_sparse_adamw import row_sparse_adamw_

from .masked_linear import Masked, masked_layers
from .neurons import Written
from .tuned_linear import TunedLayer


class RowSparseAdamW(torch.optim.Optimizer):
    """``torch.optim.AdamW``, except that rows outside the task's active set stay bitwise as they were.

    AdamW moves a row by its momentum even in a step whose gradient for it is zero, and weight decay shrinks it. Here, of
    the weight of each specialised layer (``nspec.specialize``, ``MaskedLinear``) only the rows are touched that the passes
    used whose gradient is stepped: parameter, both moments and decay. Over several micro-batches of different tasks that
    is the union of their sets; over the processes of ``torch.distributed`` too. All other parameters get ordinary AdamW,
    fused where PyTorch has that. The bias correction uses one global step count.

    A pass counts once its backward pass has run, until a step or until its gradient is dropped: by :meth:`zero_grad`, or
    where ``.grad`` is None when the next gradient arrives (``model.zero_grad()``). So a step that a
    ``torch.amp.GradScaler`` skips leaves nothing behind. A gradient that is set by hand, after a ``zero_grad`` or from
    ``torch.func``, is stepped in the rows of the passes since the last step where it is not zero. What is not seen:
    ``model.zero_grad(set_to_none=False)`` without a step before it; call that of the optimiser. Of weights that
    ``fully_shard`` shards, that of the optimiser only is.

    Parameters may be replicated (``DistributedDataParallel``) or sharded (``torch.distributed.fsdp.fully_shard``, for
    which the optimiser is made after sharding, as always): each process steps its shard.

    ``Conv1D``, the linear layer of GPT-2, has its neurons in the columns of its weight, and is refused: take
    ``torch.optim.AdamW`` there.

    Of a model that is fine-tuned (``nspec.finetune``), given as ``model``, it steps the neurons' parameters, all of their
    rows, as AdamW does. With ``write_rows`` it writes them into the weights of the base in the launch of the step, where
    one task has neurons and computes in place; the training passes until the next step then write nothing.

    A step cannot be captured in a CUDA graph, which would replay its step count, learning rate and rows: capture forward
    and backward pass, and step outside.

    Args:
        params: parameters or parameter groups, as in ``torch.optim.AdamW``.
        lr: learning rate.
        betas: decay rates of the moments.
        eps: added to the denominator.
        weight_decay: decoupled weight decay.
        model: the model, or what wraps it, whose specialised layers or neurons the parameters are of. None: all
            specialised layers of the process are searched for them, in each step.
        write_rows: whether steps of a fine-tuned ``model`` write its rows. Training passes see what operations of PyTorch
            and other optimisers change between steps, and then write themselves; what is written through ``.data`` between
            a step and the training pass after it they do not see.

    Raises:
        ValueError: options out of range or not finite, no parameter belongs to a specialised layer or to neurons of
            ``model``, ``write_rows`` without such neurons, the weight of one is
            made anew in each pass (prune, weight_norm, parametrisations), has its neurons in columns (``Conv1D``), or is
            not a matrix any more (``FullyShardedDataParallel``, the older FSDP, flattens it).
        TypeError: an option that is no number, betas that are not two, a model that is no module.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> model = nspec.specialize(model, nspec.NeuronMasks({"en-de": {"0": torch.arange(8) < 6}}))
        >>> optimizer = nspec.RowSparseAdamW(model.parameters(), model=model, lr=0.1)
        >>> before = model[0].weight.detach().clone()
        >>> with nspec.task(model, "en-de"):
        ...     model(torch.randn(3, 4)).sum().backward()
        >>> optimizer.step()
        >>> torch.equal(model[0].weight[6:], before[6:])
        True
    """

    _layers: dict[int, weakref.ref[Masked]]
    _model: nn.Module | None = None  # a copy, or what was pickled, has none
    _write_rows = False

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        model: nn.Module | None = None,
        write_rows: bool = False,
    ) -> None:
        _check(lr, betas, eps, weight_decay)
        if model is not None and not isinstance(model, nn.Module):
            raise TypeError(f"model is a {type(model).__name__}, expected a torch.nn.Module or None")
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})
        self._model, self._write_rows = model, write_rows
        if write_rows:
            if model is None:
                raise ValueError("write_rows is True and model is None: give the fine-tuned model as model=")
            if not self._of_neurons():
                raise ValueError(
                    "write_rows is True, and no parameter is of the neurons of this model: call "
                    "nspec.finetune(model, masks) first"
                )
            _watch_other_optimizers()
        elif not (self._owners() or self._of_neurons()):
            if model is None:
                what = ": call nspec.specialize(model, masks) first, give a fine-tuned model as model="
            else:
                what = f", or to neurons, of the {type(model).__name__}: call nspec.specialize or nspec.finetune first"
            raise ValueError(f"no parameter belongs to a specialised layer{what}, or use torch.optim.AdamW")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update; ``closure`` as in every PyTorch optimiser.

        Raises:
            RuntimeError: a CUDA graph is being captured.
        """
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "a CUDA graph is being captured, and it would replay the step count, the learning rate and the rows of "
                "this step: capture forward and backward pass, and step outside"
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        touched, tuned = self._touched(), self._of_neurons() if self._write_rows else {}
        written: dict[TunedLayer, list[Tensor]] = {}
        for group in self.param_groups:
            self._step_group(group, touched, tuned, written)
        for layer, parameters in written.items():
            layer._nspec.written = Written((layer.weight, layer.bias), parameters)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in every PyTorch optimiser; the rows that were noted for these gradients are forgotten with them."""
        super().zero_grad(set_to_none)
        for owner in self._owners().values():
            owner.gradient_is_dropped()

    def _of_neurons(self) -> dict[Tensor, tuple[TunedLayer, bool]]:
        """The parameters of neurons of a fine-tuned model, each with its layer, and whether it is one of biases."""
        if self._model is None:
            return {}
        mine = {id(p) for group in self.param_groups for p in group["params"]}
        layers = [module for module in self._model.modules() if isinstance(module, TunedLayer)]
        parts = [
            (layer, part, part is layer.neuron_biases)
            for layer in layers
            for part in (layer.neurons, layer.neuron_biases)
        ]
        return {p: (layer, biases) for layer, part, biases in parts for p in part.parameters() if id(p) in mine}

    def _owners(self) -> dict[Tensor, Any]:
        """The specialised layers whose weights are among the parameters."""
        layers, found = masked_layers(self._model), {}
        now = {id(layer.weight): layer for layer in layers}
        remade = (layer for layer in layers if "weight" not in layer._parameters)
        made_of = {id(p) for layer in remade for name, p in layer.named_parameters() if name != "bias"}
        # A wrapper that shards may have put another tensor in the place of a parameter for a while (FSDP between a
        # forward pass and the next backward pass): a layer that was found once is remembered.
        known = self.__dict__.setdefault("_layers", {})
        for p in (p for group in self.param_groups for p in group["params"]):
            if id(p) in made_of:
                raise ValueError(
                    "the weight of a specialised layer is made anew in each pass (prune, weight_norm, spectral_norm, "
                    "parametrisations), and rows of what it is made of are not its rows: make it permanent first "
                    "(prune.remove, remove_weight_norm, remove_parametrizations), or use torch.optim.AdamW"
                )
            owner = now.get(id(p))
            if owner is not None:
                known[id(p)] = weakref.ref(owner)
            elif id(p) in known:
                owner = known[id(p)]()
            if not isinstance(owner, Masked):
                continue
            if owner.transposed:
                raise ValueError(
                    "the weight of a specialised layer is [in, out], as in Conv1D: its neurons are columns, and this "
                    "optimiser leaves rows alone. Use torch.optim.AdamW, whose momentum and decay move other neurons too"
                )
            if p.shape != (owner.out_features, owner.in_features):
                raise ValueError(
                    f"the weight of a specialised layer has shape {list(p.shape)}, expected "
                    f"[{owner.out_features}, {owner.in_features}]: a wrapper flattens it; shard the model with "
                    "torch.distributed.fsdp.fully_shard, which keeps matrices"
                )
            owner.follow(p)
            found[p] = owner
        return found

    def _touched(self) -> dict[Tensor, tuple[Tensor, Tensor | None]]:
        """For each parameter of a specialised layer, the same on every process: the rows to update, bool
        ``[out_features]``, and those to update where their gradient is not zero.
        """
        taken = {p: owner.take_touched() for p, owner in self._owners().items()}
        rows = [each for touched, dropped, _ in taken.values() for each in (touched, dropped)]
        if rows and torch.distributed.is_available() and torch.distributed.is_initialized():
            flat = torch.cat(rows).to(torch.uint8)
            torch.distributed.all_reduce(flat, op=torch.distributed.ReduceOp.MAX)
            rows = list(flat.bool().split([len(each) for each in rows]))
        # Reading a gradient to find its zeros is a pass over memory, which an ordinary loop is spared.
        pairs = zip(rows[::2], rows[1::2])
        return {
            p: (touched, dropped if apart else None)
            for (p, (*_, apart)), (touched, dropped) in zip(taken.items(), pairs)
        }

    def _step_group(
        self,
        group: dict[str, Any],
        touched: dict[Tensor, tuple[Tensor, Tensor | None]],
        tuned: dict[Tensor, tuple[TunedLayer, bool]],
        written: dict[TunedLayer, list[Tensor]],
    ) -> None:
        sparse: dict[int, list[list[Any]]] = {}  # by step: a parameter that had no gradient for a while is behind
        dense: list[list[Tensor]] = [[], [], [], [], []]
        for p in group["params"]:
            if p.grad is None:
                continue
            state = self.state[p]
            if not state:
                state["step"] = torch.tensor(0.0)
                state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            columns = [_local(tensor) for tensor in (p, p.grad, state["exp_avg"], state["exp_avg_sq"])]
            if p in touched or p in tuned:
                state["step"] += 1
                lists = sparse.setdefault(int(state["step"]), [[], [], [], [], [], []])
                rows: Tensor | None = None
                write = None
                if p in tuned:
                    layer, biases = tuned[p]
                    write = layer.place_of(p, biases)
                    if write is not None:
                        written.setdefault(layer, []).append(p)
                else:
                    used, dropped = touched[p]
                    rows = _local_rows(used, p)
                    if dropped is not None:
                        rows = rows | (_local_rows(dropped, p) & (columns[1] != 0).any(1))
                for column, value in zip(lists, [*columns, rows, write]):
                    column.append(value)
            else:
                if _fused(columns[0]) and state["step"].device != columns[0].device:
                    state["step"] = state["step"].to(columns[0].device)  # the fused kernel counts on the device
                for column, value in zip(dense, [*columns, state["step"]]):
                    column.append(value)
        options = {"lr": float(group["lr"]), "eps": group["eps"], "weight_decay": group["weight_decay"]}
        for step, (*lists, writes) in sparse.items():
            row_sparse_adamw_(*lists, step=step, betas=group["betas"], **options, writes=writes)
        if dense[0]:
            beta1, beta2 = group["betas"]
            params, grads, exp_avgs, exp_avg_sqs, counts = dense
            adamw(
                params, grads, exp_avgs, exp_avg_sqs, [], counts, fused=all(map(_fused, params)),
                amsgrad=False, beta1=beta1, beta2=beta2, maximize=False, **options,
            )  # fmt: skip


@functools.cache
def _watch_other_optimizers() -> None:
    """Has passes write rows again after a step of an optimiser that does not."""

    def note(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if not getattr(optimizer, "_write_rows", False):
            Written.steps += 1

    register_optimizer_step_post_hook(note)


def _check(lr: Any, betas: Any, eps: Any, weight_decay: Any) -> None:
    """Raises unless the options are those of an AdamW: finite numbers from 0, of betas two below 1."""
    betas = tuple(betas) if isinstance(betas, (tuple, list)) else betas
    found = f"lr={lr}, betas={betas}, eps={eps}, weight_decay={weight_decay}"
    if not isinstance(betas, tuple):
        raise TypeError(f"{found}: expected betas to be a tuple of two numbers")
    values = [lr, eps, weight_decay, *betas]
    if any(isinstance(value, (bool, str)) for value in values):
        raise TypeError(f"{found}: expected numbers")
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError) as error:
        raise TypeError(f"{found}: expected numbers") from error
    if not all(math.isfinite(value) and value >= 0 for value in numbers) or len(betas) != 2 or max(numbers[3:]) >= 1:
        raise ValueError(f"{found}: expected finite numbers >= 0 and two betas below 1")


def _fused(parameter: Tensor) -> bool:
    """Whether PyTorch's fused AdamW takes a parameter: one pass over memory where its other ways need eight."""
    return parameter.device.type in ("cpu", "cuda") and parameter.is_floating_point()


def _local(tensor: Tensor) -> Tensor:
    """What this process has of a tensor: its shard of a DTensor, else the tensor itself. Shares its memory."""
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local


def _local_rows(rows: Tensor, parameter: Any) -> Tensor:
    """The part of ``rows``, bool ``[out_features]``, that belongs to this process's shard of the parameter."""
    if not hasattr(parameter, "placements"):
        return rows
    from torch.distributed.tensor import DTensor, Replicate

    mesh = parameter.device_mesh
    placements = [place if place.is_shard(0) else Replicate() for place in parameter.placements]
    whole = DTensor.from_local(rows, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return _local(whole.redistribute(placements=placements))

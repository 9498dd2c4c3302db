"""AdamW that leaves alone the rows of specialised layers which no task of the step used."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from nspec.kernels.row_sparse_adamw import row_sparse_adamw_

from .masked_linear import owner_of


class RowSparseAdamW(torch.optim.Optimizer):
    """``torch.optim.AdamW``, except that rows outside the task's active set stay bitwise as they were.

    AdamW moves a row by its momentum even in a step whose gradient for it is zero, and weight decay shrinks it. Here, of
    the weight of each specialised layer (``nspec.specialize``, ``MaskedLinear``) only the rows that a forward pass with
    gradients has used since the last step are touched: parameter, both moments and decay. Over several micro-batches of
    different tasks that is the union of their sets; over the processes of ``torch.distributed`` too. All other
    parameters get ordinary AdamW. The bias correction uses one global step count.

    Args:
        params: parameters or parameter groups, as in ``torch.optim.AdamW``.
        lr: learning rate.
        betas: decay rates of the moments.
        eps: added to the denominator.
        weight_decay: decoupled weight decay.

    Raises:
        ValueError: options out of range, or no parameter belongs to a specialised layer.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        if lr < 0 or eps < 0 or weight_decay < 0 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(
                f"lr={lr}, betas={betas}, eps={eps}, weight_decay={weight_decay}: expected numbers >= 0 and betas below 1"
            )
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})
        if not any(owner_of(p) for group in self.param_groups for p in group["params"]):
            raise ValueError(
                "no parameter belongs to a specialised layer: call nspec.specialize(model, masks) first, or use "
                "torch.optim.AdamW"
            )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update; ``closure`` as in every PyTorch optimiser."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        touched = self._touched()
        for group in self.param_groups:
            self._step_group(group, touched)
        return loss

    def _touched(self) -> dict[Tensor, Tensor]:
        """For each parameter of a specialised layer, the rows to update, the same on every process."""
        owners = {p: owner_of(p) for group in self.param_groups for p in group["params"]}
        touched = {p: owner.take_touched() for p, owner in owners.items() if owner is not None}
        if touched and torch.distributed.is_available() and torch.distributed.is_initialized():
            flat = torch.cat(list(touched.values())).to(torch.uint8)
            torch.distributed.all_reduce(flat, op=torch.distributed.ReduceOp.MAX)
            parts = flat.bool().split([len(rows) for rows in touched.values()])
            touched = dict(zip(touched, parts))
        return touched

    def _step_group(self, group: dict[str, Any], touched: dict[Tensor, Tensor]) -> None:
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
            columns = [p, p.grad, state["exp_avg"], state["exp_avg_sq"]]
            if p in touched:
                state["step"] += 1
                lists = sparse.setdefault(int(state["step"]), [[], [], [], [], []])
                for column, value in zip(lists, [*columns, touched[p]]):
                    column.append(value)
            else:
                for column, value in zip(dense, [*columns, state["step"]]):
                    column.append(value)
        options = {"lr": float(group["lr"]), "eps": group["eps"], "weight_decay": group["weight_decay"]}
        for step, lists in sparse.items():
            row_sparse_adamw_(*lists, step=step, betas=group["betas"], **options)
        if dense[0]:
            beta1, beta2 = group["betas"]
            params, grads, exp_avgs, exp_avg_sqs, counts = dense
            adamw(
                params, grads, exp_avgs, exp_avg_sqs, [], counts,
                amsgrad=False, beta1=beta1, beta2=beta2, maximize=False, **options,
            )  # fmt: skip

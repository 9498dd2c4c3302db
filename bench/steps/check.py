"""Whether the systems compute what they should, before their time is taken: losses, gradients and one update."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch import Tensor

from bench import trouble
from bench.steps.model import Batch, Masks, Tasks
from bench.steps.systems import System

Gradients = dict[str, Tensor]

TOLERANCE = {torch.float64: 1e-9, torch.float32: 5e-3, torch.bfloat16: 0.2}
"""Largest error of a gradient, relative to its norm.

Where two correct results round a sum next to zero differently, a ReLU is on in one of them and off in the other: one such
neuron of one token changed the gradient of an attention matrix by 4e-4 in float32, where all other tokens agreed to 1e-6,
and in float64 everything to 1e-14. In bfloat16 the rounding of all layers adds up. A wrong mask gives errors near 1.
"""
LEAST_SHARE = 0.03
"""Of the whole gradient's norm: the error of a parameter whose gradient is smaller is relative to this share. That of a key
projection's bias, for example, is zero but for rounding."""


def expected(dense: System, mode: str, batch: Batch, tasks: Tasks, masks: Masks) -> tuple[Tensor, Gradients]:
    """Loss and gradients of a mode in plain PyTorch: a dense model whose fc1 weights and their gradients are masked.

    A batch of several tasks is the sum of its parts.
    """
    of_sentence = [tasks] * len(batch["labels"]) if isinstance(tasks, str) else list(tasks)
    total, sums = torch.zeros((), device=dense.device), Gradients()
    parameters = dict(dense.model.named_parameters())
    for task in dict.fromkeys(of_sentence):
        chosen = torch.tensor([name == task for name in of_sentence], device=dense.device)
        share = float(chosen.double().mean())
        rows = {f"{name}.weight": mask[:, None].to(dense.device) for name, mask in masks[task].items()}
        kept = {name: parameters[name].detach().clone() for name in rows}
        with torch.no_grad():
            for name, mask in rows.items() if mode == "forward" else ():
                parameters[name].mul_(mask)
        loss, found = dense.gradients({name: tensor[chosen] for name, tensor in batch.items()}, task)
        with torch.no_grad():
            for name, weight in kept.items():
                parameters[name].copy_(weight)
        total = total + share * loss  # each part's loss is the mean over its own tokens
        for name, gradient in found.items():
            sums[name] = sums.get(name, 0) + gradient * share * rows.get(name, 1)
    return total, sums


def errors(loss: Tensor, found: Gradients, right_loss: Tensor, right: Gradients) -> tuple[float, str]:
    """The largest relative error, and whose it is."""
    if set(found) != set(right):
        return float("inf"), f"parameters with a gradient: {sorted(set(found) ^ set(right))[:2]}"
    worst, whose = float((loss - right_loss).abs() / right_loss.abs()), "loss"
    whole = float(torch.stack([g.double().norm() for g in right.values()]).norm())
    for name, gradient in right.items():
        size = max(float(gradient.double().norm()), LEAST_SHARE * whole)
        error = float((found[name].double() - gradient.double()).norm()) / size
        if not error <= worst:  # NaN is the worst
            worst, whose = error, f"gradient of {name}"
    return worst, whose


def check(
    dense: System, systems: Mapping[str, System], batch: Batch, task: str, mixed: Tasks | None, masks: Masks
) -> dict[str, str]:
    """What is wrong with each system, in words; nothing for those that are right. One that raises is wrong.

    Args:
        dense: a plain system with the same weights, from which the right results come.
        systems: by name.
        batch: on which losses and gradients are compared.
        task: of the batch.
        mixed: the task of each sentence, for systems that take such batches; None: not checked.
        masks: of all these tasks.
    """
    batches: dict[str, Tasks] = {"one task": task} | ({} if mixed is None else {"several tasks": mixed})
    right = functools.cache(lambda mode, several: expected(dense, mode, batch, batches[several], masks))
    wrong: dict[str, str] = {}
    for name, system in systems.items():
        mode, bound = "forward" if system.kind == "release" else system.kind, TOLERANCE[system.dtype]
        try:
            for several, tasks in batches.items() if system.kind != "release" else [("one task", task)]:
                error, whose = errors(*system.gradients(batch, tasks), *right(mode, several))
                if not error <= bound:
                    said = f"{whose} is off by {error:.2g} with {several} in a batch, expected at most {bound:g}"
                    wrong.setdefault(name, said)
            checked = name not in wrong and system.optimizer_name == "row_sparse_adamw"
            if checked and (moved := _moved(system, batch, task, masks)):
                wrong[name] = f"an update changed rows of {moved} that {task} does not use"
        except Exception as error:
            wrong[name] = f"it raised {trouble.report(name, error)}"
    return wrong


def _moved(system: System, batch: Batch, task: str, masks: Masks) -> str:
    """The layer of which an update of ``task`` moved an inactive row, or left all active ones; else empty."""
    parameters = dict(system.model.named_parameters())
    weights = {name: parameters[f"{name}.weight"] for name in masks[task]}
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    system.optimizer.zero_grad()
    system.optimizer.step()  # without a gradient: it forgets the rows that were used before
    system.step(batch, task)
    for name, weight in weights.items():
        changed = (weight.detach() != before[name]).any(1).cpu()
        if bool((changed & ~masks[task][name]).any()) or not bool(changed.any()):
            return name
    return ""

"""Gradient surgery against the formulas of the papers, written out for vectors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from nspec.mt.training.config import SurgeryConfig
from nspec.mt.training.surgery import Surgery, gradvac, part_of, pcgrad

RNG = np.random.default_rng(5)
TASKS = ["en-de", "en-fr", "de-en", "fr-en"]


def conflicting(count: int = 4, size: int = 6) -> np.ndarray:
    """Gradients of which many conflict."""
    found = RNG.normal(size=(count, size))
    return found - 1.1 * found.mean(0)


def orders_of(count: int) -> list[list[int]]:
    return [[int(j) for j in RNG.permutation(count) if j != i] for i in range(count)]


def cosine(one: np.ndarray, two: np.ndarray) -> float:
    return float(one @ two / np.linalg.norm(one) / np.linalg.norm(two))


def test_pcgrad_projects_each_gradient_off_those_that_conflict_with_it() -> None:
    gradients, orders = conflicting(), orders_of(4)
    expected = gradients.copy()
    for i, order in enumerate(orders):
        for j in order:
            if (dot := expected[i] @ gradients[j]) < 0:
                expected[i] = expected[i] - dot / (gradients[j] @ gradients[j]) * gradients[j]
    assert not np.allclose(expected, gradients)
    made = pcgrad((gradients @ gradients.T)[None], orders)[0] @ gradients
    assert np.allclose(made, expected)


def test_pcgrad_leaves_no_conflict_between_two_and_nothing_changed_where_there_is_none() -> None:
    two = np.array([[1.0, 0.2, -3.0], [-0.5, 1.0, 2.0]])
    made = pcgrad((two @ two.T)[None], [[1], [0]])[0] @ two
    assert two[0] @ two[1] < 0
    assert abs(made[0] @ two[1]) < 1e-12
    assert abs(made[1] @ two[0]) < 1e-12
    agreeing = np.abs(two)
    assert (pcgrad((agreeing @ agreeing.T)[None], [[1], [0]])[0] == np.eye(2)).all()


@pytest.mark.parametrize("wanted", [-0.3, 0.0, 0.6])
def test_gradvac_brings_the_cosine_of_two_up_to_the_target_and_moves_it(wanted: float) -> None:
    two = np.array([[1.0, 0.2, -3.0], [-0.5, 1.0, 2.0]])
    before, targets = cosine(two[0], two[1]), np.full((1, 2, 2), wanted)
    assert before < wanted
    made = gradvac((two @ two.T)[None], [[1], []], targets, 0.1)[0] @ two
    assert cosine(made[0], two[1]) == pytest.approx(wanted)
    assert (made[1] == two[1]).all()
    assert targets[0, 0, 1] == pytest.approx(0.9 * wanted + 0.1 * before)
    assert targets[0, 1, 0] == wanted  # not compared


def test_gradvac_leaves_what_agrees_more_than_the_target() -> None:
    two = np.array([[1.0, 0.2], [1.0, 0.3]])
    targets = np.full((1, 2, 2), 0.5)
    assert (gradvac((two @ two.T)[None], [[1], [0]], targets, 0.1)[0] == np.eye(2)).all()
    assert (targets[0, [0, 1], [1, 0]] > 0.5).all()


@pytest.mark.parametrize("rule", ["pcgrad", "gradvac"])
@pytest.mark.parametrize("parts", ["model", "tensor"])
def test_the_parts_of_a_model_are_changed_each_by_itself(rule: str, parts: str) -> None:
    """Of one direction a tensor has no gradient, which is a gradient of 0."""
    model = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(2, 4, bias=False))
    sizes = [p.numel() for p in model.parameters()]
    gradients = {task: conflicting(1, sum(sizes))[0] - 0.3 for task in ("en-fr", "de-en")}
    gradients["de-en"] = -gradients["en-fr"] + RNG.normal(size=sum(sizes)) * 0.3
    gradients["de-en"][sizes[0] :] = 0
    surgery = Surgery(rule, SurgeryConfig(parts=parts, beta=0.5), model, TASKS, seed=3)
    surgery.targets += 0.2
    for task, values in gradients.items():
        for p, part in zip(model.parameters(), np.split(values, np.cumsum(sizes)[:-1])):
            p.grad = torch.tensor(part, dtype=torch.float32).view_as(p) if part.any() else None
        surgery.take(task)
        assert all(p.grad is None for p in model.parameters())
    surgery.put(0)
    pieces = [slice(0, None)] if parts == "model" else [slice(0, sizes[0]), slice(sizes[0], None)]
    expected = []
    for piece in pieces:
        two = np.stack([values[piece] for values in gradients.values()])
        gram, orders = (two @ two.T)[None], [[1], [0]]
        made = pcgrad(gram, orders) if rule == "pcgrad" else gradvac(gram, orders, np.full((1, 2, 2), 0.2), 0.5)
        expected.append((made[0] @ two).sum(0))
    found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert np.allclose(found.numpy(), np.concatenate(expected), atol=1e-5)


def test_the_targets_are_those_of_the_directions_whatever_their_order() -> None:
    model = nn.Linear(5, 1, bias=False)
    surgery = Surgery("gradvac", SurgeryConfig(parts="model", beta=0.5), model, TASKS, seed=3)
    one, two = RNG.normal(size=5), RNG.normal(size=5) + 1
    for task, values in (("fr-en", one), ("en-fr", two)):
        model.weight.grad = torch.tensor(values[None], dtype=torch.float32)
        surgery.take(task)
    surgery.put(0)
    place = np.argwhere(surgery.targets[0])
    assert place.tolist() == [[1, 3], [3, 1]]
    again = Surgery("gradvac", SurgeryConfig(parts="model"), model, TASKS, seed=3)
    again.load_state_dict(surgery.state_dict())
    assert (again.targets == surgery.targets).all()


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ("model", "model"),
        ("side", "encoder"),
        ("layer", "model.encoder.layers.10"),
        ("tensor", "model.encoder.layers.10.fc1.weight"),
    ],
)
def test_parameters_are_in_the_part_that_they_stand_in(parts: str, expected: str) -> None:
    assert part_of("model.encoder.layers.10.fc1.weight", parts) == expected
    assert (
        part_of("model.shared.weight", parts)
        == {
            "model": "model",
            "side": "rest",
            "layer": "model.shared",
            "tensor": "model.shared.weight",
        }[parts]
    )

"""Weight masks as bits: nothing is lost in memory or in files, and what is no mask is refused."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nspec.baselines.lass import WeightMasks

TASKS = ("en-de", "de-en", "en-fr")


def test_odd_shapes_survive_packing_and_a_round_trip_through_files(tmp_path: Path) -> None:
    shapes = {"a": (1, 1), "b": (3, 5), "c": (8, 2), "d.é": (7, 9), "none": (0, 4)}
    drawn = {task: {name: torch.rand(shape) < 0.5 for name, shape in shapes.items()} for task in TASKS}
    masks = WeightMasks(drawn)
    masks.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["weight_masks.json", "weight_masks.safetensors"]
    for found in (masks, WeightMasks.load(tmp_path), pickle.loads(pickle.dumps(masks))):
        assert found.tasks == list(TASKS)
        assert found.layers == list(shapes)
        assert found.digest() == masks.digest()
        assert found.nbytes == 3 * (1 + 2 + 2 + 8)
        for task in TASKS:
            assert all(torch.equal(found[task][name], drawn[task][name]) for name in shapes)
            share = {name: mask.sum().item() / max(1, mask.numel()) for name, mask in drawn[task].items()}
            assert found.density()[task] == pytest.approx(share)
    readable = json.loads((tmp_path / "weight_masks.json").read_text(encoding="utf-8"))
    assert readable["tasks"] == list(TASKS)
    assert readable["layers"]["b"] == [3, 5]


def test_masks_are_copied_and_the_digest_sees_one_weight() -> None:
    drawn = {"a": {"x": torch.rand(3, 5) < 0.5, "y": torch.rand(2, 2) < 0.5}}
    masks = WeightMasks(drawn)
    before = masks.digest()
    assert WeightMasks({"a": dict(reversed(drawn["a"].items()))}).digest() == before
    masks["a"]["x"].fill_(True)
    drawn["a"]["x"][2, 4] ^= True
    assert masks.digest() == before != WeightMasks(drawn).digest()
    assert WeightMasks({"b": drawn["a"]}).digest() != WeightMasks(drawn).digest()


def test_single_tasks_are_put_together_without_copying_bits() -> None:
    parts = [WeightMasks({task: {"x": torch.rand(3, 5) < 0.5}}) for task in TASKS]
    whole = WeightMasks.union_of_tasks(parts)
    assert whole.tasks == list(TASKS)
    assert all(whole.packed(t, "x") is part.packed(t, "x") for t, part in zip(TASKS, parts))
    other_order = WeightMasks({"b": {"y": torch.ones(1, 1).bool(), "x": torch.ones(2, 2).bool()}})
    first = WeightMasks({"a": {"x": torch.ones(2, 2).bool(), "y": torch.ones(1, 1).bool()}})
    assert [list(layers) for layers in WeightMasks.union_of_tasks([first, other_order]).values()] == [["x", "y"]] * 2
    with pytest.raises(ValueError, match="task en-de is given twice"):
        WeightMasks.union_of_tasks([parts[0], parts[0]])
    other = WeightMasks({"other": {"x": torch.rand(5, 3) < 0.5}})
    with pytest.raises(ValueError, match=r"weights \[5, 3\] in task other, weights \[3, 5\] in task en-de"):
        WeightMasks.union_of_tasks([parts[0], other])


def test_values_that_are_no_masks_are_refused() -> None:
    good = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(TypeError, match=r"torch.float32 \[2, 3\], expected a bool tensor"):
        WeightMasks({"a": {"x": torch.ones(2, 3)}})
    with pytest.raises(TypeError, match=r"\[6\], expected a bool tensor \[out, in\]"):
        WeightMasks({"a": {"x": good.flatten()}})
    with pytest.raises(ValueError, match="task b lacks layer x"):
        WeightMasks({"a": {"x": good, "y": good}, "b": {"y": good}})
    with pytest.raises(ValueError, match="task b has layer y"):
        WeightMasks({"a": {"x": good}, "b": {"x": good, "y": good}})
    with pytest.raises(ValueError, match="no task"):
        WeightMasks({})
    with pytest.raises(ValueError, match="task a has no layer"):
        WeightMasks({"a": {}})


def test_files_that_are_no_masks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"weight_masks.safetensors does not exist"):
        WeightMasks.load(tmp_path)
    path = tmp_path / "weight_masks.safetensors"
    WeightMasks({"a": {"x": torch.ones(3, 3, dtype=torch.bool)}}).save(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="is broken"):
        WeightMasks.load(tmp_path)
    about = {"format": 1, "kind": "weight_masks", "tasks": ["a"], "shapes": {"x": [3, 3]}}
    for row, message in (([[255, 3]], "bits after its last weight"), ([[255]], r"expected torch.uint8 \[1, 2\]")):
        save_file({"x": torch.tensor(row, dtype=torch.uint8)}, path, metadata={"nspec": json.dumps(about)})
        with pytest.raises(ValueError, match=message):
            WeightMasks.load(tmp_path)
    bits = {"x": torch.tensor([[255, 1]], dtype=torch.uint8)}
    changes: list[dict[str, Any]] = [{"tasks": tasks} for tasks in (None, "a", [["a"]], ["a", "a"], [])]
    changes += [{"shapes": {"x": shape}} for shape in (9, [3, 3.0], [-3, -3], [10**10, 10**10])]
    for change in [*changes, {"shapes": ["x"]}, {"shapes": {"y": [3, 3]}}]:
        save_file(bits, path, metadata={"nspec": json.dumps(about | change)})
        with pytest.raises(ValueError, match="weight_masks.safetensors is broken: .*write it again"):
            WeightMasks.load(tmp_path)
    save_file({"x": torch.ones(1)}, path, metadata={"nspec": json.dumps(about | {"kind": "masks"})})
    with pytest.raises(ValueError, match="holds masks, expected weight_masks"):
        WeightMasks.load(tmp_path)
    path.write_bytes(whole)
    assert load_file(path)["x"].tolist() == [[255, 1]]  # nine weights kept: eight bits and one

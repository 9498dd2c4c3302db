"""Files of masks and counts that something has changed: each loads as it was written, or is one clear error."""

from __future__ import annotations

import json
import random
import resource
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nspec import ActivationCounts, NeuronMasks
from nspec.analysis.heads import HeadImportance
from nspec.baselines.lass import WeightMasks

TASKS, LAYERS = ("de-en", "en-de"), ("encoder.0.fc1", "decoder.0.fc1")
KINDS: dict[str, Any] = {
    "masks": NeuronMasks,
    "counts": ActivationCounts,
    "weight_masks": WeightMasks,
    "heads": HeadImportance,
}
WRONG: list[Any] = [
    None,
    True,
    -1,
    0,
    1,
    7,
    2.0,
    10**10,
    10**30,
    "",
    "ab",
    [],
    ["a"],
    ["a", "a"],
    [["a"]],
    {},
    {"a": 1},
]


def values_of(kind: str) -> Any:
    generator = torch.Generator().manual_seed(0)

    def draw() -> torch.Tensor:
        if kind == "counts":
            return torch.randint(0, 99, (13,), generator=generator)
        if kind == "heads":
            return torch.rand(4, generator=generator, dtype=torch.float64)
        return torch.rand((3, 5) if kind == "weight_masks" else (13,), generator=generator) < 0.5

    return KINDS[kind]({task: {layer: draw() for layer in LAYERS} for task in TASKS})


def same(one: Mapping[str, Mapping[str, torch.Tensor]], other: Mapping[str, Mapping[str, torch.Tensor]]) -> bool:
    return (
        [*one] == [*other]
        and all([*one[task]] == [*other[task]] for task in one)
        and all(torch.equal(one[task][layer], other[task][layer]) for task in one for layer in one[task])
    )


def parts_of(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors and what the metadata says."""
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])
    return load_file(path), json.loads(header["__metadata__"]["nspec"])


def error_of(kind: str, values: Any, folder: Path) -> str:
    """The one line of the error that loading gives; empty where it loads, which must then be as it was."""
    try:
        loaded = type(values).load(folder)
    except (ValueError, FileNotFoundError) as error:
        message = str(error)
        assert str(folder / f"{kind}.safetensors") in message
        assert "\n" not in message
        assert len(message) < 500
        return message
    assert same(loaded, values)
    return ""


@pytest.mark.parametrize("kind", KINDS)
def test_changed_bytes_are_noticed_or_change_nothing(kind: str, tmp_path: Path) -> None:
    values, rng = values_of(kind), random.Random(1)
    values.save(tmp_path)
    path = tmp_path / f"{kind}.safetensors"
    whole = path.read_bytes()
    payload = 8 + struct.unpack("<Q", whole[:8])[0]
    for _ in range(150):
        broken = bytearray(whole)
        for _ in range(rng.choice([1, 1, 2, 9])):
            broken[rng.randrange(len(broken))] ^= 1 << rng.randrange(8)
        path.write_bytes(broken)
        error_of(kind, values, tmp_path)
    for place in range(payload, len(whole)):
        broken = bytearray(whole)
        broken[place] ^= 1 << rng.randrange(8)
        path.write_bytes(broken)
        assert "is broken" in error_of(kind, values, tmp_path), "a bit of the tensors"
    for length in [*range(0, 12), *(rng.randrange(len(whole)) for _ in range(20))]:
        path.write_bytes(whole[:length])
        assert error_of(kind, values, tmp_path)


@pytest.mark.parametrize("signed", [True, False], ids=["with its digest", "as older versions wrote it"])
@pytest.mark.parametrize("kind", KINDS)
def test_metadata_and_tensors_that_do_not_fit_are_errors(kind: str, signed: bool, tmp_path: Path) -> None:
    values, rng = values_of(kind), random.Random(2)
    values.save(tmp_path)
    path = tmp_path / f"{kind}.safetensors"
    tensors, about = parts_of(path)
    if not signed:
        del about["sha256"]
    entry = "shapes" if kind == "weight_masks" else "d_ff"

    def written(tensors: dict[str, torch.Tensor], text: str) -> str:
        save_file(tensors, path, metadata={"nspec": text})
        return error_of(kind, values, tmp_path)

    assert written(tensors, json.dumps(about)) == "", "only written again"
    for text in ["null", "3", "[]", '"a"', "", "{", "[" * 100_000, '{"a":' * 100_000, "9" * 5000]:
        assert written(tensors, text)
    for key, wrong in [(key, wrong) for key in ("format", "kind", "tasks", entry) for wrong in WRONG]:
        if key != "format" or wrong is True or wrong != 1:
            assert written(tensors, json.dumps(about | {key: wrong})), (key, wrong)
    for wrong in [*WRONG, [3, 5, 1], [-3, -5], [3, True], [10**6, 10**6]]:
        assert written(tensors, json.dumps(about | {entry: about[entry] | {LAYERS[0]: wrong}})), wrong
        assert written(tensors, json.dumps(about | {entry: about[entry] | {"other.fc1": wrong}})), wrong
        if wrong != "ab":
            assert written(tensors, json.dumps(about | {"tasks": [wrong, "en-de"]})), wrong
    for tasks in (["de-en"], ["de-en", "en-de", "x"], ["de-en", "de-en"], ["de-en", "\ud800"]):
        assert written(tensors, json.dumps(about | {"tasks": tasks})), tasks
    rows = tensors[LAYERS[0]]
    shapes = [(0,), (2,), (2, 0), (0, 2), (1, rows.shape[1]), (2, rows.shape[1] + 1), (3, rows.shape[1]), (2, 1, 2), ()]
    others = [torch.zeros(shape, dtype=rows.dtype) for shape in shapes]
    others += [rows.to(dtype) for dtype in (torch.bool, torch.int8, torch.float32, torch.bfloat16, torch.int16)]
    for other in others:
        found = written(tensors | {LAYERS[0]: other}, json.dumps(about))
        assert f"{LAYERS[0]} is torch." in found
        assert ", expected torch." in found
    assert "has no tensor" in written({LAYERS[0]: rows}, json.dumps(about))
    assert "its tensor z is not in" in written(tensors | {"z": rows.clone()}, json.dumps(about))
    for _ in range(40):  # and several at once
        changed = dict(about)
        for key in rng.sample([*about], 2):
            changed[key] = rng.choice(WRONG)
        written(tensors, json.dumps(changed))


def of_an_older_version(kind: str, folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> str:
    values = values_of(kind)
    values.save(folder)
    path = folder / f"{kind}.safetensors"
    tensors, about = parts_of(path)
    del about["sha256"]
    change(tensors)
    save_file(tensors, path, metadata={"nspec": json.dumps(about)})
    return error_of(kind, values, folder)


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_older_versions_still_load(kind: str, tmp_path: Path) -> None:
    assert of_an_older_version(kind, tmp_path, lambda tensors: None) == ""


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        ("counts", -1, "go down to -1, expected none below 0"),
        ("masks", 255, "has bits after its last neuron"),
        ("weight_masks", 255, "has bits after its last weight"),
        ("heads", float("nan"), "heads.safetensors is broken"),
    ],
)
def test_values_that_cannot_be_are_errors_that_name_the_file(
    kind: str, value: float, message: str, tmp_path: Path
) -> None:
    assert message in of_an_older_version(kind, tmp_path, lambda tensors: tensors[LAYERS[1]][0, -1:].fill_(value))


@pytest.mark.parametrize("kind", ["masks", "counts", "weight_masks"])
def test_a_width_without_tensors_for_it_takes_no_memory(kind: str, tmp_path: Path) -> None:
    values = values_of(kind)
    values.save(tmp_path)
    path = tmp_path / f"{kind}.safetensors"
    tensors, about = parts_of(path)
    large: Any = [10**5, 10**5] if kind == "weight_masks" else 10**9
    entry = "shapes" if kind == "weight_masks" else "d_ff"
    about[entry] = dict.fromkeys(LAYERS, large)
    save_file(tensors, path, metadata={"nspec": json.dumps(about)})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert f"{entry} {large}" in error_of(kind, values, tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000, "in KiB"

"""Counts and masks on disk: exact, small, readable beside it, whole or not at all."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from nspec import ActivationCounts, NeuronMasks
from nspec.baselines.lass import WeightMasks


def some_masks(tasks: int = 3, layers: int = 2, d_ff: int = 37) -> NeuronMasks:
    return NeuronMasks(
        {
            f"l{t:02d}-en": {f"model.encoder.layers.{i}.fc1": torch.rand(d_ff) < 0.7 for i in range(layers)}
            for t in range(tasks)
        }
    )


def test_equal_masks_are_equal_bytes_in_every_process(tmp_path) -> None:
    script = (
        "import torch, nspec, sys\n"
        "m = {f't{i}': {f'l{j}': torch.arange(9) % (i + j + 1) == 0 for j in range(5)} for i in range(5)}\n"
        "nspec.NeuronMasks(m).save(sys.argv[1])\n"
    )
    for number in range(3):
        subprocess.run([sys.executable, "-c", script, tmp_path / str(number)], check=True)
    files = [(tmp_path / str(number) / "masks.safetensors").read_bytes() for number in range(3)]
    assert files[0] == files[1] == files[2]


def test_counts_come_back_exactly_also_beyond_32_bits(tmp_path) -> None:
    counts = ActivationCounts({"a": {"x": torch.tensor([2**40, 0, 5]), "y": torch.tensor([1, 2])}})
    counts.save(tmp_path)
    loaded = ActivationCounts.load(tmp_path)
    assert loaded["a"]["x"].tolist() == [2**40, 0, 5]
    assert loaded["a"]["y"].dtype == torch.int64


def test_sixty_tasks_of_a_big_model_fit_into_400_kilobytes(tmp_path) -> None:
    some_masks(60, 12, 4096).save(tmp_path)
    assert sum(os.path.getsize(tmp_path / name) for name in os.listdir(tmp_path)) <= 400_000


def test_the_json_beside_it_says_what_is_inside(tmp_path) -> None:
    masks = some_masks()
    masks.save(tmp_path)
    readable = json.loads((tmp_path / "masks.json").read_text())
    assert readable["tasks"] == masks.tasks
    assert readable["layers"]["model.encoder.layers.0.fc1"] == {"d_ff": 37}
    assert readable["density"]["l00-en"][0] == pytest.approx(masks.density()["l00-en"][masks.layers[0]], abs=1e-4)


def test_a_broken_missing_or_other_file_is_one_clear_error(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="masks.safetensors does not exist"):
        NeuronMasks.load(tmp_path)
    some_masks().save(tmp_path)
    whole = (tmp_path / "masks.safetensors").read_bytes()
    (tmp_path / "masks.safetensors").write_bytes(whole[:-5])
    with pytest.raises(ValueError, match="is broken"):
        NeuronMasks.load(tmp_path)
    (tmp_path / "counts.safetensors").write_bytes(whole)
    with pytest.raises(ValueError, match="holds masks, expected counts"):
        ActivationCounts.load(tmp_path)


def test_a_full_disk_leaves_the_old_file_intact(tmp_path) -> None:
    masks = some_masks(2, 2, 64)
    masks.save(tmp_path)
    script = (
        "import torch, nspec, sys\n"
        "m = nspec.NeuronMasks({'a': {'x': torch.ones(4_000_000, dtype=torch.bool)}})\n"
        "try: m.save(sys.argv[1])\n"
        "except OSError as e: print('OSError', e); sys.exit(3)\n"
    )

    def small_files_only() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path], capture_output=True, text=True, preexec_fn=small_files_only
    )
    assert done.returncode == 3, done.stderr
    assert "cannot write" in done.stdout
    assert "unchanged" in done.stdout
    assert NeuronMasks.load(tmp_path).tasks == masks.tasks
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".part")]


def test_counts_add_up_and_join_tasks() -> None:
    one = ActivationCounts({"a": {"x": torch.tensor([1, 2])}})
    two = ActivationCounts({"a": {"x": torch.tensor([10, 0])}, "b": {"x": torch.tensor([5, 5])}})
    both = one + two
    assert both["a"]["x"].tolist() == [11, 2]
    assert both.tasks == ["a", "b"]
    with pytest.raises(ValueError, match="neurons"):
        one + ActivationCounts({"a": {"x": torch.tensor([1])}})
    large = ActivationCounts({"a": {"x": torch.tensor([2**62, 2**62])}})
    with pytest.raises(ValueError, match=r"counts of a, x add up to more than 9223372036854775807"):
        large + large


def test_the_readable_sums_are_exact_beyond_64_bits(tmp_path) -> None:
    ActivationCounts({"a": {"x": torch.tensor([2**63 - 1, 2**63 - 1, 7])}}).save(tmp_path)
    assert json.loads((tmp_path / "counts.json").read_text())["activations"]["a"]["x"] == 2**64 + 5


@pytest.mark.parametrize("kind", [NeuronMasks, ActivationCounts, WeightMasks])
def test_what_is_no_mapping_of_names_to_tensors_is_an_error(kind) -> None:
    good = torch.ones(2, 3).bool() if kind is WeightMasks else torch.ones(3).bool()
    good = good.long() if kind is ActivationCounts else good
    for wrong in (good.numpy(), good.tolist(), None, good.float()):
        with pytest.raises(TypeError, match="expected an? (bool|int64) tensor"):
            kind({"a": {"x": wrong}})
    for wrong in ([good], good, {"a": good}, {"a": [good]}, {1: {"x": good}}, {"a": {None: good}}):
        with pytest.raises(TypeError, match="expected a mapping|expected the name of a"):
            kind(wrong)
    for name in ("", "\ud800"):
        with pytest.raises(ValueError, match="is no name"):
            kind({name: {"x": good}})
        with pytest.raises(ValueError, match="is no name"):
            kind({"a": {name: good}})


def test_wrong_contents_are_errors() -> None:
    with pytest.raises(TypeError, match="expected an int64 tensor"):
        ActivationCounts({"a": {"x": torch.tensor([1.0])}})
    with pytest.raises(ValueError, match="go down to -1"):
        ActivationCounts({"a": {"x": torch.tensor([-1])}})
    with pytest.raises(ValueError, match="task b lacks layer y"):
        ActivationCounts({"a": {"x": torch.tensor([1]), "y": torch.tensor([1])}, "b": {"x": torch.tensor([1])}})
    with pytest.raises(ValueError, match="no task"):
        NeuronMasks({})
    with pytest.raises(TypeError, match="expected a bool tensor"):
        NeuronMasks({"a": {"x": torch.tensor([1])}})
    with pytest.raises(ValueError, match="layer x has a width of 0"):
        NeuronMasks({"a": {"x": torch.ones(0, dtype=torch.bool)}})


@pytest.mark.parametrize("kind", [NeuronMasks, ActivationCounts, WeightMasks])
def test_the_name_that_the_format_keeps_for_itself_is_no_layer(kind, tmp_path) -> None:
    good = torch.ones(2, 3).bool() if kind is WeightMasks else torch.ones(3).bool()
    good = good.long() if kind is ActivationCounts else good
    with pytest.raises(ValueError, match="^no layer can be called __metadata__ in .*; rename the module"):
        kind({"a": {"x": good, "__metadata__": good}}).save(tmp_path)
    assert not list(tmp_path.iterdir())
    kind({"__metadata__": {"x__metadata__": good}}).save(tmp_path)
    assert kind.load(tmp_path).tasks == ["__metadata__"]


def test_a_folder_that_is_not_utf8_is_not_called_broken(tmp_path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    some_masks().save(folder)
    with pytest.raises(ValueError, match=r"caf\\udce9/masks.safetensors' cannot be read where it is: .* rename"):
        NeuronMasks.load(folder)
    folder.rename(tmp_path / "café")
    assert NeuronMasks.load(tmp_path / "café").tasks


@pytest.mark.parametrize("layer", ["x" * 5000, "a\nb" * 2000])
@pytest.mark.parametrize("wrong", ["extra", "missing", "shape", "d_ff", "spare"])
def test_a_long_name_in_a_file_is_a_short_message_on_one_line(tmp_path, layer: str, wrong: str) -> None:
    about = {"format": 1, "kind": "masks", "tasks": ["a"], "d_ff": {layer: -1 if wrong == "d_ff" else 3}}
    tensors = {layer: torch.zeros(1, 2 if wrong == "shape" else 1, dtype=torch.uint8)}
    if wrong == "extra":
        tensors[f"{layer}2"] = tensors[layer]
    elif wrong == "missing":
        tensors = {"other": tensors[layer]}
    elif wrong == "spare":
        tensors[layer] += 255
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / "masks.safetensors", {"nspec": json.dumps(about)})
    with pytest.raises(ValueError, match="masks.safetensors is broken: .*; write it again$") as caught:
        NeuronMasks.load(tmp_path)
    message = str(caught.value).removeprefix(str(tmp_path))
    assert len(message) < 300
    assert "\n" not in message

"""Neurons as files: what is written, what comes back, and what is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_models import FAMILIES, Family, inputs, make, output
from test_finetune import LLAMA, masks_of, near, own, steps
from torch import nn

import nspec
from nspec.tuning.stored import digest_of

NAMES = ("Llama, with biases", "Phi3", "T5, gated-gelu", "M2M100", "GPT2")


def trained(family: Family, tasks: tuple[str, ...] = ("cy",), dtype: torch.dtype = torch.float64) -> tuple[Any, Any]:
    """A base, and a copy with neurons that have moved."""
    base = make(family).to(dtype)
    model = nspec.finetune(copy.deepcopy(base), masks_of(base, tasks), quiet=True)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in own(model).values():
            p += 0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return base, model


def logits(model: nn.Module, task: Any = "cy", family: Family = LLAMA) -> torch.Tensor:
    with torch.no_grad(), nspec.task(model, task):
        return output(family, model, inputs(family))


@pytest.mark.parametrize("name", NAMES)
def test_what_is_saved_and_loaded_gives_the_same_outputs(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    base, model = trained(family)
    nspec.save_neurons(model, tmp_path)
    other = nspec.load_neurons(copy.deepcopy(base), tmp_path)
    assert not any(p.requires_grad for p in own(other).values())
    assert torch.equal(logits(other, "cy", family), logits(model, "cy", family))
    assert torch.equal(logits(other, None, family), logits(base_of(base), None, family))
    nspec.save_neurons(other, tmp_path / "again")
    assert (tmp_path / "again/neurons.safetensors").read_bytes() == (tmp_path / "neurons.safetensors").read_bytes()


def base_of(base: nn.Module) -> nn.Module:
    """The base as one that knows tasks."""
    return nspec.finetune(copy.deepcopy(base), masks_of(base), quiet=True)


def test_several_sets_lie_beside_one_base(tmp_path: Path) -> None:
    base, model = trained(LLAMA, ("cy", "mt", "is"))
    for task in ("cy", "mt", "is"):
        nspec.save_neurons(model, tmp_path / task, tasks=[task])
    other = nspec.load_neurons(copy.deepcopy(base), {"Welsh": tmp_path / "cy", "mt": str(tmp_path / "mt")})
    nspec.load_neurons(other, {"is": tmp_path / "is"})
    for name, task in (("Welsh", "cy"), ("mt", "mt"), ("is", "is"), (None, None)):
        assert torch.equal(logits(other, name), logits(model, task))
    assert near(logits(other, ["is", None, "Welsh", "mt"]), logits(model, ["is", None, "cy", "mt"]))
    with pytest.raises(ValueError, match="neurons of task 'mt' already"):
        nspec.load_neurons(other, {"mt": tmp_path / "mt"})


def test_training_goes_on_from_a_file(tmp_path: Path) -> None:
    base, model = trained(LLAMA)
    nspec.save_neurons(model, tmp_path)
    other = nspec.load_neurons(copy.deepcopy(base), tmp_path, trained=True)
    assert {name for name, p in other.named_parameters() if p.requires_grad} == set(own(model))
    steps(LLAMA, model)
    steps(LLAMA, other)
    assert all(torch.equal(p, own(other)[name]) for name, p in own(model).items())


def test_what_was_saved_in_the_dtype_of_the_base_trains_on_in_float32(tmp_path: Path) -> None:
    base, model = trained(LLAMA, dtype=torch.bfloat16)
    nspec.save_neurons(model, tmp_path)
    other = nspec.load_neurons(copy.deepcopy(base), tmp_path, trained=True)
    assert {p.dtype for p in own(other).values()} == {torch.float32}
    assert torch.equal(logits(other), logits(model))
    before = {name: p.detach().clone() for name, p in own(other).items()}
    steps(LLAMA, other, count=1, lr=1e-6)  # less than bfloat16 shows
    assert all(not torch.equal(p, before[name]) for name, p in own(other).items())
    frozen = nspec.load_neurons(copy.deepcopy(base), tmp_path)
    assert {p.dtype for p in own(frozen).values()} == {torch.bfloat16}
    asked = nspec.load_neurons(copy.deepcopy(base), tmp_path, trained=True, dtype=torch.float64)
    assert {p.dtype for p in own(asked).values()} == {torch.float64}
    with pytest.raises(ValueError, match=r"dtype is torch.int8, expected a floating one"):
        nspec.load_neurons(copy.deepcopy(base), tmp_path, dtype=torch.int8)


@pytest.mark.parametrize(("dtype", "saved"), [(torch.bfloat16, None), (torch.bfloat16, torch.float32)])
def test_the_size_of_a_file_is_that_of_its_rows(dtype: torch.dtype, saved: Any, tmp_path: Path) -> None:
    base, model = trained(LLAMA, ("cy",), dtype)
    nspec.save_neurons(model, tmp_path, dtype=saved)
    k = [int(mask.sum()) for mask in masks_of(base)["cy"].values()]
    wanted = sum(3 * count * 16 * (saved or dtype).itemsize + 4 * count for count in k)
    assert sum(t.nbytes for t in load_file(tmp_path / "neurons.safetensors").values()) == wanted
    header = int.from_bytes((tmp_path / "neurons.safetensors").read_bytes()[:8], "little")
    assert (tmp_path / "neurons.safetensors").stat().st_size == 8 + header + wanted
    about = json.loads((tmp_path / "neurons.json").read_text())
    assert about["tasks"] == ["cy"]
    assert set(about["base"]["dtypes"]["model.layers.0.mlp.gate_proj"].values()) == {"bfloat16"}
    assert list(about["neurons"]["cy"].values()) == k
    other = nspec.load_neurons(copy.deepcopy(base), tmp_path)
    assert torch.equal(logits(other), logits(model))


def test_a_layer_without_neurons_takes_no_place(tmp_path: Path) -> None:
    base, model = trained(LLAMA, ("cy", "mt"))
    nspec.save_neurons(model, tmp_path, tasks=["mt"])
    assert not any("layers.0." in name for name in load_file(tmp_path / "neurons.safetensors"))
    assert torch.equal(logits(nspec.load_neurons(copy.deepcopy(base), tmp_path), "mt"), logits(model, "mt"))


def test_another_base_is_refused_and_left_as_it_was(tmp_path: Path) -> None:
    base, model = trained(LLAMA)
    nspec.save_neurons(model, tmp_path)
    other = copy.deepcopy(base)
    with torch.no_grad():
        index = masks_of(base)["cy"]["model.layers.1.mlp.gate_proj"].nonzero()[0, 0]
        other.model.layers[1].mlp.down_proj.weight[3, index] += 1e-9
    with pytest.raises(ValueError, match="is of another base: the model has other numbers in these rows"):
        nspec.load_neurons(other, tmp_path)
    assert not any(".neuron" in name for name, _ in other.named_parameters())
    assert all(p.requires_grad for p in other.parameters())
    nspec.load_neurons(other, tmp_path, verify=False)
    wider = make(LLAMA._replace(options=LLAMA.options | {"intermediate_size": 80}))
    with pytest.raises(ValueError, match="d_ff=72 and d_model=16 there, 80 and 16 in the model"):
        nspec.load_neurons(wider, tmp_path)
    with pytest.raises(ValueError, match=r"block 'model.layers.0.mlp.gate_proj', which the model does not have; known"):
        nspec.load_neurons(make(FAMILIES["M2M100"]), tmp_path)
    with pytest.raises(FileNotFoundError, match=r"expected a folder that nspec.save_neurons wrote"):
        nspec.load_neurons(base, tmp_path / "nothing")


@pytest.mark.parametrize("change", ["bytes", "rows", "cut"])
def test_a_broken_file_is_refused(change: str, tmp_path: Path) -> None:
    base, model = trained(LLAMA)
    nspec.save_neurons(model, tmp_path)
    path = tmp_path / "neurons.safetensors"
    if change == "cut":
        path.write_bytes(path.read_bytes()[:-9])
    elif change == "bytes":
        content = bytearray(path.read_bytes())
        content[-9] ^= 1
        path.write_bytes(content)
    else:
        save_file(load_file(path), path)
    with pytest.raises(ValueError, match=r"neurons.safetensors (is broken|holds something else)"):
        nspec.load_neurons(base, tmp_path)
    assert not any(".neuron" in name for name, _ in base.named_parameters())


CHANGES: dict[str, Any] = {
    "no tasks": lambda about: about.pop("tasks"),
    "no task at all": lambda about: about.update(tasks=[]),
    "unknown task": lambda about: about.update(tasks=["zz"]),
    "no base": lambda about: about.pop("base"),
    "no digest": lambda about: about["base"].update(rows_sha256={}),
    "no dtypes": lambda about: about["base"].update(dtypes={}),
    "no name": lambda about: about["base"].pop("name"),
    "no parts": lambda about: about.pop("parts"),
    "parts a text": lambda about: about.update(parts=dict.fromkeys(about["parts"], "gate")),
    "unknown part": lambda about: about.update(parts={key: ["gates"] for key in about["parts"]}),
    "no biases": lambda about: about.pop("biases"),
    "sizes a list": lambda about: about.update(sizes=[]),
    "no width": lambda about: about.update(sizes={key: [72] for key in about["sizes"]}),
    "counts below 0": lambda about: about["neurons"].update(cy=dict.fromkeys(about["neurons"]["cy"], -1)),
    "a block without parts": lambda about: about["parts"].popitem(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_metadata_that_lack_something_are_a_broken_file(change: str, tmp_path: Path) -> None:
    base, model = trained(LLAMA)
    nspec.save_neurons(model, tmp_path)
    path = tmp_path / "neurons.safetensors"
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["nspec"])
    CHANGES[change](about)
    tensors = load_file(path)
    save_file(tensors, path, {"nspec": json.dumps(about | {"sha256": digest_of(about, tensors)})})
    with pytest.raises(ValueError, match=r"neurons.safetensors is broken: .*; write it again"):
        nspec.load_neurons(base, tmp_path)
    assert not any(".neuron" in name for name, _ in base.named_parameters())


def test_no_task_to_save_leaves_what_was_there(tmp_path: Path) -> None:
    _, model = trained(LLAMA)
    nspec.save_neurons(model, tmp_path)
    before = (tmp_path / "neurons.safetensors").read_bytes()
    with pytest.raises(ValueError, match="tasks is empty, expected some of cy"):
        nspec.save_neurons(model, tmp_path, tasks=[])
    with pytest.raises(TypeError, match=r"tasks is 'cy', expected a list of names such as \['cy'\]"):
        nspec.save_neurons(model, tmp_path, tasks="cy")
    assert (tmp_path / "neurons.safetensors").read_bytes() == before


def test_a_model_without_neurons_has_nothing_to_save(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"call nspec.finetune\(model, masks\) first"):
        nspec.save_neurons(make(LLAMA), tmp_path)
    _, model = trained(LLAMA)
    with pytest.raises(ValueError, match="no neurons of task 'xx'; known: cy"):
        nspec.save_neurons(model, tmp_path, tasks=["xx"])


def test_a_base_of_several_dtypes_comes_back(tmp_path: Path) -> None:
    """As T5 has, whose last layers are kept in float32."""
    base = make(LLAMA).float()
    for layer in base.model.layers:
        layer.mlp.gate_proj.to(torch.bfloat16)
        layer.mlp.gate_proj.register_forward_pre_hook(lambda module, args: (args[0].to(torch.bfloat16),))
    model = nspec.finetune(copy.deepcopy(base), masks_of(base), quiet=True)
    nspec.save_neurons(model, tmp_path)
    other = nspec.load_neurons(copy.deepcopy(base), tmp_path)
    assert torch.equal(logits(other), logits(model))


def test_a_base_in_another_dtype_is_refused_and_named(tmp_path: Path) -> None:
    base, model = trained(LLAMA, dtype=torch.float32)
    nspec.save_neurons(model, tmp_path)
    with pytest.raises(ValueError, match=r"trained on, in float32 \(this one is in bfloat16\)"):
        nspec.load_neurons(copy.deepcopy(base).to(torch.bfloat16), tmp_path)
    wider = nspec.load_neurons(copy.deepcopy(base).double(), tmp_path)  # the same numbers
    assert {p.dtype for p in own(wider).values()} == {torch.float32}

"""Neurons beside a base whose weights bitsandbytes or torchao has quantised, and optimisers of theirs with few bits."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import nspec
from nspec.specialization.layers import find_blocks
from nspec.specialization.quantised import computes_affine

IDS = torch.randint(0, 99, (2, 9), generator=torch.Generator().manual_seed(3))


def small() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        shape = LlamaConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, vocab_size=99
        )
        return LlamaForCausalLM(shape)


def of_bitsandbytes(bits: int) -> Callable[[nn.Linear], nn.Module]:
    bnb = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")

    def turn(layer: nn.Linear) -> nn.Module:
        size, weight = (layer.in_features, layer.out_features), layer.weight.detach().clone()
        if bits == 4:
            made = bnb.nn.Linear4bit(*size, bias=False, compute_dtype=torch.float32, quant_type="nf4")
            made.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
        else:
            made = bnb.nn.Linear8bitLt(*size, bias=False, has_fp16_weights=False)
            made.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        moved: nn.Module = made.to("cpu")  # which quantises
        return moved

    return turn


def of_torchao(bits: int) -> Callable[[nn.Linear], nn.Module]:
    found = pytest.importorskip("torchao.quantization", reason="needs torchao")

    def turn(layer: nn.Linear) -> nn.Module:
        made = nn.Sequential(copy.deepcopy(layer))
        # Its other formats of 4 bits are for GPUs.
        config = found.Int8WeightOnlyConfig() if bits == 8 else found.IntxWeightOnlyConfig(weight_dtype=torch.int4)
        found.quantize_(made, config)
        return made[0]

    return turn


def dequantised(layer: Any) -> Tensor:
    """The matrix, by the library's own means."""
    weight = layer.weight
    if type(weight).__module__.startswith("torchao"):
        matrix: Tensor = weight.dequantize()
        return matrix
    import bitsandbytes as bnb

    if hasattr(weight, "quant_state"):
        matrix = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
        return matrix
    state = layer.state if layer.state.CB is not None else weight
    return state.CB * state.SCB[:, None] / 127


KINDS = {
    "bitsandbytes nf4": lambda: of_bitsandbytes(4),
    "bitsandbytes int8": lambda: of_bitsandbytes(8),
    "torchao int8": lambda: of_torchao(8),
    "torchao int4": lambda: of_torchao(4),
}


def replaced(model: Any, turn: Callable[[Any], Any]) -> Any:
    for layer in model.model.layers:
        for part in ("gate_proj", "up_proj", "down_proj"):
            setattr(layer.mlp, part, turn(getattr(layer.mlp, part)))
    return model


def plain(layer: Any) -> nn.Linear:
    made = nn.Linear(layer.in_features, layer.out_features, bias=False)
    made.weight = nn.Parameter(dequantised(layer).detach().float().clone())
    return made


def masks_of(model: nn.Module, tasks: tuple[str, ...] = ("cy",)) -> nspec.NeuronMasks:
    drawn = {b.name: torch.arange(b.d_ff) for b in find_blocks(model)}
    return nspec.NeuronMasks({t: {n: at % 2 == place for n, at in drawn.items()} for place, t in enumerate(tasks)})


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    found: Tensor = model(input_ids=ids).logits
    return found


def own(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def bits_of(model: nn.Module) -> dict[str, Any]:
    return {n: t.clone() for n, t in model.state_dict().items() if isinstance(t, Tensor) and "neurons" not in n}


def equal_bits(a: Any, b: Any) -> bool:
    a, b = (x.dequantize() if type(x).__module__.startswith("torchao") else x for x in (a, b))
    return torch.equal(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_neurons_beside_a_quantised_base(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = replaced(small(), KINDS[kind]())
    with torch.no_grad():
        before = logits(base.train())  # there is no dropout; an evaluation may pack weights of 4 bits, and round to 8
    masks, bits = masks_of(base), bits_of(base)
    model = nspec.finetune(copy.deepcopy(base), masks)
    rows = 2 * 3 * 64 * 64
    whole = sum(p.numel() for p in small().parameters())
    assert f"training {rows:,} numbers beside a base of {whole:,} " in capsys.readouterr().out

    # Before the first step it is the base, up to the order of sums.
    assert torch.allclose(logits(model), before, rtol=0, atol=2e-6)

    # Gradients are those of the base with its weights dequantised, in float64.
    exact = nspec.finetune(replaced(copy.deepcopy(base), plain).double(), masks, quiet=True)
    for one in (model, exact):
        y = logits(one)
        (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
    for name, parameter in own(exact).items():
        found = own(model)[name].grad
        assert parameter.grad is not None
        assert found is not None
        assert float((found - parameter.grad).abs().max()) < 5e-6 * float(parameter.grad.abs().max()), name

    # Steps move the neurons alone; what is saved gives the same beside another copy of the base.
    optimizer = torch.optim.AdamW(own(model).values(), lr=0.05)
    optimizer.step()
    with torch.no_grad():
        after = logits(model)
    assert float((after - before).abs().max()) > 1e-3
    assert all(equal_bits(tensor, bits[name]) for name, tensor in bits_of(model).items())
    nspec.save_neurons(model, tmp_path)
    with pytest.raises(ValueError, match="the weights of the base are packed, .* give verify=False"):
        nspec.load_neurons(copy.deepcopy(base), tmp_path)
    loaded = nspec.load_neurons(copy.deepcopy(base), tmp_path, verify=False)
    with torch.no_grad():
        assert torch.equal(logits(loaded), after)

    # A merged model has weights of one kind: those in floating point.
    with pytest.raises(ValueError, match=r"gate_proj is quantised \(.*load the base in floating point.*verify=False"):
        nspec.merge(loaded, "cy")
    merged = nspec.merge(nspec.load_neurons(replaced(copy.deepcopy(base), plain), tmp_path, verify=False), "cy")
    with torch.no_grad():
        assert torch.allclose(logits(merged), after, rtol=0, atol=1e-5)
    nspec.despecialize(loaded)
    with torch.no_grad():
        assert torch.equal(logits(loaded), before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_mixed_batch_and_counting_over_a_quantised_base(kind: str) -> None:
    base = replaced(small(), KINDS[kind]())
    counts = nspec.profile(base, {"cy": [{"input_ids": IDS}]}, padding="include")
    exact = nspec.profile(replaced(copy.deepcopy(base), plain), {"cy": [{"input_ids": IDS}]}, padding="include")
    differ = sum(int((a - exact["cy"][name]).abs().sum()) for name, a in counts["cy"].items())
    assert differ <= 0.01 * sum(int(a.sum()) for a in exact["cy"].values())  # int8 of bitsandbytes rounds inputs too
    if kind != "bitsandbytes int8":
        assert differ == 0
    model = nspec.finetune(base, masks_of(base, ("cy", "mt")), quiet=True)
    with torch.no_grad():
        for number, parameter in enumerate(own(model).values()):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
        with nspec.task(model, ["cy", "mt"]):
            both = logits(model)
        for place, task in enumerate(("cy", "mt")):
            with nspec.task(model, task):
                assert torch.allclose(logits(model)[place], both[place], rtol=0, atol=2e-6)


def test_4_bit_weights_are_not_packed_for_inference_where_gradients_go_through() -> None:
    base = replaced(small(), KINDS["bitsandbytes nf4"]())
    layers = [layer for block in base.model.layers for layer in block.mlp.children() if hasattr(layer, "compute_dtype")]
    assert len(layers) == 6
    for layer in layers:
        layer.support_avx512bf16_for_cpu = True  # as on CPUs that have it
    base.eval()
    bits, exact = bits_of(base), nspec.finetune(replaced(copy.deepcopy(base), plain), masks_of(base), quiet=True)
    nspec.profile(base, {"cy": [{"input_ids": IDS}]}, padding="include")
    model = nspec.finetune(base, masks_of(base), quiet=True)
    with torch.no_grad():
        logits(model)  # an evaluation, then training
    for one in (model, exact):
        logits(one.train()).square().mean().backward()
    for name, parameter in own(exact).items():
        wanted: Any = parameter.grad
        assert torch.allclose(own(model)[name].grad, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
    nspec.despecialize(model)
    assert all(layer.support_avx512bf16_for_cpu for layer in layers)
    assert all(torch.equal(tensor, bits[name]) for name, tensor in bits_of(model).items())
    layers[0].weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match=r"gate_proj was packed by bitsandbytes for inference on this CPU"):
        nspec.finetune(model, masks_of(model), quiet=True)


def test_the_trainer_takes_a_base_of_4_bits_that_does_not_say_it_is_quantised(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    small().save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=config, device_map="cpu")
    nspec.finetune(model, masks_of(model), quiet=True)
    model.is_quantized = False
    settings = TrainingArguments(str(tmp_path), max_steps=1, use_cpu=True, report_to=[], save_strategy="no")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    Trainer(model, settings, train_dataset=[{"input_ids": ids, "labels": ids} for ids in IDS]).train()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == set(own(model))


def test_a_quantised_module_is_not_trained_in_full() -> None:
    base = small()
    base.lm_head = KINDS["torchao int8"]()(base.lm_head)
    with pytest.raises(
        ValueError, match=r"also has 'lm_head', which matches a weight in Int8Tensor: it cannot be trained"
    ):
        nspec.finetune(base, masks_of(base), also=["lm_head"], quiet=True)
    nspec.finetune(base, masks_of(base), also=["norm"], quiet=True)  # others can


class Rectified(nn.Linear):
    """A quantised layer that does more than multiply."""

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weight.float().t()).relu()


def test_a_quantised_layer_that_does_more_is_not_counted() -> None:
    layer = Rectified(4, 8, bias=False)
    layer.weight = nn.Parameter(torch.randint(-9, 9, (8, 4), dtype=torch.int8), requires_grad=False)
    assert computes_affine(layer) == "it computes something else than a product with its weight"


class Inference(nn.Linear):
    """A quantised layer through which no gradient goes."""

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weight.float().t() / 100).detach()


def test_a_quantised_layer_that_drops_gradients_is_an_error() -> None:
    base = small()
    layer = Inference(128, 64, bias=False)
    layer.weight = nn.Parameter(torch.randint(-9, 9, (64, 128), dtype=torch.int8), requires_grad=False)
    base.model.layers[1].mlp.down_proj = layer
    model = nspec.finetune(base, masks_of(base), quiet=True)
    with torch.no_grad():
        logits(model)
    with pytest.raises(RuntimeError, match=r"layers\.1\.mlp\.down_proj: no gradient goes through this Inference"):
        logits(model)


def optimisers() -> dict[str, Callable[[Any], Any]]:
    def of(library: str, name: str, **options: Any) -> Callable[[Any], Any]:
        def make(parameters: Any) -> Any:
            module = pytest.importorskip(library, reason=f"needs {library.split('.')[0]}")
            return getattr(module, name)(parameters, lr=0.01, **options)

        return make

    small_too = {"min_8bit_size": 256}
    return {
        "bitsandbytes AdamW8bit": of("bitsandbytes.optim", "AdamW8bit", **small_too),
        "bitsandbytes PagedAdamW8bit": of("bitsandbytes.optim", "PagedAdamW8bit", **small_too),
        "torchao AdamW8bit": of("torchao.optim", "AdamW8bit"),
        "torchao AdamW4bit": of("torchao.optim", "AdamW4bit"),
        "torchao AdamWFp8": of("torchao.optim", "AdamWFp8"),
    }


@pytest.mark.parametrize("name", optimisers())
def test_optimisers_with_few_bits_step_the_neurons_alone(name: str) -> None:
    base = small()
    model, other = (nspec.finetune(copy.deepcopy(base), masks_of(base), quiet=True) for _ in range(2))
    trained = own(model)
    few, whole = optimisers()[name](list(trained.values())), torch.optim.AdamW(own(other).values(), lr=0.01)
    with torch.compiler.set_stance("force_eager"):  # torchao compiles its step, which takes a minute
        for _ in range(3):
            for one, optimizer in ((model, few), (other, whole)):
                optimizer.zero_grad()
                loss = one(input_ids=IDS, labels=IDS).loss
                loss.backward()
                optimizer.step()
    held = [value for state in few.state.values() for key, value in state.items() if key in ("state1", "exp_avg")]
    assert len(held) == len(trained)
    assert all(v.dtype == torch.uint8 or type(v).__name__.startswith("OptimState") for v in held)  # not kept in float32
    assert all(torch.isfinite(p).all() for p in trained.values())
    for key, parameter in trained.items():  # as far as eight bits, or four, tell the moments
        start = nspec.finetune(copy.deepcopy(base), masks_of(base), quiet=True).get_parameter(key)
        moved, wanted = (parameter - start).detach(), (own(other)[key] - start).detach()
        assert float((moved - wanted).norm()) < 0.35 * float(wanted.norm()), key
    nspec.despecialize(model)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), base.state_dict().values()))

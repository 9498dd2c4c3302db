"""Fine-tuned neurons are exported merged with their base."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import nspec
from nspec import cli
from nspec.files import write_json, write_text

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = torch.arange(8)[None] % 5 + 3


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """What `nspec finetune` leaves of a method, and the model with the neurons beside its base."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("tuned")
    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=8, bos_token_id=1, eos_token_id=2, **sizes)).eval()
    base.save_pretrained(folder / "base" / "model")
    words = Tokenizer(models.WordLevel({name: i for i, name in enumerate(["<unk>", "<s>", "</s>", *"abcde"])}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder / "base" / "model")
    layers = [f"model.layers.{i}.mlp.gate_proj" for i in range(2)]
    masks = nspec.NeuronMasks(
        {code: {name: torch.arange(32) % 3 == i for name in layers} for i, code in enumerate(("cy", "mt"))}
    )
    model: Any = nspec.finetune(copy.deepcopy(base), masks, quiet=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".neurons." in name:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    write_text(folder / "config.yaml", f"run: {{folder: {folder}}}\n")
    for code in ("cy", "mt"):
        nspec.save_neurons(model, folder / "tuned" / "lape" / code, tasks=[code])
        write_json(folder / "tuned" / "lape" / code / "stage.json", {})
    write_json(folder / "tuned" / "lora" / "cy" / "stage.json", {})
    return folder, model


def same(folder: Path, model: Any, task: str) -> bool:
    with torch.no_grad(), nspec.task(model, task):
        expected = model(IDS).logits
        found = AutoModelForCausalLM.from_pretrained(folder)(IDS).logits
    return torch.allclose(found, expected, atol=1e-5)


def test_a_run_gives_a_folder_for_each_language(run: tuple[Path, Any], tmp_path: Path) -> None:
    folder, model = run
    assert cli.main(["export", str(folder), "--system", "lape", "--all", "--out", str(tmp_path / "all")]) == 0
    for code, other in (("cy", "mt"), ("mt", "cy")):
        assert same(tmp_path / "all" / code, model, code)
        assert not same(tmp_path / "all" / code, model, other)
    card = (tmp_path / "all" / "cy" / "README.md").read_text(encoding="utf-8")
    assert "AutoModelForCausalLM" in card
    assert f"The weights of `{folder.name}/base/model` with" in card
    assert "base_model" not in card


def test_saved_neurons_go_with_their_base(run: tuple[Path, Any], tmp_path: Path) -> None:
    folder, model = run
    saved = str(folder / "tuned" / "lape" / "mt")
    base, out = ["--base", str(folder / "base" / "model")], ["--out", str(tmp_path / "mt")]
    assert cli.main(["export", saved, "--task", "mt", *base, *out]) == 0
    assert same(tmp_path / "mt", model, "mt")


def test_ctranslate2_goes_on_with_a_text_as_the_merged_model_does(run: tuple[Path, Any], tmp_path: Path) -> None:
    ctranslate2 = pytest.importorskip("ctranslate2")
    folder, model = run
    options = ["--system", "lape", "--task", "cy", "--format", "ctranslate2", "--out", str(tmp_path / "cy")]
    assert cli.main(["export", str(folder), *options]) == 0
    generator = ctranslate2.Generator(str(tmp_path / "cy"))
    (found,) = generator.generate_batch([["<s>", "a", "b"]], max_length=6, include_prompt_in_result=False, beam_size=1)
    with nspec.task(model, "cy"):
        expected = model.generate(torch.tensor([[1, 3, 4]]), max_new_tokens=6, do_sample=False, pad_token_id=2)[0, 3:]
    assert found.sequences_ids[0] == [i for i in expected.tolist() if i != 2]


def test_what_is_wrong_is_one_line(run: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = run
    saved = [str(folder / "tuned" / "lape" / "mt"), "--task", "mt"]
    base = ["--base", str(folder / "base" / "model")]
    (tmp_path / "half").mkdir()
    shutil.copy(folder / "tuned" / "lape" / "mt" / "neurons.safetensors", tmp_path / "half")
    wrong = {
        f"give --system: {folder} has fine-tuned by lape, lora": [str(folder), "--task", "cy"],
        "has cy, mt of lape": [str(folder), "--system", "lape", "--task", "fr"],
        "its LoRA weights are merged by peft": [str(folder), "--system", "lora", "--task", "cy"],
        f"give --base, the one that they were trained on, or export them from their run: nspec export {folder} "
        "--system lape --task mt": saved,
        "has saved neurons: leave --system out": [*saved, *base, "--system", "lape"],
        "is a run, which knows its base: leave --base out": [str(folder), "--system", "lape", "--task", "cy", *base],
        "neurons.json, which names the tasks, is not there": [str(tmp_path / "half"), "--task", "mt", *base],
        "there is no such folder": [*saved, "--base", str(tmp_path / "nothing")],
        "has no saved neurons": [str(tmp_path), "--task", "mt", "--base", str(folder / "base" / "model")],
    }
    for message, options in wrong.items():
        assert cli.main(["export", *options, "--out", str(tmp_path / "out")]) == 2, message
        assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()

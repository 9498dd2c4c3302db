"""What an exported compact model says is what the specialised one says: 500 sentences in float32, by both searches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import FAMILIES, make
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

import nspec
from nspec.specialization.layers import find_blocks

pytestmark = pytest.mark.usefixtures("one_thread")
SENTENCES, BATCH, NEW, END = 500, 100, 10, 2
ROUNDING = 1e-5  # of a score in float32: sums of at most NEW log-probabilities


@pytest.fixture(scope="module", params=["M2M100", "Marian, swish", "MBart, gelu", "T5, gated-gelu", "Llama"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A specialised model with weights that make it say much, and its export, loaded by Transformers."""
    family = FAMILIES[request.param]
    torch.manual_seed(1)
    model: Any = make(family).float().eval()
    for name, parameter in model.named_parameters():
        if "embed_positions" in name:
            continue  # Marian's are sines, which are not saved
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=1.0)
        elif "bias" in name:
            torch.nn.init.normal_(parameter, std=0.5)  # masked neurons give constants that matter
    generator = torch.Generator().manual_seed(5)
    masks = {block.name: torch.rand(block.d_ff, generator=generator) < 0.5 for block in find_blocks(model)}
    nspec.specialize(model, nspec.NeuronMasks({"task": masks}))
    folder: Path = nspec.export(model, "task", tmp_path_factory.mktemp("export") / "model")
    kind: Any = AutoModelForSeq2SeqLM if model.config.is_encoder_decoder else AutoModelForCausalLM
    small = kind.from_pretrained(folder, dtype=torch.float32).eval()
    assert sum(p.numel() for p in small.parameters()) < 0.8 * sum(p.numel() for p in model.parameters())
    nspec.set_task(model, "task")
    return model, small


def sentences() -> list[Tensor]:
    """Batches of sentences of one length each: int64 ``[BATCH, tokens]``."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(4, 50, (BATCH, 4 + number), generator=generator) for number in range(SENTENCES // BATCH)]


def said(model: Any, ids: Tensor, beams: int) -> Tensor:
    """What the model says; of a translation the second token is given, as a tag is, another one in each sentence."""
    prefix = {}
    if model.config.is_encoder_decoder:
        start = torch.full((len(ids), 1), model.config.decoder_start_token_id)
        prefix = {"decoder_input_ids": torch.cat([start, ids[:, 1:2]], 1)}
    with torch.inference_mode():
        found: Tensor = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            **prefix,
            num_beams=beams,
            do_sample=False,
            max_new_tokens=NEW,
            eos_token_id=END,
            pad_token_id=1,
            early_stopping=beams > 1,
        )
    return found


def score(model: Any, ids: Tensor, row: Tensor) -> float:
    """The log-probability of what was said, over its length, in float64."""
    first = 2 if model.config.is_encoder_decoder else ids.shape[1]
    words = row[first:]
    words = words[: int((words == END).nonzero()[0]) + 1] if bool((words == END).any()) else words
    given = {
        "decoder_input_ids" if model.config.is_encoder_decoder else "input_ids": row[None, : first + len(words) - 1]
    }
    given |= {"input_ids": ids[None]} if model.config.is_encoder_decoder else {}
    with torch.inference_mode():
        logits = model(**given).logits[0, first - 1 :].double()
    return float(logits.log_softmax(-1).gather(-1, words[:, None]).sum() / len(words))


@pytest.mark.parametrize("beams", [1, 4])
def test_an_export_says_what_the_specialised_model_says(both: tuple[Any, Any], beams: int) -> None:
    model, small = both
    different, words = [], set()
    for ids in sentences():
        want, found = said(model, ids, beams), said(small, ids, beams)
        words |= {tuple(row) for row in want.tolist()}
        if want.shape == found.shape and torch.equal(want, found):
            continue
        different += [(i, a, b) for i, a, b in zip(ids, want, found) if a.tolist() != b.tolist()]
    assert len(words) > SENTENCES / 5  # a model that says one thing whatever it reads proves nothing
    # Two translations of one score but for rounding may change places; nothing else may differ.
    for ids, want, found in different:
        assert abs(score(model, ids, want) - score(model, ids, found)) < ROUNDING
    assert len(different) <= SENTENCES / 100

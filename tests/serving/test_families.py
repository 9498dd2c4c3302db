"""Each family that CTranslate2 converts says there what the specialised model says; what it would change is refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from small_models import FAMILIES, Family, make
from transformers import PreTrainedTokenizerFast

import nspec
from nspec.specialization.layers import find_blocks

ctranslate2 = pytest.importorskip("ctranslate2")
pytestmark = pytest.mark.usefixtures("one_thread")

BATCHES, BATCH, NEW = 3, 40, 10  # 120 texts
TAG = 5  # stands for the tag of the target language
ROUNDING = 1e-4  # of the score of a translation in float32, in nats a token
DOCS = Path(__file__).parents[2] / "docs" / "serving.md"


def of(name: str, **options: Any) -> Family:
    """A family of the tests of specialisation with other options; its vocabulary is what OPT's converter rounds to."""
    return FAMILIES[name]._replace(options=FAMILIES[name].options | {"vocab_size": 56} | options)


def llama(name: str, **options: Any) -> Family:
    """A family of Llama's form, with a base of the rotary positions that is no default."""
    rope = {"rope_type": "default", "rope_theta": 100.0}
    own = {"head_dim": 8} if name in ("Qwen3", "Gemma") else {}
    return of("Llama", rope_parameters=rope, **own, **options)._replace(
        config=f"{name}Config", model=f"{name}ForCausalLM"
    )


TRANSLATORS = {
    "M2M100": of("M2M100"),  # NLLB's class
    "Marian": of("Marian, swish"),
    "mBART": of("MBart, gelu", decoder_start_token_id=TAG),
    "mBART-50": of("MBart, gelu", scale_embedding=True),
    "T5": of("T5"),
    "T5 1.1": of("T5, gated-gelu", tie_word_embeddings=False),
    "mT5": of("mT5", feed_forward_proj="gated-gelu"),
    "UMT5": of("T5, gated-gelu")._replace(config="UMT5Config", model="UMT5ForConditionalGeneration"),
}
LANGUAGE_MODELS = {
    **{name: llama(name) for name in ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma")},
    **{name: of(name) for name in ("GPT2", "OPT", "Falcon")},
}
WIDE = {"BLOOM": of("BLOOM")}  # whose configuration has no option for the width
REFUSED = {
    "CTranslate2 has no conversion": (
        "No conversion is registered",
        {name: of(name) for name in ("LongT5", "SeamlessM4T, text", "NLLB-MoE", "Nemotron")},
    ),
    "its converter fails with the configurations of Transformers 5": (
        "does not convert this",
        {name: of(name) for name in ("Bart, gelu_new", "Pegasus, quick_gelu", "Phi3", "GPT-NeoX")},
    ),
    "it writes a model that computes something else": (
        "is another model: log-probabilities of 40 tokens are off by",
        {name: of(name) for name in ("Gemma2", "Gemma3")},
    ),
}


class Special(NamedTuple):
    """Ids of a family's special tokens."""

    pad: int
    end: int
    begin: int
    unknown: int


def vocabulary(special: Special, rows: int) -> Any:
    """A tokenizer with a word for each row."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = [f"w{row}" for row in range(rows)]
    for row, name in zip(special, ("<pad>", "</s>", "<s>", "<unk>")):
        words[row] = name
    found = Tokenizer(models.WordLevel({word: row for row, word in enumerate(words)}, "<unk>"))
    found.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=found, **names)


def specialised(family: Family) -> tuple[Any, Special, Any]:
    """A random model that says much, its special tokens, and its tokenizer."""
    torch.manual_seed(1)
    model: Any = make(family).float().eval()
    rows, kind = model.config.vocab_size, str(family.config)
    special = Special(0, 1, 3, 2) if "T5" in kind and "Long" not in kind else Special(1, 2, 0, 3)
    generation = model.generation_config
    if kind == "MarianConfig":
        special = Special(rows - 1, 2, 0, 1)
        model.config.pad_token_id = model.config.decoder_start_token_id = generation.decoder_start_token_id = rows - 1
    generation.pad_token_id, generation.eos_token_id, generation.forced_eos_token_id = special.pad, special.end, None
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed_positions" not in name:  # Marian's are sines, which are not saved
                parameter.normal_()
                if ".encoder_attn.out_proj" in name or ".EncDecAttention.o." in name:
                    parameter *= 8  # what is read decides what is said
            elif "bias" in name:
                parameter.normal_(std=0.5)  # masked neurons give constants that matter
        for table in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
            table[[special.pad, special.begin, special.unknown]] *= 0.05  # trained models do not choose them
            table[special.end] *= 1.5  # some translations end early
        if kind == "MarianConfig":
            model.get_input_embeddings().weight[special.pad] = 0
    generator = torch.Generator().manual_seed(5)
    masks = {block.name: torch.rand(block.d_ff, generator=generator) < 0.5 for block in find_blocks(model)}
    nspec.specialize(model, nspec.NeuronMasks({"task": masks}))
    nspec.set_task(model, "task")
    return model, special, vocabulary(special, rows)


class Searches:
    """The two searches with the same options: special tokens and an empty translation are never chosen.

    Both leave these out of the sum of the probabilities (``renormalize_logits``), so that scores are the same too.
    """

    def __init__(self, family: Family, folder: Path, compact: bool) -> None:
        self.model, self.special, self.tokenizer = specialised(family)
        nspec.export(self.model, "task", folder, "ctranslate2", tokenizer=self.tokenizer, compact=compact)
        self.translates = self.model.config.is_encoder_decoder
        kind = ctranslate2.Translator if self.translates else ctranslate2.Generator
        self.served = kind(str(folder), intra_threads=1)
        start = self.model.config.decoder_start_token_id if self.translates else None
        self.tagged = start in (2, self.special.pad) and "T5" not in str(family.config)
        self.never = [self.special.pad, self.special.begin, self.special.unknown]

    def texts(self, number: int) -> Any:
        """A batch of one length: int64 ``[BATCH, tokens]``."""
        generator = torch.Generator().manual_seed(number)
        ids = torch.randint(4, 50, (BATCH, 4 + number), generator=generator)
        return torch.cat([ids, torch.full((BATCH, 1), self.special.end)], 1) if self.translates else ids

    def given(self, ids: Any) -> dict[str, Any]:
        """What the model reads before it says something."""
        if not self.translates:
            return {"input_ids": ids}
        before = [self.model.config.decoder_start_token_id, TAG][: 1 + self.tagged]
        return {"input_ids": ids, "decoder_input_ids": torch.tensor([before] * len(ids))}

    def transformers(self, ids: Any, beams: int) -> list[list[int]]:
        options = {"num_beams": beams, "do_sample": False, "early_stopping": beams > 1, "suppress_tokens": self.never}
        options |= {"max_new_tokens": NEW + self.tagged, "min_new_tokens": 1 + self.tagged, "renormalize_logits": True}
        options |= {"forced_bos_token_id": TAG} if self.tagged else {}
        found = self.model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=self.special.pad, **options)
        first = 1 + self.tagged if self.translates else ids.shape[1]
        return [self.ended(row) for row in found[:, first:].tolist()]

    def ctranslate2(self, ids: Any, beams: int) -> list[list[int]]:
        words = [self.tokenizer.convert_ids_to_tokens(row) for row in ids.tolist()]
        never = [[name] for name in self.tokenizer.convert_ids_to_tokens(self.never)]
        options: dict[str, Any] = {"beam_size": beams}
        if not self.translates:
            options |= {"suppress_sequences": never, "max_length": NEW, "min_length": 1, "length_penalty": 1.0}
            results = self.served.generate_batch(words, include_prompt_in_result=False, **options)
            return [self.ended(result.sequences_ids[0]) for result in results]
        if str(type(self.model).__name__).startswith("Marian"):
            never = [name for name in never if name != ["<pad>"]]  # which is not there
        options |= {"suppress_sequences": never, "max_decoding_length": NEW + self.tagged}
        options |= {"min_decoding_length": 1 + self.tagged, "length_penalty": 1.0}
        prefix = [[self.tokenizer.convert_ids_to_tokens(TAG)]] * len(words) if self.tagged else None
        found = [result.hypotheses[0] for result in self.served.translate_batch(words, target_prefix=prefix, **options)]
        return [self.tokenizer.convert_tokens_to_ids(row)[self.tagged :] for row in found]

    def ended(self, row: list[int]) -> list[int]:
        return row[: row.index(self.special.end)] if self.special.end in row else row

    def score(self, ids: Any, row: Sequence[int]) -> float:
        """The mean log-probability of what was said, as both searches count it: with the tag and the end."""
        words = torch.tensor([*row, self.special.end][:NEW])
        key = "decoder_input_ids" if self.translates else "input_ids"
        given = self.given(ids[None])
        first = given[key].shape[1]
        given[key] = torch.cat([given[key], words[None, :-1]], 1)
        with torch.no_grad():
            logits = self.model(**given).logits[0, first - 1 :].double()
        logits[:, self.never] = -torch.inf
        logits[0, self.special.end] = -torch.inf
        return float(logits.log_softmax(-1).gather(-1, words[:, None]).sum() / (len(words) + self.tagged))


CASES = [(name, True) for name in (TRANSLATORS | LANGUAGE_MODELS)]
CASES += [(name, False) for name in ("mBART", "mBART-50", "T5 1.1", *WIDE)]


@pytest.mark.parametrize(
    ("name", "compact"), CASES, ids=lambda value: {True: "compact", False: "wide"}.get(value, value)
)
def test_an_export_says_what_the_specialised_model_says(name: str, compact: bool, tmp_path: Path) -> None:
    both = Searches((TRANSLATORS | LANGUAGE_MODELS | WIDE)[name], tmp_path / "out", compact)
    for beams in (1, 4):
        words, ended, different = set(), 0, 0
        for number in range(BATCHES):
            ids = both.texts(number)
            wanted, found = both.transformers(ids, beams), both.ctranslate2(ids, beams)
            words |= {tuple(row) for row in wanted}
            ended += sum(len(row) < NEW for row in wanted)
            for text, one, other in zip(ids, wanted, found):
                if one != other:  # two of one score but for rounding may change places; nothing else may differ
                    different += 1
                    assert abs(both.score(text, one) - both.score(text, other)) < ROUNDING
        assert different <= BATCHES * BATCH / 100
        assert len(words) > BATCHES * BATCH / 6  # a model that says one thing whatever it reads proves nothing


@pytest.mark.parametrize("name", [name for _, families in REFUSED.values() for name in families])
def test_what_would_be_another_model_is_refused(name: str, tmp_path: Path) -> None:
    (message, family) = next((message, group[name]) for message, group in REFUSED.values() if name in group)
    model, _, tokenizer = specialised(family)
    with pytest.raises(ValueError, match=message) as raised:
        nspec.export(model, "task", tmp_path / "out", "ctranslate2", tokenizer=tokenizer)
    assert str(raised.value).endswith("take transformers in its place")
    assert not list(tmp_path.iterdir())


def test_the_page_tells_of_these_families() -> None:
    def row(*cells: str) -> str:
        return f"| {' | '.join(cells)} |"

    told = [row("to CTranslate2", "families")]
    told += [row("---", "---").replace(" ", "")]
    told += [row("converted, `compact` too", ", ".join(TRANSLATORS | LANGUAGE_MODELS))]
    told += [row("converted, without `compact`", ", ".join(WIDE))]
    for reason, (_, families) in REFUSED.items():
        told.append(row(f"refused: {reason}", ", ".join(name.partition(",")[0] for name in families)))
    assert "\n".join(told) in DOCS.read_text(encoding="utf-8")

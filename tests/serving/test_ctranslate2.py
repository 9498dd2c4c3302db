"""Conversion from memory by the installed CTranslate2, for each family that is translated with."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from alone import readme, without_nspec
from marian_folder import spm, write_model, write_tokenizer
from transformers import (
    M2M100Config,
    M2M100ForConditionalGeneration,
    M2M100Tokenizer,
    MBart50Tokenizer,
    MBartConfig,
    MBartForConditionalGeneration,
    MBartTokenizer,
    PreTrainedTokenizerBase,
    T5Config,
    T5ForConditionalGeneration,
    T5Tokenizer,
)

import nspec
from nspec.files import write_json
from nspec.mt.model import load_system
from nspec.mt.scoring.config import DecodeConfig
from nspec.mt.scoring.translate import Translator, choose_for
from nspec.mt.text.config import TokenizerConfig
from nspec.mt.text.tokenizer_fit import token_ids
from nspec.mt.text.vocabulary import train_sentencepiece
from nspec.serving import ctranslate2 as converter
from nspec.specialization.layers import find_blocks

ctranslate2 = pytest.importorskip("ctranslate2")
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Recommended. pip install sacremoses"),
]

WORDS = ["haus", "mann", "frau", "kind", "see", "rot", "blau", "gross", "klein"]
GREEDY = DecodeConfig(beam=1)  # in a beam of so small a vocabulary an end comes among the first words


def lines(count: int) -> list[str]:
    chance = random.Random(0)
    return [" ".join(chance.choice(WORDS) for _ in range(chance.randint(1, 8))) for _ in range(count)]


@pytest.fixture(scope="module")
def m2m100(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder as plain transformers writes it, whose language tags are no entries of its vocabulary."""
    place = tmp_path_factory.mktemp("m2m100")
    proto = train_sentencepiece([" ".join(WORDS)] * 9, TokenizerConfig(vocab_size=40))
    (place / "m.model").write_bytes(proto)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=proto)
    write_json(place / "vocab.json", {pieces.id_to_piece(index): index for index in range(len(pieces))})
    M2M100Tokenizer(str(place / "vocab.json"), str(place / "m.model")).save_pretrained(place / "model")
    config = M2M100Config(
        vocab_size=144, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, init_std=0.4,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=32,
    )  # fmt: skip
    torch.manual_seed(3)
    M2M100ForConditionalGeneration(config).save_pretrained(place / "model")
    return place / "model"


def marian(folder: Path, tokens: list[str]) -> Path:
    write_model(folder, write_tokenizer(folder, lines(60), lines(60), tokens))
    return folder


def pieces() -> list[tuple[str, float]]:
    """The pieces of a Unigram vocabulary with their scores."""
    found = sentencepiece.SentencePieceProcessor(model_proto=spm(lines(60)))
    return [(found.id_to_piece(row), found.get_score(row)) for row in range(3, len(found))]


def mbart(tokenizer: PreTrainedTokenizerBase, start: int) -> Any:
    torch.manual_seed(3)
    config = MBartConfig(
        vocab_size=len(tokenizer), d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=32, init_std=0.8,
        decoder_start_token_id=start, forced_eos_token_id=None,
    )  # fmt: skip
    return MBartForConditionalGeneration(config).eval()


def both(folder: Path, task: str) -> list[list[str]]:
    """What the two engines translate some lines to."""
    model, tokenizer = load_system(folder)
    assert choose_for(model, GREEDY, task).name == "ctranslate2"
    text = ["", *lines(20), "haus ẞ §"]
    return [
        list(Translator(model, tokenizer, GREEDY, engine=name).translate(text, task))
        for name in ("transformers", "ctranslate2")
    ]


def test_m2m100s_language_tags_are_in_the_vocabulary_and_chosen(m2m100: Path, tmp_path: Path) -> None:
    ours = tmp_path / "ours"
    model, tokenizer = load_system(m2m100)
    converter.convert(model, tokenizer, ours, names=converter.row_names(model, tokenizer, token_ids(tokenizer)))
    names = json.loads((ours / "shared_vocabulary.json").read_text(encoding="utf-8"))
    assert len(names) == model.config.vocab_size
    assert [names[row] for row in tokenizer.convert_tokens_to_ids(["__de__", "__en__"])] == ["__de__", "__en__"]
    transformers, by_ctranslate2 = both(m2m100, "de-en")
    assert transformers == by_ctranslate2
    assert len(set(transformers)) > 5
    # Why it is done here: CTranslate2's own way loses them.
    with pytest.raises(ValueError, match="has size 48 but the model expected a vocabulary of size 144"):
        ctranslate2.converters.TransformersConverter(str(m2m100)).convert(str(tmp_path / "theirs"))


@pytest.mark.parametrize(("tokens", "task"), [([], "de-en"), ([">>eng<<", ">>fra<<"], "de-fr")], ids=["one", "several"])
def test_marians_translations_are_the_same(tmp_path: Path, tokens: list[str], task: str) -> None:
    transformers, by_ctranslate2 = both(marian(tmp_path / "model", tokens), task)
    assert transformers == by_ctranslate2
    assert len(set(transformers)) > 5


def test_the_readme_of_an_export_translates_alone(m2m100: Path, tmp_path: Path) -> None:
    beam = DecodeConfig(max_length_ratio=50)
    tokenizer = MBart50Tokenizer(vocab=[(name, 0.0) for name in ("<unk>", "<s>", "</s>")] + pieces())
    for part in (mbart(tokenizer, 2), tokenizer):
        part.save_pretrained(tmp_path / "mbart")
    tried = [(m2m100, "de-en"), (marian(tmp_path / "marian", [">>eng<<", ">>fra<<"]), "de-fr")]
    for folder, task in [*tried, (tmp_path / "mbart", "en-de")]:
        model, tokenizer = load_system(folder)
        out = nspec.export(model, task, tmp_path / task, "ctranslate2", tokenizer=tokenizer)
        text = [*lines(6), "haus ẞ §"]
        expected = list(Translator(model, tokenizer, beam, engine="ctranslate2").translate(text, task))
        assert without_nspec(readme(out, text)) == expected


def test_the_readme_of_what_has_another_frame_says_what_generate_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """mBART, whose decoder starts from a tag, and T5 1.1, whose embeddings have more rows than the tokenizer has tokens."""
    special = [(name, 0.0) for name in ("<s>", "<pad>", "</s>", "<unk>")]
    tags = [(name, 0.0) for name in (*MBartTokenizer().lang_code_to_id, "<mask>")]
    tagged = MBartTokenizer(vocab=special + pieces() + tags, src_lang="de_DE")
    extra = [(f"<extra_id_{number}>", 0.0) for number in range(9, -1, -1)]
    tokenizer = T5Tokenizer(vocab=[(name, 0.0) for name in ("<pad>", "</s>", "<unk>")] + pieces() + extra, extra_ids=10)
    config = T5Config(
        vocab_size=len(tokenizer) + 6, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, initializer_factor=3.0,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0,
    )  # fmt: skip
    torch.manual_seed(3)
    models = {
        "mbart": (mbart(tagged, tagged.convert_tokens_to_ids("en_XX")), tagged),
        "t5": (T5ForConditionalGeneration(config).eval(), tokenizer),
    }
    models["t5"][0].shared.weight.data[len(tokenizer) - 10 :] *= 0.05  # trained models do not choose them
    for name, (model, own) in models.items():
        masks = nspec.NeuronMasks({"de-en": {block.name: torch.arange(24) % 3 > 0 for block in find_blocks(model)}})
        nspec.specialize(model, masks)
        nspec.set_task(model, "de-en")
        out = nspec.export(model, "de-en", tmp_path / name, "ctranslate2", tokenizer=own)
        text = (out / "README.md").read_text(encoding="utf-8").partition("```python\n")[2].partition("```")[0]
        said = set()
        for line in lines(6):
            code = text.replace('folder = "."', f"folder = {str(out)!r}").replace("A text", line)
            exec(code.replace("max_decoding_length=50", "max_decoding_length=8, beam_size=1"), {})
            ids = model.generate(**own(line, return_tensors="pt"), num_beams=1, do_sample=False, max_new_tokens=8)
            assert capsys.readouterr().out.strip() == own.decode(ids[0], skip_special_tokens=True).strip()
            said.add(tuple(ids[0].tolist()))
        assert len(said) > 3


def test_a_marian_whose_decoder_starts_from_something_else_than_zeros_is_refused(tmp_path: Path) -> None:
    model, tokenizer = load_system(marian(tmp_path / "model", []))
    with torch.no_grad():
        model.get_input_embeddings().weight[model.config.pad_token_id] = 1
    with pytest.raises(ValueError, match="the embedding of <pad>, which starts Marian's decoder, is not zero"):
        converter.convert(model, tokenizer, tmp_path / "out", names=["a"])


def test_the_model_is_left_as_it_was(m2m100: Path, tmp_path: Path) -> None:
    model, tokenizer = load_system(m2m100)
    before, config = copy.deepcopy(model.state_dict()), model.config.to_dict()
    names = converter.row_names(model, tokenizer, token_ids(tokenizer))
    converter.convert(model, tokenizer, tmp_path / "out", names=names, quantization="int8")
    assert model.config.to_dict() == config
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert converter.load(tmp_path / "out", threads=1).compute_type.startswith("int8")


def test_what_cannot_be_converted_is_one_error(m2m100: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = load_system(m2m100)
    with pytest.raises(ValueError, match="quantization is 'int3'; expected one of int8, "):
        converter.convert(model, tokenizer, tmp_path / "out", quantization="int3")
    twice: Any = type("Twice", (), {"convert_ids_to_tokens": lambda self, rows: ["a"] * len(rows)})()
    with pytest.raises(ValueError, match="the token 'a' twice"):
        converter.row_names(model, twice, [0, 1])
    model.config.activation_function = "mish"
    with pytest.raises(ValueError, match="does not convert this M2M100ForConditionalGeneration: 'mish'"):
        converter.convert(model, tokenizer, tmp_path / "out", names=["a"])
    monkeypatch.setattr(converter, "why_not", lambda: "ctranslate2 is not installed")
    with pytest.raises(ImportError, match="ctranslate2 is not installed"):
        converter.convert(model, tokenizer, tmp_path / "out")
    assert not (tmp_path / "out").exists()

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from toy_translation import Toy
from transformers import M2M100Config, M2M100ForConditionalGeneration, M2M100Tokenizer

from nspec.files import write_json
from nspec.mt.config import ModelConfig
from nspec.mt.language_tags import language_id
from nspec.mt.model import build_model, load_system, save_system
from nspec.mt.scoring.config import DecodeConfig
from nspec.mt.scoring.translate import Translator
from nspec.mt.text.config import TokenizerConfig
from nspec.mt.text.tokenizer_fit import RECORD, check_same, token_ids
from nspec.mt.text.vocabulary import encode, export_tokenizer, load_tokenizer, train_sentencepiece

pytestmark = pytest.mark.usefixtures("one_thread")

Change = Callable[[dict[str, Any]], Any]


@pytest.fixture
def folder(toy: Toy, tmp_path: Path) -> Path:
    """A whole model folder, which a test breaks."""
    save_system(toy.model(), toy.data.tokenizer, tmp_path / "model")
    return tmp_path / "model"


def change(file: Path, how: Change) -> None:
    described = json.loads(file.read_text())
    how(described)
    file.write_text(json.dumps(described))


def refused(toy: Toy, folder: Path, message: str) -> None:
    """Both by what translates and by what trains, in one line with the folder."""
    for load in (load_system, lambda place: build_model(ModelConfig(pretrained=str(place)), toy.data.tokenizer, 1)):
        with pytest.raises(ValueError, match=message) as caught:
            load(folder)
        assert str(folder) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_the_record_is_one_that_sha256sum_checks(folder: Path) -> None:
    names = [line.split("  ")[1] for line in (folder / RECORD).read_text().splitlines()]
    assert names == ["tokenizer.json", "tokenizer_config.json"]
    assert subprocess.run(["sha256sum", "-c", RECORD], cwd=folder, capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("recorded", [True, False], ids=["record", "no record"])
def test_a_whole_folder_loads_with_its_record_and_without(toy: Toy, folder: Path, recorded: bool) -> None:
    if not recorded:  # as older versions wrote it
        (folder / RECORD).unlink()
    assert load_system(folder)[1].get_vocab() == toy.data.tokenizer.get_vocab()
    build_model(ModelConfig(pretrained=str(folder)), toy.data.tokenizer, 1)


def far(described: dict[str, Any]) -> None:
    described["model"]["vocab"]["far"] = 5000


def other_eos(described: dict[str, Any]) -> None:
    described["eos_token"] = "<s>"


def no_pad(described: dict[str, Any]) -> None:
    described["pad_token"] = None


def no_merges(described: dict[str, Any]) -> None:
    described["model"]["merges"] = []


def last_merge(described: dict[str, Any]) -> None:
    described["model"]["merges"] = described["model"]["merges"][:-1]


@pytest.mark.parametrize(
    ("file", "how", "message"),
    [
        ("tokenizer.json", far, "vocabulary of 72 and the tokenizer beside it one of 5001"),
        ("tokenizer.json", no_merges, "has no merges, by which its pieces such as '▁.' are made"),
        (
            "tokenizer_config.json",
            other_eos,
            r"eos_token_id 2, but the eos_token of the tokenizer is <s> with id 0|writes",
        ),
        ("tokenizer_config.json", no_pad, "has no pad_token"),
        ("tokenizer.json", last_merge, ""),
    ],
    ids=["far", "no merges", "eos", "pad", "a merge less"],
)
def test_a_tokenizer_that_was_changed_is_an_error(toy: Toy, folder: Path, file: str, how: Change, message: str) -> None:
    change(folder / file, how)
    refused(toy, folder, rf"{file} is not the one that was saved with the model")
    (folder / RECORD).unlink()
    if message:
        refused(toy, folder, message)


def test_a_folder_without_the_files_of_a_tokenizer_is_an_error(toy: Toy, folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    refused(toy, folder, r"has no tokenizer: neither tokenizer.json nor sentencepiece.bpe.model is there")


@pytest.mark.parametrize("languages", [["en", "de"], ["en", "de", *(f"x{chr(97 + i)}" for i in range(26))]])
def test_a_tokenizer_of_another_vocabulary_is_an_error(toy: Toy, folder: Path, languages: list[str]) -> None:
    model = train_sentencepiece(["a b c d e f g"] * 9, TokenizerConfig(vocab_size=12))
    export_tokenizer(model, languages, folder)
    refused(toy, folder, "tokenizer.json is not the one that was saved with the model")
    (folder / RECORD).unlink()
    refused(toy, folder, rf"vocabulary of 72 and the tokenizer beside it one of {13 + len(languages)}; .*another model")


@pytest.mark.parametrize("text", ["", "5  tokenizer.json", f"{'0' * 64}  ../tokenizer.json"])
def test_a_broken_record_is_an_error(folder: Path, text: str) -> None:
    (folder / RECORD).write_text(text)
    with pytest.raises(ValueError, match=rf"{RECORD} has a line .*, expected a SHA-256 and a file"):
        load_system(folder)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "decoder_start_token_id",
            99999,
            "the eos_token of the tokenizer, which starts the decoder, is </s> with id 2",
        ),
        ("decoder_start_token_id", -1, "the eos_token"),
        ("pad_token_id", None, "but the pad_token of the tokenizer is <pad> with id 1"),
        ("pad_token_id", 2, "the pad_token"),
        ("pad_token_id", -1, "the pad_token"),
        ("eos_token_id", 1, "the eos_token"),
        ("bos_token_id", 7, "the bos_token"),
        ("max_position_embeddings", 0, "expected 4 or more"),
        ("max_position_embeddings", 3, "expected 4 or more"),
        ("is_encoder_decoder", False, "expected a model of encoder and decoder"),
    ],
)
def test_a_configuration_that_cannot_work_is_an_error_with_its_key(
    toy: Toy, folder: Path, key: str, value: Any, message: str
) -> None:
    change(folder / "config.json", lambda described: described.update({key: value}))
    shown = "null" if value is None else str(value).lower()
    refused(toy, folder, rf"config.json says {key} {shown}.*{message}")


def test_generation_settings_must_mean_the_same_ids(toy: Toy, folder: Path) -> None:
    change(folder / "generation_config.json", lambda described: described.update(eos_token_id=[7, 8]))
    refused(toy, folder, r"generation_config.json says eos_token_id \[7, 8\], but the eos_token")
    change(folder / "generation_config.json", lambda described: described.update(eos_token_id=[2, 8]))
    load_system(folder)


def test_results_come_by_name_whatever_the_configuration_says(toy: Toy, folder: Path) -> None:
    expected = list(Translator(*load_system(folder), DecodeConfig(beam=2)).translate(["a b"], "en-de"))
    change(folder / "config.json", lambda described: described.update(return_dict=False))
    assert list(Translator(*load_system(folder), DecodeConfig(beam=2)).translate(["a b"], "en-de")) == expected


def test_text_of_another_vocabulary_is_an_error(toy: Toy, tmp_path: Path) -> None:
    export_tokenizer(train_sentencepiece(["a b c"] * 9, TokenizerConfig(vocab_size=9)), ["en", "de"], tmp_path)
    other = load_tokenizer(tmp_path)
    check_same(other, load_tokenizer(tmp_path), "there")
    with pytest.raises(ValueError, match=r"prepared with a vocabulary of \d+ tokens .* of model.pretrained there"):
        check_same(toy.data.tokenizer, other, "there")


# Tags that the length of a tokenizer does not count


@pytest.fixture
def m2m100(tmp_path: Path) -> Path:
    """A model folder as plain transformers writes it, whose tags are no special tokens."""
    proto = train_sentencepiece(["haus mann frau kind see rot blau gross klein"] * 9, TokenizerConfig(vocab_size=40))
    (tmp_path / "m.model").write_bytes(proto)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=proto)
    write_json(tmp_path / "vocab.json", {pieces.id_to_piece(index): index for index in range(len(pieces))})
    M2M100Tokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "m.model")).save_pretrained(tmp_path / "model")
    config = M2M100Config(
        vocab_size=144, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=32,
    )  # fmt: skip
    M2M100ForConditionalGeneration(config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("beam", [1, 3])
def test_language_tags_beyond_the_pieces_are_forced_and_never_come_out(m2m100: Path, beam: int) -> None:
    model, tokenizer = load_system(m2m100)
    assert token_ids(tokenizer) == list(range(140))
    tag = language_id(tokenizer, "en")
    assert tag >= len(tokenizer)
    word = encode(tokenizer, ["haus"])[0][-1]
    bias = torch.zeros(144)
    bias[140:], bias[word] = 2e4, 1e4  # rows that nothing stands for, and a word
    model.lm_head.bias = torch.nn.Parameter(bias)
    (out,) = Translator(model, tokenizer, DecodeConfig(beam=beam)).translate(["mann frau"], "de-en")
    piece = tokenizer.convert_ids_to_tokens(word).replace("▁", "")
    assert out.replace(" ", "").replace(piece, "") == ""
    assert piece in out
    assert build_model(ModelConfig(pretrained=str(m2m100)), tokenizer, 1).config.vocab_size == 144

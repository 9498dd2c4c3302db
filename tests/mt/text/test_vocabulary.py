"""The vocabulary: the same ids as SentencePiece, in a folder that plain transformers loads."""

from __future__ import annotations

import gzip
import random
import shutil
from pathlib import Path

import pytest
import sentencepiece
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    M2M100Config,
    M2M100ForConditionalGeneration,
    M2M100Tokenizer,
    NllbTokenizer,
)

from nspec.files import write_json
from nspec.mt.language_tags import language_id, language_tag, tag
from nspec.mt.text import vocabulary
from nspec.mt.text.config import TokenizerConfig
from nspec.mt.text.corpus.base import clean
from nspec.mt.text.frame import Frame

DATA = Path(__file__).resolve().parents[3].parent / "shared" / "data"
LANGUAGES = ["de", "en", "kn", "mt", "ti"]  # three of them are in no fixed list of transformers

ALPHABETS = {
    "de": "abcdefghijklmnoprstuvwzäöüß",
    "en": "abcdefghijklmnoprstuvwyz",
    "kn": "ಅಆಇಈಉಊಎಏಒಓಕಖಗಘಚಜಟಡತದನಪಬಮಯರಲವಶಸಹ",
    "mt": "abċdefġghħijklmnopqrstuvwxżz",
    "ti": "ሀለመረሰሸቀበተኀነአከወዐዘየደገጠጸፈ",
}


def sentences(language: str, count: int, seed: int = 0) -> list[str]:
    """Sentences over a fixed small lexicon, with numbers and punctuation."""
    rng = random.Random(f"{language} {seed}")
    lexicon = ["".join(rng.choices(ALPHABETS[language], k=rng.randint(1, 8))) for _ in range(80)]
    return [
        " ".join([*rng.choices(lexicon, k=rng.randint(1, 9)), f"{rng.randint(0, 2024)}{rng.choice('.!?')}"])
        for _ in range(count)
    ]


TEXT = [line for language in LANGUAGES for line in sentences(language, 150)]


@pytest.fixture(scope="module")
def model() -> bytes:
    return vocabulary.train_sentencepiece(TEXT, TokenizerConfig(vocab_size=700))


@pytest.fixture(scope="module")
def folder(model: bytes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    vocabulary.export_tokenizer(model, LANGUAGES, folder, max_length=64)
    return folder


@pytest.fixture(scope="module")
def pieces(model: bytes) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=model)


@pytest.fixture(scope="module")
def untouched(folder: Path):
    """The tokenizer, for tests that set nothing on it."""
    return AutoTokenizer.from_pretrained(folder)


def plain_ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


# Training


def test_the_same_sentences_give_the_same_bytes(model):
    assert vocabulary.train_sentencepiece(TEXT, TokenizerConfig(vocab_size=700)) == model


def test_special_tokens_have_the_ids_of_m2m100(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    special = [tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id]
    assert special == [0, 1, 2, 3]
    tags = [tokenizer.convert_tokens_to_ids(f"__{language}__") for language in LANGUAGES]
    assert tags == [700, 701, 702, 703, 704]
    assert len(tokenizer) == 706  # and <mask>, which the class insists on


def test_a_digit_is_always_a_piece_of_its_own(pieces):
    numbers = [
        pieces.id_to_piece(index)
        for index in range(pieces.get_piece_size())
        if any(c.isdigit() for c in pieces.id_to_piece(index))
    ]
    assert numbers
    assert all(len(piece.lstrip("▁")) == 1 for piece in numbers)


def test_too_large_a_vocabulary_says_how_large_it_may_be_and_that_size_works():
    with pytest.raises(ValueError, match=r"tokenizer\.vocab_size is 90000, .* supports no more than (\d+)") as caught:
        vocabulary.train_sentencepiece(TEXT, TokenizerConfig(vocab_size=90000))
    most = int(str(caught.value).split("no more than ")[1].split()[0])
    proto = vocabulary.train_sentencepiece(TEXT, TokenizerConfig(vocab_size=most))
    assert sentencepiece.SentencePieceProcessor(model_proto=proto).get_piece_size() == most


def test_too_small_a_vocabulary_says_how_many_characters_there_are():
    with pytest.raises(ValueError, match=r"tokenizer\.vocab_size is 20, .* need \d+ pieces"):
        vocabulary.train_sentencepiece(TEXT, TokenizerConfig(vocab_size=20))


def test_no_text_is_an_error():
    with pytest.raises(ValueError, match="no text"):
        vocabulary.train_sentencepiece([], TokenizerConfig(vocab_size=100))


def test_a_long_line_is_not_left_out_of_the_training():
    text = [*TEXT, " ".join(["zyzzyva"] * 2000)]
    proto = vocabulary.train_sentencepiece(text, TokenizerConfig(vocab_size=700))
    assert len(sentencepiece.SentencePieceProcessor(model_proto=proto).encode("zyzzyva")) == 1


@pytest.mark.parametrize("sign", ["\u2585", "\0", "\u2047", "<s>", "</s>", "<unk>", "\ufffd", "\x85", "\u2028"])
def test_a_line_with_a_sign_of_sentencepiece_takes_part_in_the_training(sign):
    text = ["ab ba"] * 9 + [f"zz {sign} zz"] * 9
    model = vocabulary.train_sentencepiece(
        text, TokenizerConfig(vocab_size=9 if len(sign) == 1 and sign.isprintable() else 8)
    )
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert pieces.unk_id() not in pieces.encode("zz ab")


def test_unknown_characters_are_those_that_a_text_loses(untouched):
    text = "abc äß Ж🙂 \u2585 1 \u2581\u00a0\u0301 漢 ħ"
    lost = vocabulary.unknown_characters(untouched, sorted(set(text)))
    assert lost == {"Ж", "🙂", "\u2585", "\u0301", "漢"}
    assert untouched.unk_token_id not in vocabulary.encode(untouched, ["".join(c for c in text if c not in lost)])[0]
    assert vocabulary.unknown_characters(untouched, []) == set()


# Sampling of languages


def test_quotas_are_in_proportion_at_temperature_one_and_even_at_a_high_one():
    counts = {"aa": 900, "bb": 90, "cc": 10}
    assert vocabulary.quotas(counts, 1.0, 100) == {"aa": 90, "bb": 9, "cc": 1}
    assert set(vocabulary.quotas(counts, 1e9, 300).values()) == {100}
    assert vocabulary.quotas(counts, 2.0, 1000)["cc"] == round(1000 * 10**0.5 / (900**0.5 + 90**0.5 + 10**0.5))


def test_a_small_language_is_repeated_evenly_and_a_large_one_sampled_without_repetition():
    text = {"aa": [f"a{i}" for i in range(900)], "bb": [f"b{i}" for i in range(20)]}
    counts = {language: len(lines) for language, lines in text.items()}

    def draw(seed: int) -> list[str]:
        return list(vocabulary.sampled(text.__getitem__, counts, 1e9, 100, seed))

    drawn = draw(1)
    large = [line for line in drawn if line[0] == "a"]
    small = [line for line in drawn if line[0] == "b"]
    assert len(large) == len(set(large)) == len(small) == 50
    assert {small.count(line) for line in text["bb"]} == {2, 3}
    assert drawn == draw(1)
    assert drawn != draw(2)


# The exported tokenizer against SentencePiece


def test_all_training_text_has_the_ids_of_sentencepiece(folder, pieces):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer(TEXT, add_special_tokens=False)["input_ids"] == pieces.encode(TEXT)
    assert vocabulary.encode(tokenizer, TEXT) == pieces.encode(TEXT)


@pytest.mark.parametrize(
    "text",
    [
        "two  spaces",
        "  leading spaces",
        "tab\tand\nnewline\r\nand no\u00a0break and\u2009thin and\u3000wide",
        "unknown Ω and 漢字 漢字漢字 in between",
        "emoji 😀😀 👩‍👩‍👧 🇩🇪 at the end 😀",
        "שלום עולם مرحبا ٣٤",
        "1234567890 12,5 % 3.14",
        "</s> <s> <pad> <unk> <mask> literally",
        "__de__ en de __en__ x__en__y </s>",
        "sign ▁ of a ▁▁space▁",
        "▁first",
        "combi\u0301ning ma\u0308rks",
        "zero\u200bwidth\u200djoiner\ufeff",
        "aaaaaaaaaaaaaaaa ........ !!!!!!! -----",
        "\U0001f600",
        "x",
        "",
        "   ",
    ],
)
def test_awkward_text_has_the_ids_of_sentencepiece(untouched, pieces, text):
    assert vocabulary.encode(untouched, [text]) == [pieces.encode(clean(text))]
    # Plain transformers too, where no white space is at the end.
    if text == text.rstrip(" \n▁"):
        assert plain_ids(untouched, text) == pieces.encode(text)


def test_white_space_at_the_end_is_one_more_piece_in_plain_transformers_and_none_in_encode(folder, pieces):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert plain_ids(tokenizer, "hab ") == [*pieces.encode("hab "), pieces.piece_to_id("▁")]
    assert vocabulary.encode(tokenizer, ["hab "]) == [pieces.encode("hab")]


@settings(max_examples=400, deadline=None)
@given(st.lists(st.sampled_from([*"aenirt.-12äħ ", "  ", "አለ", "ಕ", "</s>", "en", "__en__", "😀", "\u0301", "中"])))
def test_any_mixture_has_the_ids_of_sentencepiece(untouched, pieces, parts):
    text = clean("".join(parts))
    assert vocabulary.encode(untouched, [text]) == [pieces.encode(text)]
    assert plain_ids(untouched, text) == pieces.encode(text)


@pytest.mark.skipif(not (DATA / "wiki-i18n").is_dir(), reason="../shared/data/wiki-i18n is not there")
def test_real_text_in_31_languages_has_the_ids_of_sentencepiece(tmp_path):
    lines = []
    for path in sorted((DATA / "wiki-i18n").glob("*.tsv.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as file:
            lines += [line.rstrip("\n").split("\t", 1)[1] for _, line in zip(range(400), file)]
    proto = vocabulary.train_sentencepiece(map(clean, lines), TokenizerConfig(vocab_size=4000))
    vocabulary.export_tokenizer(proto, ["en"], tmp_path)
    expected = sentencepiece.SentencePieceProcessor(model_proto=proto).encode([clean(line) for line in lines])
    assert vocabulary.encode(AutoTokenizer.from_pretrained(tmp_path), lines) == expected


def test_text_survives_encoding_and_decoding(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text in TEXT[::37]:
        tokenizer.src_lang = "__ti__"
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


# As a transformers tokenizer


def test_source_and_target_tags_stand_where_transformers_puts_them(folder, pieces):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert isinstance(tokenizer, NllbTokenizer)
    for source, target in [("kn", "mt"), ("ti", "en")]:
        tokenizer.src_lang, tokenizer.tgt_lang = tag(source), tag(target)
        batch = tokenizer(TEXT[0], text_target=TEXT[200])
        ids = {language: language_id(tokenizer, language) for language in LANGUAGES}
        assert batch["input_ids"] == [ids[source], *pieces.encode(TEXT[0]), 2]
        assert batch["labels"] == [ids[target], *pieces.encode(TEXT[200]), 2]
        frame = Frame.of(tokenizer, [f"{source}-{target}"])
        sides = [vocabulary.encode(tokenizer, [TEXT[number]])[0] for number in (0, 200)]
        framed = frame.framed(f"{source}-{target}", sides)
        assert [ids.tolist() for ids in framed] == [batch["input_ids"], batch["labels"]]


def test_saving_and_loading_again_changes_nothing(folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.src_lang = "__ti__"
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again.src_lang == "__ti__"
    assert again("</s>  x __en__").input_ids == tokenizer("</s>  x __en__").input_ids


def test_a_piece_spelled_like_a_language_code_is_no_tag(folder, pieces):
    tokenizer = vocabulary.load_tokenizer(folder)
    assert pieces.piece_to_id("a") > 3
    with pytest.raises(ValueError, match="no tag for the language 'a'; it has de, en, kn, mt, ti"):
        language_id(tokenizer, "a")


def test_no_piece_can_be_a_tag():
    text = ["b__xx__ c__xx__ d__xx__ __xx__"] * 400  # without the split between scripts this would give a piece __xx__
    proto = vocabulary.train_sentencepiece([*TEXT, *text], TokenizerConfig(vocab_size=700))
    assert sentencepiece.SentencePieceProcessor(model_proto=proto).piece_to_id("__xx__") == 3


def test_model_and_tokenizer_load_from_one_folder_and_generate_with_the_tag(folder, tmp_path):
    torch.manual_seed(0)
    tokenizer = vocabulary.load_tokenizer(folder)
    sizes = {f"{side}_{name}": 32 for side in ("encoder", "decoder") for name in ("ffn_dim",)}
    config = M2M100Config(
        vocab_size=len(tokenizer),
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        max_position_embeddings=64,
        **sizes,
    )
    M2M100ForConditionalGeneration(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(model, M2M100ForConditionalGeneration)
    assert isinstance(tokenizer, NllbTokenizer)
    tokenizer.src_lang = "__en__"
    forced = tokenizer.convert_tokens_to_ids("__ti__")
    out = model.generate(
        **tokenizer(TEXT[:2], return_tensors="pt", padding=True),
        forced_bos_token_id=forced,
        max_new_tokens=4,
        num_beams=2,
    )
    assert out[:, 0].tolist() == [2, 2]
    assert out[:, 1].tolist() == [forced, forced]


# Tokenizers of pretrained models


@pytest.mark.parametrize("listed", [True, False], ids=["tags listed as on the hub", "tags not listed"])
def test_m2m100_tags_are_found(model, tmp_path, listed):
    (tmp_path / "sentencepiece.bpe.model").write_bytes(model)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    vocab = {pieces.id_to_piece(index): index for index in range(pieces.get_piece_size())}
    write_json(tmp_path / "vocab.json", vocab)
    tokenizer = M2M100Tokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "sentencepiece.bpe.model"))
    tags = list(tokenizer.lang_code_to_token.values())
    settings = {"tokenizer_class": "M2M100Tokenizer"} | ({"additional_special_tokens": tags} if listed else {})
    write_json(tmp_path / "tokenizer_config.json", settings)
    tokenizer = vocabulary.load_tokenizer(tmp_path)
    assert type(tokenizer) is M2M100Tokenizer
    assert language_tag(tokenizer, "de") == "__de__"
    tokenizer.src_lang = "de"
    own = tokenizer(TEXT[0]).input_ids
    assert own == [language_id(tokenizer, "de"), *vocabulary.encode(tokenizer, [TEXT[0]])[0], tokenizer.eos_token_id]
    assert vocabulary.encode(tokenizer, ["a </s> __de__ b"]) == [pieces.encode("a </s> __de__ b")]
    with pytest.raises(ValueError, match="no tag for the language 'mt'; it has af, am, ar, ast, "):
        language_id(tokenizer, "mt")


@pytest.mark.parametrize(
    ("tags", "language", "expected"),
    [
        (["deu_Latn", "eng_Latn", "tir_Ethi"], "de", "deu_Latn"),
        (["deu_Latn", "eng_Latn", "tir_Ethi"], "ti", "tir_Ethi"),
        (["deu_Latn", "eng_Latn", "tir_Ethi"], "eng_Latn", "eng_Latn"),
        (["de_DE", "en_XX", "pt_XX"], "de", "de_DE"),
        (["de_DE", "en_XX", "pt_XX"], "en", "en_XX"),
    ],
)
def test_tags_of_nllb_and_mbart_are_found_by_two_letter_codes(tags, language, expected):
    tokenizer = NllbTokenizer(extra_special_tokens=tags, src_lang=tags[0])
    assert language_tag(tokenizer, language) == expected
    assert language_id(tokenizer, language) == tokenizer.convert_tokens_to_ids(expected)


def test_a_tokenizer_that_puts_the_tag_last_is_refused(folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(folder, legacy_behaviour=True)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="expected the language tag first"):
        vocabulary.load_tokenizer(tmp_path)


def test_a_folder_without_a_tokenizer_is_one_clear_line(tmp_path):
    with pytest.raises(ValueError, match="no tokenizer can be loaded from") as caught:
        vocabulary.load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_the_hash_of_a_tokenizer_sees_every_file(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    assert vocabulary.folder_sha256(copy) == vocabulary.folder_sha256(folder)
    path = copy / "tokenizer_config.json"
    path.write_text(path.read_text("utf-8").replace("__de__", "__dx__"), encoding="utf-8")
    assert vocabulary.folder_sha256(copy) != vocabulary.folder_sha256(folder)

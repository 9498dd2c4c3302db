"""Runs that start from pretrained models whose activation is not ReLU."""

from __future__ import annotations

import io
import json
import random
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from marian_folder import write_model, write_tokenizer
from transformers import (
    M2M100Config,
    M2M100ForConditionalGeneration,
    MBart50Tokenizer,
    MBartConfig,
    MBartForConditionalGeneration,
)

import nspec
from nspec import cli
from nspec.mt.text.config import TokenizerConfig
from nspec.mt.text.tokenizer_fit import rows_of
from nspec.mt.text.vocabulary import export_tokenizer, load_tokenizer, train_sentencepiece

WORDS = {"de": "haus mann frau kind rot blau gross klein sieht hat"}
WORDS |= {"en": "house man woman child red blue big small sees has"}
SIZES = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
SIZES |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 64}
CONFIG = """
run: {folder: %s, threads: 1, systems: [dense, forward, update]}
corpus: {type: files, path: %s, languages: [de, en], directions: %s, max_tokens: 40}
model: {pretrained: %s}
train: &training {updates: 4, batch_tokens: 128, lr: 3e-3, warmup: 1, valid_every: 2, log_every: 1}
specialize: {<<: *training, updates: 2}
decode: {beam: 2, max_length_ratio: 1.0}
score: {bootstrap: 40}
"""


def text(folder: Path) -> dict[str, list[str]]:
    """Writes a tiny corpus in ``folder``; all lines of each language."""
    draw, lines = random.Random(1), defaultdict(list)
    for split, count in (("train", 60), ("valid", 6), ("test", 4)):
        chosen = [[draw.randrange(10) for _ in range(6)] for _ in range(count)]
        for language, words in WORDS.items():
            side = [" ".join(words.split()[number] for number in sentence) for sentence in chosen]
            (folder / f"{split}.de-en.{language}").write_text("\n".join(side) + "\n", encoding="utf-8")
            lines[language] += side
    return lines


def mbart(folder: Path, lines: dict[str, list[str]]) -> None:
    """GELU, the Unigram vocabulary and tags of mBART-50."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*lines["de"], *lines["en"]]), model_writer=model, model_type="unigram", vocab_size=40,
        hard_vocab_limit=False, minloglevel=2, num_threads=1,
    )  # fmt: skip
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    scored = [(pieces.id_to_piece(index), pieces.get_score(index)) for index in range(3, len(pieces))]
    tokenizer = MBart50Tokenizer(vocab=[(one, 0.0) for one in ("<s>", "<pad>", "</s>", "<unk>")] + scored)
    tokenizer.save_pretrained(folder)
    MBartForConditionalGeneration(MBartConfig(vocab_size=len(tokenizer), **SIZES)).save_pretrained(folder)


def m2m100(folder: Path, lines: dict[str, list[str]]) -> None:
    """SiLU, and a vocabulary as nspec makes them."""
    export_tokenizer(
        train_sentencepiece([*lines["de"], *lines["en"]], TokenizerConfig(vocab_size=60)), ["de", "en"], folder
    )
    config = M2M100Config(vocab_size=rows_of(load_tokenizer(folder)), activation_function="silu", **SIZES)
    M2M100ForConditionalGeneration(config).save_pretrained(folder)


def opus_mt(folder: Path, lines: dict[str, list[str]]) -> None:
    """Swish, Marian's two ways of spelling, and one target language."""
    write_model(folder, write_tokenizer(folder, lines["de"], lines["en"], [], source_lang="de", target_lang="en"))


def opus_mt_of_several(folder: Path, lines: dict[str, list[str]]) -> None:
    """Swish, and a token for the target language before the source."""
    both = [*lines["de"], *lines["en"]]
    write_model(folder, write_tokenizer(folder, both, both, [">>deu<<", ">>eng<<"], source_lang="mul"))


@pytest.mark.parametrize(
    ("make", "activation", "tasks"),
    [
        (mbart, "gelu", ["de-en", "en-de"]),
        (m2m100, "silu", ["de-en", "en-de"]),
        (opus_mt, "swish", ["de-en"]),
        (opus_mt_of_several, "swish", ["de-en", "en-de"]),
    ],
)
def test_a_run_from_a_model_of_another_activation(
    make: Any, activation: str, tasks: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, model, run = tmp_path / "data", tmp_path / "model", tmp_path / "run"
    data.mkdir()
    make(model, text(data))
    assert json.loads((model / "config.json").read_text())["activation_function"] == activation
    config = tmp_path / "my.yaml"
    config.write_text(CONFIG % (run, data, tasks, model), encoding="utf-8")
    assert cli.main(["run", str(config)]) == 0

    masks = nspec.NeuronMasks.load(run / "masks")
    assert len(masks.layers) == 2
    assert sorted(masks.tasks) == tasks
    trained = json.loads((run / "systems/forward/model/config.json").read_text())
    assert trained["activation_function"] == activation
    assert json.loads((run / "systems/forward/summary.json").read_text())["updates"] == 2
    assert (run / "report" / "index.html").is_file()

    (tmp_path / "lines.txt").write_text("haus mann\n\nfrau kind\n", encoding="utf-8")
    capsys.readouterr()
    command = ["translate", "--run", str(run), "--system", "forward", "--task", "de-en", "--input"]
    assert cli.main([*command, str(tmp_path / "lines.txt")]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3

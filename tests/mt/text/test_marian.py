"""Marian's models, OPUS-MT, against plain ``MarianMTModel`` and ``MarianTokenizer``."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from marian_folder import spm, write_model, write_tokenizer
from toy_translation import text_options
from transformers import AutoTokenizer, MarianMTModel

import nspec
from nspec.files import write_json
from nspec.mt.config import ModelConfig, ProfileConfig
from nspec.mt.languages import languages_of_task
from nspec.mt.model import build_model, load_system, save_system
from nspec.mt.model_files import load_dense, load_weights
from nspec.mt.profiling import profile_tasks
from nspec.mt.scoring.config import DecodeConfig
from nspec.mt.scoring.translate import Translator
from nspec.mt.text.batches import evaluation_batches
from nspec.mt.text.collate import collate
from nspec.mt.text.other import OtherText
from nspec.mt.text.prepare import prepare
from nspec.mt.text.prepared import Examples, PreparedData
from nspec.mt.text.tokenizer_fit import check_same
from nspec.mt.text.vocabulary import encode, load_tokenizer
from nspec.mt.training.config import TrainConfig
from nspec.mt.training.validation import Validator
from nspec.run.config import Config

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Recommended. pip install sacremoses"),
]

WORDS = {"de": "haus mann frau kind rot blau gross klein sieht hat"}
WORDS |= {"en": "house man woman child red blue big small sees has"}
WORDS |= {"fr": "maison homme femme enfant rouge bleu grand petit voit a"}
TOKENS = {code: f">>{name}<<" for code, name in (("de", "deu"), ("en", "eng"), ("fr", "fra"))}


@dataclass
class Run:
    """Prepared text, the folder of the model that it is prepared for, and what is asked of it."""

    model: Path
    config: Config
    data: PreparedData
    tokens: dict[str, str]

    def plain(self) -> tuple[MarianMTModel, Any]:
        """The model and the tokenizer of ``transformers`` alone."""
        return MarianMTModel.from_pretrained(self.model).eval(), AutoTokenizer.from_pretrained(self.model)

    def texts(self, task: str, split: str) -> tuple[list[str], list[str]]:
        """Sources, as a user of ``transformers`` writes them, and targets."""
        sources, targets = self.data.text(split, task)
        token = self.tokens.get(languages_of_task(task)[1], "")
        return [f"{token} {source}".strip() for source in sources], targets


def write_text(folder: Path) -> dict[str, list[str]]:
    """Writes a tiny corpus of de-en and en-fr; all lines of each language."""
    draw, lines = random.Random(1), {code: [] for code in WORDS}
    folder.mkdir(parents=True)
    for pair in ("de-en", "en-fr"):
        for split, count in (("train", 60), ("valid", 9), ("test", 4)):
            chosen = [[draw.randrange(10) for _ in range(draw.randint(2, 8))] for _ in range(count)]
            for code in pair.split("-"):
                side = [" ".join(WORDS[code].split()[number] for number in sentence) for sentence in chosen]
                (folder / f"{split}.{pair}.{code}").write_text("\n".join(side) + "\n", encoding="utf-8")
                lines[code] += side
    return lines


def made(folder: Path, directions: list[str], tokens: dict[str, str], **settings: Any) -> Run:
    lines = write_text(folder / "data")
    sides = [[line for code in codes for line in lines[code]] for codes in zip(*map(languages_of_task, directions))]
    rows = write_tokenizer(folder / "model", *sides, tokens=[*tokens.values()], **settings)
    write_model(folder / "model", rows)
    config = Config()
    config.corpus.type, config.corpus.path, config.corpus.directions = "files", str(folder / "data"), directions
    config.corpus.languages = sorted({code for task in directions for code in languages_of_task(task)})
    config.model.pretrained = str(folder / "model")
    prepare(*text_options(config), folder / "prepared")
    return Run(folder / "model", config, PreparedData(folder / "prepared"), tokens)


@pytest.fixture(scope="module")
def bilingual(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return made(tmp_path_factory.mktemp("one"), ["de-en"], {}, source_lang="deu", target_lang="en")


@pytest.fixture(scope="module")
def multilingual(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return made(tmp_path_factory.mktemp("several"), ["de-en", "en-de", "en-fr"], TOKENS, source_lang="mul")


@pytest.fixture(params=["bilingual", "multilingual"])
def run(request: pytest.FixtureRequest) -> Run:
    found: Run = request.getfixturevalue(request.param)
    return found


def test_prepared_pairs_are_what_marians_tokenizer_makes_of_the_text(run: Run) -> None:
    _, tokenizer = run.plain()
    for task in run.data.tasks:
        sources, targets = run.texts(task, "valid")
        expected = tokenizer(sources, text_target=targets)
        lengths = run.data.lengths("valid", task)
        for index in range(len(sources)):
            pair = [ids.tolist() for ids in run.data.ids("valid", task, index)]
            assert pair == [expected["input_ids"][index], expected["labels"][index]]
            assert [len(ids) for ids in pair] == [side[index] for side in lengths]
    assert encode(tokenizer, targets, "source") != encode(tokenizer, targets, "target")  # so that a mix-up shows


def test_the_loss_is_that_of_plain_marian(run: Run) -> None:
    plain, tokenizer = run.plain()
    model = build_model(run.config.model, run.data.tokenizer, 1).eval()
    examples = Examples(run.data, "valid")
    for number, task in enumerate(run.data.tasks):
        batches = evaluation_batches(run.data, "valid", task, 4096)
        inputs = collate([examples[number, example] for batch in batches for example in batch])
        sources, targets = run.texts(task, "valid")
        theirs = tokenizer(sources, text_target=targets, return_tensors="pt", padding=True)
        labels = theirs.pop("labels")
        labels[labels == tokenizer.pad_token_id] = -100
        inputs.pop("task")
        with torch.no_grad():
            assert model(**inputs).loss.item() == pytest.approx(plain(**theirs, labels=labels).loss.item(), rel=1e-6)


def test_validation_and_profile_read_the_sentences_that_plain_marian_does(run: Run) -> None:
    plain, tokenizer = run.plain()
    settings, decode = TrainConfig(batch_tokens=96, valid_bleu_sentences=0), DecodeConfig()
    measured = Validator(
        build_model(run.config.model, run.data.tokenizer, 1), run.data, settings, decode, precision="fp32"
    )
    losses = measured.measure()["tasks"]
    counts = profile_tasks(plain, run.data, ProfileConfig(), 96)
    for task in run.data.tasks:
        singles = [tokenizer(s, text_target=t, return_tensors="pt") for s, t in zip(*run.texts(task, "valid"))]
        with torch.no_grad():
            words = [single["labels"].numel() for single in singles]
            total = sum(plain(**single).loss.item() * count for single, count in zip(singles, words))
        assert losses[task]["loss"] == pytest.approx(total / sum(words), rel=1e-5)
        one_by_one = nspec.profile(plain, {task: singles}, padding="include")
        assert counts.tokens[task] == one_by_one.tokens[task]
        for layer in counts.layers:
            assert counts[task][layer].tolist() == one_by_one[task][layer].tolist()


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("beam", [1, 3])
def test_translations_are_those_of_plain_marian(run: Run, beam: int, renormalize: bool) -> None:
    plain, tokenizer = run.plain()
    model = load_dense(run.model).eval()
    own = {"num_beams": beam, "early_stopping": beam > 1, "length_penalty": 1.0, "forced_eos_token_id": None}
    for each in (plain, model):
        each.generation_config.renormalize_logits = renormalize
        each.final_logits_bias[:, tokenizer.pad_token_id] = 9.0  # it would come everywhere
        each.final_logits_bias[:, 2 : 2 + len(run.tokens)] = -99.0  # the tokens of languages are no words
    translator = Translator(model, run.data.tokenizer, DecodeConfig(beam=beam))
    for task in run.data.tasks:
        marked, _ = run.texts(task, "valid")
        sources, _ = run.data.text("valid", task)
        found = list(translator.translate(sources, task))
        for source, text in zip(marked, found):
            batch = tokenizer([source], return_tensors="pt")
            limit = min(2 * batch["input_ids"].shape[1] + 10, 64)
            ids = plain.generate(**batch, max_length=1 + limit, **own)[0]
            assert text == tokenizer.decode(ids, skip_special_tokens=True, use_source_tokenizer=False).strip()
        assert any(found)


def test_what_a_translation_may_not_hold_by_the_folder_does_not_come(bilingual: Run) -> None:
    model, tokenizer = load_dense(bilingual.model).eval(), bilingual.data.tokenizer
    word = tokenizer.convert_tokens_to_ids("▁house")
    model.final_logits_bias[:, word] = 99.0
    translator = Translator(model, tokenizer, DecodeConfig(beam=1))
    assert "house" in next(translator.translate(["haus"], "de-en"))
    model.generation_config.bad_words_ids = [[word]]
    model.final_logits_bias[:, tokenizer.pad_token_id] = 98.0
    found = next(translator.translate(["haus"], "de-en"))
    assert found
    assert "house" not in found


def test_a_translation_is_read_as_a_target(bilingual: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(shutil.copytree(bilingual.model, tmp_path / "model"))
    (folder / "target.spm").write_bytes(spm(["a b a b"] * 9, 300, byte_fallback=True))
    pieces = ["▁a", "<0xD0>", "<0xB6>"]
    write_json(folder / "vocab.json", {piece: place for place, piece in enumerate(["</s>", "<unk>", *pieces, "<pad>"])})
    monkeypatch.setattr("nspec.mt.scoring.search.search", lambda *_: [[2, 3, 4]])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    translator = Translator(load_dense(bilingual.model), tokenizer, DecodeConfig(beam=1))
    assert list(translator.translate(["haus"], "de-en")) == ["aж"]


def test_rules_against_repetitions_begin_at_the_first_word(bilingual: Run) -> None:
    model, tokenizer = load_dense(bilingual.model).eval(), bilingual.data.tokenizer
    model.final_logits_bias[:, tokenizer.convert_tokens_to_ids("▁house")] = 99.0
    free, once = (
        next(Translator(model, tokenizer, DecodeConfig(beam=1, no_repeat_ngram_size=size)).translate(["rot"], "de-en"))
        for size in (0, 1)
    )
    assert free.startswith("house house house")
    assert once.split().count("house") == 1


def test_special_tokens_in_a_text_are_text(multilingual: Run) -> None:
    tokenizer = multilingual.data.tokenizer
    special = {*tokenizer.all_special_ids, *tokenizer.convert_tokens_to_ids(list(TOKENS.values()))}
    (ids,) = encode(tokenizer, [">>fra<< house </s> <pad>"], "source")
    assert set(ids) & special <= {tokenizer.unk_token_id}
    assert len(ids) > len(encode(tokenizer, ["house"], "source")[0])


def test_text_of_another_folder_gives_the_same_ids(multilingual: Run) -> None:
    config, data = Config(**vars(multilingual.config)), multilingual.data
    config.profile = type(config.profile)(path=config.corpus.path, path_split="valid")
    text = OtherText(config.profile, config.corpus, config.run.seed, data)
    for task in data.tasks:
        assert [side.tolist() for side in text.lengths("valid", task)] == [
            s.tolist() for s in data.lengths("valid", task)
        ]
        for index in range(text.size("valid", task)):
            two = [[ids.tolist() for ids in each.ids("valid", task, index)] for each in (text, data)]
            assert two[0] == two[1]


def test_a_system_comes_back_as_it_was_saved_and_its_positions_are_not_trained(bilingual: Run, tmp_path: Path) -> None:
    model = build_model(bilingual.config.model, bilingual.data.tokenizer, 1)
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen == ["model.encoder.embed_positions.weight", "model.decoder.embed_positions.weight"]
    save_system(model, bilingual.data.tokenizer, tmp_path / "system")
    again, tokenizer = load_system(tmp_path / "system")
    assert [*again.state_dict()] == [*model.state_dict()]
    other = MarianMTModel(model.config)
    load_weights(other, tmp_path / "system")
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
        assert torch.equal(value, other.state_dict()[name])
    check_same(tokenizer, bilingual.data.tokenizer, "there")


def test_folders_as_they_were_written_years_ago_are_taken(bilingual: Run, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bilingual.model, tmp_path / "old"))
    for name in ("model.safetensors", "generation_config.json"):
        (folder / name).unlink()
    plain, _ = bilingual.plain()
    torch.save(plain.state_dict(), folder / "pytorch_model.bin")  # positions and all names of the one table among them
    config = json.loads((folder / "config.json").read_text())
    pad = config["pad_token_id"]
    config |= {"bad_words_ids": [[pad]], "num_beams": 6, "max_length": 512, "add_bias_logits": False}
    write_json(folder / "config.json", config)
    model = build_model(ModelConfig(pretrained=str(folder)), bilingual.data.tokenizer, 1)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])
    save_system(model, bilingual.data.tokenizer, tmp_path / "system")
    load_system(tmp_path / "system")


# What cannot be served


def refused(run: Run, directions: list[str], folder: Path) -> str:
    """The message of a preparation of other directions."""
    config = Config(**vars(run.config))
    codes = sorted({code for task in directions for code in languages_of_task(task)})
    config.corpus = type(config.corpus)(
        type="files", path=run.config.corpus.path, languages=codes, directions=directions
    )
    with pytest.raises(ValueError, match="^model.pretrained ") as caught:
        prepare(*text_options(config), folder / "prepared")
    assert not (folder / "prepared").exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_directions_into_several_languages_need_tokens_that_say_which(bilingual: Run, tmp_path: Path) -> None:
    message = refused(bilingual, ["de-en", "en-de"], tmp_path)
    assert "no tokens such as >>fra<<" in message
    assert "de-en, en-de are into 2 (de, en); set corpus.directions" in message


def test_a_direction_of_other_languages_than_the_folders_is_named(bilingual: Run, tmp_path: Path) -> None:
    assert "does not translate en-fr: its tokenizer_config.json says source_lang deu" in refused(
        bilingual, ["en-fr"], tmp_path
    )
    translator = Translator(load_dense(bilingual.model), bilingual.data.tokenizer, DecodeConfig())
    with pytest.raises(ValueError, match="does not translate de-fr: .* target_lang en"):
        translator.translate([], "de-fr")


def test_the_language_that_a_folder_does_not_name_is_known_after_the_run(bilingual: Run, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bilingual.model, tmp_path / "model"))
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "MarianTokenizer"})
    config = Config(**vars(bilingual.config))
    config.model = ModelConfig(pretrained=str(folder))
    prepare(*text_options(config), tmp_path / "prepared")
    tokenizer = PreparedData(tmp_path / "prepared").tokenizer
    translator = Translator(build_model(config.model, tokenizer, 1), tokenizer, DecodeConfig(beam=1))
    assert len(list(translator.translate(["haus"], "de-en"))) == 1
    with pytest.raises(ValueError, match="does not translate en-de: .* target_lang en"):
        translator.translate([], "en-de")


def test_a_target_language_without_a_token_is_named(multilingual: Run, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(multilingual.model, tmp_path / "model"))
    words = json.loads((folder / "vocab.json").read_text())
    words[">>ita<<"] = words.pop(">>fra<<")
    write_json(folder / "vocab.json", words)
    config = Config(**vars(multilingual.config))
    config.model = ModelConfig(pretrained=str(folder))
    changed = Run(folder, config, multilingual.data, TOKENS)
    assert "no tag for the language 'fr'; it has deu, eng, ita" in refused(changed, ["en-fr"], tmp_path)


def test_a_folder_with_two_vocabularies_is_refused(bilingual: Run, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bilingual.model, tmp_path / "model"))
    shutil.copy(folder / "vocab.json", folder / "target_vocab.json")
    settings = {"tokenizer_class": "MarianTokenizer", "separate_vocabs": True}
    write_json(folder / "tokenizer_config.json", settings)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"separate_vocabs .* expected one vocab.json for both"):
            load_tokenizer(folder)
        (folder / "target_vocab.json").unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("vocabulary", "message"),
    [
        ({"</s>": 0, "a": 1, "b": 1}, "'a' and 'b' both have the id 1"),
        ({"</s>": 0, "a": 1, "<pad>": 3}, "no piece has the id 2, and the ids go to 3"),
        ({"</s>": 0, "a": "1"}, "expected an object with the id of each piece"),
        (["</s>"], "expected an object with the id of each piece"),
    ],
)
def test_ids_that_are_not_one_for_each_piece_are_refused(tmp_path: Path, vocabulary: Any, message: str) -> None:
    for name in ("source.spm", "target.spm"):
        (tmp_path / name).touch()
    write_json(tmp_path / "vocab.json", vocabulary)
    with pytest.raises(ValueError, match=rf"vocab\.json: {message}"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("side", ["source", "target"])
def test_a_sentencepiece_model_of_another_vocabulary_is_refused(bilingual: Run, tmp_path: Path, side: str) -> None:
    folder = Path(shutil.copytree(bilingual.model, tmp_path / "model"))
    (folder / f"{side}.spm").write_bytes(spm(["дом мужчина женщина ребёнок красный синий большой маленький"] * 9))
    with pytest.raises(ValueError, match=rf"of the \d+ pieces of {side}\.spm only \d are in vocab\.json"):
        load_tokenizer(folder)
    (folder / f"{side}.spm").unlink()
    with pytest.raises(ValueError, match=rf"model has no tokenizer: {side}\.spm of a Marian's .* is not there"):
        load_tokenizer(folder)


def test_text_that_was_spelled_by_another_model_is_not_trained_on(bilingual: Run, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bilingual.model, tmp_path / "model"))
    shutil.copy(folder / "target.spm", folder / "source.spm")
    with pytest.raises(ValueError, match="not the one of model.pretrained there"):
        check_same(bilingual.data.tokenizer, load_tokenizer(folder), "there")


def test_a_decoder_that_does_not_start_from_padding_is_refused(bilingual: Run, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bilingual.model, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text()) | {"decoder_start_token_id": 0}
    write_json(folder / "config.json", config)
    with pytest.raises(ValueError, match="decoder_start_token_id 0, but the pad_token of the tokenizer, which starts"):
        build_model(ModelConfig(pretrained=str(folder)), bilingual.data.tokenizer, 1)

from __future__ import annotations

import copy
import itertools
import logging
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sacrebleu.metrics import BLEU
from toy_translation import ALPHABETS, Toy, spell

import nspec
from nspec import cli
from nspec.mt.methods import NeuronSpecialization
from nspec.mt.model import build_model, load_system, save_system
from nspec.mt.scoring.config import DecodeConfig
from nspec.mt.scoring.translate import WINDOW, Translator
from nspec.mt.text.config import TokenizerConfig
from nspec.mt.text.vocabulary import export_tokenizer, load_tokenizer, train_sentencepiece

pytestmark = pytest.mark.usefixtures("one_thread")

GREEDY = DecodeConfig(beam=1)


@pytest.fixture(scope="module")
def system(copier: tuple[Toy, Path]) -> Any:
    return load_system(copier[1] / "model")


@pytest.fixture
def own_system(system: Any) -> Any:
    """A copy that a test may change."""
    return copy.deepcopy(system[0]), system[1]


def biased(model: Any, biases: dict[int, float]) -> None:
    """Adds to the scores of some tokens."""
    bias = torch.zeros(model.lm_head.out_features)
    for token, value in biases.items():
        bias[token] = value
    model.lm_head.bias = torch.nn.Parameter(bias)


def masks(tasks: list[str], density: float = 0.5) -> nspec.NeuronMasks:
    generator = torch.Generator().manual_seed(0)
    layers = [f"model.{side}.layers.0.fc1" for side in ("encoder", "decoder")]
    return nspec.NeuronMasks(
        {t: {layer: torch.rand(64, generator=generator) < density for layer in layers} for t in tasks}
    )


def lines(count: int, language: str = "en", longest: int = 7) -> list[str]:
    chance = random.Random(count)
    return [spell([chance.randrange(10) for _ in range(chance.randint(3, longest))], language) for _ in range(count)]


@pytest.mark.parametrize("task", ["en-de", "de-en"])
def test_training_to_convergence_is_seen_through_the_translator(
    copier: tuple[Toy, Path], system: Any, task: str
) -> None:
    sources, references = copier[0].data.text("test", task)
    hypotheses = list(Translator(*system, DecodeConfig()).translate(sources, task))
    assert BLEU(smooth_method="none").corpus_score(hypotheses, [references]).score > 90


def test_lines_come_out_in_order_whatever_their_batches(system: Any) -> None:
    sources = lines(60)
    expected = [line.translate(str.maketrans(ALPHABETS["en"], ALPHABETS["de"])) for line in sources]
    one_by_one = [text for s in sources for text in Translator(*system, GREEDY).translate([s], "en-de")]
    assert sum(a == b for a, b in zip(one_by_one, expected)) >= 54
    for batch_tokens, window in itertools.product([1, 40, 4096], [0, 7]):
        decode = DecodeConfig(beam=1, batch_tokens=batch_tokens)
        assert list(Translator(*system, decode, window).translate(sources, "en-de")) == one_by_one


def test_beam_search_is_deterministic_and_keeps_the_order(system: Any) -> None:
    sources = lines(20)
    first, again = (list(Translator(*system, DecodeConfig(beam=4)).translate(sources, "en-de")) for _ in range(2))
    assert first == again
    assert first[3] == next(iter(Translator(*system, DecodeConfig(beam=4)).translate([sources[3]], "en-de")))


def test_a_blank_line_gives_a_blank_line(system: Any) -> None:
    sources = ["a b c", "", "  \t ", "\u3000\n", "b c d\n"]
    out = list(Translator(*system, GREEDY).translate(sources, "en-de"))
    assert out == ["k l m", "", "", "", "l m n"]
    assert list(Translator(*system, GREEDY).translate(["", ""], "en-de")) == ["", ""]
    assert list(Translator(*system, GREEDY).translate([], "en-de")) == []


class Counting:
    """Lines that say how many of them were read, from a terminal or not."""

    def __init__(self, count: int, terminal: bool) -> None:
        self.read, self.count, self.terminal = 0, count, terminal

    def isatty(self) -> bool:
        return self.terminal

    def __iter__(self) -> Iterator[str]:
        for _ in range(self.count):
            self.read += 1
            yield "a b c\n"


def test_a_terminal_gets_each_translation_before_the_next_line_is_read(system: Any) -> None:
    source = Counting(5, terminal=True)
    for number, text in enumerate(Translator(*system, GREEDY).translate(source, "en-de"), start=1):
        assert text == "k l m"
        assert source.read == number


def test_a_file_is_read_a_window_ahead_and_not_to_its_end(system: Any) -> None:
    source = Counting(3 * WINDOW, terminal=False)
    translations = Translator(*system, GREEDY).translate(source, "en-de")
    assert source.read == 0
    assert next(translations) == "k l m"
    assert source.read == WINDOW
    source = Counting(50, terminal=False)
    next(Translator(*system, GREEDY, window=4).translate(source, "en-de"))
    assert source.read == 4


@pytest.mark.parametrize(
    ("task", "message"),
    [("en-xx", "language 'xx'; it has de, en"), ("xx-en", "language 'xx'"), ("ende", "direction 'ende'")],
)
def test_an_unknown_language_is_an_error_before_anything_is_read(system: Any, task: str, message: str) -> None:
    source = Counting(3, terminal=False)
    with pytest.raises(ValueError, match=message):
        Translator(*system, GREEDY).translate(source, task)
    assert source.read == 0


@pytest.mark.parametrize("beam", [1, 3])
def test_a_forward_system_translates_with_the_masks_of_the_direction(own_system: Any, beam: int) -> None:
    model, tokenizer = own_system
    decode, sources = DecodeConfig(beam=beam), lines(12)
    dense = list(Translator(model, tokenizer, decode).translate(sources, "en-de"))
    nspec.specialize(model, masks(["en-de", "en-en"]), mode="forward")
    merged = {task: nspec.merge(model, task) for task in ("en-de", "en-en")}
    masked = Translator(model, tokenizer, decode, window=3)
    interleaved = [masked.translate(sources, task) for task in merged]
    found = dict(zip(merged, zip(*zip(*interleaved))))  # windows of the two directions in turns
    for task, plain in merged.items():
        assert list(found[task]) == list(Translator(plain, tokenizer, decode).translate(sources, task))
    assert list(found["en-de"]) != dense
    with pytest.raises(ValueError, match="no masks of task 'de-en'.*en-de.*none from de"):
        masked.translate(sources, "de-en")


@pytest.mark.parametrize("pivot", ["", "en"])
def test_a_direction_that_was_not_trained_takes_the_masks_of_two(
    own_system: Any, caplog: pytest.LogCaptureFixture, pivot: str
) -> None:
    model, tokenizer = own_system
    known = masks(["de-en", "en-en", "en-de"], density=0.2)
    whole = {layer: known["de-en" if "encoder" in layer else "en-de"][layer] for layer in known.layers}
    by_hand = nspec.specialize(copy.deepcopy(model), nspec.NeuronMasks({"de-de": whole}))
    nspec.specialize(model, known)
    translator, sources = Translator(model, tokenizer, GREEDY, window=3, pivot=pivot), lines(8, "de")
    used = set()
    for name, module in model.named_modules():
        if hasattr(module, "task"):
            half = name.split(".")[1]
            module.register_forward_pre_hook(lambda module, _, half=half: used.add((half, module.task)))
    with caplog.at_level(logging.INFO, logger="nspec"):
        found = [list(translator.translate(sources, "de-de")) for _ in range(2)]
    assert found[0] == found[1] == list(Translator(by_hand, tokenizer, GREEDY).translate(sources, "de-de"))
    assert used == {("encoder", "de-en"), ("decoder", "en-de")}
    assert [record.getMessage() for record in caplog.records] == [
        "de-de is translated with masks of de-en in the encoder and masks of en-de in the decoder, as it was not trained"
    ]
    assert all(module.task is None for module in model.modules() if hasattr(module, "task"))


def test_a_pivot_combines_two_directions_also_for_one_that_was_trained(
    own_system: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model, tokenizer = own_system
    nspec.specialize(model, masks(["en-de", "en-en"]))
    list(Translator(model, tokenizer, GREEDY).translate(lines(2), "en-de"))
    assert caplog.records == []
    list(Translator(model, tokenizer, GREEDY, pivot="en").translate(lines(2), "en-de"))
    assert "masks of en-en in the encoder" in caplog.records[0].getMessage()
    assert "not trained" not in caplog.records[0].getMessage()


def test_a_pivot_for_a_model_without_masks_in_its_forward_pass_is_an_error(own_system: Any) -> None:
    model, tokenizer = own_system
    with pytest.raises(ValueError, match="pivot en: this model computes the same for every direction"):
        Translator(model, tokenizer, GREEDY, pivot="en")


def test_an_update_system_translates_as_the_dense_model_any_direction(own_system: Any) -> None:
    model, tokenizer = own_system
    dense = list(Translator(model, tokenizer, GREEDY).translate(lines(5), "de-en"))
    nspec.specialize(model, masks(["en-de"]), mode="update")
    assert list(Translator(model, tokenizer, GREEDY).translate(lines(5), "de-en")) == dense


def test_a_long_line_is_cut_with_a_warning_that_has_its_number(
    own_system: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model, tokenizer = own_system
    model.config.max_position_embeddings = 8
    sources = ["a b", "a b", "a b c a b c", "b c d e f g h", "c d"]
    with caplog.at_level(logging.WARNING, logger="nspec"):
        out = list(Translator(model, tokenizer, GREEDY, window=2).translate(sources, "en-de"))
    assert [record.getMessage() for record in caplog.records] == [
        "line 4 has 7 tokens; only the first 6 are translated"
    ]
    assert out[3] == next(iter(Translator(model, tokenizer, GREEDY).translate(["b c d e f g"], "en-de")))


def test_a_translation_is_at_most_the_given_times_its_source_whatever_its_neighbours(own_system: Any) -> None:
    model, tokenizer = own_system
    biased(model, {tokenizer.eos_token_id: -1e4})  # never ends by itself
    sources = ["a b c", "a " * 20]
    for ratio in (0.5, 1.5):
        out = Translator(model, tokenizer, DecodeConfig(beam=1, max_length_ratio=ratio)).translate(sources, "en-de")
        for source, text in zip(sources, out):
            most = int(ratio * (len(source.split()) + 2)) + 10  # the tag and </s> are tokens
            assert most / 2 < len(tokenizer(text, add_special_tokens=False).input_ids) < most  # the tag is not in it


def test_special_tokens_and_line_breaks_never_come_out(system: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = system
    tag, end, pad = (tokenizer.convert_tokens_to_ids(token) for token in ("__de__", "</s>", "<pad>"))
    a, b = tokenizer.convert_tokens_to_ids(["▁a", "▁b"])
    monkeypatch.setattr(model, "generate", lambda **_: torch.tensor([[end, tag, a, tag, b, end, a, pad]]))
    assert list(Translator(model, tokenizer, GREEDY).translate(["a b c"], "en-de")) == ["a b"]
    monkeypatch.setattr(type(tokenizer), "decode", lambda *_, **__: " x\ny\u2028z\r\n")
    assert list(Translator(model, tokenizer, GREEDY).translate(["a b c"], "en-de")) == ["x y z"]


def test_rows_that_only_round_the_vocabulary_up_are_never_chosen(own_system: Any) -> None:
    model, tokenizer = own_system
    tokenizer = copy.deepcopy(tokenizer)
    expected = list(Translator(model, tokenizer, GREEDY).translate(lines(3), "en-de"))
    model.resize_token_embeddings(len(tokenizer) + 3)
    biased(model, {len(tokenizer) + 1: 1e4})
    assert list(Translator(model, tokenizer, GREEDY).translate(lines(3), "en-de")) == expected


def test_the_model_is_left_in_training_mode_and_without_a_task(own_system: Any) -> None:
    model, tokenizer = own_system
    model.train()
    model.model.encoder.dropout = model.model.decoder.dropout = 0.9
    nspec.specialize(model, masks(["en-de"]), mode="forward")
    first = list(Translator(model, tokenizer, GREEDY).translate(lines(4), "en-de"))
    assert model.training
    assert all(module.task is None for module in model.modules() if hasattr(module, "task"))
    assert first == list(Translator(model.eval(), tokenizer, GREEDY).translate(lines(4), "en-de"))


def test_a_direction_is_taken_with_hyphens_in_its_codes(
    toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export_tokenizer(
        train_sentencepiece(["a b c"] * 9, TokenizerConfig(vocab_size=9)), ["en", "zh_Hans"], tmp_path / "t"
    )
    tokenizer = load_tokenizer(tmp_path / "t")
    model = build_model(toy.config().model, tokenizer, 1)
    tasks = ["en-zh_Hans", "zh_Hans-en"]
    method = NeuronSpecialization(masks(tasks), "forward")
    method.attach(model)
    save_system(model, tokenizer, tmp_path / "model", method)
    (tmp_path / "in.txt").write_text("a b\n")
    given = ["translate", "--model", str(tmp_path / "model"), "--input", str(tmp_path / "in.txt"), "--threads", "1"]
    outputs = []
    for task in ("en-zh-Hans", "en-zh_Hans"):
        assert cli.main([*given, "--device", "cpu", "--engine", "transformers", "--task", task]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    model, tokenizer = load_system(tmp_path / "model")
    assert [*Translator(model, tokenizer, DecodeConfig()).translate(["a b"], "en-zh-Hans")] == outputs[0].splitlines()
    combined = Translator(model, tokenizer, DecodeConfig(), pivot="zh-Hans").translate(["a b"], "en-en")
    assert len([*combined]) == 1


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_another_tokenizer_is_one_line_before_text_is_read(
    copier: tuple[Toy, Path], tmp_path: Path, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(copier[1] / "model", tmp_path / "model")
    with open(tmp_path / "model" / file, "a") as changed:
        changed.write(" ")
    (tmp_path / "in.txt").write_text("a b\n")
    given = ["--model", tmp_path / "model", "--input", tmp_path / "in.txt", "--output", tmp_path / "out.txt"]
    assert cli.main(["translate", "--task", "en-de", "--device", "cpu", "--threads", "1", *map(str, given)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{tmp_path / 'model' / file} is not the one that was saved with the model" in line
    assert not (tmp_path / "out.txt").exists()

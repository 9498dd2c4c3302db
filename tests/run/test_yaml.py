"""Options as text: what is accepted, what is refused and in which words."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from nspec.run.checks import load, validate
from nspec.run.config import Config
from nspec.run.systems import config_of
from nspec.run.yaml import SECTIONS, find_config, flatten, parse, parse_given, render, set_option
from nspec.yaml_text import read_lists

ROOT = Path(__file__).resolve().parents[2]
# That of `nspec finetune` has options of its own: tests/run/test_finetune_config.py.
CONFIGS = sorted(path for path in (ROOT / "configs").glob("*.yaml") if path.stem != "finetune")


def error_of(text: str) -> str:
    with pytest.raises(ValueError) as caught:
        validate(parse(text, "f.yaml"))
    message = str(caught.value)
    assert "\n" not in message
    return message


def set_error(assignment: str) -> str:
    config = Config()
    with pytest.raises(ValueError) as caught:
        set_option(config, assignment)
    assert config == Config(), "a refused assignment changes nothing"
    return str(caught.value)


def test_what_is_not_given_keeps_its_default() -> None:
    config = parse("train:\n  lr: 3e-4\nselect: {k: 1}\ncorpus:\n")
    assert config.train.lr == 3e-4
    assert config.select.k == 1.0
    assert isinstance(config.select.k, float)
    config.train.lr, config.select.k = Config().train.lr, Config().select.k
    assert config == Config()


@pytest.mark.parametrize("text", ["5e-4", "0.0005", ".0005", "5.e-4", "+5.0E-04"])
def test_numbers_are_numbers_with_or_without_a_dot(text: str) -> None:
    assert parse(f"train: {{lr: {text}}}").train.lr == 5e-4


def test_norwegian_is_a_language_and_not_false() -> None:
    assert parse("corpus: {languages: [no, en, de], pivot: no}").corpus.languages == ["no", "en", "de"]


def test_octal_looking_numbers_are_decimal() -> None:
    assert parse("run: {seed: 010}").run.seed == 10


def test_merge_keys_share_settings_between_sections() -> None:
    config = parse("train: &t {lr: 1e-3, updates: 7}\nspecialize:\n  <<: *t\n  updates: 5\n")
    assert (config.specialize.lr, config.specialize.updates, config.train.updates) == (1e-3, 5, 7)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train:\n  lr: fast", "train.lr: expected a number, found 'fast' (f.yaml line 2)"),
        ("train: {lr: true}", "train.lr: expected a number, found True (f.yaml line 1)"),
        ("train: {lr: .inf}", "train.lr: expected a finite number, found inf (f.yaml line 1)"),
        ("train: {updates: 10.0}", "train.updates: expected a whole number, found 10.0 (f.yaml line 1)"),
        ("train: {updates: true}", "train.updates: expected a whole number, found True (f.yaml line 1)"),
        ("train: {compile: yes}", "train.compile: expected true or false, found 'yes' (f.yaml line 1)"),
        (
            "train: {betas: [0.9, x]}",
            "train.betas: expected a number at place 2 of the list, found 'x' (f.yaml line 1)",
        ),
        (
            "run: {systems: dense}",
            "run.systems: expected a list of texts such as [a, b], found 'dense' (f.yaml line 1)",
        ),
        ("corpus: {path: 2016}", "corpus.path: expected text, found 2016 (f.yaml line 1)"),
        (
            "run: {device: gpu}",
            "run.device: expected one of auto, cpu, cuda, found 'gpu' (f.yaml line 1); did you mean cpu?",
        ),
        ("train:\n  lrr: 3", "unknown option train.lrr in f.yaml line 2; did you mean train.lr?"),
        (
            "train:\n  label_smooth: 3",
            "unknown option train.label_smooth in f.yaml line 2; did you mean train.label_smoothing?",
        ),
        ("model:\n\n  lr: 3", "unknown option model.lr in f.yaml line 3; did you mean train.lr?"),
        ("trian:\n  lr: 3", "unknown option trian in f.yaml line 1; did you mean train?"),
        ("beam: 3", "unknown option beam in f.yaml line 1; did you mean decode.beam?"),
        ("xyzzy: 3", "unknown option xyzzy in f.yaml line 1; `nspec config` shows every option"),
        ("train:\n  lr: 1\n  lr: 2", "train.lr is given twice in f.yaml, at lines 2 and 3"),
        ("train: {lr: 1}\nrun: {}\ntrain: {lr: 2}", "train is given twice in f.yaml, at lines 1 and 3"),
        ("train: 3", "section train: expected options as `key: value` lines, found 3 in f.yaml line 1"),
        ("- train", "the file: expected options as `key: value` lines, found ['train'] in f.yaml line 1"),
    ],
)
def test_what_does_not_fit_is_named_with_its_place(text: str, message: str) -> None:
    assert error_of(text) == message


@pytest.mark.parametrize(
    "text", ["train: {lr: [", "a: b: c", "\ttrain: 3", "train: !!python/name:os.system", "--- 1\n--- 2", "\0"]
)
def test_what_is_not_yaml_is_one_line(text: str) -> None:
    assert "f.yaml" in error_of(text)


def test_set_takes_yaml_and_plain_text() -> None:
    config = Config()
    for assignment in [
        "train.lr=3e-4",
        "run.systems=[dense, forward]",
        "corpus.path=2016",
        "corpus.pivot=",
        "corpus.subset={pair}",
        "train.compile=true",
        "run.folder=a=b",
    ]:
        set_option(config, assignment)
    assert config.train.lr == 3e-4
    assert config.run.systems == ["dense", "forward"]
    assert (config.corpus.path, config.corpus.pivot, config.corpus.subset) == ("2016", "", "{pair}")
    assert config.train.compile is True
    assert config.run.folder == "a=b"


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("train.lr", "--set train.lr: expected section.key=value, such as train.lr=3e-4"),
        ("train.lrr=3", "unknown option train.lrr in --set; did you mean train.lr?"),
        ("lr=3", "unknown option lr in --set; did you mean train.lr?"),
        ("train.lr=fast", "train.lr: expected a number, found 'fast' (--set train.lr=fast)"),
        ("train.lr=", "train.lr: expected a number, found nothing (--set train.lr=)"),
        ("train.betas=[1", "--set train.betas=[1: '[1' is not valid YAML; quote it"),
        ("train\nlr", r"--set train\nlr: expected section.key=value, such as train.lr=3e-4"),
        ("train.lr=a\n\nb", r"train.lr: expected a number, found 'a\nb' (--set train.lr=a\n\nb)"),
        ("train.\nlr=3", r"unknown option train.\nlr in --set; did you mean train.lr?"),
        ("train.betas=[\x1b", r"--set train.betas=[\x1b: '[\x1b' is not valid YAML; quote it"),
        (
            f"train.lr={'x' * 500}",
            f"train.lr: expected a number, found '{'x' * 76}' ... (--set train.lr={'x' * 67} ...)",
        ),
    ],
)
def test_set_errors_show_the_assignment(assignment: str, message: str) -> None:
    assert set_error(assignment) == message


@pytest.mark.parametrize(
    ("text", "option"),
    [
        ("select: {k: 0}", "select.k"),
        ("select: {k: 1.01}", "select.k"),
        ("decode: {beam: 0}", "decode.beam"),
        ("model: {d_model: 10, heads: 4}", "model.d_model"),
        ("model: {d_ff: 0}", "model.d_ff"),
        ("model: {dropout: 1}", "model.dropout"),
        ("model: {max_positions: 100}", "model.max_positions"),
        ("train: {warmup: 0}", "train.warmup"),
        ("specialize: {warmup: 0}", "specialize.warmup"),
        ("specialize: {updates: -1}", "specialize.updates"),
        ("select: {layers: [encoder.layers.6]}", "select.layers of forward"),
        ("run: {systems: [dense, forward_encoder]}\nselect: {layers: [decoder]}", "select.layers of forward_encoder"),
        ('run: {variants: ["top = update select.layers=[decoder.layers.9]"]}', "select.layers of top"),
        ("train: {updates: 0}", "train.updates"),
        ("{model: {pretrained: m}, specialize: {updates: 0}}", "specialize.updates"),
        ("train: {lr: 0}", "train.lr"),
        ("train: {lr: -1e-3}", "train.lr"),
        ("train: {betas: [0.9]}", "train.betas"),
        ("train: {betas: [0.9, 1.0]}", "train.betas"),
        ("train: {label_smoothing: 1.0}", "train.label_smoothing"),
        ("train: {best: bleu, valid_bleu_sentences: 0}", "train.best"),
        ("train: {batch_tokens: 100}", "train.batch_tokens"),
        ("train: {tasks_per_batch: 0}", "train.tasks_per_batch"),
        ("specialize: {batch_tokens: 300, tasks_per_batch: 3}", "specialize.batch_tokens"),
        ("train: {optimizer: row_sparse_adamw}", "train.optimizer"),
        ("run: {systems: []}", "run.systems"),
        ("run: {systems: [forward, dense]}", "run.systems"),
        ("run: {systems: [dense, sideways]}", "run.systems"),
        ("run: {systems: [dense, forward, forward]}", "run.systems"),
        ("run: {seed: -1}", "run.seed"),
        ('run: {folder: ""}', "run.folder"),
        ("corpus: {type: files}", "corpus.path"),
        ("corpus: {type: hub}", "corpus.name"),
        ("corpus: {languages: [de, de]}", "corpus.languages"),
        ("corpus: {languages: [en-de]}", "corpus.languages"),
        ("corpus: {directions: [en]}", "corpus.directions"),
        ("corpus: {directions: [en-en]}", "corpus.directions"),
        ("corpus: {languages: [en, de], directions: [en-fr]}", "corpus.directions"),
        ("corpus: {max_ratio: 0.5}", "corpus.max_ratio"),
        ("corpus: {type: files, path: x, valid_split: dev, test_split: dev}", "corpus.test_split"),
        ("corpus: {type: hub, name: x, valid_split: dev, test_split: dev}", "corpus.test_split"),
        ("corpus: {type: cldr, valid_split: dev, test_split: dev}", "corpus.test_split"),
        ("corpus: {test_sentences: -1}", "corpus.test_sentences"),
        ("tokenizer: {character_coverage: 0}", "tokenizer.character_coverage"),
        ("tokenizer: {character_coverage: 0.97}", "tokenizer.character_coverage"),
        ("run: {threads: 2000}", "run.threads"),
        ("run: {seed: 4294967296}", "run.seed"),
        ("model: {encoder_layers: 1000000000}", "model.encoder_layers"),
        ("model: {d_model: 1000000000000}", "model.d_model"),
        ("model: {d_ff: 1000000000000}", "model.d_ff"),
        ("model: {max_positions: 1000000000000}", "model.max_positions"),
        ("tokenizer: {vocab_size: 9223372036854775808}", "tokenizer.vocab_size"),
        ("{tokenizer: {vocab_size: 4}, decode: {beam: 5}}", "decode.beam"),
        ("decode: {beam: 1000000}", "decode.beam"),
        ("decode: {length_penalty: 1e308}", "decode.length_penalty"),
        ("decode: {max_length_ratio: 1e308}", "decode.max_length_ratio"),
        ("score: {bootstrap: 100000000}", "score.bootstrap"),
        ("train: {updates: 100000000, accumulate: 2}", "train.updates"),
        ("{specialize: {accumulate: 1000000}, finetune: {updates: 101}}", "specialize.updates"),
        ("{train: {accumulate: 100000, updates: 10}, bilingual: {updates: 1001}}", "bilingual.updates"),
        ('run: {variants: ["big = forward specialize.updates=2000000000"]}', "run.variants: big: specialize.updates"),
        ("score: {bootstrap: 10}", "score.bootstrap"),
        ("score: {tokenize: 13b}", "score.tokenize"),
        ("score: {baseline: best}", "score.baseline"),
    ],
)
def test_values_that_cannot_work_are_refused_before_the_run(text: str, option: str) -> None:
    assert error_of(text).startswith(f"{option}: ")


def test_a_direction_may_have_the_pivot_that_is_not_listed() -> None:
    validate(parse("corpus: {languages: [de, fr], directions: [en-de, de-fr]}"))
    with pytest.raises(ValueError, match="en-de needs en, neither in corpus.languages nor corpus.pivot"):
        validate(parse("corpus: {languages: [de, fr], directions: [en-de], pivot: fr}"))


def test_the_defaults_are_valid() -> None:
    validate(Config())


def test_render_shows_every_option_and_reads_back() -> None:
    config = Config()
    config.run.folder, config.corpus.languages, config.train.lr = "no", ["no", "zh_Hant"], 1e-7
    config.corpus.path, config.train.betas, config.train.compile = "#: {a}", [0.5, 1e-9], True
    text = render(config, "first\n\nsecond")
    assert text.startswith("# first\n#\n# second\n")
    assert max(map(len, text.splitlines())) <= 120
    assert parse(text) == config
    for name in flatten(config):
        section, key = name.split(".")
        assert f"\n  {key}: " in text.split(f"\n{section}:\n")[1].split("\n\n")[0] + "\n", name


def test_render_gives_meaning_choices_and_default() -> None:
    config = Config()
    config.decode.beam = 7
    text = render(config)
    assert "  # beam size; 1 is greedy search; 1 to 1000; default: 5\n  beam: 7\n" in text
    assert "; one of: loss, bleu; default: loss\n" in text
    assert "; in (0, 1]; default: 0.95\n" in text
    assert "  # highest learning rate; in (0, 1000]; default: 0.0005\n" in text
    assert "0: never; at least 0; default: 10\n" in text


def test_every_section_and_option_has_a_meaning() -> None:
    assert list(SECTIONS) == [field.name for field in dataclasses.fields(Config)]
    for section in SECTIONS:
        for field in dataclasses.fields(getattr(Config(), section)):
            assert len(field.metadata["meaning"]) > 5, field.name


def test_load_applies_set_over_the_file_and_validates(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("train: {lr: 1e-3, warmup: 9}\n", encoding="utf-8")
    config = load(path, ["train.lr=2e-3", "train.lr=3e-3"])
    assert (config.train.lr, config.train.warmup) == (3e-3, 9)
    with pytest.raises(ValueError, match=r"select\.k: expected a number in \(0, 1\], found 2"):
        load(path, ["select.k=2"])


@pytest.mark.parametrize("name", ["run.folder", "corpus.path", "profile.path", "model.pretrained"])
def test_the_home_folder_is_written_out_once(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/of me")
    monkeypatch.setenv("DIR", "elsewhere")
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "c.yaml"
    for given, expected in [
        ("~/runs/x", "/home/of me/runs/x"),
        ("~", "/home/of me"),
        ("~root/x", f"{Path('~root').expanduser()}/x"),
        ("$DIR/x", "$DIR/x"),
        ("a/~/x", "a/~/x"),
        ("./~x", f"{tmp_path}/~x"),  # libraries would take ~x for the home folder of x
        ("./a", "./a"),
    ]:
        section, key = name.split(".")
        path.write_text(f"{section}: {{{key}: '{given}'}}", encoding="utf-8")
        for config in (load(None, [f"{name}={given}"]), load(path)):
            assert flatten(config)[name] == expected
            path.with_name("again.yaml").write_text(render(config), encoding="utf-8")
            assert load(path.with_name("again.yaml")) == config
    with pytest.raises(ValueError, match=f"^{name}: there is no home folder ~nobody-at-all; "):
        load(None, [f"{name}=~nobody-at-all/x"])


def test_the_home_folder_is_written_out_in_variants(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/of-variants")
    config = load(None, ["run.variants=[news = forward profile.path=~/news]"])
    assert config_of(config, "news").profile.path == "/home/of-variants/news"
    with pytest.raises(ValueError, match=r"^run\.variants: profile\.path: there is no home folder ~nobody-at-all"):
        load(None, ["run.variants=[news = forward profile.path=~nobody-at-all/x]"])


def test_a_file_that_is_not_utf8_says_where(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(b"run:\n  folder: caf\xe9\n")
    with pytest.raises(ValueError, match=r"c\.yaml is not UTF-8: byte 18 is 0xe9"):
        load(path)


def test_find_config_takes_a_file_first_and_then_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_config("cldr8").name == "cldr8.yaml"
    Path("cldr8").write_text("")
    assert find_config("cldr8") == Path("cldr8")
    with pytest.raises(FileNotFoundError, match="cldr8"):
        find_config("cldr9")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_configs_that_come_along_are_valid(path: Path) -> None:
    overrides = ["corpus.path=folder"] if path.stem.startswith(("multi30k", "tatoeba")) else []
    assert load(path, overrides).run.systems[0] == "dense"


def test_the_first_config_shows_every_option_and_the_others_what_differs() -> None:
    default = flatten(Config())
    for path in CONFIGS:
        text = path.read_text(encoding="utf-8")
        config, given = parse_given(text)
        if path.stem == "cldr8":
            header = text.partition("\nrun:\n")[0].split("\n\n")[0].splitlines()
            again = render(config, "\n".join(line.removeprefix("#").removeprefix(" ") for line in header))
            assert text == again, "not what render() writes: an option is missing or its comment is old"
        else:
            assert not [name for name in given if flatten(config)[name] == default[name]], path.name


def test_an_option_that_went_is_read_where_it_says_what_holds_now() -> None:
    assert parse_given("tokenizer: {model_type: bpe}") == (Config(), frozenset({"tokenizer.model_type"}))
    with pytest.raises(ValueError, match=r"unknown option tokenizer\.model_type"):
        parse("tokenizer: {model_type: unigram}")


def test_there_are_configs() -> None:
    assert {path.stem for path in CONFIGS} >= {"cldr8", "multi30k"}


def test_half_a_character_in_lists_of_texts_is_named_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "groups.yaml"
    for text in ('low: [is]\n"\\ud800": [mt]', 'low: [is]\nhigh: [de, "\\udfff"]'):
        path.write_text(text)
        with pytest.raises(
            ValueError, match=r"expected text in UTF-8, found half a character in .*groups\.yaml line 2"
        ):
            read_lists(path)

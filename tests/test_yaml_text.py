"""YAML that is written reads back, here and with YAML 1.1; what cannot be read is one line with its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from nspec import yaml_text
from nspec.run.config import Config, each_option, types
from nspec.run.yaml import parse, render, set_option
from nspec.yaml_text import read_lists

# Texts that some reader of YAML takes for something else.
TEXTS = [
    *("5e-4", "1e3", "0x10", "0o10", "1_000", "010", "+1", ".5", "1.", "1:30", "-.inf", ".NaN", "true"),
    *("Yes", "NO", "on", "off", "y", "n", "null", "Null", "~", "<<", "=", "!", "&", "*", "|", ">", "%"),
    *("@", "`", "[]", "{}", "[a", "a]", "{a:", "#", "#x", "x#", "a:b", "a:", ":a", "-", "-a", "---", "..."),
    *("?", "?a", "2016", "2016-01-01", "2016-01-01T00:00:00Z", "~/x", "'", '"', "''", '""', "it's", "a\\b"),
    *("\\n", "", " ", " a", "a ", "a #b", "a: b", "- a", "? a", "a\nb", "\n", "a\n", "\r", "\t", "a\tb"),
    *("\x00", "\x7f", "\x85", "\u2028", "\ufeff", "\ufeffa", "\xa0", "a\u3000"),
    *("\U0001f600", "ünï", "日本", "... a"),
    "x" * 300,
]

texts = st.one_of(st.sampled_from(TEXTS), st.text(st.characters(codec="utf-8"), max_size=40))
numbers = st.floats(allow_nan=False, allow_infinity=False)
VALUES = {
    str: texts,
    int: st.integers(-(2**70), 2**70),
    float: numbers | st.integers(-(2**53), 2**53),
    bool: st.booleans(),
    list[str]: st.lists(texts, max_size=12),
    list[float]: st.lists(numbers, max_size=3),
}


@settings(max_examples=30, phases=[Phase.generate], deadline=None, derandomize=True, database=None)
@given(st.fixed_dictionaries({str(kind): strategy for kind, strategy in VALUES.items()}))
def test_a_configuration_of_any_values_reads_back(drawn: dict[str, Any]) -> None:
    config = Config()
    for section, key, field in each_option():
        if not field.metadata["choices"]:
            setattr(getattr(config, section), key, drawn[str(types()[section][key])])
    text = render(config)
    assert parse(text) == config
    assert yaml.safe_load(text)["run"]["folder"] == config.run.folder, "to readers of YAML 1.1 too"


def test_a_text_reads_back_and_is_taken_letter_for_letter_on_the_command_line() -> None:
    config = Config()
    for text in TEXTS:
        set_option(config, f"run.folder={text}")
        assert config.run.folder == text
        assert yaml_text.read(yaml_text.one_line(text)) == text
        assert yaml.safe_load(yaml_text.one_line(text)) == text
    for width in (len(TEXTS), 3):  # a line each, and in brackets
        config.corpus.languages = TEXTS[:width]
        assert parse(render(config)) == config


@pytest.mark.parametrize(
    "value", [0.0, -0.0, 5e-324, 1e-7, 5e-4, 1e22, 1.7976931348623157e308, 10**300, -1, 123456789.123]
)
def test_a_number_reads_back(value: float) -> None:
    assert yaml_text.read(yaml_text.one_line(value)) == value


def test_spaces_around_the_equals_sign_do_not_belong_to_the_value() -> None:
    config = Config()
    set_option(config, "run.folder = runs/a b ")
    set_option(config, "run.device = cpu")
    assert (config.run.folder, config.run.device) == ("runs/a b", "cpu")


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]\n" for level in range(1, 9)
)
MERGES = "m0: &m0 {k0: v}\n" + "".join(
    f"m{level}: &m{level} {{<<: [*m{level - 1}, *m{level - 1}, *m{level - 1}], k{level}: v}}\n"
    for level in range(1, 20)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"\ntrain: {'[' * 100_000}", "f.yaml line 2, column 27 is not valid YAML: nested more than 20 deep"),
        ("train: " + '{"a": ' * 3000, "f.yaml line 1, column 117 is not valid YAML: nested more than 20 deep"),
        ("train:\n" + "".join(f"{' ' * n}- \n" for n in range(2000)), "is not valid YAML: nested more than 20 deep"),
        (BOMB, "is not valid YAML: aliases stand for more than 10000 values; write them out"),
        (MERGES, "is not valid YAML: aliases stand for more than 10000 values; write them out"),
        ("train: &t {lr: *t}", "f.yaml line 1, column 16 is not valid YAML: an alias stands within what it names"),
        (
            "\n\ntrain:\n  updates: " + "9" * 5000,
            "train.updates: found a whole number of 5000 digits, expected at most 1000 (f.yaml line 4)",
        ),
        ("train: {lr: !!float ''}", "train.lr: found '' for float (f.yaml line 1)"),
        ("train: {lr: !!bool maybe}", "train.lr: found 'maybe' for bool (f.yaml line 1)"),
        ("train: {lr: !!int [1]}", "train.lr: found "),
        ("train: {lr: !!timestamp x}", "train.lr: could not determine a constructor for the tag"),
        ("train: {lr: 1" + "0" * 400 + "}", "train.lr: expected a finite number, found 1000"),
        (
            "run:\n  folder: a\0b",
            "f.yaml line 2 is not valid YAML: the character U+0000 can only be written as an escape",
        ),
        ("? [a, b]\n: c", "expected the name of an option before the colon in f.yaml line 1, found a list or mapping"),
        ("x" * 1000 + ": 1", "unknown option xxx"),
        ("run: {folder: [" + "x, " * 1000 + "]}", "run.folder: expected text, found ['x', 'x', "),
        ("run: {device: " + "x" * 10**6 + "}", "run.device: expected one of auto, cpu, cuda, found 'xxx"),
    ],
)
def test_hostile_yaml_is_one_short_line(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:
        parse(text, "f.yaml")
    assert message in str(caught.value)
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)
    (tmp_path / "groups.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError) as caught:
        read_lists(tmp_path / "groups.yaml")
    assert "groups.yaml line " in str(caught.value)
    assert len(str(caught.value)) < 400 + len(str(tmp_path))


def test_aliases_within_reason_are_read(tmp_path: Path) -> None:
    config = parse("corpus: {languages: &l [de, en]}\nselect: {layers: *l}\n")
    assert config.select.layers == ["de", "en"]
    (tmp_path / "groups.yaml").write_text("a: &a [de-en, en-de]\nb: *a\n", encoding="utf-8")
    assert read_lists(tmp_path / "groups.yaml") == {"a": ["de-en", "en-de"], "b": ["de-en", "en-de"]}

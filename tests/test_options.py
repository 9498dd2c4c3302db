"""Each option by itself: what fits is taken and reads back, all else is one error that names the option."""

from __future__ import annotations

import math
from typing import Any

import pytest

from nspec import yaml_text
from nspec.options import check_option, range_of, show
from nspec.run.checks import validate
from nspec.run.config import Config, each_option, fields, types
from nspec.run.yaml import expand_paths, flatten, parse, set_option

OPTIONS = list(flatten(Config()))

# Fits some options and not others; as YAML, and behind --set.
HOSTILE = [
    *("0", "1", "-1", "7", "0.5", "1e-320", "5e-4", "1e308", "1e999", "-1e300", ".inf", ".nan", "010", "0x10", "1_000"),
    *("2147483648", "9223372036854775808", "1" + "0" * 400, "9" * 5000, "true", "no", "null", "~", "''", "2016-01-01"),
    *("[]", "[1, 2]", "[a, a]", "{}", "text", "[[[[[[]]]]]]", "!!int x", "!!float ''", "!!timestamp x", "!!set {a}"),
    *("&a [*a]", "*a", "~/x", "a b", "[" * 30, "'\\0'", '"\\0"', "x" * 5000, "\ud800", "é\u2028"),
]


@pytest.mark.parametrize("name", OPTIONS)
def test_a_hostile_value_fits_and_reads_back_or_is_an_error_that_names_the_option(name: str) -> None:
    section, key = name.split(".")
    for value in HOSTILE:
        for given in ("set", "file"):
            config = Config()
            try:
                if given == "set":
                    set_option(config, f"{name}={value}")
                else:
                    config = parse(f"{section}:\n  {key}: {value}", "f.yaml")
                expand_paths(config)
                validate(config)
            except ValueError as error:
                message = str(error)
                # What is no YAML has no options yet, only lines.
                assert name in message or "f.yaml line 2" in message, (value, given, message)
                assert len(message) < 1200, (value, given)
                assert "\n" not in message
            else:
                accepted = getattr(getattr(config, section), key)
                again = parse(f"{section}: {{{key}: {yaml_text.one_line(accepted)}}}")
                assert getattr(getattr(again, section), key) == accepted, (value, given)


@pytest.mark.parametrize("name", OPTIONS)
def test_the_ends_of_a_range_fit_and_what_is_beyond_does_not(name: str) -> None:
    section, key = name.split(".")
    limits = fields(section)[key].metadata
    kind = types()[section][key]

    def fits(value: float) -> bool:
        given: Any = [value] if kind == list[float] else kind(value)
        try:
            check_option(fields(section)[key], kind, name, given)
        except ValueError as error:
            return not str(error).startswith(f"{name}: expected ")
        return True

    step = 1 if kind is int else 1e-3
    for end, inside, strict in [("least", 1, False), ("above", 1, True), ("most", -1, False), ("below", -1, True)]:
        if limits[end] is not None:
            assert fits(limits[end]) is not strict
            assert fits(limits[end] + inside * step)
            assert not fits(limits[end] - inside * step)
            assert not fits(-inside * math.inf) if kind is not int else True
    if kind is int:
        assert not fits(2**63)
    if kind in (float, list[float]):
        assert not fits(math.nan)
        assert not fits(1e308)


def test_every_number_has_a_lower_end() -> None:
    for section, key, field in each_option():
        if types()[section][key] in (int, float, list[float]):
            assert field.metadata["least"] is not None or field.metadata["above"] is not None, key
            assert range_of(field)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("decode.beam", 0, "decode.beam: expected at least 1, found 0"),
        ("decode.beam", 1_000_000, "decode.beam: expected at most 1000, found 1000000"),
        ("decode.length_penalty", 1e29, "decode.length_penalty: expected at most 10, found 1e+29"),
        ("train.betas", [0.9, 1.0], "train.betas: expected a number in [0, 1), found 1.0"),
        ("train.updates", 2**63, "train.updates: expected at most 100000000, found 9223372036854775808"),
        ("train.warmup", 2**31, "train.warmup: expected at most 2147483647, found 2147483648"),
        ("train.clip_norm", 1e31, "train.clip_norm: expected at most 1e+30, found 1e+31"),
        ("train.eps", 1e-300, "train.eps: expected a number in [1e-20, 1], found 1e-300"),
        ("train.lr", 1e-44, "train.lr: expected a number not nearer to 0 than 1e-30, found 1e-44"),
        ("adapters.lr", 5e-324, "adapters.lr: expected a number not nearer to 0 than 1e-30, found 5e-324"),
        ("train.clip_norm", 1e-40, "train.clip_norm: expected 0 or a number not nearer to 0 than 1e-30, found 1e-40"),
        (
            "decode.length_penalty",
            -1e-40,
            "decode.length_penalty: expected 0 or a number not nearer to 0 than 1e-30",
        ),
        ("train.lr", 10**400, "train.lr: expected a finite number, found 1000"),
        (
            "train.updates",
            10**6000,
            "train.updates: expected at most 100000000, found a whole number of about 6000 digits",
        ),
        ("run.folder", "~/x", "run.folder: expected a path without ~ at its start, found '~/x'; write it out"),
        ("corpus.path", "./~x", "corpus.path: expected a path without ~ at its start, found './~x'; write it out"),
        ("profile.path", "a\0b", "profile.path: expected a file name, found 'a\\x00b' with a NUL character"),
    ],
    ids=lambda _: "",
)
def test_values_that_code_gives_are_checked_like_text(name: str, value: Any, message: str) -> None:
    config = Config()
    section, key = name.split(".")
    setattr(getattr(config, section), key, value)
    with pytest.raises(ValueError) as caught:
        validate(config)
    assert str(caught.value).startswith(message)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("name", OPTIONS)
def test_no_number_is_0_in_float32_that_is_none(name: str) -> None:
    section, key = name.split(".")
    for value in (1e-300, 1e-46, 1e-38):
        config = Config()
        if types()[section][key] in (float, list[float]):
            setattr(getattr(config, section), key, [value, value] if key in ("betas", "grid") else value)
            with pytest.raises(ValueError, match=f"^{name}: expected "):
                validate(config)


TEXTS = [(name, kind) for name in OPTIONS if (kind := types()[(p := name.split("."))[0]][p[1]]) in (str, list[str])]


@pytest.mark.parametrize(("name", "kind"), TEXTS)
@pytest.mark.parametrize("half", ["\ud800", "a\udce9b"])
def test_half_a_character_is_no_text_of_an_option(name: str, kind: Any, half: str) -> None:
    section, key = name.split(".")
    written = '"' + half.encode("unicode-escape").decode() + '"'
    written = f"[{written}]" if kind is not str else written
    message = f"^{name}: expected text in UTF-8, found '.*' with half a character"
    with pytest.raises(ValueError, match=message + r" \(f\.yaml line 2\)$"):
        parse(f"{section}:\n  {key}: {written}", "f.yaml")
    with pytest.raises(ValueError, match=message) as caught:
        set_option(Config(), f"{name}={half if kind is str else written}")
    str(caught.value).encode()
    config = Config()
    setattr(getattr(config, section), key, half if kind is str else [half])
    with pytest.raises(ValueError, match=message):
        validate(config)


@pytest.mark.parametrize(("key", "value"), [("updates", "7"), ("updates", True), ("lr", None), ("betas", 0.9)])
def test_a_wrong_type_from_code_is_a_type_error(key: str, value: Any) -> None:
    config = Config()
    setattr(config.train, key, value)
    with pytest.raises(TypeError, match=f"^train.{key}: expected "):
        validate(config)


def test_a_value_in_a_message_is_short() -> None:
    for value in ("x" * 10**6, ["x"] * 10**5, 10**5000, [10**5000], {"a": "b" * 1000}):
        assert len(show(value)) <= 90
    assert show("it's") == repr("it's")
    assert show(None) == "nothing"

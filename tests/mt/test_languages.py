"""Codes and directions: what is read, in which spelling, and what is told from other words."""

from __future__ import annotations

import pytest

from nspec.mt.languages import is_known, language_code, languages_of_task, pair_of_task, plain_code, task_of
from nspec.run.checks import validate
from nspec.run.config import Config
from nspec.run.yaml import parse, set_option

CODES = {
    "zh-Hans": "zh_Hans",
    "zh-hans": "zh_hans",
    "pt-BR": "pt_BR",
    "pt_BR": "pt_BR",
    "pt-br": "pt_br",
    "zh-tw": "zh_tw",
    "zh-cn": "zh_cn",
    "fr-ca": "fr_ca",
    "sr-Latn": "sr_Latn",
    "sr-Latn-RS": "sr_Latn_RS",
    "zh_Hant-TW": "zh_Hant_TW",
    "es-419": "es_419",
    "ca-valencia": "ca_valencia",
    "eng_Latn": "eng_Latn",
    "de": "de",
}


@pytest.mark.parametrize(("text", "code"), CODES.items())
def test_hyphens_in_a_code_become_underscores(text, code):
    assert language_code(text) == plain_code(text) == code
    assert language_code(code) == code


@pytest.mark.parametrize(
    "text", ["", "-", "e", "en-", "-en", "en-de", "de-orig", "zh-TW-Hant", "zh-Hans-Hant", "x-Latn", "en de"]
)
def test_what_is_no_code_is_none(text):
    assert language_code(text) is None


@pytest.mark.parametrize("other", ["en", "fil", "deu_Latn", "sr-Cyrl", "pt-BR"])
@pytest.mark.parametrize("text", sorted(set(CODES) - {"de", "pt_BR"}))
def test_every_pair_of_codes_is_read_in_one_way_in_either_order(text, other):
    one, two = language_code(text), language_code(other)
    if one != two:
        assert languages_of_task(f"{text}-{other}") == (one, two)
        assert languages_of_task(f"{other}-{text}") == (two, one)
        assert languages_of_task(task_of(one, two)) == (one, two)
        assert pair_of_task(f"{other}-{text}") == pair_of_task(f"{text}-{other}") == task_of(*sorted((one, two)))


@pytest.mark.parametrize("task", ["en-de-fr", "en-de-", "-en-de", "en-zh-foo", "de-fr-at-x"])
def test_what_can_be_read_in_no_way_is_an_error(task):
    with pytest.raises(ValueError, match="expected two language codes joined by '-'.*write '_'"):
        languages_of_task(task)


def test_field_names_are_no_known_languages():
    languages = "en id zh_Hans zh_tw pt_br deu eng_Latn xyz_Latn cmn_Hans_CN"
    fields = "src tgt ref url tag doc idx text xyz en_text id_no is_a raw_Text"
    assert all(map(is_known, languages.split()))
    assert not any(map(is_known, fields.split()))


def test_options_take_hyphens_and_keep_underscores():
    config = parse("corpus: {languages: [zh-Hans, pt_BR, en], pivot: pt-BR, directions: [pt-BR-zh-Hans, en-pt_BR]}")
    assert config.corpus.languages == ["zh_Hans", "pt_BR", "en"]
    assert config.corpus.pivot == "pt_BR"
    assert config.corpus.directions == ["pt_BR-zh_Hans", "en-pt_BR"]
    validate(config)
    config = Config()
    set_option(config, "corpus.languages=[sr-Latn]")
    assert config.corpus.languages == ["sr_Latn"]
    with pytest.raises(ValueError, match="the list more than once"):
        validate(parse("corpus: {languages: [pt-BR, pt_BR]}"))
    with pytest.raises(ValueError, match=r"corpus\.languages: expected language codes.*found 'en-de'"):
        validate(parse("corpus: {languages: [en-de]}"))

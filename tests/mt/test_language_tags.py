from __future__ import annotations

from typing import Any

import pytest
from transformers import NllbTokenizer
from transformers.models.m2m_100.tokenization_m2m_100 import FAIRSEQ_LANGUAGE_CODES as M2M
from transformers.models.nllb.tokenization_nllb import FAIRSEQ_LANGUAGE_CODES as NLLB

from nspec.mt.language_tags import language_tag

MBART = ["ar_AR", "de_DE", "en_XX", "pt_XX", "zh_CN", "id_ID", "he_IL", "tl_XX", "fr_XX"]
SCRIPTS = [*NLLB, "kas_Deva", "kas_Arab", "min_Arab", "min_Latn"]


class Tags:
    """A tokenizer, as far as tags go."""

    def __init__(self, tags: list[str]) -> None:
        self.all_special_tokens = tags

    def get_added_vocab(self) -> dict[str, int]:
        return {}


VOCABULARIES: dict[str, Any] = {
    "m2m100": Tags([f"__{code}__" for code in M2M["m2m100"]]),
    "nllb": Tags(list(dict.fromkeys(SCRIPTS))),
    "mbart": Tags(MBART),
    "scripts": Tags(["sr_Cyrl", "__sr_Cyrl__", "__sr_Latn__", "__pt_BR__", "__pt_PT__"]),
}


@pytest.mark.parametrize(
    ("code", "m2m100", "nllb"),
    [
        ("zh", "__zh__", "zho_Hans"),
        ("zh_TW", "__zh__", "zho_Hant"),
        ("zh-CN", "__zh__", "zho_Hans"),
        ("zh-Hant-HK", "__zh__", "zho_Hant"),
        ("zh_Hant", "__zh__", "zho_Hant"),
        ("cmn_Hans", "__zh__", "zho_Hans"),
        ("pt_BR", "__pt__", "por_Latn"),
        ("pt_PT", "__pt__", "por_Latn"),
        ("nb", "__no__", "nob_Latn"),
        ("no", "__no__", "nob_Latn"),
        ("nor", "__no__", "nob_Latn"),
        ("de_DE", "__de__", "deu_Latn"),
        ("deu", "__de__", "deu_Latn"),
        ("ger", "__de__", "deu_Latn"),
        ("deu_Latn", "__de__", "deu_Latn"),
        ("en-US", "__en__", "eng_Latn"),
        ("sr", "__sr__", "srp_Cyrl"),
        ("sr_Cyrl", "__sr__", "srp_Cyrl"),
        ("fil", "__tl__", "tgl_Latn"),
        ("tl", "__tl__", "tgl_Latn"),
        ("iw", "__he__", "heb_Hebr"),
        ("in", "__id__", "ind_Latn"),
        ("mo", "__ro__", "ron_Latn"),
        ("fa_IR", "__fa__", "pes_Arab"),
        ("fas", "__fa__", "pes_Arab"),
        ("arb", "__ar__", "arb_Arab"),
        ("ar_EG", "__ar__", "arb_Arab"),
        ("msa", "__ms__", "zsm_Latn"),
        ("swa", "__sw__", "swh_Latn"),
        ("lav", "__lv__", "lvs_Latn"),
        ("est", "__et__", "est_Latn"),
        ("mn_MN", "__mn__", "khk_Cyrl"),
        ("pa_IN", "__pa__", "pan_Guru"),
        ("uz_UZ", "__uz__", "uzn_Latn"),
        ("nso", "__ns__", "nso_Latn"),
        ("ff", "__ff__", "fuv_Latn"),
        ("ast", "__ast__", "ast_Latn"),
        ("ZH_tw", "__zh__", "zho_Hant"),
    ],
)
def test_common_codes_lead_to_the_tags_of_m2m100_and_nllb(code: str, m2m100: str, nllb: str) -> None:
    assert language_tag(VOCABULARIES["m2m100"], code) == m2m100
    assert language_tag(VOCABULARIES["nllb"], code) == nllb


def test_every_language_of_m2m100_that_nllb_has_is_found_there_by_its_code() -> None:
    absent = {"br", "fy"}
    for code in set(M2M["m2m100"]) - absent:
        assert language_tag(VOCABULARIES["m2m100"], language_tag(VOCABULARIES["nllb"], code)) == f"__{code}__"


@pytest.mark.parametrize(
    ("code", "tag"), [("pt_BR", "pt_XX"), ("zh", "zh_CN"), ("zh_Hans", "zh_CN"), ("iw", "he_IL"), ("deu", "de_DE")]
)
def test_tags_with_a_country_are_found_too(code: str, tag: str) -> None:
    assert language_tag(VOCABULARIES["mbart"], code) == tag


@pytest.mark.parametrize(
    ("vocabulary", "code", "message"),
    [
        ("nllb", "sr_Latn", "no tag for the language 'sr_Latn'.*; the nearest: srp_Cyrl"),
        ("nllb", "pa_PK", "the nearest: pan_Guru"),
        ("m2m100", "nn", "no tag for the language 'nn'"),
        ("mbart", "zh_TW", "the nearest: zh_CN"),
        ("mbart", "de_AT", "the nearest: de_DE"),
        ("nllb", "kas", "the language 'kas' may be kas_Arab or kas_Deva in this vocabulary"),
        ("nllb", "ks", "the language 'ks' may be kas_Arab or kas_Deva in this vocabulary"),
        ("nllb", "kr", "may be knc_Arab or knc_Latn"),
        ("nllb", "min", "may be min_Arab or min_Latn"),
        ("scripts", "sr", "may be sr_Cyrl or sr_Latn"),
        ("scripts", "pt", "may be pt_BR or pt_PT"),
        ("scripts", "pt_MZ", "the nearest: pt_BR, pt_PT"),
        ("nllb", "tlh", "no tag for the language 'tlh'"),
        ("nllb", "x", "no tag for the language 'x'"),
    ],
)
def test_no_tag_or_several_is_an_error_that_names_the_candidates(vocabulary: str, code: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        language_tag(VOCABULARIES[vocabulary], code)


def test_a_real_tokenizer_is_asked_alike() -> None:
    tokenizer = NllbTokenizer(extra_special_tokens=["por_Latn", "zho_Hans", "zho_Hant"], src_lang="por_Latn")
    assert [language_tag(tokenizer, code) for code in ("pt_BR", "zh_HK", "zh")] == ["por_Latn", "zho_Hant", "zho_Hans"]

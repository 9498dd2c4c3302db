"""The language tags of a vocabulary, and which of them is meant by a language code.

Codes come as they are written elsewhere: ``pt_BR``, ``zh-Hant-TW``, ``deu``, ``nb``, ``iw``. Tags come as their makers
chose: ``__pt__`` (ours, M2M100), ``por_Latn`` (NLLB), ``pt_XX`` (mBART), ``>>por<<`` (Marian). One rule leads from the one
to the other; where it leads to several tags, or to one of another script or region, that is an error that names them.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_OURS = re.compile(r"__(\w+?)__")  # also M2M100's
_FLORES = re.compile(r"[a-z]{3}_[A-Z][a-z]{3}")
_MBART = re.compile(r"[a-z]{2,3}_[A-Z]{2}")
_MARIAN = re.compile(r">>(.+)<<")
_CODE = re.compile(r"([a-z]{2,8})(?:[-_]([a-z]{4}))?(?:[-_]([a-z]{2}|[0-9]{3}))?", re.IGNORECASE)

# What NLLB calls the languages of two-letter codes; where it has several scripts or varieties, the usual one.
_FLORES_TABLE = """
    af:afr_Latn ak:aka_Latn am:amh_Ethi ar:arb_Arab as:asm_Beng ay:ayr_Latn az:azj_Latn ba:bak_Cyrl be:bel_Cyrl
    bg:bul_Cyrl bm:bam_Latn bn:ben_Beng bo:bod_Tibt bs:bos_Latn ca:cat_Latn ceb:ceb_Latn cs:ces_Latn cy:cym_Latn
    da:dan_Latn de:deu_Latn dz:dzo_Tibt ee:ewe_Latn el:ell_Grek en:eng_Latn eo:epo_Latn es:spa_Latn et:est_Latn
    eu:eus_Latn fa:pes_Arab fi:fin_Latn fj:fij_Latn fo:fao_Latn fr:fra_Latn ga:gle_Latn gd:gla_Latn gl:glg_Latn
    gn:grn_Latn gu:guj_Gujr ha:hau_Latn he:heb_Hebr hi:hin_Deva hr:hrv_Latn ht:hat_Latn hu:hun_Latn hy:hye_Armn
    id:ind_Latn ig:ibo_Latn ilo:ilo_Latn is:isl_Latn it:ita_Latn ja:jpn_Jpan jv:jav_Latn ka:kat_Geor kk:kaz_Cyrl
    km:khm_Khmr kn:kan_Knda ko:kor_Hang ku:kmr_Latn ky:kir_Cyrl lb:ltz_Latn lg:lug_Latn li:lim_Latn ln:lin_Latn
    lo:lao_Laoo lt:lit_Latn lv:lvs_Latn mg:plt_Latn mi:mri_Latn mk:mkd_Cyrl ml:mal_Mlym mn:khk_Cyrl mr:mar_Deva
    ms:zsm_Latn mt:mlt_Latn my:mya_Mymr ne:npi_Deva nl:nld_Latn nn:nno_Latn no:nob_Latn nb:nob_Latn ns:nso_Latn
    ny:nya_Latn oc:oci_Latn om:gaz_Latn or:ory_Orya pa:pan_Guru pl:pol_Latn ps:pbt_Arab pt:por_Latn qu:quy_Latn
    rn:run_Latn ro:ron_Latn ru:rus_Cyrl rw:kin_Latn sa:san_Deva sc:srd_Latn sd:snd_Arab sg:sag_Latn si:sin_Sinh
    sk:slk_Latn sl:slv_Latn sm:smo_Latn sn:sna_Latn so:som_Latn sq:als_Latn sr:srp_Cyrl ss:ssw_Latn st:sot_Latn
    su:sun_Latn sv:swe_Latn sw:swh_Latn ta:tam_Taml te:tel_Telu tg:tgk_Cyrl th:tha_Thai ti:tir_Ethi tk:tuk_Latn
    tl:tgl_Latn tn:tsn_Latn tr:tur_Latn ts:tso_Latn tt:tat_Cyrl ug:uig_Arab uk:ukr_Cyrl ur:urd_Arab uz:uzn_Latn
    vi:vie_Latn wo:wol_Latn xh:xho_Latn yi:ydd_Hebr yo:yor_Latn zh:zho_Hans zu:zul_Latn
    """
_FLORES_CODES = dict(entry.split(":") for entry in _FLORES_TABLE.split())

# Other codes of the same languages: withdrawn ones, those of ISO 639-2 and 639-3, macrolanguages, and M2M100's "ns".
_OTHER_TABLE = """
    iw:he in:id ji:yi jw:jv mo:ro fil:tl nb:no nob:no nor:no nso:ns cmn:zh zho:zh ara:ar fas:fa msa:ms swa:sw lav:lv est:et
    ekk:et aze:az uzb:uz mlg:mg mon:mn orm:om pus:ps que:qu sqi:sq yid:yi nep:ne kur:ku aym:ay ori:or srd:sc fuv:ff ful:ff
    fry:fy bre:br twi:tw kon:kg aka:ak grn:gn tgl:tl hye:hy alb:sq arm:hy baq:eu bur:my chi:zh cze:cs dut:nl fre:fr
    geo:ka ger:de gre:el ice:is mac:mk mao:mi may:ms per:fa rum:ro slo:sk tib:bo wel:cy kas:ks knc:kr kau:kr
    kik:ki
    """
_SAME = {name.partition("_")[0]: code for code, name in _FLORES_CODES.items() if code not in ("no", "nb", "ns")}
_SAME |= {"nno": "nn"} | dict(entry.split(":") for entry in _OTHER_TABLE.split())

# The script that a region writes a language in, where that is not the same everywhere.
_SCRIPTS_TABLE = """
    zh_CN:Hans zh_SG:Hans zh_MY:Hans zh_TW:Hant zh_HK:Hant zh_MO:Hant pa_IN:Guru pa_PK:Arab uz_UZ:Latn uz_AF:Arab az_AZ:Latn
    az_IR:Arab mn_MN:Cyrl mn_CN:Mong kk_KZ:Cyrl kk_CN:Arab ky_KG:Cyrl ky_CN:Arab ms_CC:Arab sd_IN:Deva sd_PK:Arab
    """
_SCRIPTS = dict(entry.split(":") for entry in _SCRIPTS_TABLE.split())


@dataclass(frozen=True)
class _Code:
    """A language code in parts: ``zh-tw`` is language zh, script Hant, region TW. Empty: not said."""

    language: str
    script: str
    region: str

    @classmethod
    def of(cls, text: str) -> _Code | None:
        found = _CODE.fullmatch(text)
        if not found:
            return None
        language, script, region = (part or "" for part in found.groups())
        language, script, region = language.lower(), script.title(), region.upper()
        language = _SAME.get(language, language)
        region = "" if region == "XX" else region  # mBART's for any
        return cls(language, script or _SCRIPTS.get(f"{language}_{region}", ""), region)

    def includes(self, asked: _Code) -> bool:
        """Whether a tag of this meaning is one for ``asked``: it says the same, or leaves open what that says."""
        pairs = ((self.script, asked.script), (self.region, asked.region))
        return all(not (own and other) or own == other for own, other in pairs)


def tag(language: str) -> str:
    """The tag of a language in a vocabulary of ours: ``de`` gives ``__de__``."""
    return f"__{language}__"


def languages_of(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """The language tags of a tokenizer: by what they name (``de``, ``deu_Latn``, ``de_DE``) the token itself."""
    if (targets := getattr(tokenizer, "supported_language_codes", None)) is not None:  # Marian's, of target languages
        return {match[1]: token for token in targets if (match := _MARIAN.fullmatch(token))}
    found = {}
    listed = getattr(tokenizer, "lang_code_to_token", {}).values()  # M2M100's need not be among the special tokens
    for token in [*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens, *listed]:
        if match := _OURS.fullmatch(token):
            found[match[1]] = token
        elif _FLORES.fullmatch(token) or _MBART.fullmatch(token):
            found[token] = token
    return found


def same_language(one: str, other: str) -> bool:
    """Whether two codes are of one language, whatever their scripts and regions: ``de``, ``deu``, ``de_AT``."""
    first, second = _Code.of(one), _Code.of(other)
    return one == other or (first is not None and second is not None and first.language == second.language)


def tag_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of all language tags of a tokenizer."""
    ids = tokenizer.convert_tokens_to_ids(list(languages_of(tokenizer).values()))
    assert isinstance(ids, list)
    return ids


def is_ours(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer is one that :func:`nspec.mt.text.vocabulary.export_tokenizer` makes.

    That is one of NLLB's class with tags like ``__de__``, which no published one has.
    """
    tags = languages_of(tokenizer).values()
    return type(tokenizer).__name__.startswith("Nllb") and all(map(_OURS.fullmatch, tags))


def language_tag(tokenizer: PreTrainedTokenizerBase, language: str) -> str:
    """The tag token of a language.

    The code itself where it is a tag (``deu_Latn``, ``de`` for ``__de__``); else the tag of the same language, whatever it
    is called there (``de``, ``deu``, ``de_DE`` and ``de-Latn`` are ``deu_Latn`` in NLLB; ``iw`` is ``__he__`` in M2M100),
    if its script and region are those of the code or are left open by one of the two. A region stands for its script:
    ``zh_TW`` is ``zho_Hant``. A code without a script where there are several takes what NLLB's usual one is.

    Raises:
        ValueError: there is no such tag, or there are several; the message names the nearest, or these.
    """
    tags = languages_of(tokenizer)
    if language in tags:
        return tags[language]
    asked = _Code.of(language)
    meanings = {name: code for name in tags if (code := _Code.of(name))}
    same = [name for name, code in meanings.items() if asked and code.language == asked.language]
    fitting = [name for name in same if asked and meanings[name].includes(asked)]
    usual = _FLORES_CODES.get(asked.language, "") if asked and not asked.script else ""
    for names in (fitting, [name for name in fitting if name == usual]):
        if len(names) == 1:
            return tags[names[0]]
    if len(fitting) > 1:
        raise ValueError(
            f"the language {language!r} may be {' or '.join(sorted(fitting))} in this vocabulary; write one of these"
        )
    shown = ", ".join(sorted(tags))
    near = same or difflib.get_close_matches(language, tags, n=3)
    hint = f"; the nearest: {', '.join(sorted(near))}" if near else ""
    raise ValueError(f"the vocabulary has no tag for the language {language!r}; it has {shown}{hint}")


def language_id(tokenizer: PreTrainedTokenizerBase, language: str) -> int:
    """The token id of a language's tag; see :func:`language_tag`."""
    token_id = tokenizer.convert_tokens_to_ids(language_tag(tokenizer, language))
    assert isinstance(token_id, int)  # of one token, not of a list
    return token_id

"""Codes of languages and the names of directions: how they are written, read and told from other words.

A direction, the task of a run, is two codes joined by a hyphen: ``en-de``. Inside a run a code has no hyphen: it is
``pt_BR``, ``zh_Hans``, ``eng_Latn``. Where codes are read (options, names of files, keys of JSON objects, headers), hyphens
inside them are taken as well and become underscores, so that ``en-zh-Hans`` is ``en-zh_Hans``.
"""

from __future__ import annotations

import re
from functools import lru_cache

CODE = re.compile(r"[A-Za-z]{2,8}(_[A-Za-z0-9]+)*")
"""A code as a run has it."""

FILE_CODE = r"[a-z]{2,3}(?:_[A-Za-z0-9]+)*"
"""The stricter form of what stands in names of files and in keys of JSON objects, as a pattern: de, pt_BR, eng_Latn."""

_ISO_639_1 = """
    aa ab ae af ak am an ar as av ay az ba be bg bh bi bm bn bo br bs ca ce ch co cr cs cu cv cy da de dv dz ee el en
    eo es et eu fa ff fi fj fo fr fy ga gd gl gn gu gv ha he hi ho hr ht hu hy hz ia id ie ig ii ik io is it iu iw ja
    jv ka kg ki kj kk kl km kn ko kr ks ku kv kw ky la lb lg li ln lo lt lu lv mg mh mi mk ml mn mr ms mt my na nb nd
    ne ng nl nn no nr nv ny oc oj om or os pa pi pl ps pt qu rm rn ro ru rw sa sc sd se sg sh si sk sl sm sn so sq sr
    ss st su sv sw ta te tg th ti tk tl tn to tr ts tt tw ty ug uk ur uz ve vi vo wa wo xh yi yo za zh zu
    """
# Of the 7900 codes of ISO 639-3 those of the languages above and of FLORES-200, NLLB and Tatoeba. All of them would be of
# no use here: src, tgt, ref, url, tag, doc and idx are languages too.
_ISO_639_3 = """
    aar abk ace acm acq aeb afr ajp aka als amh apc ara arb arg ars ary arz asm ast ava awa aym ayr azb aze azj bak
    bam ban bar bel bem ben bho bih bis bjn bod bos bre bug bul cat ceb ces cha che chr chu chv cjk ckb cmn cor cos
    crh csb cym dan deu dik div dsb dyu dzo ell eng epo est eus ewe fao fas fij fil fin fon fra frr fry ful fur fuv
    gaz gcf gla gle glg glv grn gsw guj hat hau haw hbs heb hil hin hmn hne hrv hsb hun hye hyw ibo ido ile ilo ina
    ind isl ita jav jbo jpn kab kac kal kam kan kas kat kaz kbp kea kha khk khm kik kin kir kmb kmr knc kok kon kor
    kur lad lao lat lav lfn lij lim lin lit lld lmo ltg ltz lua lug luo lus lvs lzh mag mah mai mal mar min mkd mlg
    mlt mni mon mos mri msa mya nau nav nds nep nld nno nob nor npi nqo nso nus nya oci ori orm ory oss pag pam pan
    pap pbt pcm pes plt pms pnb pol por prs pus que quy roh rom ron run rus sag sah san sat scn sco shn sin slk slv
    sme smo sna snd som sot spa sqi srd srn srp ssw sun swa swe swh syc szl tah tam taq tat tel tet tgk tgl tha tir
    tlh toi tok ton tpi tsn tso tuk tum tur twi tyv tzm uig ukr umb urd uzb uzn vec ven vie vol war wln wol wuu xho
    xmf ydd yid yor yue zha zho zlm zsm zul zza
    """
_SCRIPTS = """
    Adlm Arab Armn Beng Cans Cher Copt Cyrl Deva Ethi Geor Grek Gujr Guru Hang Hani Hans Hant Hebr Hira Jpan Kana Khmr
    Knda Kore Laoo Latn Lisu Mlym Mong Mtei Mymr Nkoo Olck Orya Sinh Sund Syrc Taml Telu Tfng Thaa Thai Tibt Vaii Yiii
    Zyyy
    """
ISO_639_1, ISO_639_3, SCRIPTS = (frozenset(table.split()) for table in (_ISO_639_1, _ISO_639_3, _SCRIPTS))
# Countries in small letters that are languages elsewhere.
_COUNTRIES = frozenset(["pt-br", "fr-ca", "en-ca", "zh-tw"])
_VARIANTS = frozenset(["ca-valencia", "be-tarask"])


@lru_cache(maxsize=4096)  # keys of JSON objects, row after row
def language_code(text: str) -> str | None:
    """A code as a run has it: ``zh-Hans`` gives ``zh_Hans``; None where ``text`` is no code.

    What follows a hyphen must be a script (``Latn``), a country (``BR``, ``419``; in small letters where that is no
    language), so that ``en-de`` is not taken for one code.
    """
    first, *subtags = text.split("-")
    if not CODE.fullmatch(first):
        return None
    language, *given = first.split("_")
    kinds = [_kind(language, subtag) for subtag in subtags]
    before = max((_kind(language, subtag) for subtag in given), default=0)
    rising = all(low < high for low, high in zip([before, *kinds], kinds))
    return "_".join([first, *subtags]) if rising else None


@lru_cache(maxsize=4096)
def plain_code(text: str) -> str | None:
    """:func:`language_code` of what may be no code, as in names of files: the language is two or three small letters."""
    code = language_code(text)
    return code if code and re.fullmatch(FILE_CODE, code) else None


def _kind(language: str, subtag: str) -> int:
    """What follows a language, in the order in which it stands: 1 a script, 2 a country, 3 a variant; 0 nothing known."""
    if f"{language}-{subtag}" in _VARIANTS:
        return 3
    if subtag.title() in SCRIPTS and subtag in (subtag.title(), subtag.lower()):
        return 1
    small = re.fullmatch(r"[a-z]{2}", subtag) and (
        subtag not in ISO_639_1 or subtag == language or f"{language}-{subtag}" in _COUNTRIES
    )
    return 2 if small or re.fullmatch(r"[A-Z]{2}|[0-9]{3}", subtag) else 0


def is_known(code: str) -> bool:
    """Whether a code names a language beyond doubt: by ISO 639, or by a script (``xyz_Latn``); subtags are well formed."""
    language, *subtags = code.split("_")
    if not all(_kind(language, subtag) for subtag in subtags):
        return False
    return language in ISO_639_1 or language in ISO_639_3 or any(subtag in SCRIPTS for subtag in subtags)


def cuts(direction: str) -> list[tuple[str, str]]:
    """The ways to read a direction as two different codes, hyphens in them as underscores."""
    parts = direction.split("-")
    places = [("-".join(parts[:place]), "-".join(parts[place:])) for place in range(1, len(parts))]
    # With more hyphens than one, a code must be plain: else the script of sr-Latn-sr-Cyrl could be one, too.
    code = language_code if len(places) == 1 else plain_code
    read = [(code(source), code(target)) for source, target in places]
    return [(source, target) for source, target in read if source and target and source != target]


def languages_of_task(task: str) -> tuple[str, str]:
    """Source and target language of a direction: ``en-de`` gives ``("en", "de")``, ``en-zh-Hans`` ``("en", "zh_Hans")``.

    Raises:
        ValueError: it is not two codes joined by "-", or cannot be read in one way alone.
    """
    source, _, target = task.partition("-")
    if source and target and "-" not in target:
        return source, target
    found = cuts(task)
    if len(found) != 1:
        raise ValueError(
            f"direction {task!r}: expected two language codes joined by '-', such as en-de (in a code write '_': pt_BR)"
        )
    return found[0]


def task_of(source: str, target: str) -> str:
    """The direction from one language to another, the reverse of :func:`languages_of_task`."""
    return f"{source}-{target}"


def pair_of_task(task: str) -> str:
    """The name of the files that both directions between two languages share: ``en-de`` gives ``de-en``."""
    return task_of(*sorted(languages_of_task(task)))


def normalized_code(text: str) -> str:
    """:func:`language_code`, or ``text`` itself where it is none, for a check that follows."""
    return language_code(text) or text


def normalized_task(text: str) -> str:
    """A direction with underscores in its codes, or ``text`` itself where it is none, for a check that follows."""
    try:
        return task_of(*languages_of_task(text))
    except ValueError:
        return text

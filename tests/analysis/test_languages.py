from __future__ import annotations

import itertools
import string
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from nspec.analysis import languages, lineages
from nspec.analysis.lineages import EC30_GROUPS, STANDS_FOR, Group

LETTERS = string.ascii_lowercase
EC30 = " ".join(EC30_GROUPS.values()).split()


COMMON_CODES = (
    "am ar az bg bn ca cs cy da de el en es et eu fa fi fr ga gu ha he hi hr hu hy id ig is it ja ka kk km kn ko lo lt lv"
    " mg ml mn mr ms mt my ne nl no or pl ps pt ro ru rw sd si sk sl so sq sr sv sw ta te th ti tl tr uk ur uz vi xh yi yo"
    " zh zu"
)
COMMON = COMMON_CODES.split()


def test_every_language_has_a_family_and_one_branch_at_most() -> None:
    for code in {*COMMON, *EC30, *STANDS_FOR}:
        entry = languages.language(code)
        assert entry.code == code
        assert all(group.name for group in entry.groups)
        assert sum(group.is_branch for group in entry.groups) <= 1, entry
        names = [group.name for group in entry.groups]
        assert len(set(names)) == len(names)


def test_no_group_says_what_another_says() -> None:
    # Two groups of the same languages would count one meeting point twice.
    codes = {code for code in (a + b for a in LETTERS for b in LETTERS) if languages.is_known(code)}
    assert len(codes) > 170
    members: dict[str, set[str]] = {}
    for code in codes:
        for group in languages.language(code).groups:
            members.setdefault(group.name, set()).add(code)
    shared = [frozenset(inside) for inside in members.values() if len(inside) > 1]
    assert len(set(shared)) == len(shared)
    assert len(shared) > 60


def test_languages_that_nobody_relates_have_a_family_each() -> None:
    assert languages.genetic_distance("eo", "ia") == 1  # Glottolog has both under one heading
    assert languages.language("eu").groups == (Group("Basque"),)


def test_a_macrolanguage_stands_where_its_member_stands() -> None:
    assert languages.language("arb").groups == languages.language("ar").groups
    assert languages.genetic_distance("ar", "arb_Arab") == 0
    assert languages.genetic_distance("ar", "mt") < languages.genetic_distance("ar", "he")


@pytest.fixture
def without_tree(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    caches = (lineages.language, lineages._database, lineages._kept)
    for cache in caches:
        cache.cache_clear()
    monkeypatch.setitem(sys.modules, "qq", None)  # as if it were not installed
    yield
    for cache in caches:
        cache.cache_clear()


def test_without_the_tree_an_error_names_the_package_and_ec30_has_its_groups(without_tree: None) -> None:
    with pytest.raises(ValueError, match=r"Glottolog's tree, which the package qwanqwa has: pip install qwanqwa"):
        languages.genetic_distances(["de", "nl"])
    assert "pip install qwanqwa" in languages.why_no_families()
    assert not languages.is_known("de")
    assert languages.group_of("kn", "ec30") == "Indo-Aryan"
    assert languages.script_of("ru") == "Cyrl"


def test_with_the_tree_nothing_is_missing() -> None:
    assert languages.why_no_families() == ""


FAMILIES = """
    Indo-European/Germanic: de nl sv da af lb en is no nb nn
    Indo-European/Romance: fr es it pt ro oc ca gl
    Indo-European/Slavic: ru cs pl bg uk sr hr sl
    Indo-European/Indo-Aryan: hi bn mr sd gu ur ne
    Indo-European/Eastern Baltic: lt lv
    Indo-European/Iranian: fa
    Indo-European/Greek: el
    Indo-European/Albanian: sq als aln als_Latn
    Afro-Asiatic/Semitic: ar he mt am ti
    Afro-Asiatic/Chadic: ha
    Afro-Asiatic/Cushitic: so
    Afro-Asiatic/Berber: kab tzm_Latn zgh taq
    Atlantic-Congo/Narrow Bantu: sw zu xh rw
    Sino-Tibetan/Sinitic: zh yue_Hant wuu nan_Latn cmn_Hant
"""
NO_BRANCH = """
    Atlantic-Congo: ig yo, Dravidian: kn ta te ml, Uralic: fi et hu, Turkic: tr az kk uz, Basque: eu, Koreanic: ko,
    Mongolic-Khitan: mn, Japonic: ja, Austroasiatic: vi km, Tai-Kadai: th lo, Austronesian: id ms tl
"""


def test_families_and_branches() -> None:
    for line in FAMILIES.strip().split("\n") + NO_BRANCH.split(","):
        named, codes = line.strip().split(": ")
        family, _, branch = named.partition("/")
        for code in codes.split():
            assert languages.group_of(code, "family") == family
            assert languages.group_of(code, "branch") == (branch or family)


def test_kannada_is_dravidian_but_indo_aryan_to_the_authors_of_ec30() -> None:
    assert languages.group_of("kn", "ec30") == "Indo-Aryan"
    assert languages.group_of("ha", "ec30") == "Afro-Asiatic"
    assert languages.genetic_distance("kn", "mr") == 1
    differ = [code for code in EC30 if languages.group_of(code, "ec30") not in languages_groups(code)]
    assert differ == ["kn"]


def languages_groups(code: str) -> list[str]:
    return [group.name for group in languages.language(code).groups]


def test_distance_is_one_over_one_more_than_the_groups_shared() -> None:
    assert languages.genetic_distance("de", "de") == 0
    assert languages.genetic_distance("de", "deu_Latn") == 0
    assert languages.genetic_distance("de", "ar") == 1
    assert languages.genetic_distance("de", "fr") == 1 / 2  # Indo-European
    assert languages.genetic_distance("de", "sv") == 1 / 3  # Germanic
    assert languages.genetic_distance("de", "en") == languages.genetic_distance("de", "nl") == 1 / 4  # West Germanic
    assert languages.genetic_distance("de", "lb") == 1 / 5  # High German
    assert languages.genetic_distance("ru", "lt") == 1 / 3  # Balto-Slavic
    assert languages.genetic_distance("fr", "la") == 1 / 3  # Italic: of Glottolog's four groups for this one counts


def test_closer_relatives_are_nearer() -> None:
    for near in [
        "de-nl de-sv",
        "es-pt es-fr",
        "es-fr es-ro",
        "ru-uk ru-pl",
        "cs-sk cs-pl",
        "hi-ur hi-bn",
        "hi-bn hi-fa",
    ]:
        a, b = (languages.genetic_distance(*pair.split("-")) for pair in near.split())
        assert a < b, near


def test_distances_are_ultrametric() -> None:
    codes = COMMON
    far = languages.genetic_distances(codes)
    assert np.array_equal(far, far.T)
    assert (np.diag(far) == 0).all()
    assert (far[~np.eye(len(codes), dtype=bool)] > 0).all()
    # No side of a triangle is longer than the longer of the other two.
    assert (far[:, None, :] <= np.maximum(far[:, :, None], far[None, :, :]) + 1e-12).all()


def test_codes_may_be_written_in_several_ways() -> None:
    ways = "pt_BR=pt pt-BR=pt deu=de deu_Latn=de DE=de arb_Arab=ar zh-Hans-CN=zh cmn_Hans=zh pes=fa iw=he sr_Latn=sr nno=nn"
    for written, _, code in (way.partition("=") for way in [*ways.split(), "ca@valencia=ca"]):
        assert languages.language(written).code == code


def test_an_unknown_language_is_an_error_that_says_what_else_there_is() -> None:
    with pytest.raises(
        ValueError, match=r"the family of language 'xx_Latn' is not known: Glottolog has no such language; for others"
    ):
        languages.genetic_distances(["de", "xx_Latn"])
    with pytest.raises(ValueError, match=r"language '' is not known"):
        languages.language("")
    with pytest.raises(ValueError, match=r"EC30 has no group for language 'en'; it has de nl"):
        languages.group_of("en", "ec30")
    with pytest.raises(ValueError, match=r"grouping is 'clan', expected one of branch, family, ec30"):
        languages.group_of("en", "clan")  # type: ignore[arg-type]


@pytest.mark.parametrize("code", ["ids", "zht", "cn", "cz", "qaa", "mul", "und", "bat_smg", "english", "src1"])
def test_what_is_no_language_has_no_family(code: str) -> None:
    assert not languages.is_known(code)


def test_sign_languages_and_registers_are_not_called_related() -> None:
    assert languages.genetic_distance("ase", "sgg") == 1


def test_script_follows_what_the_code_names() -> None:
    named = """
        zh=Hans zh_TW=Hant zh-HK=Hant cmn_TW=Hant zh_CN=Hans yue=Hant sr@latin=Latn sr_RS@latin=Latn uz@cyrillic=Cyrl
        sr_ME=Latn sr_RS=Cyrl pa_PK=Arab pa=Guru pt_BR=Latn es-419=Latn ZHO_hant=Hant az_IR=Arab de_DE.UTF-8=Latn
        ca@valencia=Latn ja_XX=Jpan zh-Hant-TW=Hant deu=Latn
    """
    for code, _, script in (pair.partition("=") for pair in named.split()):
        assert languages.script_of(code) == script


def test_script_distance_is_zero_for_one_script() -> None:
    latin, cyrillic = [0, 0, 1, 1, 0], [1, 1, 0, 0, 1]
    expected = [latin, latin, cyrillic, cyrillic, latin]
    assert languages.script_distances(["de", "fr", "ru", "sr", "sr_Latn"]).tolist() == expected
    with pytest.raises(ValueError, match=r"the script of language 'xx' is not known to CLDR; name it, such as xx_Latn"):
        languages.script_of("xx")
    assert all(
        languages.script_of(a) != languages.script_of(b) for a, b in itertools.combinations(["hi", "ur", "bn"], 2)
    )


def test_distances_of_a_file_hold_either_way_and_for_any_language(tmp_path: Path) -> None:
    path = tmp_path / "far.tsv"
    path.write_text("# my own tree\nde\tnl\t0.25\n\ntlh de 3  # not in the table\nnl tlh 2\nnl de 0.25\n")
    assert languages.read_distances(path)(["tlh", "de", "nl"]).tolist() == [[0, 3, 2], [3, 0, 0.25], [2, 0.25, 0]]
    with pytest.raises(ValueError, match=r"far.tsv has no distance of de and fr; it needs one for every two"):
        languages.read_distances(path)(["de", "fr"])


@pytest.mark.parametrize(
    "line",
    [
        *("de nl", "de nl far", "de nl 1 2", "de nl -1", "de nl nan", "de nl inf", "de de 1", "de", "a b distance"),
        *("de nl 0,5", "lang1 lang2 distance", "de nl 1_0", "de nl 1e999", "de nl 0x1", "de nl 0 .5"),
    ],
)
def test_a_line_that_is_no_distance_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "far.tsv"
    path.write_text(f"de fr 1\n{line}\n")
    with pytest.raises(ValueError) as caught:
        languages.read_distances(path)
    found = repr(" ".join(line.split()))
    expected = f"{path} line 2: expected two languages and their distance, such as de nl 0.2; found {found}"
    assert str(caught.value) == expected + ("; write the number with a point" if "," in line else "")


def test_marks_line_ends_and_the_diagonal_change_no_distance(tmp_path: Path) -> None:
    path = tmp_path / "far.tsv"
    path.write_bytes(b"\xef\xbb\xbfde nl 2.5e-1\r\nde de 0\r\nnl de +.25\r\n\r\nde fr 1.\r\nfr nl 2")
    assert languages.read_distances(path)(["de", "nl", "fr"]).tolist() == [[0, 0.25, 1], [0.25, 0, 2], [1, 2, 0]]
    path.write_bytes("de nl 1\n".encode("utf-16"))
    with pytest.raises(ValueError, match=r"far.tsv is not UTF-8: byte 0 is 0xff"):
        languages.read_distances(path)


def test_two_distances_of_one_pair_are_an_error(tmp_path: Path) -> None:
    path = tmp_path / "far.tsv"
    path.write_text("de fr 1\nfr de 2\n")
    with pytest.raises(ValueError, match=r"far.tsv line 2: fr and de have another distance above, 1"):
        languages.read_distances(path)
    path.write_bytes(b"de fr \xe9\n")
    with pytest.raises(ValueError, match=r"far.tsv is not UTF-8: byte 6 is 0xe9"):
        languages.read_distances(path)

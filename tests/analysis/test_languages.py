from __future__ import annotations

import itertools
import re
from pathlib import Path

import numpy as np
import pytest

from nspec.analysis import languages
from nspec.analysis.lineages import ALIASES, EC30_GROUPS

EC30 = " ".join(EC30_GROUPS.values()).split()


def test_every_entry_is_whole_and_named_once() -> None:
    table = languages.known()
    assert len(table) > 140
    for code, entry in table.items():
        assert entry.code == code
        assert re.fullmatch(r"[a-z]{2}", code)
        assert re.fullmatch(r"[a-z]{3}", entry.iso3)
        assert re.fullmatch(r"[A-Z][a-z]{3}", entry.script)
        assert entry.name
        assert entry.groups
        assert sum(group.is_branch for group in entry.groups) <= 1
    for field in ("iso3", "name"):
        assert len({getattr(entry, field) for entry in table.values()}) == len(table)
    groups = {group for entry in table.values() for group in entry.groups}
    assert len({group.name for group in groups}) == len(groups)
    places = {entry.groups[: depth + 1] for entry in table.values() for depth in range(len(entry.groups))}
    assert len(places) == len(groups), "a group of one name stands in one place"
    assert set(ALIASES.values()) <= set(table)
    assert not set(ALIASES) & set(table)


def test_no_group_says_what_another_says() -> None:
    # Two groups of the same languages would count one meeting point twice.
    table = languages.known()
    members: dict[str, frozenset[str]] = {}
    for group in {group.name for entry in table.values() for group in entry.groups}:
        inside = [code for code, entry in table.items() if group in [other.name for other in entry.groups]]
        if len(inside) > 1:
            members[group] = frozenset(inside)
    assert len(set(members.values())) == len(members)


def test_the_table_has_ec30_and_what_the_configurations_use() -> None:
    assert len(EC30) == len(set(EC30)) == 30
    assert set(EC30) | set(["en", "fa", "pl", "ar", "he", "nl", "de", "it", "es", "fr", "cs"]) <= set(languages.known())


@pytest.mark.parametrize(
    ("codes", "family", "branch"),
    [
        ("de nl sv da af lb en is no", "Indo-European", "Germanic"),
        ("fr es it pt ro oc ca gl", "Indo-European", "Romance"),
        ("ru cs pl bg uk sr hr sl", "Indo-European", "Slavic"),
        ("hi bn mr sd gu ur ne", "Indo-European", "Indo-Aryan"),
        ("lt lv", "Indo-European", "Baltic"),
        ("fa", "Indo-European", "Iranian"),
        ("ar he mt am ti", "Afro-Asiatic", "Semitic"),
        ("ha", "Afro-Asiatic", "Chadic"),
        ("so", "Afro-Asiatic", "Cushitic"),
        ("sw zu xh rw", "Atlantic-Congo", "Bantu"),
        ("ig yo", "Atlantic-Congo", "Volta-Niger"),
        ("kn ta te ml", "Dravidian", "Dravidian"),
        ("fi et hu", "Uralic", "Uralic"),
        ("tr az kk uz", "Turkic", "Turkic"),
        ("eu", "Basque", "Basque"),
        ("zh", "Sino-Tibetan", "Sinitic"),
        ("ja", "Japonic", "Japonic"),
        ("ko", "Koreanic", "Koreanic"),
        ("vi km", "Austroasiatic", "Austroasiatic"),
        ("th lo", "Tai-Kadai", "Tai-Kadai"),
        ("id ms tl", "Austronesian", "Austronesian"),
    ],
)
def test_families_and_branches(codes: str, family: str, branch: str) -> None:
    for code in codes.split():
        assert languages.group_of(code, "family") == family
        assert languages.group_of(code, "branch") == branch


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


def test_closer_relatives_are_nearer() -> None:
    for near in (
        "de-nl de-sv",
        "es-pt es-fr",
        "es-fr es-ro",
        "ru-uk ru-pl",
        "cs-sk cs-pl",
        "hi-ur hi-bn",
        "hi-bn hi-fa",
    ):
        a, b = (languages.genetic_distance(*pair.split("-")) for pair in near.split())
        assert a < b, near


def test_distances_are_ultrametric() -> None:
    codes = list(languages.known())
    far = languages.genetic_distances(codes)
    assert np.array_equal(far, far.T)
    assert (np.diag(far) == 0).all()
    assert (far[~np.eye(len(codes), dtype=bool)] > 0).all()
    # No side of a triangle is longer than the longer of the other two.
    assert (far[:, None, :] <= np.maximum(far[:, :, None], far[None, :, :]) + 1e-12).all()


@pytest.mark.parametrize(
    ("written", "code"),
    [
        ("pt_BR", "pt"),
        ("pt-BR", "pt"),
        ("deu", "de"),
        ("deu_Latn", "de"),
        ("DE", "de"),
        ("arb_Arab", "ar"),
        ("zh-Hans-CN", "zh"),
        ("cmn_Hans", "zh"),
        ("pes", "fa"),
        ("iw", "he"),
        ("sr_Latn", "sr"),
        ("nno", "nn"),
        ("ca@valencia", "ca"),
    ],
)
def test_codes_may_be_written_in_several_ways(written: str, code: str) -> None:
    assert languages.normalize(written) == code
    assert languages.language(written).code == code


def test_an_unknown_language_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match=r"the family of language 'tlh_Latn' is not known; known are aa ab af .* zu; for others"
    ):
        languages.genetic_distances(["de", "tlh_Latn"])
    with pytest.raises(ValueError, match=r"language '' is not known"):
        languages.normalize("")
    with pytest.raises(ValueError, match=r"EC30 has no group for language 'en'; it has de nl"):
        languages.group_of("en", "ec30")
    with pytest.raises(ValueError, match=r"grouping is 'clan', expected one of branch, family, ec30"):
        languages.group_of("en", "clan")  # type: ignore[arg-type]


def test_script_distance_is_zero_for_one_script() -> None:
    assert languages.script_distances(["de", "fr", "ru", "sr", "sr_Latn"]).tolist() == [
        [0, 0, 1, 1, 0],
        [0, 0, 1, 1, 0],
        [1, 1, 0, 0, 1],
        [1, 1, 0, 0, 1],
        [0, 0, 1, 1, 0],
    ]
    assert languages.script_of("pt_BR") == "Latn"
    assert languages.script_of("zh-Hant-TW") == "Hant"
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
    "line", ["de nl", "de nl far", "de nl 1 2", "de nl -1", "de nl nan", "de nl inf", "de de 1", "de"]
)
def test_a_line_that_is_no_distance_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "far.tsv"
    path.write_text(f"de fr 1\n{line}\n")
    with pytest.raises(ValueError, match=rf"far.tsv line 2: expected two languages .* found '{line}'"):
        languages.read_distances(path)


def test_two_distances_of_one_pair_are_an_error(tmp_path: Path) -> None:
    path = tmp_path / "far.tsv"
    path.write_text("de fr 1\nfr de 2\n")
    with pytest.raises(ValueError, match=r"far.tsv line 2: fr and de have another distance above, 1"):
        languages.read_distances(path)
    path.write_bytes(b"de fr \xe9\n")
    with pytest.raises(ValueError, match=r"far.tsv is not UTF-8: byte 6 is 0xe9"):
        languages.read_distances(path)

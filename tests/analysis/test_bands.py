from __future__ import annotations

from nspec.analysis.bands import Band, band_order, grouping_of


def test_directions_stand_by_side_of_the_pivot_and_then_by_group() -> None:
    tasks = ["fr-en", "en-nl", "en-fr", "de-en", "en-de", "nl-en"]
    order, bands = band_order(tasks, "en")
    assert order == ["en-de", "en-nl", "en-fr", "de-en", "nl-en", "fr-en"]
    assert bands == [
        Band("Germanic", 0, 0, 2),
        Band("Romance", 0, 2, 1),
        Band("Germanic", 1, 3, 2),
        Band("Romance", 1, 5, 1),
    ]


def test_ec30_has_its_own_groups_and_order() -> None:
    # Kannada is Dravidian, but EC30's authors count it as Indo-Aryan; Maltese stands with Amharic as Afro-Asiatic.
    order, bands = band_order(["en-mt", "en-kn", "en-hi", "en-ru", "en-de"], "en")
    assert order == ["en-de", "en-ru", "en-hi", "en-kn", "en-mt"]
    assert [band.name for band in bands] == ["Germanic", "Slavic", "Indo-Aryan", "Afro-Asiatic"]
    assert grouping_of(["kn", "hi"]) == "ec30"


def test_a_language_outside_ec30_gives_branches_and_unknown_ones_come_last() -> None:
    assert grouping_of(["de", "fa"]) == "branch"
    order, bands = band_order(["en-qqq", "en-he", "en-de", "en-fa"], "en")
    assert order[-1] == "en-qqq"
    assert bands[-1] == Band("other", 0, 3, 1)
    assert {band.name for band in bands[:-1]} == {"Germanic", "Semitic", "Iranian"}


def test_without_a_pivot_directions_stand_in_the_group_of_their_source() -> None:
    order, bands = band_order(["de-fr", "fr-de", "nl-fr"], "")
    assert order == ["de-fr", "nl-fr", "fr-de"]
    assert [(band.name, band.part, band.size) for band in bands] == [("Germanic", 2, 2), ("Romance", 2, 1)]

from __future__ import annotations

import importlib.metadata

import numpy as np
import pytest

from nspec.analysis import typology
from nspec.analysis.typology import ASPECTS, typological_distances

pytest.importorskip("qq", reason="language codes are looked up in qwanqwa")
try:
    importlib.metadata.version("lang2vec")
except importlib.metadata.PackageNotFoundError:
    pytest.skip("lang2vec, which has URIEL's vectors, is not installed", allow_module_level=True)

CODES = ["ar", "de", "es", "fr", "he", "hi", "nl", "ru", "uk", "zh"]


@pytest.mark.parametrize("aspect", ASPECTS)
def test_distances_are_symmetric_and_zero_for_a_language_and_itself(aspect: typology.Aspect) -> None:
    far = typological_distances(aspect)(CODES)
    assert far.shape == (10, 10)
    assert np.array_equal(far, far.T)
    assert (np.diag(far) == 0).all()
    assert 0 <= far.min() < far.max() <= 1


def test_languages_of_like_structure_are_near() -> None:
    syntax = typological_distances("syntax")
    for near, away in (("de-nl", "de-hi"), ("ru-uk", "ru-ar"), ("fr-es", "fr-zh"), ("ar-he", "ar-de")):
        assert syntax(near.split("-"))[0, 1] < syntax(away.split("-"))[0, 1]


def test_the_distance_is_one_less_the_cosine_of_the_aspects_vectors() -> None:
    rows, features, values = typology._vectors()
    chosen = [i for i, name in enumerate(features) if str(name).startswith("P_")]
    a, b = values[rows["deu"], chosen], values[rows["arb"], chosen]  # Arabic stands where Standard Arabic does
    expected = 1 - (a @ b) / np.sqrt((a @ a) * (b @ b))
    assert typological_distances("phonology")(["de", "ar"])[0, 1] == pytest.approx(expected, abs=1e-12)
    assert set(np.unique(values)) == {0, 1}


def test_an_aspect_or_a_language_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"URIEL has no 'colour' here, expected one of syntax, phonology, inventory"):
        typological_distances("colour")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"the family of language 'xx' is not known"):
        typological_distances("syntax")(["de", "xx"])
    rows, features, values = typology._vectors()
    less = {name: row for name, row in rows.items() if name != "deu"}
    monkeypatch.setattr(typology, "_vectors", lambda: (less, features, values))
    with pytest.raises(ValueError, match=r"URIEL has no vectors of de"):
        typological_distances("syntax")(["nl", "de"])
    monkeypatch.undo()

    def absent(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", absent)
    typology._vectors.cache_clear()
    with pytest.raises(ValueError, match=r"URIEL's vectors are in the package lang2vec: pip install lang2vec"):
        typological_distances("syntax")

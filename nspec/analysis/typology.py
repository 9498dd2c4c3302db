"""How far apart languages are in their structure: the vectors of URIEL (Littell et al., EACL 2017).

The package lang2vec ships them (data under CC BY-SA 4.0), with gaps filled by the nearest languages. Its module asks for
``pkg_resources``, which current setuptools no longer have, so only its data files are read. Some seconds are spent on
the first use.
"""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import pdist, squareform

from nspec.analysis.lineages import language
from nspec.analysis.overlap import Floats

Aspect = Literal["syntax", "phonology", "inventory"]
ASPECTS: tuple[Aspect, ...] = get_args(Aspect)
_PREFIXES = {"syntax": "S_", "phonology": "P_", "inventory": "INV_"}


def typological_distances(aspect: Aspect) -> Callable[[Sequence[str]], Floats]:
    """The distances of URIEL: 1 - the cosine of two languages' vectors of zeros and ones, in [0, 1].

    Args:
        aspect: ``syntax`` (word order and the like), ``phonology`` or ``inventory`` (which sounds there are).

    Returns:
        A function like :func:`nspec.analysis.languages.genetic_distances`.

    Raises:
        ValueError: there is no such aspect, lang2vec is not installed, or, from the function, URIEL or the tree of
            languages lacks a language.
    """
    if aspect not in ASPECTS:
        raise ValueError(f"URIEL has no {aspect!r} here, expected one of {', '.join(ASPECTS)}")
    rows, features, values = _vectors()
    chosen = np.char.startswith(features, _PREFIXES[aspect])

    def distances(codes: Sequence[str]) -> Floats:
        names = [language(code).iso3 for code in codes]
        lacking = [code for code, name in zip(codes, names) if name not in rows]
        if lacking:
            raise ValueError(f"URIEL has no vectors of {', '.join(lacking)}")
        vectors = values[[rows[name] for name in names]][:, chosen]
        return np.asarray(squareform(np.clip(pdist(vectors, "cosine"), 0.0, 1.0)))

    return distances


@functools.cache
def _vectors() -> tuple[dict[str, int], NDArray[np.str_], Floats]:
    """Row of each language by ISO 639-3; names of features [n]; values float64 [languages, n]."""
    try:
        files = importlib.metadata.files("lang2vec") or []
    except importlib.metadata.PackageNotFoundError:
        raise ValueError("URIEL's vectors are in the package lang2vec: pip install lang2vec") from None
    [path] = [file for file in files if file.name == "feature_predictions.npz"]
    with np.load(path.locate()) as data:
        rows = {str(name): row for row, name in enumerate(data["langs"])}
        return rows, data["feats"], data["data"][:, :, 0].astype(np.float64)

"""Hierarchical clustering of languages by the distance of their masks."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from scipy.cluster import hierarchy

from nspec.analysis.mantel import condensed
from nspec.analysis.overlap import Floats


def average_linkage(distances: Floats) -> Floats:
    """Joins the two nearest clusters until one is left; clusters are as far apart as their members on average (UPGMA).

    Sokal and Michener, University of Kansas Science Bulletin 38, 1958.

    Args:
        distances: float [n, n], symmetric, n >= 2.

    Returns:
        float64 [n - 1, 4], a row for each join, in the format of ``scipy.cluster.hierarchy``: two clusters (lower index
        first), their distance, and the number of leaves of the new cluster, which is number n + row.

    Raises:
        ValueError: no symmetric matrix of finite numbers.
    """
    far = np.asarray(distances, dtype=np.float64)
    if far.ndim != 2 or far.shape[0] != far.shape[1] or len(far) < 2:
        raise ValueError(f"distances have shape {list(far.shape)}, expected [n, n] with n of 2 or more")
    if not np.isfinite(far).all() or not np.allclose(far, far.T, rtol=0, atol=1e-12):
        raise ValueError("distances are not symmetric or not finite, expected those of every two objects")
    return np.asarray(hierarchy.linkage(condensed(far), "average"))


def leaf_order(linkage: Floats) -> list[int]:
    """The n leaves of a linkage [n - 1, 4] as a tree shows them: for each join those of its first cluster come first."""
    return [int(leaf) for leaf in hierarchy.leaves_list(linkage)]


def newick(linkage: Floats, names: Sequence[str]) -> str:
    """The tree in Newick's format, which tools for trees read: ``((de:0.1,nl:0.1):0.2,ru:0.3);``.

    A node lies at half the distance at which it was joined, so two leaves are as far apart along the branches as their
    clusters were.

    Args:
        linkage: float [n - 1, 4] of :func:`average_linkage`.
        names: of the n leaves. One with other characters than letters, digits, dots and hyphens is quoted: readers take
            ``_`` for a blank.

    Raises:
        ValueError: the number of names is not the number of leaves.
    """
    n = len(linkage) + 1
    if len(names) != n:
        raise ValueError(f"there are {len(names)} names, expected one for each of {n} leaves")
    texts = [_quoted(name) for name in names]
    heights = [0.0] * n
    for first, second, distance, _ in linkage:
        height = float(distance) / 2
        children = (f"{texts[int(c)]}:{height - heights[int(c)]:.6g}" for c in (first, second))
        texts.append(f"({','.join(children)})")
        heights.append(height)
    return f"{texts[-1]};"


def _quoted(name: str) -> str:
    return name if re.fullmatch(r"[^\W_.-][^\W_]*(?:[.-][^\W_]+)*", name) else "'" + name.replace("'", "''") + "'"

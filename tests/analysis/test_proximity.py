from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from nspec import NeuronMasks
from nspec.analysis import languages, mantel, overlap, proximity

CODES = ["af", "ar", "da", "de", "es", "fr", "he", "it", "nl", "pl", "ru", "uk"]
LAYERS = [f"model.{side}.layers.{i}.fc1" for side in ("encoder", "decoder") for i in range(2)]


def planted_masks(
    codes: list[str] = CODES, d_ff: int = 800, planted: Callable[[str, str], bool] = lambda layer, task: True, seed=0
) -> NeuronMasks:
    """Masks that inherit: each group of the tree keeps nine tenths of what the group above it has.

    A language keeps as much as if all were equally deep in the tree, so that only the place where two meet counts.
    """
    rng = np.random.default_rng(seed)
    deepest = max(len(languages.language(code).groups) for code in codes)

    def redraw(mask: np.ndarray, share: float) -> np.ndarray:
        return np.where(rng.random(d_ff) < share, rng.random(d_ff) < 0.7, mask)

    tasks: dict[str, dict[str, torch.Tensor]] = {}
    for layer in LAYERS:
        for direction in ("from", "to"):
            drawn: dict[tuple[str, ...], np.ndarray] = {(): rng.random(d_ff) < 0.7}
            for code in codes:
                task = proximity.task_name(direction, "en", code)
                path = [group.name for group in languages.language(code).groups]
                for depth in range(1, len(path) + 1):
                    if tuple(path[:depth]) not in drawn:
                        drawn[tuple(path[:depth])] = redraw(drawn[tuple(path[: depth - 1])], 0.1)
                own = 1 - 0.9 ** (1 + deepest - len(path))
                mask = redraw(drawn[tuple(path)], own) if planted(layer, task) else rng.random(d_ff) < 0.7
                tasks.setdefault(task, {})[layer] = torch.from_numpy(mask)
    return NeuronMasks(tasks)


def test_masks_that_inherit_along_the_tree_are_found_and_random_ones_are_not() -> None:
    def is_planted(layer: str, task: str) -> bool:
        return "encoder" in layer and task.startswith("en-")

    found = proximity.proximity(planted_masks(planted=is_planted), "en", permutations=999)
    assert found.languages == {"from": tuple(CODES), "to": tuple(CODES)}
    assert [(row.layer, row.direction) for row in found.layers] == [(la, d) for la in LAYERS for d in ("from", "to")]
    for row in found.layers:
        assert row.test is not None
        assert row.reason == ""
        assert row.p_holm >= row.p_bh >= row.test.p
        if row.side == "encoder" and row.direction == "from":
            assert row.test.r > 0.5
            assert row.p_holm < 0.05
            assert row.within > row.across + 0.03
        else:
            assert row.p_holm > 0.05
            assert abs(row.within - row.across) < 0.015


def test_numbers_are_those_of_the_parts() -> None:
    masks = planted_masks()
    found = proximity.proximity(masks, "en", method="pearson", permutations=99, seed=5)
    row = found.layers[1]
    tasks = [f"{code}-en" for code in CODES]
    iou = overlap.pairwise_iou(overlap.layer_matrix(masks, row.layer, tasks))
    far = languages.genetic_distances(CODES)
    assert row.direction == "to"
    assert row.test == mantel.mantel(1 - iou, far, method="pearson", permutations=99, seed=5)
    p = [other.test.p for other in found.layers if other.test]
    np.testing.assert_allclose([other.p_holm for other in found.layers], mantel.holm(p))
    # Benjamini and Hochberg: min over j >= i of m p_(j) / j
    order = np.argsort(p)
    steps = np.array(p)[order] * len(p) / np.arange(1, len(p) + 1)
    expected = np.minimum.accumulate(steps[::-1])[::-1]
    np.testing.assert_allclose([found.layers[i].p_bh for i in order], expected)
    pairs = [(i, j) for i in range(12) for j in range(i)]
    same = [languages.group_of(CODES[i]) == languages.group_of(CODES[j]) for i, j in pairs]
    values = np.array([iou[i, j] for i, j in pairs])
    assert row.within == pytest.approx(values[same].mean())
    assert row.across == pytest.approx(values[~np.array(same)].mean())


def test_within_and_across_by_hand() -> None:
    iou = np.array([[1, 0.8, 0.2], [0.8, 1, 0.4], [0.2, 0.4, 1]])
    assert proximity.within_across(iou, ["a", "a", "b"]) == pytest.approx((0.8, 0.3))
    within, across = proximity.within_across(iou, ["a", "b", "c"])
    assert math.isnan(within)
    assert across == pytest.approx(1.4 / 3)
    # A language without a group is in neither mean.
    assert proximity.within_across(iou, ["a", "a", ""])[0] == pytest.approx(0.8)
    assert math.isnan(proximity.within_across(iou, ["a", "a", ""])[1])
    assert math.isnan(proximity.within_across(iou, ["", "", "a"])[0])


def test_a_layer_in_which_all_masks_are_equal_has_no_test_and_does_not_count() -> None:
    masks = planted_masks()
    same = {task: dict(masks[task]) for task in masks.tasks}
    for task in same:
        same[task][LAYERS[0]] = masks[masks.tasks[0]][LAYERS[0]]
    found = proximity.proximity(NeuronMasks(same), "en", permutations=99)
    for row in found.layers[:2]:
        assert row.test is None
        assert row.reason == "every two masks overlap alike"
        assert math.isnan(row.p_holm)
        assert row.within == row.across == 1
    rest = [row for row in found.layers if row.test]
    assert len(rest) == 6
    assert rest[0].p_holm == pytest.approx(min(1, 6 * 0.01))


def test_a_control_adds_a_partial_test() -> None:
    found = proximity.proximity(planted_masks(), "en", permutations=99, control=languages.script_distances)
    assert all(row.partial is not None and row.test is not None and row.partial.r != row.test.r for row in found.layers)
    p = [row.partial.p for row in found.layers if row.partial]
    assert [row.partial_p_holm for row in found.layers] == pytest.approx(mantel.holm(p).tolist())
    for row in proximity.proximity(planted_masks(), "en", permutations=9).layers:
        assert row.partial is None
        assert math.isnan(row.partial_p_holm)


def test_overlap_that_comes_of_density_alone_goes_where_density_is_held() -> None:
    """Related languages keep as many neurons, and which ones is chance."""
    rng, branches = np.random.default_rng(3), sorted({languages.group_of(code) for code in CODES})
    share = {code: 0.3 + 0.6 * branches.index(languages.group_of(code)) / len(branches) for code in CODES}
    layer = LAYERS[0]
    masks = NeuronMasks({f"en-{code}": {layer: torch.from_numpy(rng.random(4000) < share[code])} for code in CODES})
    (row,) = proximity.proximity(masks, "en", expected=proximity.mask_chance, permutations=999).layers
    assert row.test is not None
    assert row.density is not None
    assert abs(row.density.r) < 0.5 * abs(row.test.r)
    assert row.density_p_holm == row.density.p
    found = proximity.proximity(planted_masks(), "en", expected=proximity.mask_chance, permutations=99)
    assert all(row.density is not None and row.density.r > 0.4 for row in found.layers)
    chance = proximity.mask_chance(masks, [layer], "from", "en", CODES[:2])[0]
    a, b = (float(masks[f"en-{code}"][layer].float().mean()) for code in CODES[:2])
    assert chance == pytest.approx(np.array([[1, a * b / (a + b - a * b)], [a * b / (a + b - a * b), 1]]))


def test_tasks_without_the_pivot_are_left_out_and_one_direction_will_do() -> None:
    masks = planted_masks()
    some = {task: masks[task] for task in masks.tasks if task.startswith("en-")}
    found = proximity.proximity(NeuronMasks({**some, "de-fr": masks["en-de"]}), "en", permutations=9)
    assert found.languages == {"from": tuple(CODES)}
    assert len(found.layers) == len(LAYERS)


def test_errors_are_one_line() -> None:
    with pytest.raises(ValueError, match=r"no direction is from or to 'xx'; the masks are of en-af"):
        proximity.proximity(planted_masks(), "xx")
    with pytest.raises(ValueError, match=r"are of 3 languages \(de, fr, ru\) from en, expected 4 or more"):
        proximity.proximity(planted_masks(["de", "fr", "ru"]), "en")
    with pytest.raises(ValueError, match=r"de, fr, hy, ru are all equally far apart"):
        proximity.proximity(planted_masks(["de", "fr", "hy", "ru"]), "en")
    masks = planted_masks()
    odd = {f"en-q{code}": masks[f"en-{code}"] for code in CODES}
    with pytest.raises(ValueError, match=r"the family of language 'qaf' is not known"):
        proximity.proximity(NeuronMasks(odd), "en")


def test_a_grouping_that_divides_languages_differently_stands_beside_the_chosen_one() -> None:
    codes = ["am", "ar", "de", "ha", "he", "nl"]
    masks = planted_masks(codes)
    found = proximity.proximity(masks, "en", grouping="ec30", permutations=9)
    for row in found.layers:
        # Indo-European and Afro-Asiatic are Germanic and Afro-Asiatic here; branches part Hausa from Semitic.
        assert list(row.beside) == ["branch"]
        iou = proximity.mask_iou(masks, [row.layer], row.direction, "en", codes)[0]
        semitic = [iou[i, j] for i, j in ((0, 1), (0, 4), (1, 4))]
        within, across = row.beside["branch"]
        assert within == pytest.approx((sum(semitic) + iou[2, 5]) / 4)
        assert across == pytest.approx((iou.sum() - 6 - 2 * 4 * within) / 2 / 11)
        assert (row.within, row.across) != row.beside["branch"]
    by_branch = proximity.proximity(masks, "en", grouping="branch", permutations=9)
    # EC30's groups come after families here, and divide these languages as they do.
    assert [list(row.beside) for row in by_branch.layers] == [["family"]] * len(found.layers)

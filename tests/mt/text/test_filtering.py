"""Which training sentences a run may see, over random text of several pairs."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from nspec.mt.text.filtering import TrainingFilter

PAIRS = [("de", "en"), ("en", "fr"), ("de", "fr"), ("en", "zh_Hans")]


def texts(rng: random.Random, count: int) -> list[tuple[str, str]]:
    """Pairs out of so few sentences that many are equal."""
    return [(f"text {rng.randrange(60)}", f"text {rng.randrange(60)}") for _ in range(count)]


@pytest.mark.parametrize("across", [True, False])
@pytest.mark.parametrize("deduplicate", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_what_is_left_out_is_what_the_definition_says(across, deduplicate, seed):
    rng = random.Random(seed)
    evaluation = {pair: texts(rng, 8) for pair in PAIRS}
    training = {pair: texts(rng, 400) for pair in PAIRS}
    chosen = TrainingFilter(across, deduplicate)
    for pair, held_out in evaluation.items():
        for both in held_out:
            chosen.hold_out(pair, both)
    measured = {(pair, code): {both[pair.index(code)] for both in evaluation[pair]} for pair in PAIRS for code in pair}
    for pair in PAIRS:
        expected, reasons = [], Counter()
        for both in training[pair]:
            own = any(text in measured[pair, code] for code, text in zip(pair, both))
            other = any(
                text in found for (_, code), found in measured.items() for c, text in zip(pair, both) if c == code
            )
            if own:
                reasons["in valid or test"] += 1
            elif across and other:
                reasons["in valid or test of another pair"] += 1
            elif deduplicate and both in expected:
                reasons["duplicate"] += 1
            else:
                expected.append(both)
        dropped: Counter[str] = Counter()
        assert list(chosen.kept(pair, training[pair], dropped)) == expected
        assert dropped == reasons
        assert reasons["in valid or test"] > 0
        assert bool(reasons["in valid or test of another pair"]) == across
        assert bool(reasons["duplicate"]) == deduplicate


def test_the_same_text_in_another_language_is_no_reason():
    chosen = TrainingFilter(True, True)
    chosen.hold_out(("de", "en"), ("Hotel", "Taxi"))
    dropped: Counter[str] = Counter()
    assert list(chosen.kept(("en", "fr"), [("Hotel", "Taxi"), ("Taxi", "Hotel")], dropped)) == [("Hotel", "Taxi")]
    assert dropped == {"in valid or test of another pair": 1}


def test_duplicates_are_those_of_a_pair_of_languages_with_both_sides_equal():
    chosen = TrainingFilter(True, True)
    same = [("a b", "c"), ("a", "b c"), ("a b", "c"), ("a b", "d")]
    for pair in PAIRS:
        dropped: Counter[str] = Counter()
        assert list(chosen.kept(pair, same, dropped)) == [same[0], same[1], same[3]]
        assert dropped == {"duplicate": 1}

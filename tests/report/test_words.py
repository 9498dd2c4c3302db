from __future__ import annotations

import pytest

from nspec.mt.config import SelectConfig
from nspec.report import drawing, words
from nspec.run.systems import SYSTEMS, Variant


def test_every_built_in_system_has_a_name_a_meaning_and_a_colour_of_its_own() -> None:
    assert set(words.SYSTEMS) == set(SYSTEMS) == set(drawing.COLOURS)
    assert len({name for name, _ in words.SYSTEMS.values()}) == len(set(drawing.COLOURS.values())) == len(SYSTEMS)
    assert all(meaning for _, meaning in words.SYSTEMS.values())


def test_a_variant_is_called_by_what_it_varies() -> None:
    variants = {"forward-k70": Variant("forward-k70", "forward", {"select.k": 0.7, "profile.split": "train"})}
    said = words.system_name("forward-k70", variants)
    assert said == "forward-k70: Specialised (forward), select.k = 0.7, profile.split = train"
    assert words.in_sentence("Dense continued") == "dense continued"
    assert words.in_sentence("LaSS") == "LaSS"
    assert words.in_sentence("K: LaSS, lass.alpha = 0.5") == "K: LaSS, lass.alpha = 0.5"


def test_systems_without_a_colour_of_their_own_get_different_ones() -> None:
    names = [*SYSTEMS, "forward-k70", "forward-k50", "mine"]
    assert len({drawing.colour(name, names) for name in names}) == len(names)


@pytest.mark.parametrize(
    ("delta", "p", "said"),
    [
        (0.004, 0.01, "+0.004"),
        (-0.0004, 0.01, "−0.0004"),
        (0.25, 0.01, "+0.25"),
        (0.004, 0.5, "±0.00"),
        (0.0, 0.01, "±0.00"),
    ],
)
def test_a_significant_difference_is_never_shown_as_none(delta: float, p: float, said: str) -> None:
    assert words.difference(delta, p) == said


def test_ks_of_parts_are_said() -> None:
    select = SelectConfig(k=0.9, k_from_decoder=0.7, k_to_encoder=1)
    assert words.selection(select) == "k = 0.9, k_from_decoder = 0.7, k_to_encoder = 1"
    said = "(k = 0.9); from the pivot in the decoder k = 0.7; to the pivot in the encoder all (not specialised)."
    assert words.selection_sentence(select).endswith(said)
    assert words.selection(SelectConfig()) == "k = 0.95"


def test_what_random_neurons_are_like_is_said() -> None:
    assert words.selection(SelectConfig(rule="random", share=0.1)) == "random, share = 0.1"
    select = SelectConfig(rule="random", like="lape", rate=0.05)
    assert words.selection(select) == "random, like lape, rate = 0.05"
    assert words.selection_sentence(select).startswith("As many neurons are drawn at random as this rule keeps: Of the")

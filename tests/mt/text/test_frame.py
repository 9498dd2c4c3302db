"""What stands around the tokens of a sentence, without a tokenizer at hand."""

from __future__ import annotations

import pytest

from nspec.mt.text.frame import WIDEST, Frame

TAGGED = Frame(False, {"de": 7, "en": 8}, pad_id=1, end_id=2)
MARIAN = Frame(True, {}, pad_id=9, end_id=0)
MARIAN_OF_SEVERAL = Frame(True, {"de": 7, "en": 8}, pad_id=9, end_id=0)


@pytest.mark.parametrize(
    ("frame", "source", "target", "start"),
    [
        (TAGGED, [8, 5, 6, 2], [7, 5, 2], 2),
        (MARIAN, [5, 6, 0], [5, 0], 9),
        (MARIAN_OF_SEVERAL, [7, 5, 6, 0], [5, 0], 9),
    ],
)
def test_each_kind_of_model_has_its_frame(frame: Frame, source: list[int], target: list[int], start: int) -> None:
    framed = frame.framed("en-de", ([5, 6], [5]))
    assert [ids.tolist() for ids in framed] == [source, target]
    assert frame.sizes("en-de") == (len(source) - 2, len(target) - 1)
    assert max(frame.sizes("en-de")) <= WIDEST
    assert frame.start_id == start


@pytest.mark.parametrize("frame", [TAGGED, MARIAN, MARIAN_OF_SEVERAL])
def test_a_frame_comes_back_from_json(frame: Frame) -> None:
    assert Frame.read(frame.facts()) == frame


def test_text_that_was_prepared_before_marian_was_known_has_tags_on_both_sides() -> None:
    assert Frame.read({"tags": {"de": 7, "en": 8}, "pad_id": 1, "end_id": 2, "size": 60}) == TAGGED

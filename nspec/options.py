"""An option of a configuration: a dataclass field with its meaning, type, choices and range; and values in messages.

Importing this module loads neither torch nor transformers.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import os
import typing
from collections.abc import Callable
from typing import Any

INT_MAX = 2**31 - 1
"""No whole number may be larger: sizes and counts end up in 32-bit integers of libraries."""

FLOAT_MAX = 1e30
"""No number may be larger: it must stay finite in float32 when it is multiplied."""

FLOAT_MIN = 1e-30
"""No number but 0 may be nearer to 0: it must not become 0 in float32, also when it is multiplied."""

Option = dataclasses.Field[Any]

_TYPES = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
_WIDTH = 80  # of a value in a message: a file may hold one of any size
_DIGITS = 1000  # Python refuses to write whole numbers of more than 4300


def option(
    default: Any,
    meaning: str,
    choices: tuple[Any, ...] | None = None,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    path: bool = False,
    spelled: Callable[[str], str] | None = None,
) -> Any:
    """A dataclass field with its meaning and the values that it may have.

    Args:
        default: its value where nothing is given.
        meaning: what it is, for the commented template.
        choices: its possible values where there are few.
        least: the smallest number; of a list, for each item, as the three that follow.
        above: numbers are larger than this.
        most: the largest number; where neither it nor ``below`` is given, :data:`INT_MAX` or :data:`FLOAT_MAX`.
        below: numbers are smaller than this.
        path: a file or folder, in which ``~`` at the start is the home folder.
        spelled: gives the one spelling of a text that may be given in several; of a list, of each item.
    """
    limits = {"least": least, "above": above, "most": most, "below": below}
    meta = {"meaning": meaning, "choices": choices, "path": path, "spelled": spelled, **limits}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=meta)
    return dataclasses.field(default=default, metadata=meta)


@functools.cache
def options_of(section: type) -> dict[str, Option]:
    """The options of a section, a dataclass, by name."""
    return {field.name: field for field in dataclasses.fields(section)}


def cut(text: str, width: int = _WIDTH) -> str:
    """The beginning of a text that is too long for a message."""
    return text if len(text) <= width else f"{text[: width - 4]} ..."


def is_utf8(text: str) -> bool:
    """Whether a text can be written: YAML, JSON and the command line can give half of a character."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def bare(text: str) -> str:
    """A text without quotes, cut to a message, on one line: what cannot be printed is escaped."""
    return cut(text if text.isprintable() else repr(text[:_WIDTH])[1:-1])


def show(value: Any) -> str:
    """A value as messages give it."""
    if value is None:
        return "nothing"
    if isinstance(value, int) and value.bit_length() > _DIGITS * math.log2(10):
        return f"a whole number of about {value.bit_length() / math.log2(10):.0f} digits"
    if isinstance(value, str):
        return cut(repr(value[:_WIDTH])) if len(value) <= _WIDTH else f"{value[: _WIDTH - 4]!r} ..."
    try:
        return cut(repr(value))
    except ValueError:  # a whole number within it is too long for Python to write
        return f"a {type(value).__name__} with a whole number of more than 4300 digits"


def _fits(value: Any, kind: type) -> bool:
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _finite(value: Any) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def convert(
    declared: Option, kind: Any, name: str, value: Any, where: str = "", error: type[Exception] = ValueError
) -> Any:
    """``value`` as the type of an option, one of its choices; its range is not looked at.

    Args:
        declared: the option.
        kind: its type.
        name: what messages call it, such as ``train.lr``.
        value: what was given.
        where: what messages say of the place.
        error: what a wrong type raises: in a file it is a wrong value of text, so not a TypeError.

    Raises:
        ValueError: a value that does not fit; the message names the option.
    """
    choices, spelled = declared.metadata["choices"], declared.metadata["spelled"]
    if typing.get_origin(kind) is list:
        (item,) = typing.get_args(kind)
        kinds = "texts" if item is str else "numbers"
        if not isinstance(value, list):
            raise error(f"{name}: expected a list of {kinds} such as [a, b], found {show(value)}{where}")
        for position, each in enumerate(value, 1):
            if not _fits(each, item):
                expected, found = _TYPES[item], show(each)
                raise error(f"{name}: expected {expected} at place {position} of the list, found {found}{where}")
        given = value
    elif not _fits(value, kind):
        hint = ' (empty text is written "")' if kind is str and value is None else ""
        raise error(f"{name}: expected {_TYPES[kind]}, found {show(value)}{hint}{where}")
    else:
        item, given = kind, [value]
    converted = [_finite(each) if item is float else item(each) for each in given]
    for each, before in zip(converted, given):
        if isinstance(each, float) and not math.isfinite(each):
            raise ValueError(f"{name}: expected a finite number, found {show(before)}{where}")
        if isinstance(each, str) and not is_utf8(each):
            raise ValueError(f"{name}: expected text in UTF-8, found {show(before)} with half a character{where}")
    if spelled:
        converted = [spelled(each) for each in converted]
    result = converted if isinstance(value, list) else converted[0]
    if choices and result not in choices:
        nearest = difflib.get_close_matches(str(result)[:_WIDTH], map(str, choices), n=1)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        raise ValueError(f"{name}: expected one of {', '.join(map(str, choices))}, found {show(result)}{where}{hint}")
    return result


def range_of(field: Option) -> str:
    """The numbers that an option takes, in words such as ``at least 1`` or ``in (0, 1]``; empty: any, or no number."""
    least, above, most, below = (field.metadata[key] for key in ("least", "above", "most", "below"))
    whole = all(limit is None or isinstance(limit, int) for limit in (least, most))
    if most is None and below is None:
        return f"at least {least}" if least is not None else f"more than {above}" if above is not None else ""
    if whole and above is None and below is None and most > 1:
        return f"{least} to {most}"
    low = f"({above:g}" if least is None else f"[{least:g}"
    return f"in {low}, {f'{below:g})' if most is None else f'{most:g}]'}"


def check_range(declared: Option, name: str, value: Any) -> None:
    """Whether a number, or each of a list, is in the range of an option.

    Args:
        declared: the option.
        name: what the message calls it, such as ``score.bootstrap`` or ``--bootstrap``.
        value: of the option's type.

    Raises:
        ValueError: it is not; the message says which numbers are.
    """
    limits = declared.metadata
    for each in value if isinstance(value, list) else [value]:
        if isinstance(each, (str, bool)):
            continue
        largest = INT_MAX if isinstance(each, int) else FLOAT_MAX
        least, above, most, below = (limits[limit] for limit in ("least", "above", "most", "below"))
        most = largest if most is None and below is None else most
        low = (least is None or each >= least) and (above is None or each > above) and each >= -largest
        if low and (most is None or each <= most) and (below is None or each < below):
            if isinstance(each, float) and 0 < abs(each) < FLOAT_MIN:
                zero = "0 or " if (least is None or least <= 0) and above is None else ""
                raise ValueError(
                    f"{name}: expected {zero}a number not nearer to 0 than {FLOAT_MIN:g}, found {show(each)}"
                )
            continue
        expected = range_of(declared)
        if expected.startswith("in "):
            expected = f"a number {expected}"
        elif not low:
            expected = f"at least {-largest if least is None else least}" if above is None else f"more than {above}"
        else:
            expected = f"at most {most:g}" if isinstance(most, float) else f"at most {most}"
        raise ValueError(f"{name}: expected {expected}, found {show(each)}")


def check_option(declared: Option, kind: Any, name: str, value: Any) -> None:
    """Type, choices and range of an option's value, and what no path can be.

    Raises:
        TypeError: a value of another type.
        ValueError: a value that does not fit; the message names the option.
    """
    check_range(declared, name, convert(declared, kind, name, value, error=TypeError))
    if declared.metadata["path"]:
        if "\0" in value:
            raise ValueError(f"{name}: expected a file name, found {show(value)} with a NUL character")
        if os.path.normpath(value).startswith("~"):  # some libraries expand it, others take it as it stands
            raise ValueError(f"{name}: expected a path without ~ at its start, found {show(value)}; write it out")

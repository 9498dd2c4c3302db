"""What to do about an exception in one of many things to measure: say it, and go on with the others."""

from __future__ import annotations

import sys
import traceback


def report(what: str, error: Exception) -> str:
    """Writes an ``error:`` line and where it was raised to standard error, at once; returns the error in a line.

    An error on a GPU after which this process cannot use it comes again with all that is left, which has to be run again.
    """
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    in_a_line = f"{type(error).__name__}: {said[:300]}" if said else type(error).__name__
    lines = "".join(traceback.format_exception(error)).splitlines()[-25:]  # an error of a compiler stands at its end
    shown = "\n".join(f"    {line}" for line in lines)
    print(f"error: {what}: {in_a_line}\n{shown}", file=sys.stderr, flush=True)
    return in_a_line

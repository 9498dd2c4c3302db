"""What a command itself says on standard error."""

from __future__ import annotations

import re


def own_lines(errors: str) -> str:
    """What nspec itself wrote: libraries of quantised weights that Transformers imports where they are there warn, too."""
    foreign = re.compile(r"W\d{4} .*torch/|Failed to load ")
    return "".join(line for line in errors.splitlines(keepends=True) if not foreign.match(line))

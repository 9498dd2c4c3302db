"""A score in a table of the page."""

from __future__ import annotations

from typing import Any

from nspec.mt.groups import kind_of_group
from nspec.report import words
from nspec.report.run_data import RunData


def main_groups(data: RunData) -> list[str]:
    """The averages of a run that are of all directions or of a side of the pivot, not of levels or families."""
    found = dict.fromkeys(group for scores in data.scored.values() for group in scores["average"])
    return [group for group in found if not kind_of_group(group)[0]]


def score_cell(
    data: RunData, entry: dict[str, Any] | None, metric: str, best: float | None, about: str
) -> dict[str, Any]:
    """One score: its text, interval, mark and what is said on hover.

    Args:
        data: the run.
        entry: of a direction or an average in ``scores.json``; None where there is none.
        metric: ``bleu`` or ``chrf``.
        best: the highest score of those that it stands with; None: nothing is marked as highest.
        about: what the score is of.
    """
    if entry is None:
        empty = dict.fromkeys(("interval", "mark", "delta", "p"), "")
        return empty | {"score": "–", "best": False, "title": f"{about}: missing"}
    low, high, test = entry[f"{metric}_low"], entry[f"{metric}_high"], entry.get("baseline")
    title = f"{about}: {entry[metric]:.2f} {data.metric_names[metric]}, 95 % interval {low:.2f} to {high:.2f}"
    delta = p = ""
    if test:
        delta, p = words.signed(test[f"{metric}_delta"]), words.p_text(words.p_value(test, metric))
        says = words.verdict(test[f"{metric}_delta"], words.p_value(test, metric))
        title += f"; {delta} against {words.in_sentence(data.name(test['system']))}, {p}, {says}"
    return {
        "score": f"{entry[metric]:.2f}",
        "interval": f"{low:.1f}–{high:.1f}",
        "best": best is not None and entry[metric] == best,
        "mark": words.arrow(test, metric),
        "delta": delta,
        "p": p,
        "title": title,
    }

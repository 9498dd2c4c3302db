"""What was declared before a run, and what came of it, in words: the first thing that readers see."""

from __future__ import annotations

from typing import Any

from nspec.report import words
from nspec.report.losses import mean_losses
from nspec.report.run_data import RunData
from nspec.run.protocol import Primary, declarations, primary_of

LOSS = "validation loss"


def declared_section(data: RunData) -> dict[str, str] | None:
    """``hypothesis``, ``primary`` (the declared comparison and its result) and ``when``; None where nothing was declared.

    Raises:
        ValueError: what was noted in the run folder is broken.
    """
    noted = declarations(data.folder)
    if not noted or not (noted[-1]["hypothesis"] or noted[-1]["primary"]):
        return None
    last, primary = noted[-1], primary_of(data.config)
    if scored := last["scored"]:
        names = ", ".join(words.in_sentence(data.name(name)) if name in data.systems else name for name in scored)
        when = f"Declared on {last['date']}, when there were scores of {names} already."
    else:
        when = f"Declared on {last['date']}, before anything was scored."
    if len(noted) > 1:
        when += f" It was declared otherwise before ({len(noted) - 1} time{'s' if len(noted) > 2 else ''})."
    return {
        "hypothesis": last["hypothesis"],
        "primary": "" if primary is None else _result(data, primary),
        "when": when,
    }


def compared(primary: Primary, baseline: str, names: dict[str, str], name: Any) -> str:
    """The declared comparison in words.

    Args:
        primary: the comparison.
        baseline: the system that is compared with.
        names: of the metrics, for readers.
        name: gives the name of a system for readers.
    """
    metric = names.get(primary.metric, LOSS)
    return (
        f"{name(primary.system)} against {words.in_sentence(name(baseline))}, {metric}, "
        f"{words.group_name(primary.average)}"
    )


def _result(data: RunData, primary: Primary) -> str:
    said = compared(primary, data.baseline, data.metric_names if data.scored else words.METRIC_NAMES, data.name)
    if primary.metric == "loss":
        own, base = (
            mean_losses(data, system).get(primary.average) if system in data.systems else None
            for system in (primary.system, data.baseline)
        )
        if own is None or base is None:
            return f"{said}: not known yet."
        return (
            f"{said}: {words.signed(own - base, 3)} nats per target token (negative is better); whether that is more than "
            "chance, several seeds show."
        )
    entry = data.scored.get(primary.system, {"average": {}})["average"].get(primary.average)
    test = entry.get("baseline") if entry else None
    if not test:
        return f"{said}: not known yet."
    delta, p = test[f"{primary.metric}_delta"], words.p_value(test, primary.metric)
    result = f"{words.difference(delta, p)} points ({words.p_text(p)}, {words.verdict(delta, p)})"
    return f"{said}: {result}, not corrected, as the one declared."

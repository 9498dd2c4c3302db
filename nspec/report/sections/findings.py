"""The head of the page: all scores as a picture, and what the tests say in words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nspec.mt.languages import languages_of_task
from nspec.report import drawing, words
from nspec.report.declared import declared_section
from nspec.report.run_data import RunData

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def section(data: RunData) -> dict[str, Any]:
    """The picture, the headline, the set-up, and a sentence or two for each system that was tested."""
    names = list(data.systems)
    said = {name: finding(data, name) for name in names}
    return {
        "chart": [
            drawing.render(score_chart, f"{name} of every system with its interval", f"scores_{metric}", data, metric)
            for metric, name in (data.metric_names if data.scored else {}).items()
        ],
        "declared": declared_section(data),
        "reference": words.in_sentence(data.name(_reference(data))) if data.scored else "",
        "headline": headline(data),
        "setup": setup_sentence(data),
        "each": [
            {"system": data.name(name), "colour": drawing.css_colour(name, names), "text": text}
            for name, text in said.items()
            if text
        ],
    }


def _reference(data: RunData) -> str:
    """The system whose score is drawn as a line: dense, from which all start; else the first that has scores."""
    return "dense" if "dense" in data.scored else next(iter(data.scored))


def score_chart(data: RunData, metric: str) -> Figure:
    """Mean score over all directions, a line for each system: a dot in its 95 % interval, and dense as a line for all."""
    rows = {name: scores["average"]["all"] for name, scores in data.scored.items()}
    figure, panels = drawing.new_figure(5.6, 0.8 + 0.3 * len(rows))
    axes = panels[0]
    drawing.style(axes, "", "", data.metric_names[metric], lines="x", frame=["left"])
    start = rows[_reference(data)]
    axes.axvspan(start[f"{metric}_low"], start[f"{metric}_high"], color=drawing.COLOURS["dense"], alpha=0.14, lw=0)
    axes.axvline(start[metric], color=drawing.INK, linestyle=(0, (4, 3)), linewidth=0.9)
    for place, (name, entry) in enumerate(rows.items()):
        tint, low, high = drawing.colour(name, list(data.systems)), entry[f"{metric}_low"], entry[f"{metric}_high"]
        axes.plot([low, high], [place, place], color=tint, linewidth=2)
        axes.plot([low, high], [place, place], "|", color=tint, markersize=8, markeredgewidth=2)
        axes.plot([entry[metric]], [place], "o", color=tint, markersize=7)
        text = f"{entry[metric]:.2f} {words.arrow(entry.get('baseline'), metric)}".rstrip()
        axes.annotate(text, (high, place), (7, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_yticks(range(len(rows)), [data.short(name) for name in rows])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    low, high = (
        pick(entry[f"{metric}_{end}"] for entry in rows.values()) for pick, end in ((min, "low"), (max, "high"))
    )
    width = max(high - low, 0.1)
    axes.set_xlim(low - 0.04 * width, high + 0.24 * width)  # room for the number of the highest
    return figure


def setup_sentence(data: RunData) -> str:
    """What was run, on what."""
    corpus = data.config.corpus
    codes = sorted({code for task in data.tasks for code in languages_of_task(task)})
    if not data.tasks:
        return f"A run on the {corpus.type} corpus. No direction has been scored or profiled yet."
    where = f"{len(data.tasks)} direction{'s' if len(data.tasks) > 1 else ''}"
    if data.pivot and all(data.pivot in languages_of_task(task) for task in data.tasks):
        where += f" between {data.pivot} and {', '.join(code for code in codes if code != data.pivot)}"
    else:
        where += f" among {', '.join(codes)}"
    sizes = {entry["sentences"] for scores in data.scored.values() for entry in scores["tasks"].values()}
    test = f"; the test sets have {words.span(sizes)} sentences a direction" if sizes else ""
    source = f" in {corpus.path}" if corpus.path else f" {corpus.name}" if corpus.name else ""
    meaning = words.SYSTEMS.get(data.baseline, ("", ""))[1]
    control = (
        f" Systems are tested against {words.in_sentence(data.name(data.baseline))}: {meaning}." if meaning else ""
    )
    return f"{where}, from the {corpus.type} corpus{source}{test}.{control}"


def finding(data: RunData, system: str) -> str | None:
    """How a system compares with the baseline, in one or two sentences; None where it was not tested."""
    scores = data.systems[system].scores
    test = scores["average"]["all"].get("baseline") if scores else None
    if not scores or not test:
        return None
    average = scores["average"]["all"]
    said, names = [], data.metric_names
    for metric, name in names.items():
        delta, p = test[f"{metric}_delta"], words.p_value(test, metric)
        said.append(f"{words.difference(delta, p)} {name} ({words.p_text(p)}, {words.verdict(delta, p)})")
    tests = [entry["baseline"] for entry in scores["tasks"].values() if entry.get("baseline")]
    up = sum(t["bleu_delta"] > 0 for t in tests)
    down = sum(t["bleu_delta"] < 0 for t in tests)
    sure_up, sure_down = (sum(words.arrow(t, "bleu") == sign for t in tests) for sign in "▲▼")
    return (
        f"{average['bleu']:.2f} {names['bleu']} and {average['chrf']:.2f} chrF++ on average: {' and '.join(said)} against "
        f"{words.in_sentence(data.name(test['system']))}. By {names['bleu']} it is above in {up} of {len(tests)} "
        f"directions ({sure_up} significantly) and below in {down} ({sure_down} significantly)."
    )


def headline(data: RunData) -> str:
    """The answer to the question that the run asks: is specialised better than dense training for as long?

    Random masks are a part of it: where they do as well, it is not the choice of neurons that helps. Where other methods
    were run too, the headline ends with who scores highest; the tests of all are in :func:`finding`.
    """
    said, bleu = [], data.metric_names["bleu"]
    asked = ("forward", "update", "random")
    averages = {name: scores["average"]["all"] for name, scores in data.scored.items()}
    for system in asked:
        test = averages.get(system, {}).get("baseline")
        if test:
            delta, p = test["bleu_delta"], words.p_value(test, "bleu")
            one, many, than = {
                "not significant": ("shows", "show", "no significant difference from"),
                "significantly better": ("is", "are", "significantly better than"),
                "significantly worse": ("is", "are", "significantly worse than"),
            }[words.verdict(delta, p)]
            base = words.in_sentence(data.name(test["system"]))
            said.append(
                f"{words.system_name(system)} {many if system in words.PLURAL else one} {than} {base}: "
                f"{words.difference(delta, p)} {bleu} on average ({words.p_text(p)})."
            )
    if set(averages) - {"dense", "continued", *asked} and len(averages) > 1:
        best = max(averages, key=lambda name: averages[name]["bleu"])
        verb, score = "have" if best in words.PLURAL else "has", averages[best]["bleu"]
        said.append(f"{data.name(best)} {verb} the highest mean {bleu} of {len(averages)} systems, {score:.2f}.")
    return " ".join(said) or "No specialised system has been compared with a baseline yet."

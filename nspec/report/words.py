"""What the page says in words: names of systems, numbers as text, and what the tests show."""

from __future__ import annotations

from typing import Any

from nspec.report.load import RunData

LEVEL = 0.05

SYSTEMS = {
    "dense": ("Dense", "one multilingual model, all neurons for every direction"),
    "continued": ("Dense continued", "dense trained on for as many updates as the others: the fair control"),
    "forward": ("Specialised (forward)", "a direction computes with its own neurons, in training and in translation"),
    "update": ("Specialised (update)", "all neurons compute; a direction updates the fc1 rows of its own only"),
    "random": ("Random masks", "as forward, with as many neurons per direction and layer, drawn at random"),
}

METRIC_NAMES = {"bleu": "BLEU", "chrf": "chrF++"}


def system_name(system: str) -> str:
    """A system's name for readers; one that nspec does not know is called what its folder is called."""
    return SYSTEMS.get(system, (system, ""))[0]


def signed(value: float, digits: int = 2) -> str:
    """A difference with its sign (a real minus), never a negative zero."""
    text = f"{value:+.{digits}f}"
    if float(text) == 0:
        return f"±{0:.{digits}f}"
    return text.replace("-", "−")


def p_text(p: float) -> str:
    """``p = 0.012``; small ones as ``p < 0.001``."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


def verdict(delta: float, p: float) -> str:
    """What a test says at the 5 % level."""
    if p >= LEVEL:
        return "not significant"
    return "significantly better" if delta > 0 else "significantly worse"


def mark(test: dict[str, Any] | None, metric: str) -> str:
    """▲ or ▼ for a significant difference from the baseline, else nothing."""
    if not test or test[f"{metric}_p"] >= LEVEL or test[f"{metric}_delta"] == 0:
        return ""
    return "▲" if test[f"{metric}_delta"] > 0 else "▼"


def group_name(group: str) -> str:
    """``from_en`` as ``en→x``, ``to_en`` as ``x→en``."""
    if group.startswith("from_"):
        return f"{group[5:]}→x"
    if group.startswith("to_"):
        return f"x→{group[3:]}"
    return "all directions" if group == "all" else group


def duration(seconds: float) -> str:
    """Seconds as a reader says them: ``48 s``, ``3 min 12 s``, ``2 h 05 min``."""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def count(value: float) -> str:
    """A whole number with thin spaces between thousands."""
    return f"{value:,.0f}".replace(",", "\u202f")


def setup_sentence(data: RunData) -> str:
    """What was run, on what."""
    corpus = data.config.corpus
    languages = sorted({code for task in data.tasks for code in task.split("-")} - {data.pivot})
    if not data.tasks:
        return f"A run on the {corpus.type} corpus. No direction has been scored or profiled yet."
    directions = f"{len(data.tasks)} direction{'s' if len(data.tasks) > 1 else ''}"
    if data.pivot and all(data.pivot in task.split("-") for task in data.tasks):
        where = f"{directions} between {data.pivot} and {', '.join(languages)}"
    else:
        codes = sorted({code for task in data.tasks for code in task.split("-")})
        where = f"{directions} among {', '.join(codes)}"
    sizes = {entry["sentences"] for scores in data.scored.values() for entry in scores["tasks"].values()}
    test = f"; the test sets have {_range(sizes)} sentences a direction" if sizes else ""
    source = f" in {corpus.path}" if corpus.path else f" {corpus.name}" if corpus.name else ""
    meaning = SYSTEMS.get(data.baseline, ("", ""))[1]
    control = f" Systems are tested against {system_name(data.baseline).lower()}: {meaning}." if meaning else ""
    return f"{where}, from the {corpus.type} corpus{source}{test}.{control}"


def _range(sizes: set[int]) -> str:
    return count(min(sizes)) if len(sizes) == 1 else f"{count(min(sizes))} to {count(max(sizes))}"


def finding(data: RunData, system: str) -> str | None:
    """How a system compares with the baseline, in one or two sentences; None where it was not tested."""
    scores = data.systems[system].scores
    test = scores["average"]["all"].get("baseline") if scores else None
    if not scores or not test:
        return None
    average = scores["average"]["all"]
    said = []
    for metric, name in METRIC_NAMES.items():
        delta, p = test[f"{metric}_delta"], test[f"{metric}_p"]
        said.append(f"{signed(delta)} {name} ({p_text(p)}, {verdict(delta, p)})")
    tests = [entry["baseline"] for entry in scores["tasks"].values() if entry.get("baseline")]
    up = sum(t["bleu_delta"] > 0 for t in tests)
    down = sum(t["bleu_delta"] < 0 for t in tests)
    sure_up, sure_down = (sum(mark(t, "bleu") == arrow for t in tests) for arrow in "▲▼")
    return (
        f"{average['bleu']:.2f} BLEU and {average['chrf']:.2f} chrF++ on average: {' and '.join(said)} against "
        f"{system_name(test['system']).lower()}. By BLEU it is above in {up} of {len(tests)} directions "
        f"({sure_up} significantly) and below in {down} ({sure_down} significantly)."
    )


def headline(data: RunData) -> str:
    """The answer to the question that the run asks: is specialised better than dense training for as long?

    Random masks are a part of it: where they do as well, it is not the choice of neurons that helps.
    """
    said = []
    for system in ("forward", "update", "random"):
        scores = data.systems[system].scores if system in data.systems else None
        test = scores["average"]["all"].get("baseline") if scores else None
        if test:
            delta, p = test["bleu_delta"], test["bleu_p"]
            one, many, than = {
                "not significant": ("shows", "show", "no significant difference from"),
                "significantly better": ("is", "are", "significantly better than"),
                "significantly worse": ("is", "are", "significantly worse than"),
            }[verdict(delta, p)]
            base = system_name(test["system"]).lower()
            verb = f"{many if system == 'random' else one} {than}"
            said.append(f"{system_name(system)} {verb} {base}: {signed(delta)} BLEU on average ({p_text(p)}).")
    return " ".join(said) or "No specialised system has been compared with a baseline yet."

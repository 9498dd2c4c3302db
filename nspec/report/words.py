"""How things are called and numbers are written, on the page, in tables and in the terminal."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from nspec.analysis.languages import Grouping
from nspec.mt.config import PARTS, SelectConfig
from nspec.mt.scoring.averages import LEVEL, kind_of_group
from nspec.run.systems import SELECT_USES, Variant

ALPHA = 0.05

SYSTEMS = {
    "dense": ("Dense", "one multilingual model, all neurons for every direction"),
    "continued": ("Dense continued", "dense trained on for as many updates as the others: the fair control"),
    "forward": ("Specialised (forward)", "a direction computes with its own neurons, in training and in translation"),
    "update": ("Specialised (update)", "all neurons compute; a direction updates the fc1 rows of its own only"),
    "forward_encoder": (
        "Forward, encoder only",
        "as forward, with masks in the encoder alone; the decoder stays dense",
    ),
    "forward_decoder": (
        "Forward, decoder only",
        "as forward, with masks in the decoder alone; the encoder stays dense",
    ),
    "update_encoder": ("Update, encoder only", "as update, with masks in the encoder alone"),
    "update_decoder": ("Update, decoder only", "as update, with masks in the decoder alone"),
    "random": ("Random masks", "as forward, with as many neurons per direction and layer, drawn at random"),
    "neurons": (
        "Neurons",
        "the selected neurons of each direction get parameters of their own; the dense model is frozen",
    ),
    "neurons+shared": ("Neurons, shared weights too", "the same, and the weights of the dense model train on"),
    "heads": (
        "Attention heads",
        "a direction computes with the attention heads that matter most to it; the others give zero",
    ),
    "random_heads": ("Random attention heads", "the same, with as many heads drawn at random"),
    "lass": (
        "LaSS",
        "a mask of single weights for each direction: the smallest ones of the dense model fine-tuned on it are left out",
    ),
    "adapters": (
        "Adapters per direction",
        "the dense model is frozen; small layers for each direction are trained in it",
    ),
    "adapters+shared": ("Adapters, shared weights too", "the same, and the weights of the dense model train on"),
    "adapters_family": ("Adapters per family", "adapters with one set for the directions of a language family"),
    "finetuned": ("Fine-tuned models", "one model for each direction, trained on from dense with that direction alone"),
    "bilingual": ("Bilingual models", "one model for each direction, trained from scratch with that direction alone"),
    "pcgrad": (
        "PCGrad",
        "dense, continued; where the gradients of two directions of an update conflict, each loses what is against the "
        "other",
    ),
    "gradvac": (
        "GradVac",
        "dense, continued; gradients of two directions are turned to each other where they agree less than they usually do",
    ),
    "temperature": ("Changing temperature", "dense, continued; how evenly directions are sampled changes on the way"),
    "curriculum": ("Easy sentences first", "dense, continued; each direction begins with its easiest sentences"),
    "reptile": (
        "Reptile",
        "dense, continued; at first the weights go a part of the way of a few steps of one direction after another",
    ),
}
PLURAL = {
    "random",
    "neurons",
    "neurons+shared",
    "heads",
    "random_heads",
    "adapters",
    "adapters+shared",
    "adapters_family",
    "finetuned",
    "bilingual",
}

METRIC_NAMES = {"bleu": "BLEU", "chrf": "chrF++"}
METRICS = tuple(METRIC_NAMES)
GROUPINGS: dict[Grouping, str] = {
    "ec30": "EC30's own groups",
    "branch": "branches of Glottolog's tree",
    "family": "families of Glottolog's tree",
}
"""What readers are told of each grouping of languages."""
_SPBLEU = re.compile(r"(^|\|)tok:(flores|spBLEU|spm)")


def metric_names(signatures: Iterable[str]) -> dict[str, str]:
    """The metrics' names for readers: BLEU is spBLEU where SentencePiece split the text.

    Args:
        signatures: of BLEU, in every direction.
    """
    found = list(signatures)
    return METRIC_NAMES | ({"bleu": "spBLEU"} if found and all(map(_SPBLEU.search, found)) else {})


def names_of_scores(scored: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """:func:`metric_names` of what ``scores.json`` of systems holds."""
    return metric_names(entry["bleu_signature"] for scores in scored for entry in scores["tasks"].values())


def system_name(system: str, variants: Mapping[str, Variant] | None = None) -> str:
    """A system's name for readers; one that nspec does not know is called what its folder is called.

    Args:
        system: its name in the run.
        variants: those of the run: one is called ``<name>: <what it varies>, select.k = 0.7``.
    """
    variant = (variants or {}).get(system)
    if variant is None:
        return SYSTEMS.get(system, (system, ""))[0]
    return f"{system}: {system_name(variant.of)}, {changes(variant)}"


def changes(variant: Variant) -> str:
    """The options that a variant changes, ``select.k = 0.7, profile.split = train``."""
    options = variant.overrides.items()
    return ", ".join(f"{name} = {_value(value)}" for name, value in options) or "no option changed"


def _value(value: object) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value)) or "all"
    return f"{value:g}" if isinstance(value, float) else str(value)


def selection(select: SelectConfig) -> str:
    """How neurons were selected, in a few words: ``k = 0.95``, ``lape, rate = 0.01``."""
    rule = select.sized_by
    used = [name for name in SELECT_USES[rule] if name not in PARTS or name in select.parts]
    numbers = ", ".join(f"{name} = {_value(getattr(select, name))}" for name in used)
    numbers = numbers if rule == "share" else f"{rule}, {numbers}"
    return f"random, like {numbers}" if rule != select.rule else numbers


def selection_sentence(select: SelectConfig) -> str:
    """The same for readers who do not know the rules."""
    whole = f"{100 * select.k:g} % of its activations (k = {select.k:g})"
    part = f"{100 * select.share:g} % of its feed-forward neurons"
    sentence = {
        "share": f"For each direction, a layer keeps the fewest feed-forward neurons that carry {whole}{_parts(select)}.",
        "lape": f"Of the whole model the {100 * select.rate:g} % of feed-forward neurons are kept whose firing differs "
        "most between directions (lowest entropy of activation probabilities, LAPE), each for every direction that it "
        "fires often for; a direction may keep none in some layers.",
        "top": f"For each direction, a layer keeps the {part} that fire most often.",
        "specific": f"For each direction, a layer keeps the {part} that fire more often for it than for the others, by the "
        "ratio of the two.",
        "loss": "For each direction, a layer keeps the fewest feed-forward neurons that carry a share k of its "
        f"activations, with the smallest k for each {'layer' if select.by == 'layer' else 'side (encoder, decoder)'} "
        f"whose masks alone, without training, raise the validation loss by at most {select.tolerance:g} nats per token.",
        "conflict": f"Of the whole model each direction keeps the {part} whose parameters it would train most differently "
        "from what all directions do together, by the gradients of its loss and of theirs.",
        "random": f"For each direction, the {part} are drawn at random in each layer.",
    }[select.sized_by]
    drawn = "As many neurons are drawn at random as this rule keeps: "
    return sentence if select.sized_by == select.rule else drawn + sentence


def _parts(select: SelectConfig) -> str:
    """The ks of single parts of the model, as the end of a sentence."""
    found = []
    for name, k in select.parts.items():
        _, way, side = name.split("_")
        found.append(f"; {way} the pivot in the {side} " + (f"k = {k:g}" if k < 1 else "all (not specialised)"))
    return "".join(found)


def in_sentence(name: str) -> str:
    """A name within a sentence: a small first letter, unless the word has capitals of its own (LaSS) or is a variant's."""
    first = name.split(maxsplit=1)[0] if name else ""
    return name if first[1:] != first[1:].lower() or ":" in name else name[:1].lower() + name[1:]


def signed(value: float, digits: int = 2) -> str:
    """A difference with its sign (a real minus), never a negative zero."""
    text = f"{value:+.{digits}f}"
    if float(text) == 0:
        return f"±{0:.{digits}f}"
    return text.replace("-", "−")


def difference(delta: float, p: float) -> str:
    """A tested difference, signed; a significant one that two digits do not show has as many as show it, up to six."""
    digits = next((digits for digits in range(2, 7) if round(delta, digits)), 2) if p < ALPHA else 2
    return signed(delta, digits)


def p_text(p: float) -> str:
    """``p = 0.012``; small ones as ``p < 0.001``."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


def bare_p(p: float) -> str:
    """The same without its name, to stand beside another: ``0.012``, ``< 0.001``."""
    return p_text(p).removeprefix("p ").removeprefix("= ")


def verdict(delta: float, p: float) -> str:
    """What a test says at 5 %."""
    if p >= ALPHA:
        return "not significant"
    return "significantly better" if delta > 0 else "significantly worse"


def p_value(test: Mapping[str, Any], metric: str) -> float:
    """The p value that the page goes by: of approximate randomisation (two-sided), of the bootstrap where that lacks."""
    return float(test.get(f"{metric}_p_ar", test[f"{metric}_p"]))


def arrow(test: Mapping[str, Any] | None, metric: str) -> str:
    """▲ or ▼ for a difference from the baseline that is significant by :func:`p_value`, else nothing."""
    return sign(test[f"{metric}_delta"], p_value(test, metric)) if test else ""


def sign(delta: float, p: float) -> str:
    """▲ or ▼ for a difference that is significant at 5 %, else nothing."""
    return "" if p >= ALPHA or delta == 0 else "▲" if delta > 0 else "▼"


def group_name(group: str) -> str:
    """``from_en`` as ``en→x``, ``to_en`` as ``x→en``, ``low/from_en`` as ``low, en→x``.

    Of the groups that a run makes itself, ``level:high`` is ``high-resource`` and ``family:Germanic`` ``Germanic``.
    """
    name, slash, half = group.rpartition("/")
    if slash:
        return f"{name}, {group_name(half)}"
    kind, name, _ = kind_of_group(group)
    if kind:
        return f"{name}-resource" if kind == LEVEL else name
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


def span(values: Collection[float]) -> str:
    """``5`` where all are alike, else ``5 to 10``."""
    low, high = min(values), max(values)
    return count(low) if low == high else f"{count(low)} to {count(high)}"

"""sacreBLEU and chrF++ of a system: per direction and averaged, with intervals, and tested against a baseline."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nspec.mt.languages import languages_of_task, normalized_code, normalized_task
from nspec.mt.scoring import tests as significance
from nspec.mt.scoring.bleu_tokenizer import AUTO, SPBLEU, bleu_tokenizer, check_tokenizer, of_language, why_not
from nspec.mt.scoring.config import ScoreConfig
from nspec.mt.scoring.tests import Floats
from nspec.options import check_range, options_of

METRICS = {"bleu": significance.bleu, "chrf": significance.chrf}

Texts = Mapping[str, Sequence[str]]
Groups = Mapping[str, Sequence[str]]
Measured = Mapping[str, tuple[float, Floats]]  # score and per-sentence statistics of each metric


@dataclass
class _Corpus:
    """What one direction of one system measured: scores in points and their bootstrap samples, float64 [samples].

    ``swapped``, float64 [trials], is how far it is above the baseline after exchanges at random; empty without one.
    """

    score: dict[str, float]
    samples: dict[str, Floats]
    signature: dict[str, str]
    swapped: dict[str, Floats]


def score_system(
    hypotheses: Texts,
    references: Texts,
    config: ScoreConfig,
    pivot: str,
    baseline: tuple[str, Texts] | None = None,
    groups: Groups | None = None,
) -> dict[str, Any]:
    """Scores a system's translations and tests them against a baseline's.

    Args:
        hypotheses: for each direction (``en-de``) the system's translations, detokenised, one a line.
        references: for each direction the references, as many.
        config: the tokenizer of BLEU, and how many bootstrap samples.
        pivot: directions from and to this language are averaged apart; empty: only the average over all.
        baseline: name and translations of the system to test against; None: no test.
        groups: more averages, as :func:`average_groups` takes them.

    Returns:
        What goes into ``scores.json``: ``signatures``, ``tasks`` (scores in points, 0 to 100, with the bounds of their
        95 % bootstrap intervals, signatures, and under ``baseline`` differences and p values: ``<metric>_p`` of the
        paired bootstrap, ``<metric>_p_ar`` of approximate randomisation with ``ar_trials`` trials) and ``average``
        (macro averages over ``all`` directions, ``from_<pivot>``, ``to_<pivot>`` and groups, tested like a direction),
        ``groups``: the directions of each group that was given, and ``warnings``: what sacreBLEU and nspec warn of, each
        a ``text`` and the ``directions`` that it is said of.

    Raises:
        ValueError: a direction without hypotheses, references or a baseline, numbers of lines that differ, an empty
            test set, a tokenizer that cannot be used, too few or too many bootstrap samples, or a group that does not fit
            the directions.
    """
    check_range(options_of(ScoreConfig)["bootstrap"], "score.bootstrap", config.bootstrap)
    check_tokenizer(config.tokenize)
    if not references:
        raise ValueError("there is no direction to score: references are empty")
    _check("system", hypotheses, references)
    if baseline is not None:
        _check(f"baseline {baseline[0]!r}", baseline[1], references)
    averaged = average_groups(references, pivot, groups)

    signatures: dict[str, Any] = {"bleu": {}, "chrf": ""}
    tasks: dict[str, dict[str, Any]] = {}
    measured: dict[str, _Corpus] = {}
    compared: dict[str, _Corpus] = {}
    warned: dict[str, list[str]] = {}
    for task, lines in references.items():
        systems = [hypotheses[task]] + ([baseline[1][task]] if baseline else [])
        corpora, warnings = _measure(task, systems, lines, config)
        for text in warnings:
            warned.setdefault(text, []).append(task)
        measured[task] = corpora[0]
        if baseline:
            compared[task] = corpora[1]
        signature = corpora[0].signature
        signatures["bleu"][bleu_tokenizer(_target(task), config.tokenize)[0]] = signature["bleu"]
        signatures["chrf"] = signature["chrf"]
        entry: dict[str, Any] = {"sentences": len(lines)}
        for metric in METRICS:
            entry |= _with_interval(metric, corpora[0].score[metric], corpora[0].samples[metric])
            entry[f"{metric}_signature"] = signature[metric]
        entry["baseline"] = _compare(baseline[0], corpora[0], corpora[1]) if baseline else None
        tasks[task] = entry

    average: dict[str, Any] = {}
    for group, members in averaged.items():
        own = _mean([measured[task] for task in members])
        entry = {"directions": len(members)}
        for metric in METRICS:
            entry |= _with_interval(metric, own.score[metric], own.samples[metric])
        other = _mean([compared[task] for task in members]) if baseline else None
        entry["baseline"] = _compare(baseline[0], own, other) if baseline and other else None
        average[group] = entry
    given = {group: averaged[group] for group in groups or {}}
    said = [{"text": text, "directions": directions} for text, directions in warned.items()]
    return {"signatures": signatures, "tasks": tasks, "average": average, "groups": given, "warnings": said}


def _spelled(name: str, known: set[str]) -> str:
    """A language or direction as it is known: ``zh-Hans`` is ``zh_Hans``."""
    return next((each for each in (name, normalized_code(name), normalized_task(name)) if each in known), name)


def average_groups(tasks: Iterable[str], pivot: str, groups: Groups | None = None) -> dict[str, list[str]]:
    """The directions of each average.

    Args:
        tasks: the directions that are scored.
        pivot: see :func:`score_system`.
        groups: name -> languages or directions, such as ``{"low": ["is", "en-mt"]}``. A language stands for each
            direction from it and to it.

    Returns:
        ``all``, ``from_<pivot>`` and ``to_<pivot>`` where there are such directions, and each group. A group with
        directions from and to the pivot is followed by its halves, ``<group>/from_<pivot>`` and
        ``<group>/to_<pivot>``: papers give both, as translation from and into a small language differ.

    Raises:
        ValueError: a group is empty, has the name of another average or one that no table takes, or names what is not
            scored, or the pivot.
    """
    tasks = list(tasks)
    halves = {}
    if pivot:
        halves[f"from_{pivot}"] = [task for task in tasks if task.startswith(f"{pivot}-")]
        halves[f"to_{pivot}"] = [task for task in tasks if task.endswith(f"-{pivot}")]
    found = {"all": tasks} | {half: members for half, members in halves.items() if members}
    languages = sorted({code for task in tasks for code in languages_of_task(task)})
    for group, given in (groups or {}).items():
        names = [_spelled(name, {*languages, *tasks, pivot}) for name in given]
        if not group.strip() or not group.isprintable():
            raise ValueError(
                f"group {group!r}: expected a name of printable characters, as it stands in tables; rename it"
            )
        if group == "all" or group.startswith(("from_", "to_")) or "/" in group:
            raise ValueError(
                f"group {group}: all, from_..., to_... and names with / are those of other averages; rename it"
            )
        if not names:
            raise ValueError(f"group {group} is empty; give it languages or directions, or leave it out")
        for name in names:
            if name == pivot:
                raise ValueError(
                    f"group {group} has the pivot {pivot}, which says nothing of a direction; leave it out"
                )
            if name not in languages and name not in tasks:
                known = ", ".join([*languages, *tasks])
                raise ValueError(
                    f"group {group}: {name} is not a language or direction that is scored; there are {known}"
                )
        members = [task for task in tasks if {task, *languages_of_task(task)} & set(names)]
        found[group] = members
        of_group = {f"{group}/{half}": [task for task in members if task in of] for half, of in halves.items()}
        if all(of_group.values()):
            found |= of_group
    return found


def _target(task: str) -> str:
    return languages_of_task(task)[1]


def _check(who: str, hypotheses: Texts, references: Texts) -> None:
    """Every direction in hypotheses and references, with equally many lines and at least one."""
    for task in hypotheses:
        if task not in references:
            raise ValueError(
                f"direction {task} of the {who} has no references; there are those of {', '.join(references)}"
            )
    for task, lines in references.items():
        if task not in hypotheses:
            raise ValueError(f"the {who} has no translations of direction {task}; translate its test set first")
        if not lines:
            raise ValueError(f"direction {task} has no test sentences; a score needs at least one")
        if len(hypotheses[task]) != len(lines):
            raise ValueError(
                f"direction {task}: the {who} has {len(hypotheses[task])} translations for {len(lines)} references; "
                "there must be one for each"
            )


def _measure(
    task: str, systems: Sequence[Sequence[str]], references: Sequence[str], config: ScoreConfig
) -> tuple[list[_Corpus], list[str]]:
    """Scores of a system, and of a baseline after it, on one test set, with samples that are drawn jointly.

    Then what was warned of about the system, each text once.
    """
    from sacrebleu.metrics import BLEU, CHRF

    samples = config.bootstrap
    tokenizer, note = bleu_tokenizer(_target(task), config.tokenize)
    with _heard() as warnings:
        if blank := sum(not line.strip() for line in references):
            warnings.append(f"blank references: {blank} of {len(references)}, to which no translation is right")
        if note:
            proper = of_language(_target(task))
            warnings.append(f"BLEU counts characters, for {proper} cannot be used: {why_not(proper)}")
        # sacreBLEU says where another tokenizer would be better; it does not know that spBLEU is meant.
        asked = config.tokenize != AUTO and config.tokenize not in SPBLEU
        language = of_language(_target(task))[:2] if asked else ""
        metrics: dict[str, Any] = {
            "bleu": BLEU(tokenize=tokenizer, trg_lang=language, references=[references]),
            "chrf": CHRF(word_order=2, references=[references]),
        }
        measured = [{name: significance.measure(metric, systems[0]) for name, metric in metrics.items()}]
    with _heard():  # a baseline is scored as a system of its own too
        for lines in systems[1:]:
            measured.append({name: significance.measure(metric, lines) for name, metric in metrics.items()})
    signature = {}
    for name, metric in metrics.items():
        metric.n_bootstrap, metric.seed = samples, str(significance.SEED)
        form = metric.get_signature()
        if name == "bleu" and note:
            form.update("note", note)
        signature[name] = str(form)
    blocks = [system[name][1] for system in measured for name in metrics]
    drawn = significance.resample(np.concatenate(blocks, axis=1), samples)
    parts = iter(np.split(drawn, np.cumsum([block.shape[1] for block in blocks])[:-1], axis=1))
    corpora = [
        _Corpus(
            score={name: system[name][0] for name in metrics},
            samples={name: METRICS[name](next(parts)) for name in metrics},
            signature=signature,
            swapped={},
        )
        for system in measured
    ]
    if len(measured) == 2:
        corpora[0].swapped = _swap(*measured)
    return corpora, list(dict.fromkeys(warnings))


class _Collector(logging.Handler):
    """Keeps the texts of warnings."""

    def __init__(self, texts: list[str]) -> None:
        super().__init__(logging.WARNING)
        self.texts = texts

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(f"sacreBLEU: {' '.join(record.getMessage().split())}")


@contextlib.contextmanager
def _heard() -> Iterator[list[str]]:
    """What sacreBLEU warns of while the block runs; it does not reach the terminal, where nobody would know of what."""
    logger, texts = logging.getLogger("sacrebleu"), list[str]()
    collector, propagate = _Collector(texts), logger.propagate
    logger.addHandler(collector)
    logger.propagate = False
    try:
        yield texts
    finally:
        logger.removeHandler(collector)
        logger.propagate = propagate


def _swap(system: Measured, baseline: Measured) -> dict[str, Floats]:
    """How far the system is above the baseline, for each metric, after exchanges at random: float64 [trials]."""
    one, two = (np.concatenate([measured[name][1] for name in METRICS], axis=1) for measured in (system, baseline))
    ends = np.cumsum([system[name][1].shape[1] for name in METRICS])[:-1]
    own, other = (np.split(sums, ends, axis=1) for sums in significance.swap(one, two))
    return {name: formula(a) - formula(b) for (name, formula), a, b in zip(METRICS.items(), own, other)}


def _mean(corpora: Sequence[_Corpus]) -> _Corpus:
    """The macro average: each direction counts the same, whatever its size."""
    return _Corpus(
        score={m: float(np.mean([corpus.score[m] for corpus in corpora])) for m in METRICS},
        samples={m: np.mean([corpus.samples[m] for corpus in corpora], axis=0) for m in METRICS},
        signature={},
        swapped={m: np.mean([corpus.swapped[m] for corpus in corpora], axis=0) for m in corpora[0].swapped},
    )


def _with_interval(metric: str, score: float, samples: Floats) -> dict[str, float]:
    low, high = significance.interval(samples)
    return {metric: score, f"{metric}_low": low, f"{metric}_high": high}


def _compare(name: str, system: _Corpus, baseline: _Corpus) -> dict[str, Any]:
    result: dict[str, Any] = {"system": name, "ar_trials": significance.TRIALS}
    for metric in METRICS:
        delta = system.score[metric] - baseline.score[metric]
        result[f"{metric}_delta"] = delta
        result[f"{metric}_p"] = significance.paired_p_value(system.samples[metric], baseline.samples[metric], delta)
        result[f"{metric}_p_ar"] = significance.randomisation_p_value(system.swapped[metric], delta)
    return result

"""Bootstrap intervals and paired tests (bootstrap, approximate randomisation) over BLEU and chrF++, vectorised.

sacreBLEU scores a corpus from sums of per-sentence statistics (n-gram matches and lengths). Everything here works on
these statistics: one matrix product draws all bootstrap samples of a corpus, and array versions of the two formulas
score them at once. The samples are those that sacreBLEU draws (numpy's default generator, seed 12345), intervals and p
values follow its definitions, so that the numbers are the library's; :func:`paired_p_value` and
:func:`randomisation_p_value` name their exceptions. Approximate randomisation swaps sentences as it does.

The same seed for every corpus is deliberate. Corpora of the same size draw the same sentence numbers, so a multiway
test set (line i means the same in every language) is resampled jointly over its directions, which an average over
directions needs; for test sets that are not aligned it does no harm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

SEED = 12345  # sacreBLEU's default
TRIALS = 10_000  # of approximate randomisation: sacreBLEU's default

_CHUNK_CELLS = 4_000_000  # sentence draws held at a time: 32 MB of indices
_TIE = 1e-9  # points; rounding of the array formulas is far below, and a real difference of two corpora far above
_BLEU_ORDER = 4
_CHRF_ORDER = 6 + 2  # characters and words: chrF++
_BETA2 = 4.0

Floats = NDArray[np.float64]


def measure(metric: Any, hypotheses: Sequence[str]) -> tuple[float, Floats]:
    """The corpus score and the per-sentence statistics behind it.

    This is the only place that uses what sacreBLEU does not document; the score comes from the same two calls that its
    public ``corpus_score`` makes, and the array formula of this module must agree with it.

    Args:
        metric: ``BLEU(references=...)`` or ``CHRF(word_order=2, references=...)`` of sacreBLEU, other options default.
        hypotheses: one per reference.

    Returns:
        The score in points (0 to 100), and float64 [sentences, 10] for BLEU, [sentences, 24] for chrF++.

    Raises:
        RuntimeError: the installed sacreBLEU computes something else than this module expects.
    """
    statistics = metric._extract_corpus_statistics(hypotheses, None)
    score = float(metric._aggregate_and_compute(statistics).score)
    array = np.asarray(statistics, dtype=np.float64)
    formulas: dict[int, Callable[[Floats], Floats]] = {2 + 2 * _BLEU_ORDER: bleu, 3 * _CHRF_ORDER: chrf}
    formula = formulas.get(array.shape[1])
    if formula is None or abs(float(formula(array.sum(0))) - score) > 1e-6:
        raise RuntimeError(
            f"sacreBLEU's {type(metric).__name__} has other statistics than nspec knows ({array.shape[1]} a sentence); "
            "install the version that constraints.txt names"
        )
    return score, array


def bleu(statistics: Floats) -> Floats:
    """BLEU in points from summed statistics, with sacreBLEU's exponential smoothing.

    Args:
        statistics: float64 [..., 10]: length of hypothesis and reference, matches and n-grams of order 1 to 4.

    Returns:
        float64 [...].
    """
    hypothesis, reference = statistics[..., 0], statistics[..., 1]
    matches, totals = statistics[..., 2 : 2 + _BLEU_ORDER], statistics[..., 2 + _BLEU_ORDER :]
    log_precision = np.zeros_like(hypothesis)
    smoothing = np.ones_like(hypothesis)
    for order in range(_BLEU_ORDER):
        match, total = matches[..., order], np.maximum(totals[..., order], 1.0)
        smoothing = np.where(match == 0, smoothing * 2.0, smoothing)
        log_precision += np.log(np.where(match == 0, 1.0 / smoothing, match) / total)
    with np.errstate(divide="ignore", invalid="ignore"):  # no words in the hypothesis, or in both
        brevity = np.where(hypothesis > 0, np.minimum(1.0 - reference / hypothesis, 0.0), -np.inf)
    score = 100.0 * np.exp(brevity + log_precision / _BLEU_ORDER)
    # no match at all, or a corpus without any n-gram of some order, is 0 by definition
    return np.where((matches.sum(-1) == 0) | (totals == 0).any(-1), 0.0, score)


def chrf(statistics: Floats) -> Floats:
    """chrF++ in points from summed statistics (6 character orders, 2 word orders, beta 2, effective order).

    Args:
        statistics: float64 [..., 24]: for each order the n-grams of the hypothesis, of the reference, and the matches.

    Returns:
        float64 [...].
    """
    counts = statistics.reshape(*statistics.shape[:-1], _CHRF_ORDER, 3)
    hypothesis, reference, match = counts[..., 0], counts[..., 1], counts[..., 2]
    used = (hypothesis > 0) & (reference > 0)
    orders = np.maximum(used.sum(-1), 1)
    precision = np.where(used, match / np.maximum(hypothesis, 1.0), 0.0).sum(-1) / orders
    recall = np.where(used, match / np.maximum(reference, 1.0), 0.0).sum(-1) / orders
    below = _BETA2 * precision + recall
    return np.where(below > 0, 100.0 * (1.0 + _BETA2) * precision * recall / np.where(below > 0, below, 1.0), 0.0)


def resample(statistics: Floats, samples: int, seed: int = SEED) -> Floats:
    """Sums of statistics over bootstrap samples: ``samples`` times as many sentences, drawn with replacement.

    Args:
        statistics: float64 [sentences, k]; columns of several metrics or systems side by side share their draws.
        samples: how many bootstrap samples.
        seed: of numpy's default generator.

    Returns:
        float64 [samples, k]; exact, as the statistics are whole numbers.
    """
    sentences = len(statistics)
    generator = np.random.default_rng(seed)
    sums = np.empty((samples, statistics.shape[1]))
    step = max(1, _CHUNK_CELLS // sentences)
    for start in range(0, samples, step):
        rows = min(step, samples - start)
        drawn = generator.choice(sentences, size=(rows, sentences), replace=True)
        drawn += np.arange(rows)[:, None] * sentences
        times = np.bincount(drawn.ravel(), minlength=rows * sentences).reshape(rows, sentences)
        sums[start : start + rows] = times.astype(np.float64) @ statistics
    return sums


def interval(scores: Floats) -> tuple[float, float]:
    """The 95 % interval of bootstrap scores [samples]: the order statistics that sacreBLEU takes."""
    ordered = np.sort(scores)
    outside = len(ordered) // 40
    return float(ordered[outside]), float(ordered[len(ordered) - outside - 1])


def paired_p_value(system: Floats, baseline: Floats, delta: float) -> float:
    """The p value of sacreBLEU's paired bootstrap test.

    A sample counts against the difference when its absolute difference exceeds the samples' mean by more than
    ``delta``. In effect that is a one-sided test for the sign that was found: of pairs of equally good systems about
    10 % have p < 0.05, half of them each way. Where no sample differs at all the systems said the same (for this metric)
    and p is 1; sacreBLEU's formula would call exactly this case significant, with p = 1 / (samples + 1).

    Args:
        system: float64 [samples], bootstrap scores of the system.
        baseline: float64 [samples], those of the baseline on the same samples.
        delta: the difference of the two systems on the test set itself; its sign does not matter.
    """
    difference = np.abs(system - baseline)
    if not difference.any() and delta == 0:
        return 1.0
    stray = int(np.sum(difference - difference.mean() > abs(delta)))
    return (stray + 1) / (len(difference) + 1)


def swap(system: Floats, baseline: Floats, trials: int = TRIALS, seed: int = SEED) -> tuple[Floats, Floats]:
    """Sums of statistics of two systems whose translations were exchanged at random, sentence by sentence.

    Args:
        system: float64 [sentences, k]; columns of several metrics side by side share their exchanges.
        baseline: float64 [sentences, k], those of the baseline.
        trials: how many times; each sentence is exchanged in half of them.
        seed: of numpy's default generator.

    Returns:
        Two float64 [trials, k], the sums of either system; exact, as the statistics are whole numbers.
    """
    sentences = len(system)
    generator = np.random.default_rng(seed)
    # One product is enough: what one side wins by an exchange the other one loses.
    moved, gain = np.empty((trials, system.shape[1])), system - baseline
    # The generator takes 32 choices from one of its numbers and drops what is left of it at the end of a call, so a
    # multiple of 32 choices a call makes those of one call for all.
    step = 32 * max(1, _CHUNK_CELLS // (32 * sentences))
    for start in range(0, trials, step):
        rows = min(step, trials - start)
        exchanged = generator.integers(2, size=(rows, sentences), dtype=bool)
        moved[start : start + rows] = exchanged.astype(np.float64) @ gain
    return system.sum(0) - moved, baseline.sum(0) + moved


def randomisation_p_value(differences: Floats, delta: float) -> float:
    """The two-sided p value of paired approximate randomisation: (b + 1) / (trials + 1), never 0.

    If the systems were equally good it would not matter which of the two said what: a trial counts against the
    difference (b of them do) when that of the exchanged systems is at least as large, whatever its sign.

    sacreBLEU does not count a trial with the same difference. For test sets of usual size there is none and the p values
    are equal; but where systems differ in a few sentences only, most trials are such ties, and leaving them out makes
    any difference significant: of two systems that differ in one sentence the library says p = 1 / (trials + 1), where
    chance alone gives such a difference always (p = 1).

    Args:
        differences: float64 [trials], scores of one side minus those of the other after :func:`swap`.
        delta: the difference of the two systems on the test set itself; its sign does not matter.
    """
    stray = int(np.sum(np.abs(differences) >= abs(delta) - _TIE))
    return (stray + 1) / (len(differences) + 1)

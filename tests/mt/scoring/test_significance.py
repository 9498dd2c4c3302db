from __future__ import annotations

import random

import numpy as np
import pytest

from nspec.mt.scoring import tests as significance

sacrebleu_metrics = pytest.importorskip("sacrebleu.metrics")
from sacrebleu.significance import PairedTest  # noqa: E402

BLEU, CHRF = sacrebleu_metrics.BLEU, sacrebleu_metrics.CHRF
WORDS = [f"w{i}" * (1 + i % 3) for i in range(120)] + ["Haus,", "(Tür)", "naïve", "3.5", "«oui»"]


def corpus(sentences: int, kept: float, seed: int = 1) -> tuple[list[str], list[str]]:
    """References and hypotheses that keep a share of the words."""
    rng = random.Random(seed)
    references = [" ".join(rng.choices(WORDS, k=rng.randint(1, 18))) for _ in range(sentences)]
    hypotheses = [" ".join(w if rng.random() < kept else rng.choice(WORDS) for w in r.split()) for r in references]
    return references, hypotheses


def metrics(references: list[str]) -> dict:
    return {"bleu": BLEU(references=[references]), "chrf": CHRF(word_order=2, references=[references])}


FORMULAS = {"bleu": significance.bleu, "chrf": significance.chrf}


@pytest.mark.parametrize("name", ["bleu", "chrf"])
@pytest.mark.parametrize("kept", [0.0, 0.02, 0.5, 0.9, 1.0])
def test_measured_score_is_the_public_corpus_score_exactly(name: str, kept: float) -> None:
    references, hypotheses = corpus(60, kept)
    metric = metrics(references)[name]
    score, statistics = significance.measure(metric, hypotheses)
    assert score == metric.corpus_score(hypotheses, None).score
    assert float(FORMULAS[name](statistics.sum(0))) == pytest.approx(score, abs=1e-9)


@pytest.mark.parametrize("name", ["bleu", "chrf"])
@pytest.mark.parametrize(
    ("references", "hypotheses"),
    [
        (["a b c d e"], [""]),  # nothing said
        (["a b c d e"], ["a"]),  # no n-gram of order 2 and up
        (["a b c d e"], ["a b x y z"]),  # two orders without a match: smoothing
        (["a b c d e"], ["v w x y z"]),  # words that all differ
        (["a"], ["a b c d e f g h"]),  # too long
        (["a b c d e f g h"], ["a b c d"]),  # too short: brevity penalty
        ([""], ["a b c d"]),  # an empty reference
        (["äöü"], ["äöü"]),
    ],
)
def test_array_formulas_equal_the_library_in_corner_cases(
    name: str, references: list[str], hypotheses: list[str]
) -> None:
    metric = metrics(references)[name]
    statistics = significance.measure(metric, hypotheses)[1]
    expected = metric.corpus_score(hypotheses, None).score
    assert float(FORMULAS[name](statistics.sum(0))) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("name", ["bleu", "chrf"])
@pytest.mark.parametrize("sentences", [8, 57])
def test_interval_and_p_value_equal_the_librarys_paired_bootstrap(name: str, sentences: int) -> None:
    references, better = corpus(sentences, 0.80, seed=2)
    worse = [line if i % 4 else " ".join(reversed(line.split())) for i, line in enumerate(better)]
    test = PairedTest([("base", worse), ("system", better)], {name: metrics(references)[name]}, None, "bs", 300)
    base_result, result = next(iter({k: v for k, v in test()[1].items() if k != "System"}.values()))

    metric = metrics(references)[name]
    measured = [significance.measure(metric, lines) for lines in (worse, better)]
    samples = [FORMULAS[name](significance.resample(statistics, 300)) for _, statistics in measured]
    for own, theirs in zip(samples, (base_result, result)):
        low, high = significance.interval(own)
        assert own.mean() == pytest.approx(theirs.mean, abs=1e-3)  # the library sums in float32
        assert 0.5 * (high - low) == pytest.approx(theirs.ci, abs=1e-3)
    p = significance.paired_p_value(samples[1], samples[0], measured[1][0] - measured[0][0])
    assert p == pytest.approx(result.p_value, abs=1.5 / 301)


def differences(name: str, system: np.ndarray, baseline: np.ndarray, trials: int) -> np.ndarray:
    one, two = significance.swap(system, baseline, trials)
    return FORMULAS[name](one) - FORMULAS[name](two)


@pytest.mark.parametrize("name", ["bleu", "chrf"])
@pytest.mark.parametrize("sentences", [40, 57])
def test_p_value_equals_the_librarys_paired_approximate_randomisation(name: str, sentences: int) -> None:
    references, better = corpus(sentences, 0.80, seed=2)
    rng = random.Random(4)
    worse = [" ".join(w if rng.random() < 0.82 else rng.choice(WORDS) for w in r.split()) for r in references]
    test = PairedTest([("base", worse), ("system", better)], {name: metrics(references)[name]}, None, "ar", 400)
    result = next(iter({k: v for k, v in test()[1].items() if k != "System"}.values()))[1]

    metric = metrics(references)[name]
    (base_score, base), (score, system) = (significance.measure(metric, lines) for lines in (worse, better))
    p = significance.randomisation_p_value(differences(name, system, base, 400), score - base_score)
    # The same seed and the same exchanges, and too many sentences for ties, which the library does not count.
    assert p == pytest.approx(result.p_value, abs=1e-12)
    assert 0.02 < p < 0.98, "a p value that other exchanges would not give as well"
    other_way = significance.randomisation_p_value(differences(name, base, system, 400), base_score - score)
    assert other_way == p, "two-sided"


@pytest.mark.parametrize("name", ["bleu", "chrf"])
@pytest.mark.parametrize("differ", [1, 2, 3, 5])
def test_a_few_sentences_that_differ_are_not_significant(name: str, differ: int) -> None:
    """Most exchanges of them give the very difference that was found, or its opposite: those are no less extreme."""
    references, hypotheses = corpus(30, 0.6, seed=2)
    better = references[:differ] + hypotheses[differ:]
    metric = metrics(references)[name]
    (base_score, base), (score, system) = (significance.measure(metric, lines) for lines in (hypotheses, better))
    p = significance.randomisation_p_value(differences(name, system, base, 4000), score - base_score)
    # All sentences are better: of the 2^differ exchanges, none and all give the largest difference.
    assert p == pytest.approx(2 / 2**differ, abs=0.03)
    assert score > base_score


@pytest.mark.parametrize("sentences", [31, 37])
def test_exchanges_do_not_depend_on_how_many_are_held_in_memory(
    sentences: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = np.random.default_rng(5)
    system, baseline = (generator.integers(0, 9, size=(sentences, 10)).astype(np.float64) for _ in range(2))
    whole = significance.swap(system, baseline, 101)
    monkeypatch.setattr(significance, "_CHUNK_CELLS", sentences * 32)
    parts = significance.swap(system, baseline, 101)
    assert np.array_equal(parts[0], whole[0])
    assert np.array_equal(parts[0] + parts[1], np.tile(system.sum(0) + baseline.sum(0), (101, 1)))
    assert len(np.unique(whole[0], axis=0)) > 90


def test_systems_that_say_the_same_are_not_significantly_different() -> None:
    references, hypotheses = corpus(40, 0.7)
    metric = metrics(references)["bleu"]
    samples = significance.bleu(significance.resample(significance.measure(metric, hypotheses)[1], 200))
    assert significance.paired_p_value(samples, samples.copy(), 0.0) == 1.0


def test_samples_do_not_depend_on_how_many_are_held_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    statistics = np.random.default_rng(5).integers(0, 9, size=(37, 10)).astype(np.float64)
    whole = significance.resample(statistics, 101)
    monkeypatch.setattr(significance, "_CHUNK_CELLS", 37 * 7)
    assert np.array_equal(significance.resample(statistics, 101), whole)


@pytest.mark.filterwarnings("error")
def test_lines_that_are_blank_on_both_sides_are_zero_and_no_warning() -> None:
    _, statistics = significance.measure(BLEU(references=[["", "", "a b c d"]]), ["", "", "a b c d"])
    assert significance.bleu(statistics).tolist() == pytest.approx([0.0, 0.0, 100.0])
    _, statistics = significance.measure(CHRF(word_order=2, references=[["", "", "a b c d"]]), ["", "", "a b c d"])
    assert significance.chrf(statistics).tolist() == pytest.approx([0.0, 0.0, 100.0])


def test_a_metric_with_other_settings_is_refused() -> None:
    references, hypotheses = corpus(10, 0.7)
    with pytest.raises(RuntimeError, match=r"CHRF.*constraints"):
        significance.measure(CHRF(references=[references]), hypotheses)
    with pytest.raises(RuntimeError, match="BLEU"):
        significance.measure(BLEU(smooth_method="none", references=[["a b c d e"]]), ["a b x y z"])

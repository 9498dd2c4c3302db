from __future__ import annotations

import json
import random
import time

import numpy as np
import pytest

from nspec.mt.scoring.config import ScoreConfig
from nspec.mt.scoring.scores import average_groups, score_system

sacrebleu_metrics = pytest.importorskip("sacrebleu.metrics")
BLEU, CHRF = sacrebleu_metrics.BLEU, sacrebleu_metrics.CHRF

WORDS = ["the", "a", "cat", "dog", "house", "sees", "ran", "3", "12.5", ",", "blue", "Berlin", "won't", "(old)", "tree"]
CONFIG = ScoreConfig(bootstrap=200)


def texts(tasks: list[str], sentences: int = 30, kept: float = 0.7, seed: int = 0) -> tuple[dict, dict]:
    rng = random.Random(seed)
    references = {t: [" ".join(rng.choices(WORDS, k=rng.randint(4, 14))) for _ in range(sentences)] for t in tasks}
    hypotheses = {
        t: [" ".join(w if rng.random() < kept else rng.choice(WORDS) for w in line.split()) for line in lines]
        for t, lines in references.items()
    }
    return hypotheses, references


def test_scores_and_signatures_are_sacrebleus_own() -> None:
    hypotheses, references = texts(["en-de", "de-en", "en-zh"])
    scores = score_system(hypotheses, references, CONFIG, "en")
    for task, entry in scores["tasks"].items():
        bleu, chrf = BLEU(tokenize="zh" if task == "en-zh" else "13a"), CHRF(word_order=2)
        public_bleu = bleu.corpus_score(hypotheses[task], [references[task]], n_bootstrap=CONFIG.bootstrap)
        public_chrf = chrf.corpus_score(hypotheses[task], [references[task]], n_bootstrap=CONFIG.bootstrap)
        assert entry["bleu"] == public_bleu.score
        assert entry["chrf"] == public_chrf.score
        assert entry["bleu_signature"] == str(bleu.get_signature())
        assert entry["chrf_signature"] == str(chrf.get_signature())
        assert f"± {(entry['bleu_high'] - entry['bleu_low']) / 2:.2f}" in str(public_bleu)
        assert f"± {(entry['chrf_high'] - entry['chrf_low']) / 2:.2f}" in str(public_chrf)
        assert entry["bleu_low"] <= entry["bleu"] <= entry["bleu_high"]
        assert entry["sentences"] == 30
        assert entry["baseline"] is None
    assert set(scores["signatures"]["bleu"]) == {"13a", "zh"}
    assert scores["signatures"]["bleu"]["zh"] == scores["tasks"]["en-zh"]["bleu_signature"]
    assert json.loads(json.dumps(scores)) == scores  # plain numbers and strings


def test_averages_are_macro_means_by_side_of_the_pivot() -> None:
    hypotheses, references = texts(["en-de", "de-en", "en-fr", "fr-en", "de-fr"])
    average = score_system(hypotheses, references, CONFIG, "en")["average"]
    tasks = score_system(hypotheses, references, CONFIG, "")["tasks"]
    members = {"all": list(references), "from_en": ["en-de", "en-fr"], "to_en": ["de-en", "fr-en"]}
    assert set(average) == set(members)
    for group, names in members.items():
        assert average[group]["directions"] == len(names)
        assert average[group]["bleu"] == pytest.approx(np.mean([tasks[t]["bleu"] for t in names]))
        assert average[group]["chrf_low"] < average[group]["chrf"] < average[group]["chrf_high"]
    assert set(score_system(hypotheses, references, CONFIG, "")["average"]) == {"all"}


def test_average_of_aligned_directions_is_resampled_jointly() -> None:
    """The same text in every direction: the average must be as uncertain as one direction, not sqrt(n) times less."""
    hypotheses, references = texts(["en-de"])
    tasks = [f"en-{lang}" for lang in ("de", "fr", "it", "es")]
    scores = score_system(
        {t: hypotheses["en-de"] for t in tasks}, {t: references["en-de"] for t in tasks}, CONFIG, "en"
    )
    for key in ("bleu_low", "bleu_high", "chrf_low", "chrf_high"):
        assert scores["average"]["all"][key] == pytest.approx(scores["tasks"]["en-de"][key])


def test_a_planted_difference_is_significant_and_identical_systems_are_not() -> None:
    hypotheses, references = texts(["en-de", "de-en"], sentences=100)
    better = {
        t: [r if i % 3 == 0 else h for i, (h, r) in enumerate(zip(hypotheses[t], references[t]))] for t in references
    }
    scores = score_system(better, references, CONFIG, "en", ("continued", hypotheses))
    same = score_system(hypotheses, references, CONFIG, "en", ("continued", hypotheses))
    for entry in [*scores["tasks"].values(), scores["average"]["all"], scores["average"]["to_en"]]:
        assert entry["baseline"]["system"] == "continued"
        assert entry["baseline"]["bleu_delta"] > 5
        assert entry["baseline"]["bleu_p"] < 0.01
        assert entry["baseline"]["chrf_p"] < 0.01
        assert entry["baseline"]["bleu_p_ar"] < 0.01
        assert entry["baseline"]["chrf_p_ar"] < 0.01
    for entry in [*same["tasks"].values(), same["average"]["all"]]:
        assert entry["baseline"]["bleu_delta"] == entry["baseline"]["chrf_delta"] == 0
        assert entry["baseline"]["bleu_p"] == entry["baseline"]["chrf_p"] == 1.0
        assert entry["baseline"]["bleu_p_ar"] == entry["baseline"]["chrf_p_ar"] == 1.0
    worse = score_system(hypotheses, references, CONFIG, "en", ("continued", better))
    assert worse["tasks"]["en-de"]["baseline"]["bleu_delta"] == -scores["tasks"]["en-de"]["baseline"]["bleu_delta"]
    assert worse["tasks"]["en-de"]["baseline"]["bleu_p"] < 0.01


def test_p_values_of_approximate_randomisation_are_the_librarys() -> None:
    from sacrebleu.significance import PairedTest

    hypotheses, references = texts(["en-de"], sentences=40)
    rng = random.Random(5)  # another system, a little better
    lines = [" ".join(w if rng.random() < 0.75 else rng.choice(WORDS) for w in r.split()) for r in references["en-de"]]
    scores = score_system({"en-de": lines}, references, CONFIG, "en", ("base", hypotheses))
    systems = [("base", hypotheses["en-de"]), ("system", lines)]
    metrics = {"bleu": BLEU(), "chrf": CHRF(word_order=2)}
    results = PairedTest(systems, metrics, [references["en-de"]], "ar")()[1]
    test = scores["tasks"]["en-de"]["baseline"]
    assert test["ar_trials"] == 10_000
    for own, theirs in (("bleu", "BLEU"), ("chrf", "chrF2++")):
        assert test[f"{own}_p_ar"] == pytest.approx(results[theirs][1].p_value, abs=1e-12)
        assert 0.01 < test[f"{own}_p_ar"] < 0.99
    assert scores["average"]["all"]["baseline"]["bleu_p_ar"] == test["bleu_p_ar"], "the average of one direction"


def test_directions_that_differ_opposite_ways_do_not_differ_on_average() -> None:
    """The average is tested by the mean of signed differences, not of their sizes."""
    hypotheses, references = texts(["en-de"], sentences=60)
    better = [r if i % 3 == 0 else h for i, (h, r) in enumerate(zip(hypotheses["en-de"], references["en-de"]))]
    system = {"en-de": better, "en-fr": hypotheses["en-de"]}
    base = {"en-de": hypotheses["en-de"], "en-fr": better}
    both = {"en-de": references["en-de"], "en-fr": references["en-de"]}
    scores = score_system(system, both, CONFIG, "", ("base", base))
    assert scores["tasks"]["en-de"]["baseline"]["bleu_p_ar"] < 0.01
    assert scores["tasks"]["en-fr"]["baseline"]["bleu_p_ar"] < 0.01
    assert scores["average"]["all"]["baseline"]["bleu_p_ar"] == 1.0


def test_groups_are_averaged_over_their_directions() -> None:
    hypotheses, references = texts(["en-de", "de-en", "en-is", "is-en", "de-is"])
    groups = {"high": ["de"], "into icelandic": ["en-is", "de-is"], "low": ["is", "en-is"]}
    scores = score_system(hypotheses, references, CONFIG, "en", ("base", hypotheses), groups)
    members = {
        "high": ["en-de", "de-en", "de-is"],
        "high/from_en": ["en-de"],
        "high/to_en": ["de-en"],
        "into icelandic": ["en-is", "de-is"],
        "low": ["en-is", "is-en", "de-is"],
        "low/from_en": ["en-is"],
        "low/to_en": ["is-en"],
    }
    assert list(scores["average"]) == ["all", "from_en", "to_en", *members]
    assert scores["groups"] == {group: members[group] for group in groups}
    for group, tasks in members.items():
        entry = scores["average"][group]
        assert entry["directions"] == len(tasks)
        assert entry["bleu"] == pytest.approx(np.mean([scores["tasks"][task]["bleu"] for task in tasks]))
        assert entry["baseline"]["chrf_p_ar"] == 1.0
    assert list(average_groups(["en-de", "de-en"], "", {"high": ["de"]})) == ["all", "high"]


@pytest.mark.parametrize("name", ["", " ", "a\tb", "a\nb", "a\u2028b", "\0"])
def test_names_of_groups_that_would_break_a_table_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="expected a name of printable characters"):
        average_groups(["en-de"], "", {name: ["de"]})


def test_codes_in_groups_may_have_hyphens() -> None:
    tasks = ["en-zh_Hans", "zh_Hans-en", "en-de"]
    for given in (["zh-Hans"], ["zh_Hans"], ["en-zh-Hans", "zh_Hans-en"]):
        assert average_groups(tasks, "", {"han": given})["han"] == tasks[:2]
    with pytest.raises(ValueError, match="zh-Hant is not a language or direction"):
        average_groups(tasks, "", {"han": ["zh-Hant"]})


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"low": ["mt"]}, r"group low: mt is not a language or direction that is scored; there are de, en, en-de"),
        ({"low": ["de-en"]}, r"group low: de-en is not a language or direction"),
        ({"low": []}, r"group low is empty"),
        ({"low": ["de", "en"]}, r"group low has the pivot en"),
        ({"all": ["de"]}, r"group all: .* rename it"),
        ({"from_en": ["de"]}, r"group from_en: .* rename it"),
        ({"low/high": ["de"]}, r"group low/high: .* rename it"),
    ],
)
def test_a_group_that_does_not_fit_is_one_error(groups: dict, message: str) -> None:
    hypotheses, references = texts(["en-de"])
    with pytest.raises(ValueError, match=message):
        score_system(hypotheses, references, CONFIG, "en", groups=groups)


def test_empty_translations_score_zero() -> None:
    _, references = texts(["en-de"])
    entry = score_system({"en-de": [""] * 30}, references, CONFIG, "en")["tasks"]["en-de"]
    assert entry["bleu"] == entry["bleu_low"] == entry["bleu_high"] == entry["chrf"] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h, r: h["en-de"].pop(), "direction en-de: the system has 29 translations for 30 references"),
        (lambda h, r: h.pop("de-en"), "no translations of direction de-en"),
        (lambda h, r: r.pop("de-en"), "direction de-en of the system has no references"),
        (lambda h, r: r.clear(), "no direction to score"),
        (lambda h, r: (h["en-de"].clear(), r["en-de"].clear()), "direction en-de has no test sentences"),
    ],
)
def test_lines_that_do_not_fit_are_one_error_naming_the_direction(change, message: str) -> None:
    hypotheses, references = texts(["en-de", "de-en"])
    change(hypotheses, references)
    with pytest.raises(ValueError, match=message):
        score_system(hypotheses, references, CONFIG, "en")


def test_a_baseline_that_does_not_fit_is_named() -> None:
    hypotheses, references = texts(["en-de"])
    with pytest.raises(ValueError, match=r"direction en-de: the baseline 'continued' has 3 translations for 30"):
        score_system(hypotheses, references, CONFIG, "en", ("continued", {"en-de": ["a"] * 3}))


def test_too_few_bootstrap_samples_are_refused() -> None:
    hypotheses, references = texts(["en-de"])
    with pytest.raises(ValueError, match=r"score.bootstrap: expected at least 40, found 10"):
        score_system(hypotheses, references, ScoreConfig(bootstrap=10), "en")


def test_a_missing_tokenizer_stands_in_the_signature_and_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "nspec.mt.scoring.bleu_tokenizer._trouble", lambda name: "not installed" if "mecab" in name else ""
    )
    lines = {"en-ja": ["これは猫です", "私は行きます"] * 5}
    scores = score_system(lines, lines, CONFIG, "en")
    entry = scores["tasks"]["en-ja"]
    assert entry["bleu"] == pytest.approx(100)
    assert "tok:char" in entry["bleu_signature"]
    assert "note:ja-mecab-not-installed" in entry["bleu_signature"]
    [warning] = scores["warnings"]
    assert warning["directions"] == ["en-ja"]
    assert "ja-mecab cannot be used" in warning["text"]


@pytest.mark.parametrize("tokenize", ["13a", "intl", "char", "none", "zh"])
def test_a_tokenizer_that_is_asked_for_is_that_of_every_direction(tokenize: str) -> None:
    hypotheses, references = texts(["en-de", "en-zh"])
    scores = score_system(hypotheses, references, ScoreConfig(tokenize=tokenize, bootstrap=40), "en")
    for task, entry in scores["tasks"].items():
        public = BLEU(tokenize=tokenize)
        assert entry["bleu"] == public.corpus_score(hypotheses[task], [references[task]], n_bootstrap=40).score
        assert entry["bleu_signature"] == str(public.get_signature())
    assert list(scores["signatures"]["bleu"]) == [tokenize]


@pytest.mark.parametrize(("language", "low", "high"), [("cmn_Hant", 70, 90), ("yue", 70, 90), ("tha_Thai", 70, 95)])
def test_text_without_spaces_is_not_one_word(language: str, low: float, high: float) -> None:
    """One character of a sentence differs; as one word the score would be 0."""
    lines = {"tha": ("วันนี้อากาศดีมาก", "วันนี้อากาศดีมาย")}.get(
        language[:3], ("今天天气很好我们去公园散步吧", "今天天气真好我们去公园散步吧")
    )
    task = f"en-{language}"
    entry = score_system({task: [lines[0]]}, {task: [lines[1]]}, CONFIG, "en")["tasks"][task]
    assert low < entry["bleu"] < high


def test_blank_references_are_counted_and_said() -> None:
    hypotheses, references = texts(["en-de", "de-en"])
    references["en-de"][3:5] = ["", " "]
    [warning] = score_system(hypotheses, references, CONFIG, "en")["warnings"]
    assert (warning["directions"], warning["text"][:31]) == (["en-de"], "blank references: 2 of 30, to w")


def test_what_sacrebleu_warns_of_is_kept_with_its_directions(caplog: pytest.LogCaptureFixture) -> None:
    hypotheses, references = texts(["en-de", "de-en", "en-zh"], sentences=110)
    tokenized = hypotheses | {task: [f"{line} ." for line in hypotheses[task]] for task in ("en-de", "de-en")}
    period = "sacreBLEU: That's 100 lines that end in a tokenized period ('.')"
    scores = score_system(tokenized, references, ScoreConfig(bootstrap=40), "en")
    said = {warning["text"]: warning["directions"] for warning in scores["warnings"]}
    assert said[period] == ["en-de", "de-en"]
    again = score_system(hypotheses, references, ScoreConfig(tokenize="13a", bootstrap=40), "en", ("base", tokenized))
    [warning] = again["warnings"]  # not those of the baseline
    assert (warning["directions"], "'zh'" in warning["text"]) == (["en-zh"], True)
    assert not caplog.records, "the terminal would not say of which system"


def test_five_systems_on_sixteen_directions_are_scored_within_thirty_seconds() -> None:
    languages = ["fa", "pl", "ar", "he", "nl", "de", "it", "es"]
    tasks = [f"en-{x}" for x in languages] + [f"{x}-en" for x in languages]
    hypotheses, references = texts(tasks, sentences=200)
    start = time.process_time()
    score_system(hypotheses, references, ScoreConfig(), "en", ("continued", hypotheses))
    assert (time.process_time() - start) * 5 < 30

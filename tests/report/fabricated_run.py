"""Run folders as a run would leave them, with invented numbers, and a reader of the page."""

from __future__ import annotations

import contextlib
import io
import json
import random
import re
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from nspec import NeuronMasks
from nspec.analysis.bands import families_of
from nspec.analysis.heads import HeadImportance
from nspec.files import read_json, write_json, write_text
from nspec.mt.scoring.averages import kind_of_group, run_groups
from nspec.mt.scoring.config import ScoreConfig
from nspec.mt.scoring.scores import average_groups, score_system
from nspec.report import measured_heads
from nspec.run.config import Config
from nspec.run.yaml import render

LANGUAGES = ["de", "fa", "zh"]
TASKS = [f"en-{x}" for x in LANGUAGES] + [f"{x}-en" for x in LANGUAGES]
SYSTEMS = ["dense", "continued", "forward", "update", "random"]
SPECIALISED = ("forward", "update", "random")
WORDS = ["maro", "tili", "kex", "ristus", "zun", "pal", "sendo", "dorra", "1999", ","]
KEPT = {"dense": 0.6, "continued": 0.6, "forward": 0.9, "update": 0.6, "random": 0.3}


def texts(sentences: int) -> tuple[dict, dict]:
    """References by task, and hypotheses by system and task; update says exactly what continued says."""
    rng = random.Random(4)
    references = {t: [" ".join(rng.choices(WORDS, k=rng.randint(5, 12))) for _ in range(sentences)] for t in TASKS}
    hypotheses = {
        system: {
            task: [" ".join(w if rng.random() < KEPT[system] else rng.choice(WORDS) for w in r.split()) for r in lines]
            for task, lines in references.items()
        }
        for system in SYSTEMS
    }
    hypotheses["update"] = hypotheses["continued"]
    return references, hypotheses


def masks(layers: int = 2, d_ff: int = 64) -> NeuronMasks:
    generator = torch.Generator().manual_seed(1)
    names = [f"model.{side}.layers.{i}.fc1" for side in ("encoder", "decoder") for i in range(layers)]
    return NeuronMasks({t: {name: torch.rand(d_ff, generator=generator) < 0.8 for name in names} for t in TASKS})


def make_run(run: Path, systems: list[str] = SYSTEMS, scored: list[str] | None = None, with_masks: bool = True) -> Path:
    """A run folder in which ``systems`` are trained and ``scored`` are scored, out of all five."""
    config = Config()
    config.run.folder, config.run.systems, config.corpus.languages = str(run), SYSTEMS, ["en", *LANGUAGES]
    write_text(run / "config.yaml", render(config))
    references, hypotheses = texts(25)
    for task in TASKS:
        pair = "-".join(sorted(task.split("-")))
        write_text(run / "prepared/text/test" / f"{pair}.{task.split('-')[1]}.txt", "\n".join(references[task]) + "\n")
    versions = {"python": "3.11.9", "nspec": "0.1.0"}
    stage = {"options": {}, "inputs": {"prepared/meta.json": "ab" * 32}, "seconds": 12.5, "versions": versions}
    for number, system in enumerate(systems):
        folder = run / "systems" / system
        log = [
            {"step": u, "updates": u, "loss": 5 - u / 100, "lr": 1e-3, "tokens_per_second": 900, "seconds": u / 10}
            for u in range(50, 301, 50)
        ]
        log += [
            {"step": u, "valid_loss": 4 - u / 100 - number / 50, "valid_bleu": None, "tasks": {}} for u in (100, 300)
        ]
        write_text(folder / "log.jsonl", "".join(json.dumps(line) + "\n" for line in log))
        density = 0.8125 if system in SPECIALISED else None
        summary = {"system": system, "mode": None, "updates": 300, "micro_batches": 300, "train_seconds": 61.25}
        summary |= {"tokens": 12345, "tokens_per_second": 4321.0 + number, "best_step": 300, "best_value": 1.5}
        summary |= {"best_metric": "loss", "parameters": 1234567, "density": density, "precision": "fp32"}
        write_json(folder / "summary.json", summary | {"device": "cpu", "threads": 2})
        write_json(folder / "stage.json", stage | {"stage": f"specialize:{system}"})
    for system in systems if scored is None else scored:
        baseline = ("continued", hypotheses["continued"]) if system != "continued" else None
        scores = score_system(hypotheses[system], references, ScoreConfig(bootstrap=60), "en", baseline)
        write_json(run / "scores" / system / "scores.json", {"system": system, "decode": {}, **scores, "seconds": 3.0})
        for task, lines in hypotheses[system].items():
            write_text(run / "scores" / system / f"{task}.hyp.txt", "\n".join(lines) + "\n")
    write_json(run / "prepared" / "meta.json", {})
    if with_masks:
        masks().save(run / "masks")
    return run


@contextlib.contextmanager
def edited(path: Path) -> Iterator[Any]:
    """The value of a JSON file, to be changed in place; written back at the end."""
    value = read_json(path)
    yield value
    write_json(path, value)


def shown(table: Any, width: int = 200) -> str:
    """What a terminal of this width shows."""
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


class Page(HTMLParser):
    """Visible text, links, ids and unclosed elements of a page."""

    VOID = {"meta", "br", "link", "img", "hr", "input"}

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text, self.references, self.ids, self.open = [], [], [], []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.references += [value for key, value in attrs if key in ("src", "href", "xlink:href", "action")]
        self.ids += [value for key, value in attrs if key == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text.append(data)

    def is_sound(self) -> bool:
        """Whether all elements are closed, ids unique, links within the page sound, and nothing comes from elsewhere."""
        inside = {r[1:] for r in self.references if r.startswith("#")}
        inside |= set(re.findall(r"url\(#([^)]*)\)", self.source))
        alone = not re.search(r"url\((?!#)|@import|<script|https?://", self.source)
        return alone and not self.open and len(self.ids) == len(set(self.ids)) and inside <= set(self.ids)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


METHODS = ["dense", "continued", "forward", "random", "lass", "adapters", "bilingual"]
VARIANTS = [
    "forward-k70 = forward select.k=0.7",
    "forward-k50 = forward select.k=0.5",
    "forward-train = forward profile.split=train",
]
SIZES = {"de": 5000, "nl": 5000, "fr": 1000, "es": 1000, "ru": 100, "ar": 100}
DELTAS = {"dense": -1.0, "continued": 0.0, "forward": 1.5, "random": -0.5, "lass": 0.75, "adapters": 0.25}


def invented_scores(deltas: dict[str, float], system: str, baseline: str, p_ar: float = 0.01) -> dict:
    """``scores.json`` of a system that is ``deltas[task]`` points better than the baseline's 20 BLEU, chrF++ twice that."""

    def entry(delta: float) -> dict:
        found: dict = {"sentences": 100}
        test: dict = {"system": baseline, "ar_trials": 10000}
        for metric, factor in (("bleu", 1), ("chrf", 2)):
            score = 20 * factor + factor * delta
            found |= {metric: score, f"{metric}_low": score - 1, f"{metric}_high": score + 1}
            found[f"{metric}_signature"] = f"{metric}|invented"
            test |= {f"{metric}_delta": factor * delta, f"{metric}_p": 0.5, f"{metric}_p_ar": p_ar}
        return found | {"baseline": test if system != baseline else None}

    mean = sum(deltas.values()) / len(deltas)
    return {"system": system, "tasks": {t: entry(d) for t, d in deltas.items()}, "average": {"all": entry(mean)}}


def make_methods_run(
    run: Path, sizes: dict[str, int] = SIZES, variants: Sequence[str] = VARIANTS, layers: int = 3
) -> Path:
    """A run that compares methods: scores, summaries and masks of ``METHODS`` and of variants.

    Bilingual models are a point above the baseline where there are 5000 pairs, else three below. Masks of a variant keep
    the first neurons of those that forward keeps.
    """
    config = Config()
    config.run.folder, config.run.systems, config.run.variants = str(run), METHODS, list(variants)
    config.corpus.languages = ["en", *sizes]
    write_text(run / "config.yaml", render(config))
    tasks = [f"en-{code}" for code in sizes] + [f"{code}-en" for code in sizes]
    pairs = {task: sizes[task.replace("en", "").strip("-")] for task in tasks}
    write_json(run / "prepared" / "meta.json", {"counts": {"train": pairs}})
    deltas = DELTAS | {text.partition(" ")[0]: 1.0 - number / 4 for number, text in enumerate(variants)}
    for system in [*METHODS, *deltas]:
        changes = {task: deltas.get(system, 1.0 if pairs[task] == 5000 else -3.0) for task in tasks}
        write_json(run / "scores" / system / "scores.json", invented_scores(changes, system, "continued"))
        summary = {"system": system, "updates": 300, "tokens": 1234567, "train_seconds": 61.25}
        summary |= {"tokens_per_second": 4321.0, "parameters": 7654321, "parameters_added": 4096}
        summary |= {"parameters_trained": 5555, "mask_bytes": 98304, "density": None}
        write_json(run / "systems" / system / "summary.json", summary)
    generator = torch.Generator().manual_seed(1)
    names = [f"model.{side}.layers.{i}.fc1" for side in ("encoder", "decoder") for i in range(layers)]
    full = {task: {name: torch.rand(64, generator=generator) < 0.8 for name in names} for task in tasks}
    NeuronMasks(full).save(run / "masks")
    for text in variants:
        if "select." in text or "profile." in text:
            first = torch.arange(64) < (32 if "k=0.5" in text else 48)
            chosen = {task: {name: mask & first for name, mask in of.items()} for task, of in full.items()}
            NeuronMasks(chosen).save(run / "variants" / text.partition(" ")[0] / "masks")
    return run


def add_groups(run: Path, p_ar: dict[str, float] | None = None) -> None:
    """Gives the scores of a run of methods the levels and families that scoring gives them now.

    Args:
        run: made by :func:`make_methods_run`.
        p_ar: p values of averages; 0.01 for others.
    """
    for path in run.glob("scores/*/scores.json"):
        scores = json.loads(path.read_text())
        deltas = {task: entry["bleu"] - 20 for task, entry in scores["tasks"].items()}
        sizes = json.loads((run / "prepared/meta.json").read_text())["counts"]["train"]
        groups = run_groups(deltas, sizes, "en", families_of(deltas, "en"))
        for average, members in average_groups(deltas, "en", groups).items():
            if kind_of_group(average)[0]:
                p = (p_ar or {}).get(average, 0.01)
                found = invented_scores({task: deltas[task] for task in members}, scores["system"], "continued", p)
                scores["average"][average] = found["average"]["all"]
        write_json(path, scores | {"groups": groups})


def add_heads(run: Path, codes: Sequence[str] = tuple(SIZES), heads: int = 4) -> HeadImportance:
    """Head importance of a run of methods, as measured: related languages use much the same heads.

    en-de puts all of decoder cross-attention 1 into its head 2.
    """
    generator = torch.Generator().manual_seed(7)
    names = [f"model.encoder.layers.{i}.self_attn" for i in range(2)]
    names += [f"model.decoder.layers.{i}.{kind}" for i in range(2) for kind in ("self_attn", "encoder_attn")]
    family_of = families_of([f"en-{code}" for code in codes], "en")
    usual = {(n, f): torch.rand(heads, generator=generator) for n in names for f in sorted(map(family_of, codes))}
    importance = {
        task: {n: usual[n, family_of(code)] + 0.05 * torch.rand(heads, generator=generator) for n in names}
        for code in codes
        for task in (f"en-{code}", f"{code}-en")
    }
    importance["en-de"][names[-1]] = torch.eye(heads)[2]
    found = HeadImportance(importance)
    measured_heads.save(found, run, 40)
    return found

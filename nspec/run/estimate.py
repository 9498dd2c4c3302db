"""How long a run will take on this machine: from a few steps of its own training and a batch of translation.

What is known is the work of each stage: micro-batches and optimiser steps of trainings, sentences of validation, profiling
and translation. Its speed is measured once before the dense model is trained; every finished stage corrects those of its
kind that are to come: a long one by its ratio, a short one by the seconds that it took beyond its work, such as loading.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from nspec.mt.training.config import TrainConfig
from nspec.run.config import Config
from nspec.run.systems import MEASURED, config_of, system_of
from nspec.terminal import duration

if TYPE_CHECKING:
    import torch

    from nspec.mt.text.prepared import PreparedData

_MICRO_BATCHES = 3  # that are timed, after one that warms up
_SENTENCES = 64  # that are translated once
_FORWARD = 1 / 3  # of a training step's time: no backward pass, which costs twice as much
_SHORT = 5.0  # seconds of work: what shorter stages take beyond it is loading, and says nothing of the machine's speed
_SCORE, _REPORT = 0.2, 8.0  # seconds of scoring a direction, and of the page


@dataclass
class Speed:
    """What a machine needs for the model of a run, in seconds.

    Attributes:
        micro_batch: forward and backward pass of ``train.batch_tokens`` tokens.
        step: of the optimiser.
        token: forward pass, for each token of source and target.
        sentence: translating one with the run's beam.
    """

    micro_batch: float
    step: float
    token: float
    sentence: float


@dataclass
class Estimate:
    """Seconds that the stages of a run will take, corrected by those of their kind that have ended.

    Stages of the rest (profiling, scoring, ...) have nothing in common and correct their like alone.

    Args:
        expected: seconds of each stage to come, in order.
    """

    expected: dict[str, float]
    _measured: dict[str, list[tuple[float, float]]] = field(default_factory=dict)  # expected, taken

    def done(self, stage: str, seconds: float) -> None:
        """Notes how long a stage took."""
        expected = self.expected.pop(stage, None)
        if expected:
            self._measured.setdefault(_pace(stage), []).append((expected, seconds))

    def left(self, kind: str = "") -> float:
        """Seconds that the stages to come (of one kind) will take."""
        return sum(
            self._corrected(seconds, _pace(stage))
            for stage, seconds in self.expected.items()
            if not kind or _kind(stage) == kind
        )

    def _corrected(self, seconds: float, pace: str) -> float:
        past = self._measured.get(pace, [])
        long = [(expected, taken) for expected, taken in past if expected >= _SHORT]
        beyond = [max(0.0, taken - expected) for expected, taken in past if expected < _SHORT]
        ratio = sum(taken for _, taken in long) / sum(expected for expected, _ in long) if long else 1.0
        return seconds * ratio + (statistics.mean(beyond) if beyond else 0.0)

    def __str__(self) -> str:
        parts = {kind: self.left(kind) for kind in ("training", "translation", "the rest")}
        listed = ", ".join(f"{kind} {duration(seconds)}" for kind, seconds in parts.items() if seconds)
        return f"about {duration(self.left())} ({listed})"


def _kind(stage: str) -> str:
    verb = stage.partition(":")[0]
    return {"train": "training", "specialize": "training", "evaluate": "translation"}.get(verb, "the rest")


def _pace(stage: str) -> str:
    """Which stages are as fast as one another."""
    kind = _kind(stage)
    return stage.partition(":")[0] if kind == "the rest" else kind


def estimate(config: Config, data: PreparedData, stages: Iterable[str], speed: Speed, processes: int = 1) -> Estimate:
    """What the stages of a run that are not done will take.

    Args:
        config: of the run.
        data: its text.
        stages: their names.
        speed: of this machine.
        processes: that share the work.
    """
    expected = {}
    sizes = {split: sum(data.size(split, task) for task in data.tasks) for split in ("valid", "test")}
    tokens = {task: sum(float(side.sum()) for side in data.lengths("valid", task)) for task in data.tasks}
    for stage in stages:
        verb, _, system = stage.partition(":")
        own = config_of(config, system) if verb in ("specialize", "evaluate", "score") else config
        if verb == "train":
            seconds = _training(own.train, own, speed, data.tasks, tokens)
        elif verb == "specialize":
            seconds = _of_system(system, config, speed, data.tasks, tokens)
        elif verb == "profile":
            seconds = sum(tokens.values()) * speed.token
        elif verb == "head_masks":
            seconds = 3 * sum(tokens.values()) * speed.token  # with a backward pass
        elif verb == "select" and (select := config_of(config, system).select).sized_by in MEASURED:
            parts = 2 if select.by == "half" else own.model.encoder_layers + own.model.decoder_layers
            passes = 6 if select.sized_by == "conflict" else 1 + parts * len(select.grid) / 2  # 6: twice, and backward
            seconds = passes * sum(tokens.values()) * speed.token
        elif verb == "evaluate":
            seconds = sizes["test"] * speed.sentence
        else:
            fixed = {"score": _SCORE * len(data.tasks), "report": _REPORT}
            expected[stage] = fixed.get(verb, 1.0)
            continue
        expected[stage] = seconds / processes
    return Estimate(expected)


def _of_system(system: str, config: Config, speed: Speed, tasks: list[str], tokens: Mapping[str, float]) -> float:
    own, kind = config_of(config, system), system_of(config, system)
    if kind.method != "each":
        return _training(own.specialize, own, speed, tasks, tokens)
    settings = replace(own.train, updates=own.bilingual.updates)
    if not kind.scratch:
        settings = replace(own.specialize, updates=own.finetune.updates)
    settings = replace(settings, tasks_per_batch=1)
    return sum(_training(settings, own, speed, [task], tokens) for task in tasks)


def _training(train: TrainConfig, own: Config, speed: Speed, tasks: list[str], tokens: Mapping[str, float]) -> float:
    """Seconds to its last update; it may stop earlier."""
    micro_batch = speed.micro_batch * train.batch_tokens / own.train.batch_tokens
    validations = -(-train.updates // train.valid_every) or 1
    measured = sum(tokens[task] for task in tasks) * speed.token
    translated = train.valid_bleu_sentences * len(tasks) * speed.sentence / own.decode.beam  # greedily
    return train.updates * (train.accumulate * micro_batch + speed.step) + validations * (measured + translated)


def measure(config: Config, data: PreparedData, engine: str = "transformers") -> Speed:
    """Times a few steps of the dense model's training, from new weights, and a batch of translation.

    Nothing of it stays: neither weights nor random numbers.

    Args:
        config: of the run.
        data: its text.
        engine: what will translate.
    """
    import torch

    from nspec.mt.model import build_model
    from nspec.mt.text.batches import TaskBatchSampler
    from nspec.mt.text.collate import collate
    from nspec.mt.text.prepared import Examples
    from nspec.mt.training.precision import resolve_precision
    from nspec.processes import resolve_device

    train, device = config.train, resolve_device(config.run.device)
    timed = _clock(device)
    with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]):
        model: Any = build_model(config.model, data.tokenizer, config.run.seed)
        model.to(device).train()
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(
            resolve_precision(train.precision, device, int(getattr(model.config, "hidden_size", 0)))
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
        examples = Examples(data, "train")
        sampler = TaskBatchSampler(
            data, "train", train.batch_tokens, train.temperature, 1 + _MICRO_BATCHES, config.run.seed
        )

        def passes(inputs: dict[str, Any]) -> None:
            with torch.autocast(device.type, half, enabled=half is not None):
                loss = model(**inputs, use_cache=False).loss
            loss.backward()

        micro_batches, steps, padded = [], [], 0
        for batch in sampler:
            inputs = collate([examples[key] for key in batch])
            inputs.pop("task")
            inputs = {name: value.to(device) for name, value in inputs.items()}
            micro_batches.append(timed(functools.partial(passes, inputs)))
            padded = max(padded, inputs["input_ids"].numel() + inputs["labels"].numel())
            steps.append(timed(optimizer.step))
            optimizer.zero_grad()
        searching = _converted if engine == "ctranslate2" else _generated
        sentence = timed(searching(model.eval(), config, data, device)) / _SENTENCES
    micro_batch = statistics.median(micro_batches[1:])
    return Speed(micro_batch, statistics.median(steps[1:]), _FORWARD * micro_batch / max(padded, 1), sentence)


def _clock(device: torch.device) -> Callable[[Callable[[], Any]], float]:
    import torch

    def timed(work: Callable[[], Any]) -> float:
        begun = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - begun

    return timed


def _generated(model: Any, config: Config, data: PreparedData, device: torch.device) -> Callable[[], Any]:
    """Translates as many sentences, as long as the references: new weights would go on to the longest."""
    import torch

    from nspec.mt.text.collate import collate

    few, length = _few(data)
    inputs = collate(few)

    def translate() -> None:
        with torch.no_grad():
            model.generate(
                input_ids=inputs["input_ids"].to(device),
                attention_mask=inputs["attention_mask"].to(device),
                num_beams=config.decode.beam,
                min_new_tokens=length,
                max_new_tokens=length,
            )

    return translate


def _converted(model: Any, config: Config, data: PreparedData, device: torch.device) -> Callable[[], Any]:
    """The same by CTranslate2."""
    from nspec.mt.scoring.translate import converted

    few, length = _few(data)
    search = converted(model, data.tokenizer)
    sources = [[search.names[row] for row in each.source] for each in few]
    lengths = {"min_decoding_length": length, "max_decoding_length": length}
    return lambda: search.translator.translate_batch(sources, beam_size=config.decode.beam, **lengths)


def _few(data: PreparedData) -> tuple[list[Any], int]:
    """Sentences to time a search with, and the mean tokens of their references."""
    from nspec.mt.text.prepared import Examples

    examples, task = Examples(data, "valid"), data.tasks[0]
    few = [examples[0, number % data.size("valid", task)] for number in range(_SENTENCES)]
    return few, max(1, round(sum(len(each.target) for each in few) / _SENTENCES))

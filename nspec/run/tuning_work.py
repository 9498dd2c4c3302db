"""What the stages of ``nspec finetune`` do; the chain is in :mod:`nspec.run.finetune`.

Importing this module loads neither torch nor transformers.
"""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nspec.files import read_json, write_json, write_text
from nspec.lm.config import RANDOM, RULES
from nspec.processes import resolve_device
from nspec.run.finetune_config import TuningConfig, like_of
from nspec.terminal import Display, duration

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    import nspec
    from nspec.lm.train import TrainSettings


class Work:
    """The stages of a run of fine-tuning, each given its folder.

    Args:
        config: a validated configuration.
        folder: of the run.
        display: where progress is shown.
    """

    def __init__(self, config: TuningConfig, folder: Path, display: Display) -> None:
        self.config, self.folder, self.display = config, folder, display
        self._cut: dict[tuple[str, str], list[Tensor]] = {}

    def text(self, folder: Path) -> None:
        """The lines of each language: ``text/CODE.train.txt`` and ``CODE.test.txt``."""
        from nspec.lm.text import read_lines_of

        codes = self.config.text.languages
        with self.display.bar("text", "languages") as progress:
            for number, (code, lines) in enumerate(read_lines_of(self.config.text, self.config.run.seed), 1):
                for split, found in (("train", lines.train), ("test", lines.test)):
                    write_text(folder / f"{code}.{split}.txt", "".join(f"{line}\n" for line in found))
                progress(code, number, len(codes))
                self.display.line(f"  {code}: {len(lines.train):,} training lines, {len(lines.test):,} held out")

    def base(self, folder: Path) -> None:
        """The model that everything starts from: ``base/model``, or a note of the one that was given."""
        from nspec.lm.model import new_model, train_tokenizer
        from nspec.lm.train import TrainSettings, train
        from nspec.run.tuning_checks import check_tokens

        own, length, seed = self.config.model, self.config.text.length, self.config.run.seed
        if own.pretrained:
            model, tokenizer = self.check()
            codes = self.config.text.languages
            for split in ("train", "test"):
                check_tokens(self.config, model, [p for code in codes for p in self._sequences(code, split, tokenizer)])
            facts: dict[str, Any] = {"name": own.pretrained, "new": False}
        else:
            lines = [line for code in self.config.text.languages for line in self._lines(code, "train")]
            tokenizer = train_tokenizer(lines, own.vocab_size, length)
            model = new_model(own, tokenizer, length, seed).to(self._device())  # type: ignore[arg-type]
            pieces = [
                piece for code in self.config.text.languages for piece in self._sequences(code, "train", tokenizer)
            ]
            with self.display.bar("base", "updates") as progress:
                recipe = TrainSettings(own.updates, own.sequences, own.lr, bf16=self._bf16(), seed=seed)
                trained = train(model, pieces, recipe, self._with_lines(functools.partial(progress, "")))
            model.save_pretrained(folder / "model")
            tokenizer.save_pretrained(folder / "model")
            facts = {"name": "a new model", "new": True, **trained._asdict(), "updates": own.updates}
        facts["parameters"] = sum(p.numel() for p in model.parameters())
        facts["kind"] = str(model.config.model_type)
        write_json(folder / "base.json", facts)
        self.display.line(f"  {facts['name']}: {facts['kind']}, {facts['parameters']:,} parameters")

    def check(self) -> tuple[Any, Any]:
        """The base and its tokenizer, once it is sure that every method suits it."""
        from nspec.run.tuning_checks import check_model

        model, tokenizer = self._model()
        check_model(self.config, model)
        return model, tokenizer

    def base_perplexity(self, folder: Path) -> None:
        """What the base makes of the held-out text of every language."""
        model, tokenizer = self._model()
        write_json(folder / "result.json", {"perplexity": self._perplexities(model, tokenizer, "base_perplexity")})

    def profile(self, folder: Path) -> None:
        """How often each neuron of the base fires on the training text of each language: ``profile/counts.*``."""
        import nspec
        from nspec.lm.sequences import batches

        model, tokenizer = self._model()
        most, size = self.config.neurons.profile_tokens, self.config.tune.test_sequences
        kept = {}
        for code in self.config.text.languages:
            pieces = self._sequences(code, "train", tokenizer)
            kept[code] = pieces[: max(1, most // len(pieces[0]))] if most else pieces
        total = sum(map(len, kept.values()))
        done = 0

        def inputs(code: str) -> Iterator[dict[str, Tensor]]:
            nonlocal done
            for ids in batches(kept[code], size):
                yield {"input_ids": ids}
                done += len(ids)
                progress(code, done, total)

        with self.display.bar("profile", "sequences") as progress:
            counts = nspec.profile(model, {code: inputs(code) for code in kept}, padding="include")  # there is none
        counts.save(folder)

    def select(self, method: str, folder: Path) -> None:
        """The neurons of each language by one rule: ``masks/METHOD``."""
        import nspec

        counts = nspec.ActivationCounts.load(self.folder / "profile")
        own, like = self.config.neurons, like_of(self.config)
        options: dict[str, Any] = {"share": own.share}
        if method == "lape":
            options = {"rate": own.rate}
        elif method == "share":
            options = {"k": own.k}
        elif method == RANDOM:
            options = {"seed": self.config.run.seed}
            if like is None:
                options["share"] = own.share
            else:
                options["like"] = nspec.NeuronMasks.load(self.folder / "masks" / like)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always", UserWarning)
            masks = nspec.select(counts, rule=method, **options)  # type: ignore[arg-type]
        for warning in said:
            self.display.line(f"  {warning.message}")
        masks.save(folder)
        total = sum(len(mask) for mask in masks[masks.tasks[0]].values())
        listed = ", ".join(f"{code} {_neurons(masks, code):,}" for code in masks.tasks)
        self.display.line(f"  neurons of {total:,}: {listed}")

    def tune(self, method: str, language: str, folder: Path) -> None:
        """One method on one language, and what it makes of the held-out text of all."""
        from nspec.lm.train import Trained, train

        model, tokenizer = self._model()
        base = sum(p.numel() for p in model.parameters())
        found, neurons = Trained(0, 0.0, 0, float("nan")), None
        if method in RULES:
            import nspec

            masks = nspec.NeuronMasks.load(self.folder / "masks" / method)
            neurons = _neurons(masks, language)
        prepared = self._prepared(method, language, model, neurons)
        trained = sum(p.numel() for p in prepared.parameters() if p.requires_grad) if neurons != 0 else 0
        name = f"tune:{method}:{language}"
        if neurons == 0:
            self.display.line(f"  {method} gives {language} no neuron: nothing is trained, the base stands for it")
        else:
            with self.display.bar(name, "updates") as progress:
                pieces = self._sequences(language, "train", tokenizer)
                found = train(prepared, pieces, self._recipe(method), functools.partial(progress, ""))
        perplexities = self._perplexities(prepared, tokenizer, name)
        write_json(
            folder / "result.json",
            {
                "method": method,
                "language": language,
                "neurons": neurons,
                "trained": trained,
                "of": base,
                "bytes": self._save(method, prepared, folder, trained) if trained else 0,
                "tokens": found.tokens,
                "seconds": round(found.seconds, 3),
                "peak_bytes": found.peak_bytes,
                "loss": None if not trained else found.loss,
                "perplexity": perplexities,
            },
        )
        before = read_json(self.folder / "base_perplexity" / "result.json")["perplexity"][language]["perplexity"]
        after = perplexities[language]["perplexity"]
        self.display.line(
            f"  perplexity of {language}: {before:.3f} before, {after:.3f} after; {trained:,} numbers trained"
        )

    def report(self, folder: Path) -> None:
        """The page and its tables: ``report/index.html``, ``perplexity.tsv`` and ``perplexity.json``."""
        from nspec.report.finetuned import build_report

        build_report(self.folder)

    # Helpers

    def _with_lines(self, progress: Callable[[int, int], None]) -> Callable[[int, int], None]:
        """``progress``, and a line with the time left at every tenth of the way."""
        begun = time.monotonic()

        def move(done: int, total: int) -> None:
            progress(done, total)
            if done % max(1, total // 10) == 0 and done < total:
                left = (time.monotonic() - begun) / done * (total - done)
                self.display.line(f"  update {done} of {total}, about {duration(left)} left")

        return move

    def _prepared(self, method: str, language: str, model: Any, neurons: int | None) -> Any:
        """The model with what the method trains, all else frozen."""
        if method in RULES:
            import nspec

            if not neurons:
                return model
            masks = nspec.NeuronMasks.load(self.folder / "masks" / method)
            mine = nspec.NeuronMasks({language: dict(masks[language])})
            own = self.config.neurons
            return nspec.finetune(model, mine, parts=own.parts or None, biases=own.biases, quiet=True)
        if method == "lora":
            from nspec.lm.lora import add_lora

            return add_lora(model, self.config.tune, self.config.run.seed)
        return model.float()  # all parameters, with a float32 copy of each where they are saved in less

    def _save(self, method: str, model: Any, folder: Path, trained: int) -> int:
        """Writes what was trained, and returns its bytes; of a full model that is not kept, what it would have."""
        import nspec

        if method in RULES:
            nspec.save_neurons(model, folder)
            return (folder / "neurons.safetensors").stat().st_size
        if method == "lora":
            model.save_pretrained(folder)
            return (folder / "adapter_model.safetensors").stat().st_size
        if self.config.tune.save_full:
            model.save_pretrained(folder / "model")
        return sum(p.numel() * p.element_size() for p in model.parameters())

    def _recipe(self, method: str) -> TrainSettings:
        from nspec.lm.train import TrainSettings

        own = self.config.tune
        lr = {"lora": own.lr_lora, "full": own.lr_full}.get(method, own.lr_neurons)
        return TrainSettings(
            own.updates,
            own.sequences,
            lr,
            own.accumulate,
            own.schedule,
            own.weight_decay,
            own.clip,
            self._bf16(),
            own.checkpointing,
            self.config.run.seed,
        )

    def _perplexities(self, model: Any, tokenizer: Any, label: str) -> dict[str, dict[str, float]]:
        from nspec.lm.perplexity import perplexity

        found: dict[str, dict[str, float]] = {}
        pieces = {code: self._sequences(code, "test", tokenizer) for code in self.config.text.languages}
        total = sum(map(len, pieces.values()))
        with self.display.bar(f"{label} perplexity", "sequences") as progress:
            before = 0
            for code, mine in pieces.items():
                start = before
                one = perplexity(
                    model,
                    mine,
                    self.config.tune.test_sequences,
                    lambda done, code=code, start=start: progress(code, start + done, total),  # type: ignore[misc]
                )
                found[code] = {"loss": one.loss, "tokens": one.tokens, "perplexity": one.value}
                before += len(mine)
        return found

    def _lines(self, code: str, split: str) -> list[str]:
        return (self.folder / "text" / f"{code}.{split}.txt").read_text(encoding="utf-8").split("\n")[:-1]

    def _sequences(self, code: str, split: str, tokenizer: Any) -> list[Tensor]:
        from nspec.lm.sequences import sequences

        if (code, split) not in self._cut:
            try:
                self._cut[code, split] = sequences(tokenizer, self._lines(code, split), self.config.text.length)
            except ValueError as error:
                raise ValueError(f"the {split} text of {code}: {error}") from None
        return self._cut[code, split]

    def _model(self) -> tuple[Any, Any]:
        from nspec.lm.model import load_pretrained

        own = self.config.model
        name, dtype = (own.pretrained, own.dtype) if own.pretrained else (str(self.folder / "base" / "model"), "auto")
        return load_pretrained(name, dtype, self._device())

    def _device(self) -> torch.device:
        return resolve_device(self.config.run.device)

    def _bf16(self) -> bool:
        import torch

        precision = self.config.tune.precision
        if precision == "auto":
            return self._device().type == "cuda" and torch.cuda.is_bf16_supported()
        return precision == "bf16"


def _neurons(masks: nspec.NeuronMasks, task: str) -> int:
    return sum(int(mask.sum()) for mask in masks[task].values())

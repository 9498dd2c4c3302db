"""A tiny translation task for the tests of training and what follows it: digits in three alphabets, one backwards.

Run as a program it trains: ``toy_translation.py FOLDER JOB.json``, with the arguments of :meth:`Toy.train`.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import nspec
from nspec.mt.config import ModelConfig
from nspec.mt.text.config import CorpusConfig, TokenizerConfig
from nspec.mt.training.config import TrainConfig
from nspec.run.config import Config, RunConfig

ALPHABETS = {"en": "abcdefghij", "de": "klmnopqrst", "fr": "ABCDEFGHIJ"}
TASKS = ["en-de", "de-en", "en-fr", "fr-en"]


def spell(digits: list[int], language: str) -> str:
    """One letter a digit, in the language's alphabet; ``fr`` begins with the last."""
    return " ".join(ALPHABETS[language][d] for d in (digits[::-1] if language == "fr" else digits))


class Toy:
    """The text in a folder, prepared on first use, and trainings on it.

    Args:
        folder: where everything goes.
        languages: besides English.
    """

    def __init__(self, folder: Path, languages: tuple[str, ...] = ("de", "fr")) -> None:
        self.folder, self.languages = folder, languages

    def config(self, *, model: dict[str, Any] | None = None, **train: Any) -> Config:
        """A tiny model and short training; ``model`` and ``train`` override their options."""
        sizes: dict[str, Any] = {"d_model": 32, "d_ff": 64, "heads": 4, "encoder_layers": 1, "decoder_layers": 1}
        settings: dict[str, Any] = {
            "updates": 12,
            "batch_tokens": 256,
            "lr": 6e-3,
            "warmup": 20,
            "log_every": 5,
            "precision": "fp32",
        }
        settings |= {"valid_every": 4, "valid_bleu_sentences": 0}
        return Config(
            run=RunConfig(device="cpu"),
            corpus=CorpusConfig(type="files", path=str(self.folder / "corpus"), pivot="en"),
            tokenizer=TokenizerConfig(vocab_size=5 + 20 * (1 + len(self.languages))),
            model=ModelConfig(**{**sizes, "dropout": 0.1, "max_positions": 64, **(model or {})}),
            train=TrainConfig(**{**settings, **train}),
        )

    @property
    def data(self) -> Any:
        """The prepared text."""
        from nspec.mt.text.prepare import prepare
        from nspec.mt.text.prepared import PreparedData

        if not (self.folder / "prepared" / "meta.json").is_file():
            self._write_corpus()
            prepare(text_options(self.config()), self.folder / "prepared")
        return PreparedData(self.folder / "prepared")

    def _write_corpus(self) -> None:
        (self.folder / "corpus").mkdir(parents=True)
        for language in self.languages:
            for split, lines in (("train", 800), ("valid", 40), ("test", 40)):
                chance = random.Random(f"{language} {split}")
                rows = [[chance.randrange(10) for _ in range(chance.randint(3, 7))] for _ in range(lines)]
                for side in ("en", language):
                    text = "".join(spell(row, side) + "\n" for row in rows)
                    (self.folder / "corpus" / f"{split}.{language}-en.{side}").write_text(text)

    def model(self, config: Config | None = None, seed: int = 1) -> Any:
        """A new model for the text."""
        from nspec.mt.model import build_model

        return build_model((config or self.config()).model, self.data.tokenizer, seed)

    def masks(self, tasks: list[str] = TASKS, d_ff: int = 64, density: float = 0.6) -> nspec.NeuronMasks:
        """Random ones for the one encoder and the one decoder layer."""
        generator = torch.Generator().manual_seed(0)
        layers = [f"model.{side}.layers.0.fc1" for side in ("encoder", "decoder")]
        draw = lambda: torch.rand(d_ff, generator=generator) < density
        return nspec.NeuronMasks({task: {layer: draw() for layer in layers} for task in tasks})

    def train(
        self,
        name: str,
        *,
        mode: Any = None,
        recipe: Any = None,
        task: str = "",
        model: dict[str, Any] | None = None,
        **train: Any,
    ) -> Path:
        """Trains a system in this process and returns its folder."""
        from nspec.mt.methods import NeuronSpecialization
        from nspec.mt.training.train import train_system

        config = self.config(model=model, **train)
        masks = self.masks() if mode else None
        built = self.model(config)
        train_system(
            name,
            config.train,
            self.data.only(task) if task else self.data,
            built,
            self.folder / name,
            method=NeuronSpecialization(masks, mode) if masks else None,
            recipe=recipe,
            show=False,
            **run_options(config),
        )
        return self.folder / name

    def start(self, name: str, *, ranks: int = 1, **arguments: Any) -> subprocess.Popen[str]:
        """Starts :meth:`train` in a process of its own, or under torchrun in several."""
        job = self.folder / f"{name}.job.json"
        job.write_text(json.dumps({"name": name, **arguments}))
        return start(Path(__file__), [str(self.folder), str(job)], ranks)

    def run(self, name: str, **arguments: Any) -> Path:
        """:meth:`start` to the end; returns the system's folder."""
        finish(self.start(name, **arguments))
        return self.folder / name


def text_options(config: Config) -> Any:
    """What :func:`nspec.mt.text.prepare.prepare` takes of the configuration of a run."""
    from nspec.mt.text.prepare import TextOptions

    return TextOptions(config.corpus, config.tokenizer, config.model, config.run.seed)


def run_options(config: Config) -> dict[str, Any]:
    """What :func:`nspec.mt.training.train_system` takes of the configuration of a run, beside how it is trained."""
    return {"seed": config.run.seed, "device": config.run.device, "decode": config.decode}


def start(program: Path, arguments: list[str], ranks: int) -> subprocess.Popen[str]:
    """Starts a program with one thread, under torchrun where there are several ranks."""
    paths = [str(Path(nspec.__file__).resolve().parent.parent), str(Path(__file__).parent)]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    return subprocess.Popen(
        [sys.executable, *launcher, str(program), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)},
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> None:
    """Waits for a program that must succeed."""
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors


def launch(script: str, arguments: list[str], ranks: int) -> None:
    """Runs a script under torchrun."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "script.py"
        program.write_text(script)
        finish(start(program, arguments, ranks))


def rows(system: Path) -> list[dict[str, Any]]:
    """The log of a system without its times."""
    from nspec.mt.training.checkpoints import read_log

    return [
        {key: value for key, value in row.items() if key not in ("seconds", "tokens_per_second")}
        for row in read_log(system / "log.jsonl")
    ]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The stored parameters of a model folder."""
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def same_bits(first: Path, second: Path) -> bool:
    """Whether two model folders have the same parameters, bit for bit."""
    a, b = weights(first), weights(second)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def last(system: Path) -> Path:
    """The newest checkpoint that a system has."""
    from nspec.mt.training.checkpoints import whole

    return whole(system / "checkpoints")[-1]


if __name__ == "__main__":
    torch.set_num_threads(1)
    job = json.loads(Path(sys.argv[2]).read_text())
    Toy(Path(sys.argv[1])).train(job.pop("name"), **job)

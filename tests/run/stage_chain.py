"""A chain of stages that only write files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from nspec.files import write_text
from nspec.run.config import Config
from nspec.run.folder import Run
from nspec.run.stages import Stage

STAGES = [
    Stage("first", "one", options=("corpus", "run.seed")),
    Stage("train", "two", options=("train",), inputs=("one/*.txt",), after=("first",), resumable=True),
    Stage("test:a", "three/a", options=("decode",), inputs=("two/model",), after=("train",), resumable=True),
    Stage("test:b", "three/b", options=("decode",), inputs=("two/model",), after=("train",)),
    Stage("score", "three/a", ("score",), ("three/a/out",), ("test:a",), derived=True, record="stage-score.json"),
    Stage("page", "page", inputs=("three/a/out", "config"), after=("test:a",), derived=True),
]


def config_of(folder: Path, **values: object) -> Config:
    config = Config()
    config.run.folder = str(folder)
    for name, value in values.items():
        section, _, key = name.partition("_")
        setattr(getattr(config, section), key, value)
    return config


class Chain:
    """Runs all stages and remembers which worked; each writes its name and the time it was called."""

    def __init__(self, config: Config) -> None:
        self.run, self.worked, self.told = Run(config, STAGES), [], []
        self.made = {"first": "one/text.txt", "train": "two/model", "test:a": "three/a/out", "test:b": "three/b/out"}

    def work(self, name: str, text: str = "x") -> Callable[[Path], None]:
        def write(folder: Path) -> None:
            self.worked.append(name)
            write_text(self.run.folder / self.made.get(name, f"{name}.txt"), text)

        return write

    def __call__(self, until: str = "page") -> list[str]:
        with self.run:
            self.run.check()
            for name in self.run.stages:
                self.run.do(name, self.work(name), tell=self.told.append)
                if name == until:
                    break
        return self.worked


def all_of_it(folder: Path, **values: object) -> list[str]:
    return Chain(config_of(folder, **values))()


def refusal(folder: Path, **values: object) -> str:
    with pytest.raises(ValueError) as caught:
        all_of_it(folder, **values)
    assert "\n" not in str(caught.value)
    return str(caught.value)


ALL = [stage.name for stage in STAGES]

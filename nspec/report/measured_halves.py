"""How stable the selection of a run is: the neurons that each half of the text selects, compared with each other.

``RUN/analysis/halves`` has ``one`` and ``two``, the masks of both halves, and ``measured.json``, which says of which
training of the dense model and of which options they are.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nspec import analysis
from nspec.analysis.overlap import Floats
from nspec.files import read_json, write_json
from nspec.report.measured_heads import training_of

if TYPE_CHECKING:
    from nspec import NeuronMasks
    from nspec.mt.text.other import OtherText
    from nspec.mt.text.prepared import Ids, PreparedData
    from nspec.run.config import Config

FOLDER = "analysis/halves"
_NOTE, _PARTS = "measured.json", ("one", "two")


class Half:
    """Every second pair of a text.

    Args:
        data: all of it.
        number: 0 or 1, of the pair that it begins with.
    """

    def __init__(self, data: PreparedData | OtherText, number: int) -> None:
        self.data, self.number, self.tasks, self.frame = data, number, data.tasks, data.frame

    def size(self, split: str, task: str) -> int:
        """Sentence pairs of a direction."""
        return len(range(self.number, self.data.size(split, task), 2))

    def lengths(self, split: str, task: str) -> tuple[Ids, Ids]:
        """Source and target lengths, each int64 [n]."""
        source, target = self.data.lengths(split, task)
        return source[self.number :: 2], target[self.number :: 2]

    def ids(self, split: str, task: str, index: int) -> tuple[Ids, Ids]:
        """Source and target ids of one pair."""
        return self.data.ids(split, task, 2 * index + self.number)


def measure_halves(run: Path) -> tuple[NeuronMasks, NeuronMasks]:
    """Counts activations of the dense model on each half of the text that the run profiles on, and selects as it does.

    Args:
        run: a run folder with ``prepared`` and ``systems/dense/model``.

    Raises:
        ValueError: the text or the model is not there, or a direction has fewer than two sentences.
    """
    from nspec.mt.model import load_system
    from nspec.mt.profiling import profile_tasks
    from nspec.mt.text.other import OtherText
    from nspec.mt.text.prepared import PreparedData
    from nspec.processes import resolve_device
    from nspec.run.read import check_written, read_config
    from nspec.terminal import Display

    config, _ = read_config(run)
    data: Any = PreparedData(run / "prepared")
    if config.profile.path:
        data = OtherText(config.profile, config.corpus, config.run.seed, data)
    dense = run / "systems" / "dense"
    check_written(dense / "model", dense / "stage.json", "put it back as it was, or `nspec run --redo train`")
    if few := [task for task in data.tasks if data.size(config.profile.split, task) < 2]:
        raise ValueError(f"{few[0]} has one sentence to profile on; expected 2 or more, for two halves")
    model, _ = load_system(dense / "model", resolve_device(config.run.device))
    own = replace(config.profile, sentences=-(-config.profile.sentences // 2))
    found = []
    for number, name in enumerate(_PARTS):
        with Display().bar(f"half {name}") as progress:
            counts = profile_tasks(model, Half(data, number), own, config.train.batch_tokens, progress=progress)
        found.append(_selected(counts, config))
    return found[0], found[1]


def _selected(counts: Any, config: Config) -> NeuronMasks:
    from nspec.run.selecting import select_neurons

    return select_neurons(counts, config.select, config.corpus.pivot, config.run.seed)


def save(masks: tuple[NeuronMasks, NeuronMasks], run: Path) -> None:
    """Writes what :func:`measure_halves` found into the run folder, where the page of the run finds it.

    Raises:
        OSError: a file cannot be written.
    """
    for name, half in zip(_PARTS, masks):
        half.save(run / FOLDER / name)
    write_json(run / FOLDER / _NOTE, _note(run))


def load(run: Path) -> tuple[NeuronMasks, NeuronMasks, bool] | None:
    """What :func:`save` wrote, and whether the dense model or the options are others now; None where there is nothing.

    Raises:
        ValueError: a file is broken.
    """
    from nspec import NeuronMasks

    folder = run / FOLDER
    if not (folder / _NOTE).is_file():
        return None
    one, two = (NeuronMasks.load(folder / name) for name in _PARTS)
    return one, two, read_json(folder / _NOTE) != _note(run)


def _note(run: Path) -> dict[str, Any]:
    from nspec.run.read import read_config

    config, _ = read_config(run)
    return {"training": training_of(run), "profile": asdict(config.profile), "select": asdict(config.select)}


@dataclass(frozen=True)
class Stable:
    """One layer.

    Attributes:
        layer: qualified name.
        halves: mean over directions of the IoU of the masks from both halves.
        directions: mean IoU of two directions, mean of both halves; NaN with one direction.
        chance: what the masks of the halves would have if they were drawn independently.
    """

    layer: str
    halves: float
    directions: float
    chance: float


def compare_halves(one: NeuronMasks, two: NeuronMasks) -> list[Stable]:
    """How alike the masks of two halves are in each layer, the encoder before the decoder, each from bottom to top."""
    rows = []
    tasks = list(one.tasks)
    for layer in analysis.sort_layers(one.layers):
        matrices = [analysis.layer_matrix(half, layer, tasks) for half in (one, two)]
        shares: list[Floats] = [matrix.mean(1) for matrix in matrices]
        alike = [analysis.pairwise_iou(np.stack(pair))[0, 1] for pair in zip(*matrices)]
        chance = [analysis.chance_iou(np.array(pair))[0, 1] for pair in zip(*shares)]
        apart = [analysis.mean_pairwise(analysis.pairwise_iou(matrix)) for matrix in matrices]
        directions = float(np.mean(apart)) if len(tasks) > 1 else float("nan")
        rows.append(Stable(layer, float(np.mean(alike)), directions, float(np.mean(chance))))
    return rows

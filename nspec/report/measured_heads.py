"""How much each attention head of a run's dense model matters to each direction, on its validation text.

``RUN/analysis/heads`` has it as :meth:`nspec.analysis.heads.HeadImportance.save` writes it, and ``measured.json``, which
says on how many sentences and of which training of the dense model.
"""

from __future__ import annotations

from pathlib import Path

from nspec.analysis.heads import HeadImportance
from nspec.files import read_json, sha256, write_json

FOLDER = "analysis/heads"
_NOTE = "measured.json"


def measure_heads(run: Path, sentences: int) -> HeadImportance:
    """Measures the dense model of a run with teacher forcing.

    Args:
        run: a run folder with ``prepared`` and ``systems/dense/model``.
        sentences: validation sentences of each direction, at most.

    Raises:
        ValueError: the text or the model is not there.
    """
    from nspec.mt.model import load_system
    from nspec.mt.text.prepared import PreparedData
    from nspec.processes import resolve_device
    from nspec.run.head_masks import importance_of
    from nspec.run.read import check_written, read_config
    from nspec.terminal import Display

    config, _ = read_config(run)
    data = PreparedData(run / "prepared")
    dense = run / "systems" / "dense"
    check_written(dense / "model", dense / "stage.json", "put it back as it was, or `nspec run --redo train`")
    model, _ = load_system(dense / "model", resolve_device(config.run.device))
    with Display().bar("attention heads") as progress:
        return importance_of(model, data, config.train.batch_tokens, sentences, progress)


def save(importance: HeadImportance, run: Path, sentences: int) -> None:
    """Writes what :func:`measure_heads` found into the run folder, where the page of the run finds it.

    Raises:
        OSError: a file cannot be written.
    """
    folder = run / FOLDER
    importance.save(folder)
    write_json(folder / _NOTE, {"sentences": sentences, "split": "valid", "training": training_of(run)})


def load(run: Path) -> tuple[HeadImportance, int | None, bool] | None:
    """What :func:`save` wrote; None where there is nothing.

    Returns:
        The importance; sentences of each direction, at most (None: not known); whether the dense model has been trained
        anew since.

    Raises:
        ValueError: a file is broken.
    """
    folder = run / FOLDER
    if not (folder / "heads.safetensors").is_file():
        return None
    note = read_json(folder / _NOTE) if (folder / _NOTE).is_file() else {}
    if not isinstance(note, dict):
        raise ValueError(
            f"{folder / _NOTE} holds {type(note).__name__}, expected a JSON object; measure the heads again"
        )
    sentences, training = note.get("sentences"), note.get("training")
    outdated = bool(training) and training != training_of(run)
    return HeadImportance.load(folder), sentences if isinstance(sentences, int) else None, outdated


def training_of(run: Path) -> str:
    """Which training the dense model is of: the hash of its record, which every training writes anew; empty without."""
    record = run / "systems" / "dense" / "stage.json"
    return sha256(record) if record.is_file() else ""

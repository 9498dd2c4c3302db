"""COMET of translations, by a model that lies on this computer; nothing is ever downloaded."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

_BATCH = 16


class Comet:
    """A COMET model.

    Args:
        path: a checkpoint as the package keeps it, ``MODEL/checkpoints/model.ckpt`` with ``MODEL/hparams.yaml``, or
            the folder ``MODEL``.

    Raises:
        ValueError: there is no such checkpoint.
        ImportError: the package unbabel-comet is not installed.
    """

    def __init__(self, path: Path) -> None:
        checkpoint = path / "checkpoints" / "model.ckpt" if path.is_dir() else path
        settings = checkpoint.parent.parent / "hparams.yaml"
        for file in (checkpoint, settings):
            if not file.is_file():
                raise ValueError(
                    f"--comet {path}: there is no {file}; expected a model as COMET keeps it, "
                    "MODEL/checkpoints/model.ckpt and MODEL/hparams.yaml (nspec does not download one)"
                )
        _stay_offline()
        try:
            import comet
        except ModuleNotFoundError as error:
            if error.name != "comet":
                raise
            raise ImportError(
                "--comet needs the package unbabel-comet, which is not installed: pip install unbabel-comet"
            ) from None

        # The tokenizer of the encoder is not part of a checkpoint: it has to be in the local cache.
        self.model = comet.load_from_checkpoint(str(checkpoint), local_files_only=True)
        name = (path if path.is_dir() else checkpoint.parent.parent).resolve().name
        self.signature = f"model:{name}|version:{importlib.metadata.version('unbabel-comet')}"

    def add(
        self,
        scores: dict[str, Any],
        sources: Mapping[str, Sequence[str]],
        hypotheses: Mapping[str, Sequence[str]],
        references: Mapping[str, Sequence[str]],
        averages: Mapping[str, Sequence[str]],
    ) -> None:
        """Adds ``comet`` to each direction and average of :func:`nspec.mt.scoring.scores.score_system`'s result, in place.

        It is the mean over sentences in the model's own unit (most models: about 0 to 1), without interval or test.
        """
        import torch

        for task, entry in scores["tasks"].items():
            samples = [
                {"src": source, "mt": hypothesis, "ref": reference}
                for source, hypothesis, reference in zip(sources[task], hypotheses[task], references[task])
            ]
            predicted = self.model.predict(
                samples, batch_size=_BATCH, gpus=int(torch.cuda.is_available()), progress_bar=False
            )
            entry["comet"] = float(np.mean(predicted.scores))
        for group, members in averages.items():
            scores["average"][group]["comet"] = float(np.mean([scores["tasks"][task]["comet"] for task in members]))
        scores["signatures"]["comet"] = self.signature


def _stay_offline() -> None:
    """COMET fetches what it misses from the Hugging Face hub; then it shall fail instead."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        os.environ[name] = "1"
    constants = sys.modules.get("huggingface_hub.constants")
    if constants is not None:  # it has read the environment already
        constants.HF_HUB_OFFLINE = True  # type: ignore[attr-defined]

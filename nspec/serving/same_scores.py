"""Whether a folder of CTranslate2 holds the model that it was made of: both score a few texts.

The converters of CTranslate2 pass by options of a configuration that they do not know, so that a model of another base of
its rotary positions, another activation or other windows of attention is written without a word and says something else.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

TEXTS, TOKENS = 8, 6
# Most that log-probabilities may be off, as a share of how far they spread, by the bits of the weights. Of tiny models with
# weights so large that rounding grows in them, 14 families in 7 types were off by 1e-6, 0.08 and 0.24 at most; other
# rotary positions, activations or scales by 0.02 to 3.
_MOST_OFF = {32: 0.005, 16: 0.15, 8: 0.5}


def check_scores(model: Any, folder: Path, quantization: str | None = None) -> str:
    """Why the model in a folder is not ``model``; empty where it is.

    Args:
        model: of ``transformers``, plain, in evaluation mode.
        folder: that the converter wrote.
        quantization: of the weights in the folder; None: they are as those of ``model``.
    """
    import ctranslate2
    import torch

    names = _names(folder)
    texts = _texts(model, names)
    rows = torch.tensor(texts, device=model.device)
    sources, targets = ([[names[row] for row in text] for text in texts[side::2]] for side in (0, 1))
    kind = ctranslate2.Translator if model.config.is_encoder_decoder else ctranslate2.Generator
    try:
        served = kind(str(folder), compute_type="float32", intra_threads=torch.get_num_threads())
        if model.config.is_encoder_decoder:
            results = served.score_batch(sources, targets, max_input_length=0)
        else:
            results = served.score_batch(targets, max_input_length=0)
    except (ValueError, RuntimeError) as error:
        return f"it cannot be run ({error})"
    with torch.no_grad():
        wanted = _scores(model, rows[::2], rows[1::2], len(names), _start(model, folder, names))
    found = torch.tensor([result.log_probs[: wanted.shape[1]] for result in results], dtype=torch.float64)
    off, spread = float((found - wanted).square().mean().sqrt()), float(wanted.std())
    if off <= _MOST_OFF[_bits(model, quantization)] * max(spread, 1e-3):
        return ""
    return f"log-probabilities of {wanted.numel()} tokens are off by {off:.2g}, and spread by {spread:.2g}"


def _bits(model: Any, quantization: str | None) -> int:
    """Those of the weights with the fewest: 32, 16 or 8."""
    own = 16 if any(parameter.element_size() < 4 for parameter in model.parameters()) else 32
    return min(own, 8 if (quantization or "").startswith("int8") else 32 if quantization in (None, "float32") else 16)


def _scores(model: Any, sources: Any, targets: Any, known: int, start: int) -> Any:
    """The log-probability of each token of the targets, float64 ``[texts, tokens]``; a language model's first has none."""
    import torch

    given = {"input_ids": targets}
    if model.config.is_encoder_decoder:
        first = torch.full_like(targets[:, :1], start)
        given = {"input_ids": sources, "decoder_input_ids": torch.cat([first, targets[:, :-1]], 1)}
    logits = model(**given, attention_mask=torch.ones_like(given["input_ids"]), use_cache=False).logits
    if not model.config.is_encoder_decoder:
        logits, targets = logits[:, :-1], targets[:, 1:]
    every = logits[..., :known].double().log_softmax(-1)
    return every.gather(-1, targets[..., None])[..., 0].cpu()


def _start(model: Any, folder: Path, names: list[str]) -> int:
    """What starts the decoder: what the model says; where it leaves that open, what the folder says."""
    start = getattr(model.config, "decoder_start_token_id", None)
    if start is not None or not model.config.is_encoder_decoder:
        return int(start or 0)
    return names.index(json.loads((folder / "config.json").read_text(encoding="utf-8"))["decoder_start_token"])


def _names(folder: Path) -> list[str]:
    """The names of the rows of the embeddings."""
    for name in ("shared_vocabulary.json", "source_vocabulary.json", "vocabulary.json"):
        if (folder / name).is_file():
            names: list[str] = json.loads((folder / name).read_text(encoding="utf-8"))
            return names
    raise ValueError(f"{folder} has no vocabulary that can be read")


def _texts(model: Any, names: list[str]) -> list[list[int]]:
    """Texts of random rows, none of a special meaning or of the name of another: sources and targets in turn."""
    special = {getattr(model.config, f"{name}_token_id", None) for name in ("pad", "bos", "eos", "decoder_start")}
    first: dict[str, int] = {}
    for row, name in enumerate(names):
        first.setdefault(name, row)
    rows = [row for row in first.values() if row not in special] or list(first.values())
    positions = getattr(model.config, "max_position_embeddings", None) or TOKENS + 2
    drawn = random.Random(0)
    return [[drawn.choice(rows) for _ in range(min(TOKENS, positions - 2))] for _ in range(2 * TEXTS)]

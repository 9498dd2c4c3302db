"""The translation model: built from options or taken from a pretrained one, saved and loaded with its masks."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import M2M100Config, M2M100ForConditionalGeneration, PreTrainedModel, PreTrainedTokenizerBase

from nspec.files import disk_error
from nspec.mt.config import ModelConfig
from nspec.mt.methods import NSPEC_FILE, Method, load_method
from nspec.mt.model_files import load_config, load_dense, load_weights, quiet_transformers, stored_shapes
from nspec.mt.text.tokenizer_fit import check_fit, check_same, check_special, rows_of, write_record
from nspec.mt.text.vocabulary import load_tokenizer

logger = logging.getLogger(__name__)

_OFF = ("activation_dropout", "encoder_layerdrop", "decoder_layerdrop")


def build_model(config: ModelConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """A model that fits the tokenizer, in float32 on the CPU.

    A new one is M2M100's architecture (pre-norm, ReLU, sinusoidal positions, one matrix for all embeddings). Weights
    are drawn with a standard deviation of ``d_model ** -0.5``: what fairseq takes for embeddings and, for square
    matrices, equal to its Xavier initialisation. The caller's random state is left alone.

    In both cases there is no dropout between the activation and ``fc2``, as the specialised forward pass needs a deselected
    neuron to be constant, and no layer drop, as every parameter must take part in each step of several processes.

    Args:
        config: sizes, or ``pretrained``: a folder or hub name, whose sizes hold; dropouts are ours in both cases.
        tokenizer: with pad, eos and bos (or cls) tokens.
        seed: of the initialisation.

    Raises:
        ValueError: a width that heads do not divide; a pretrained model whose vocabulary is not the tokenizer's, or
            that of the tokenizer beside it (:mod:`nspec.mt.text.tokenizer_fit`), that is a system with masks or
            adapters, or that cannot be read whole (:func:`nspec.mt.model_files.load_dense`).
    """
    if config.pretrained:
        return _pretrained(config, tokenizer)
    if config.d_model % config.heads or config.d_model < 4:
        raise ValueError(
            f"model.d_model is {config.d_model} and model.heads is {config.heads}; "
            "expected a width of 4 or more that the number of heads divides"
        )
    architecture = M2M100Config(
        vocab_size=rows_of(tokenizer),
        d_model=config.d_model,
        encoder_layers=config.encoder_layers,
        decoder_layers=config.decoder_layers,
        encoder_attention_heads=config.heads,
        decoder_attention_heads=config.heads,
        encoder_ffn_dim=config.d_ff,
        decoder_ffn_dim=config.d_ff,
        dropout=config.dropout,
        attention_dropout=config.attention_dropout,
        max_position_embeddings=config.max_positions,
        activation_function="relu",
        activation_dropout=0.0,
        encoder_layerdrop=0.0,
        decoder_layerdrop=0.0,
        scale_embedding=True,
        tie_word_embeddings=True,
        init_std=config.d_model**-0.5,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = M2M100ForConditionalGeneration(architecture)
    model.generation_config.max_length = config.max_positions  # transformers' own default is 20
    return model


def _pretrained(config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    method = load_method(Path(config.pretrained))
    if method is not None and method.mode != "update":  # which decodes as the dense model
        raise ValueError(
            f"model.pretrained {config.pretrained} is a system with {method.name}, which would be left out; take a dense "
            "model, or one specialised in mode update"
        )
    architecture = load_config(config.pretrained)
    own = load_tokenizer(config.pretrained)
    check_fit(own, architecture, config.pretrained)
    check_same(tokenizer, own, config.pretrained)
    for name in _OFF:
        if getattr(architecture, name, 0):
            logger.info("%s: %s is set from %g to 0", config.pretrained, name, getattr(architecture, name))
            setattr(architecture, name, 0.0)
    architecture.dropout = config.dropout
    architecture.attention_dropout = config.attention_dropout
    model = load_dense(config.pretrained, architecture)
    check_special(own, model.generation_config, config.pretrained, "generation_config.json")
    return model


def save_system(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | os.PathLike[str],
    method: Method | None = None,
) -> None:
    """Writes a system that :func:`load_system` and, as a dense model, ``AutoModelForSeq2SeqLM`` load.

    The weights are the dense ones under their usual names (those of adapters are added); what makes the system, such as
    masks, stands beside them with ``nspec.json``; ``tokenizer.sha256`` says which tokenizer is the model's. The folder
    appears at once: a kill leaves the old one (:func:`put_back` gives it its name again), the new one or none.
    """
    with _new_folder(Path(folder)) as part, quiet_transformers():
        cached, model.config.use_cache = model.config.use_cache, True  # off while training, wanted in decoding
        try:
            model.save_pretrained(part)
        finally:
            model.config.use_cache = cached
        write_record(part, tokenizer.save_pretrained(part))
        if method is not None:
            method.save(part)


def load_system(
    folder: str | os.PathLike[str], device: str | torch.device = "cpu", made_by: tuple[str, str] | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads what :func:`save_system` wrote, or any ``transformers`` sequence-to-sequence model with its tokenizer.

    Args:
        folder: of the model.
        device: where it goes.
        made_by: name and mode of the method that makes the system in its run, both empty for a dense model; None: what the
            folder says.

    Returns:
        The model in evaluation mode and float32 on ``device``, with what makes the system applied, and its tokenizer.

    Raises:
        ValueError: no model or no tokenizer in the folder, one that is broken or incomplete (see
            :func:`nspec.mt.model_files.load_dense` and :func:`nspec.mt.methods.load_method`), the tokenizer of another
            model (:mod:`nspec.mt.text.tokenizer_fit`), or a system of another method than
            ``made_by``.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no model: config.json is not there")
    method = load_method(folder)
    if made_by is not None:
        _check_method(folder, method, made_by)
    own_weights = method is not None and method.has_weights
    config = load_config(folder)
    tokenizer = load_tokenizer(folder)
    check_fit(tokenizer, config, folder)
    model: Any = load_dense(folder, config, extra=own_weights)  # transformers wraps Module.to in a type of its own
    check_special(tokenizer, model.generation_config, folder, "generation_config.json")
    if method is not None:
        method.check(folder, stored_shapes(folder) if own_weights else {})
        method.attach(model)
        if own_weights:
            load_weights(model, folder)
    return model.to(device).eval(), tokenizer


def _check_method(folder: Path, method: Method | None, made_by: tuple[str, str]) -> None:
    """A folder that lost its ``nspec.json``, or got another's, would be translated as another system."""
    expected = (made_by[0] or None, made_by[1] or None)
    found = (None, None) if method is None else (method.name, method.mode)
    if found != expected:
        names = [f"{name} in mode {mode}" if mode else name or "a dense model" for name, mode in (found, expected)]
        raise ValueError(
            f"{folder} is {names[0]} ({NSPEC_FILE} {'says so' if method else 'is not there'}), but config.yaml of the run "
            f"says {names[1]}; train the system again, or copy its whole folder"
        )


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """Yields an empty folder that takes the place of ``folder`` when the body has ended without an error."""
    part, old = folder.with_name(f".{folder.name}.part"), _old(folder)
    put_back(folder)
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        if folder.exists():  # a folder with files in it cannot be renamed over
            os.rename(folder, old)
        os.rename(part, folder)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise disk_error(error, folder) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def put_back(folder: Path) -> None:
    """Puts the folder of a model back that a kill left aside when the new one was to take its place."""
    if folder.exists():  # whole, as it comes by renaming
        shutil.rmtree(_old(folder), ignore_errors=True)
    elif _old(folder).is_dir():
        os.rename(_old(folder), folder)


def _old(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")

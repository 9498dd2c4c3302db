"""Reading the folder of a model (or its hub name), whole or not at all.

What ``transformers`` takes with a note that nobody reads is an error here: weights that are missing, which it draws at
random, weights that the model has no place for, other shapes, numbers that are not finite. Code that comes with a model is
never run, nor asked about. What cannot be read is a ValueError that names the file.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nspec.files import read_json
from nspec.specialization.patterns import nearest

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedConfig, PreTrainedModel

Location = str | os.PathLike[str]

_OBJECTS = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "special_tokens_map.json",
)
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_FLOATS = ("F64", "F32", "F16", "BF16")
_CODE = "comes with code of its own, which nspec does not run; take a model whose class transformers has"
_NAMED = 3  # names of weights in a message, at most


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Within the block transformers draws no progress bars and says nothing below errors."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def reading(what: str, source: Location, hint: str = "") -> Iterator[None]:
    """Makes any error of a library within the block a ValueError that says what cannot be read from where, and why.

    Libraries raise whatever broken files lead them to, a plain Exception among it. Files that are broken for sure are
    named before the block is entered.
    """
    check_files(source)
    folder = Path(source).is_dir()
    if not folder and not (isinstance(source, str) and _HUB_NAME.fullmatch(source)):
        raise ValueError(f"no {what} can be loaded from {source}: there is no such folder")
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        text = str(error).strip() or type(error).__name__
        if isinstance(error, KeyError):  # whose text is the key alone
            text = f"transformers does not know, or does not find in the files, {text}"
        reason = text.splitlines()[0].rstrip(":")
        if "trust_remote_code" in text:
            reason = (
                "it comes with code of its own, which nspec does not run; take a model whose class transformers has"
            )
        place = "" if folder else "there is no such folder here, and as a model of the hub: "
        raise ValueError(f"no {what} can be loaded from {source}: {place}{reason}{hint}") from error


def check_files(source: Location) -> None:
    """Checks the files of a local folder that can be checked alone; a hub name passes.

    Raises:
        ValueError: one that is not JSON, holds something else than an object, is no whole safetensors file, or has
            weights that are no floating-point numbers of 16 bits or more, with their names.
    """
    folder = Path(source)
    if not folder.is_dir():
        return
    for name in _OBJECTS:
        if not (folder / name).is_file():
            continue
        found = read_json(folder / name)
        if not isinstance(found, dict):
            raise ValueError(
                f"{folder / name} holds {_kind(found)}, expected a JSON object; copy or write the model folder again"
            )
        if name == "tokenizer_config.json" and found.get("auto_map"):
            import transformers

            if not hasattr(transformers, str(found.get("tokenizer_class"))):  # it would load as some other class
                raise ValueError(f"the tokenizer in {folder} {_CODE}")
    for file in sorted(folder.glob("model*.safetensors")):
        _shapes(file)


def _kind(value: Any) -> str:
    names = {list: "a list", str: "a text", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), "null")


def load_config(source: Location) -> PreTrainedConfig:
    """The configuration of a model.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    from transformers import AutoConfig

    with reading("model configuration", source):
        found: PreTrainedConfig = AutoConfig.from_pretrained(source, trust_remote_code=False)
        found.return_dict = True  # as all code here reads results by name
    return found


def load_dense(source: Location, config: PreTrainedConfig | None = None, *, extra: bool = False) -> PreTrainedModel:
    """A sequence-to-sequence model in float32 on the CPU.

    Args:
        source: a folder or hub name.
        config: to use in place of the one that is there.
        extra: weights that the model has no place for belong to something that comes on top of it.

    Raises:
        ValueError: there is no model or it cannot be read; weights that are missing, too many, of another shape or not
            finite, with their names.
    """
    import torch
    from transformers import AutoModelForSeq2SeqLM

    config = config or load_config(source)
    _check_activation(config, source)
    with quiet_transformers(), reading("model", source):
        model, found = AutoModelForSeq2SeqLM.from_pretrained(
            source,
            config=config,
            dtype=torch.float32,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are in what was found, with names and shapes
        )
    computed = {name for name, _ in model.named_buffers()}  # such as sinusoidal positions, which old files still hold
    other = [f"{name} {list(file)} for {list(own)}" for name, file, own in found["mismatched_keys"]]
    wrong = {
        "lacks": sorted(found["missing_keys"]),
        "has, with no place for it in the model,": [] if extra else sorted(set(found["unexpected_keys"]) - computed),
        "has in another shape": sorted(other),
        "cannot give": [str(error) for error in found["error_msgs"]],
    }
    _refuse(source, wrong)
    check_finite(model, source)
    for name in _never_saved(model):  # Marian's positions get no gradient, and several processes would wait for one
        model.get_parameter(name).requires_grad_(False)
    return model


def _check_activation(config: PreTrainedConfig, source: Location) -> None:
    from transformers.activations import ACT2FN

    for option in ("activation_function", "hidden_act", "dense_act_fn"):
        name = getattr(config, option, None)
        if isinstance(name, str) and name not in ACT2FN:
            raise ValueError(
                f"no model can be loaded from {source}: {option} in config.json is {name!r}, which is no activation "
                f"function of transformers; {nearest(name, list(ACT2FN))}"
            )


def load_weights(model: nn.Module, folder: Path) -> None:
    """Copies the weights in a folder into the model; names that are tied to a stored one may be missing.

    Raises:
        ValueError: the file cannot be read, has other parameters than the model, or numbers that are not finite.
    """
    from safetensors.torch import load_file

    check_files(folder)
    stored: dict[str, Tensor] = {}
    for file in _weight_files(folder):
        stored |= load_file(file)
    own = model.state_dict()
    shapes = {name: (list(value.shape), list(own[name].shape)) for name, value in stored.items() if name in own}
    covered = {own[name].data_ptr() for name in stored if name in own}
    covered |= {own[name].data_ptr() for name in _never_saved(model)}
    wrong = {
        "lacks": [name for name, value in own.items() if name not in stored and value.data_ptr() not in covered],
        "has, with no place for it in the model,": [name for name in stored if name not in own],
        "has in another shape": [f"{name} {a} for {b}" for name, (a, b) in shapes.items() if a != b],
    }
    _refuse(folder, wrong)
    model.load_state_dict(stored, strict=False)
    check_finite(model, folder)


def _never_saved(model: nn.Module) -> list[str]:
    """Names of parameters that a model computes for itself, such as Marian's sinusoidal positions."""
    own = dict(model.named_parameters())
    return [name for name in getattr(model, "_keys_to_ignore_on_save", None) or [] if name in own]


def stored_shapes(folder: Path) -> dict[str, list[int]]:
    """The shapes of the weights in a folder, by name; none are read."""
    found: dict[str, list[int]] = {}
    for file in _weight_files(folder):
        found |= _shapes(file)
    return found


def _weight_files(folder: Path) -> list[Path]:
    whole = folder / "model.safetensors"
    files = [whole] if whole.is_file() else sorted(folder.glob("model-*.safetensors"))  # many gigabytes are cut up
    if not files:
        raise ValueError(f"{folder} has no weights: {whole.name} is not there")
    return files


def _shapes(file: Path) -> dict[str, list[int]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as weights:
            parts = {name: weights.get_slice(name) for name in weights.keys()}  # noqa: SIM118 (no mapping)
            shapes: dict[str, list[int]] = {name: part.get_shape() for name, part in parts.items()}
            types: dict[str, str] = {name: str(part.get_dtype()) for name, part in parts.items()}
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{file} cannot be read as safetensors: {error}; copy or write the model folder again"
        ) from error
    other = [f"{name} is {kind}" for name, kind in types.items() if kind not in _FLOATS]
    if other:
        raise ValueError(
            f"{file} has weights of a type that is not computed with: {_some(other)}; expected {', '.join(_FLOATS)}: take "
            "the model as it was trained, not quantised"
        )
    return shapes


def check_finite(model: nn.Module, source: Location) -> None:
    """Raises ValueError where the model has numbers that are not finite, with the names of the weights."""
    tensors: Iterable[tuple[str, Tensor]] = model.state_dict().items()
    names = [name for name, value in tensors if value.is_floating_point() and not bool(value.isfinite().all())]
    if names:
        raise ValueError(
            f"the weights in {source} are not finite (NaN or infinite): {_some(names)}; the model is broken"
        )


def _refuse(source: Location, wrong: dict[str, list[str]]) -> None:
    found = [f"{what} {_some(names)}" for what, names in wrong.items() if names]
    if found:
        raise ValueError(
            f"the weights in {source} are not those of the model that its config.json describes: the file "
            f"{'; it '.join(found)}"
        )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more

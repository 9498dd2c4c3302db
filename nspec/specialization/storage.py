"""The file format of counts and masks: one safetensors file that is complete in itself, and a readable JSON beside it.

``<kind>.safetensors`` holds one tensor per layer, named by the qualified name of fc1, with a row per task: int32 or
int64 ``[tasks, d_ff]`` for counts, uint8 ``[tasks, ceil(d_ff / 8)]`` for masks (bit j % 8 of byte j // 8 is neuron j, the
bits after the last neuron are 0). Its metadata has one entry, ``nspec``, a JSON object with ``format`` (1), ``kind``,
``tasks``, ``d_ff`` by layer, in counts ``tokens`` (by task, and by layer where layers differ; older files have none) and
``sha256`` (nor that), the digest of the other entries and of the tensors:
one entry, because safetensors writes several in an order that changes, and equal masks should be equal bytes. Only this
file is read; the JSON is for people and for other tools. No pickle anywhere.

A file may come from anywhere: what it says of itself is compared with the tensors that it has before one of them is read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nspec.files import replacing, write_text

from .tensors import is_name

FORMAT = 1
_LARGEST = 2**31 - 1  # of a dimension of a layer: more is no layer, and its product may not fit into 64 bits
_RESERVED = "__metadata__"
_DTYPES = {"BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64"}
_DTYPES |= {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}


class Kind(NamedTuple):
    """What a file of tensors by task and layer holds.

    Attributes:
        name: of the file, and ``kind`` in its metadata.
        dtypes: of the tensors, any of them, as safetensors calls them.
        entry: of the metadata, with the size of each layer: ``d_ff``, a number, or ``shapes``, the two of a matrix.
        bits: whether eight values are packed into a byte.
    """

    name: str
    dtypes: tuple[str, ...]
    entry: str = "d_ff"
    bits: bool = False

    def columns(self, values: int) -> int:
        """Length of the row of a task for so many values."""
        return -(-values // 8) if self.bits else values


class Stacked(NamedTuple):
    """What a file holds: the tensors ``[tasks, columns]`` by layer, the tasks, the size of each layer, other entries."""

    tensors: dict[str, Tensor]
    tasks: list[str]
    sizes: dict[str, Any]
    more: dict[str, Any] = {}


def save_stacked(folder: Path, kind: Kind, stacked: Stacked, readable: Mapping[str, Any]) -> None:
    """Writes ``<kind>.safetensors`` and ``<kind>.json`` into ``folder``, each whole or not at all.

    Raises:
        OSError: the files cannot be written; what was there is unchanged.
        ValueError: a layer has the name that safetensors keeps for itself.
    """
    if _RESERVED in stacked.tensors:
        raise ValueError(
            f"no layer can be called {_RESERVED} in {folder / kind.name}.safetensors: the format has the name for itself; "
            "rename the module"
        )
    about = {"format": FORMAT, "kind": kind.name, "tasks": stacked.tasks, kind.entry: stacked.sizes} | stacked.more
    tensors = {layer: tensor.contiguous() for layer, tensor in stacked.tensors.items()}
    about["sha256"] = _digest(about, tensors)
    with replacing(folder / f"{kind.name}.safetensors") as part:
        try:
            save_file(tensors, part, metadata={"nspec": json.dumps(about, ensure_ascii=False)})
        except SafetensorError as error:  # what the library makes of a full disk
            raise OSError(5, str(error)) from error
    lines = [f" {json.dumps(key)}: {_compact(value)}" for key, value in {"nspec_format": FORMAT, **readable}.items()]
    write_text(folder / f"{kind.name}.json", "{\n" + ",\n".join(lines) + "\n}\n")


def _compact(value: Any) -> str:
    """One line per task or layer: readable, and small enough beside the bits."""
    if isinstance(value, dict) and value:
        inner = (
            f"  {json.dumps(key, ensure_ascii=False)}: {json.dumps(item, ensure_ascii=False)}"
            for key, item in value.items()
        )
        return "{\n" + ",\n".join(inner) + "\n }"
    return json.dumps(value, ensure_ascii=False)


def _digest(about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over what the metadata says, but for the digest itself, and over the tensors in the order of the layers."""
    found = hashlib.sha256(json.dumps({key: value for key, value in about.items() if key != "sha256"}).encode())
    for layer, tensor in tensors.items():
        found.update(json.dumps([layer, str(tensor.dtype), list(tensor.shape)]).encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


@contextlib.contextmanager
def reading(folder: Path, kind: Kind) -> Iterator[Stacked]:
    """What :func:`save_stacked` wrote; a ValueError within the block, of values that do not fit, then names the file.

    Raises:
        FileNotFoundError: the file is not there.
        ValueError: it is broken, of another kind, or of a newer format, or its tensors are not those that it names; or
            its path is not UTF-8.
    """
    path = folder / f"{kind.name}.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: expected a folder that {kind.name}.save(folder) wrote")
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"{str(path)!r} cannot be read where it is: safetensors takes no path that is not UTF-8; rename the folder"
        ) from None
    try:
        with safe_open(path, framework="pt") as file:
            about = _about(file.metadata(), path, kind)
            tasks, sizes = about["tasks"], about[kind.entry]
            _check_tensors(file, path, kind, tasks, sizes)
            tensors = {layer: file.get_tensor(layer) for layer in sizes}
    except SafetensorError as error:
        raise ValueError(f"{path} is broken: {_shown_name(str(error), 300)}; write it again") from error
    if "sha256" in about and about["sha256"] != _digest(about, tensors):
        raise ValueError(
            f"{path} is broken: its contents are not those that were written, by their SHA-256; write it again, or take "
            "another copy"
        )
    for layer, rows in tensors.items():
        _check_spare(path, kind, layer, rows, sizes[layer])
    try:
        yield Stacked(tensors, tasks, sizes, {key: value for key, value in about.items() if key not in _own(kind)})
    except ValueError as error:
        raise ValueError(f"{path} is broken: {error}; write it again") from error


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _shown_name(text: str, width: int = 80) -> str:
    """A name that a file gives, which may be of any length and hold line breaks, for a message."""
    text = text if text.isprintable() else repr(text)[1:-1]
    return text if len(text) <= width else f"{text[: width - 3]}..."


def _about(metadata: Mapping[str, str] | None, path: Path, kind: Kind) -> dict[str, Any]:
    """What the metadata says, checked."""

    def need(fits: bool, name: str, found: Any, expected: str) -> None:
        if not fits:
            raise ValueError(f"{path} is broken: {name} is {_shown(found)}, expected {expected}; write it again")

    try:
        about = json.loads((metadata or {}).get("nspec", "{}"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is broken: its metadata is no JSON ({_shown(str(error))}); write it again") from error
    need(isinstance(about, dict), "its metadata", about, "a JSON object")
    if about.get("kind") != kind.name:
        found = _shown(about["kind"]).strip("'") if "kind" in about else "something else"
        raise ValueError(f"{path} holds {found}, expected {kind.name}")
    if type(about.get("format")) is not int or about["format"] != FORMAT:
        raise ValueError(f"{path} has format {_shown(about.get('format'))}, this version reads {FORMAT}")
    tasks, sizes = about.get("tasks"), about.get(kind.entry)
    need(isinstance(tasks, list) and len(tasks) > 0, "tasks", tasks, "a list of one task or more")
    for task in tasks:
        need(is_name(task), "a task", task, "a name")
    need(len(set(tasks)) == len(tasks), "tasks", tasks, "every task once")
    need(isinstance(sizes, dict) and len(sizes) > 0, kind.entry, sizes, "an object with one layer or more")
    for layer, size in sizes.items():
        if kind.entry == "d_ff":
            need(_whole(size, 1), f"d_ff of {_shown_name(layer)}", size, f"a whole number from 1 to {_LARGEST}")
        else:
            fits = isinstance(size, list) and len(size) == 2 and all(_whole(number, 0) for number in size)
            need(fits, f"the shape of {_shown_name(layer)}", size, f"two whole numbers from 0 to {_LARGEST}")
    # Without its digest a file is one of an older version, which wrote these entries only.
    other = sorted(set(about) - _own(kind))
    need("sha256" in about or not other, "its metadata", other, f"format, kind, tasks, {kind.entry} and sha256")
    return about


def _own(kind: Kind) -> set[str]:
    return {"format", "kind", "tasks", kind.entry, "sha256"}


def _whole(value: Any, least: int) -> bool:
    return type(value) is int and least <= value <= _LARGEST


def _values(kind: Kind, size: Any) -> int:
    return int(size) if kind.entry == "d_ff" else int(size[0]) * int(size[1])


def _check_tensors(file: Any, path: Path, kind: Kind, tasks: list[str], sizes: Mapping[str, Any]) -> None:
    """Raises ValueError unless the file has a tensor for each layer, of the right dtype and shape, and no other."""
    names = set(file.keys())
    if missing := [layer for layer in sizes if layer not in names]:
        raise ValueError(
            f"{path} is broken: it has no tensor {_shown_name(missing[0])}, which its {kind.entry} names; write it again"
        )
    if extra := sorted(names - set(sizes)):
        raise ValueError(
            f"{path} is broken: its tensor {_shown_name(extra[0])} is not in its {kind.entry}; write it again"
        )
    for layer, size in sizes.items():
        tensor, expected = file.get_slice(layer), [len(tasks), kind.columns(_values(kind, size))]
        dtype, shape = tensor.get_dtype(), list(tensor.get_shape())
        if dtype not in kind.dtypes or shape != expected:
            wanted = " or ".join(f"torch.{_DTYPES[name]}" for name in kind.dtypes)
            found = f"torch.{_DTYPES[dtype]}" if dtype in _DTYPES else dtype
            raise ValueError(
                f"{path} is broken: {_shown_name(layer)} is {found} {shape}, expected {wanted} {expected} "
                f"({len(tasks)} tasks, {kind.entry} {size}); write it again"
            )


def _check_spare(path: Path, kind: Kind, layer: str, rows: Tensor, size: Any) -> None:
    """Raises ValueError for bits after the last value."""
    spare = -_values(kind, size) % 8
    if kind.bits and spare and bool((rows[:, -1] >= 1 << (8 - spare)).any()):
        what = "neuron" if kind.entry == "d_ff" else "weight"
        raise ValueError(f"{path} is broken: {_shown_name(layer)} has bits after its last {what}; write it again")

"""The file format of counts and masks: one safetensors file that is complete in itself, and a readable JSON beside it.

``<kind>.safetensors`` holds one tensor per layer, named by the qualified name of fc1, with a row per task: int32 or
int64 ``[tasks, d_ff]`` for counts, uint8 ``[tasks, ceil(d_ff / 8)]`` for masks (bit j % 8 of byte j // 8 is neuron j).
Its metadata has one entry, ``nspec``, a JSON object with ``format`` (1), ``kind``, ``tasks`` and ``d_ff`` by layer: one
entry, because safetensors writes several in an order that changes, and equal masks should be equal bytes. Only this file
is read; the JSON is for people and for other tools. No pickle anywhere.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nspec.files import replacing, write_text

FORMAT = 1


def save_stacked(
    folder: Path, kind: str, stacked: Mapping[str, Tensor], tasks: list[str], readable: Mapping[str, Any]
) -> None:
    """Writes ``<kind>.safetensors`` and ``<kind>.json`` into ``folder``, each whole or not at all."""
    widths = {layer: info["d_ff"] for layer, info in readable["layers"].items()}
    about = {"format": FORMAT, "kind": kind, "tasks": tasks, "d_ff": widths}
    tensors = {layer: tensor.contiguous() for layer, tensor in stacked.items()}
    with replacing(folder / f"{kind}.safetensors") as part:
        try:
            save_file(tensors, part, metadata={"nspec": json.dumps(about, ensure_ascii=False)})
        except SafetensorError as error:  # what the library makes of a full disk
            raise OSError(5, str(error)) from error
    lines = [f" {json.dumps(key)}: {_compact(value)}" for key, value in {"nspec_format": FORMAT, **readable}.items()]
    write_text(folder / f"{kind}.json", "{\n" + ",\n".join(lines) + "\n}\n")


def _compact(value: Any) -> str:
    """One line per task or layer: readable, and small enough beside the bits."""
    if isinstance(value, dict) and value:
        inner = (
            f"  {json.dumps(key, ensure_ascii=False)}: {json.dumps(item, ensure_ascii=False)}"
            for key, item in value.items()
        )
        return "{\n" + ",\n".join(inner) + "\n }"
    return json.dumps(value, ensure_ascii=False)


def load_stacked(folder: Path, kind: str) -> tuple[dict[str, Tensor], list[str], dict[str, int]]:
    """Reads the tensors by layer, the tasks, and d_ff by layer.

    Raises:
        FileNotFoundError: the file is not there.
        ValueError: it is broken, of another kind, or of a newer format.
    """
    with opened(folder / f"{kind}.safetensors", kind) as (file, about):
        return {layer: file.get_tensor(layer) for layer in about["d_ff"]}, about["tasks"], about["d_ff"]


@contextlib.contextmanager
def opened(path: Path, kind: str) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Opens a safetensors file of ours: it, and what its metadata says of it.

    Raises:
        FileNotFoundError: the file is not there.
        ValueError: it is broken, also where reading it within the block shows that, of another kind, or of a newer format.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: expected a folder that {kind}.save(folder) wrote")
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("nspec", "{}"))
            if about.get("kind") != kind:
                raise ValueError(f"{path} holds {about.get('kind', 'something else')}, expected {kind}")
            if about.get("format") != FORMAT:
                raise ValueError(f"{path} has format {about.get('format')}, this version reads {FORMAT}")
            yield file, about
    except (SafetensorError, json.JSONDecodeError, KeyError) as error:
        raise ValueError(f"{path} is broken: {error}; write it again") from error

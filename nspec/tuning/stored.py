"""Reading neurons of tasks from files; see :mod:`nspec.tuning.storage` for what is in them."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .layers import GATED, PLAIN, Values

FORMAT = 1
FILE = "neurons.safetensors"


class Stored(NamedTuple):
    """What a file holds of one task.

    Attributes:
        neurons: of each block, int64 ``[k]``.
        values: of each block and part.
        about: the file's metadata.
        path: of the file.
        task: its name there.
    """

    neurons: dict[str, Tensor]
    values: dict[str, dict[str, Values]]
    about: dict[str, Any]
    path: Path
    task: str


def stored_in(folders: Any) -> Iterator[tuple[str, Stored]]:
    """What folders hold, by the name that each task is to have. Raises as :func:`nspec.load_neurons` does."""
    if isinstance(folders, Mapping):
        if not folders:
            raise ValueError("folders is empty, expected one or more, such as {'cy': 'welsh'}")
        for name, folder in folders.items():
            about, path, tensors = _read(Path(folder))
            tasks = about["tasks"]
            task = name if name in tasks else tasks[0] if len(tasks) == 1 else None
            if task is None:
                raise ValueError(f"{path} has neurons of {', '.join(tasks)}, none of {name!r}")
            yield name, _of_task(about, path, tensors, task)
        return
    about, path, tensors = _read(Path(folders))
    for task in about["tasks"]:
        yield task, _of_task(about, path, tensors, task)


def _of_task(about: dict[str, Any], path: Path, tensors: Mapping[str, Tensor], task: str) -> Stored:
    """What a file holds of a task, checked."""
    index: dict[str, Tensor] = {}
    values: dict[str, dict[str, Values]] = {}
    for block, count in about["neurons"][task].items():
        with _broken(path):
            d_ff, d_model = about["sizes"][block]
            rows = tensors[f"{task}/{block}/rows"].to(torch.int64)
            fits = rows.shape == (count,) and count > 0 and bool((rows.diff() > 0).all())
            if not fits or int(rows[0]) < 0 or int(rows[-1]) >= d_ff:
                raise ValueError(f"the neurons of {block} are not {count} rising numbers below {d_ff}")
            index[block], values[block] = rows, {}
            for part in about["parts"][block]:
                mine, bias = tensors[f"{task}/{block}/{part}"], tensors.get(f"{task}/{block}/{part}.bias")
                if mine.shape != (count, d_model) or (bias is not None and bias.shape != (count,)):
                    raise ValueError(f"{part} of {block} is {list(mine.shape)}, expected {[count, d_model]}")
                values[block][part] = Values(mine, bias)
    return Stored(index, values, about, path, task)


def _read(folder: Path) -> tuple[dict[str, Any], Path, dict[str, Tensor]]:
    """The metadata, the path and the tensors of a folder's file."""
    path = folder / FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: expected a folder that nspec.save_neurons wrote")
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("nspec", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is broken: {str(error)[:300]}; write it again") from error
    if not isinstance(about, dict) or about.get("kind") != "neurons":
        raise ValueError(f"{path} holds something else, expected neurons")
    if about.get("format") != FORMAT:
        raise ValueError(f"{path} has format {about.get('format')!r}, this version reads {FORMAT}")
    if about.get("sha256") != digest_of(about, tensors):
        raise ValueError(f"{path} is broken: its contents are not those that were written, by their SHA-256")
    with _broken(path):
        _check_about(about)
    return about, path, tensors


def _check_about(about: Mapping[str, Any]) -> None:
    """Raises ValueError, KeyError or TypeError where metadata does not say all that it is asked."""
    parts, sizes, neurons, base = (_a(dict, about, key) for key in ("parts", "sizes", "neurons", "base"))
    digests, dtypes = _a(dict, base, "rows_sha256"), _a(dict, base, "dtypes")
    _a(bool, about, "biases"), _a(str, base, "name")
    if not _a(list, about, "tasks"):
        raise ValueError("it has neurons of no task")
    for block in parts:
        d_ff, d_model = _a(list, sizes, block)
        if not d_ff > 0 < d_model:
            raise ValueError(f"the sizes of {block} are {d_ff} and {d_model}")
        for part in _a(list, parts, block):
            if part not in (*GATED, *PLAIN):
                raise ValueError(f"{block} has a part {part!r}")
            _a(str, _a(dict, dtypes, block), part)
    for task in about["tasks"]:
        _a(str, digests, task)
        if unknown := [block for block in _a(dict, neurons, task) if block not in parts]:
            raise ValueError(f"{unknown[0]!r} has neurons of {task!r} and no parts")


def _a(kind: type, of: Mapping[str, Any], key: str) -> Any:
    """An entry of a kind."""
    if not isinstance(of[key], kind):
        raise TypeError(f"{key!r} is {str(of[key])[:60]!r}, expected a {kind.__name__}")
    return of[key]


@contextlib.contextmanager
def _broken(path: Path) -> Iterator[None]:
    try:
        yield
    except (KeyError, TypeError, ValueError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else error
        raise ValueError(f"{path} is broken: {what}; write it again") from error


def digest_of(about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over what the metadata says, but for the digest itself, and over the tensors in the order of their names."""
    found = hashlib.sha256(json.dumps({key: value for key, value in about.items() if key != "sha256"}).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        found.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()

"""Neurons of tasks as files: the rows alone, to be put beside the base that they were trained on.

``neurons.safetensors`` holds, for each task and block, ``<task>/<block>/rows`` (int32 ``[k]``, the neurons) and for each
part ``<task>/<block>/<part>`` (``[k, d]``, those of a last layer transposed) and, where biases belong to a neuron,
``<task>/<block>/<part>.bias`` (``[k]``). Its metadata has one entry, ``nspec``, a JSON object: the base, with the SHA-256
of what it has in these rows, the tasks, the parts and the sizes of each block, and the digest of it all.
``neurons.json`` shows the same to people. No pickle anywhere.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from nspec.files import replacing, write_json
from nspec.nn.neurons import NeuronSet
from nspec.specialization.feed_forward import FeedForward, features
from nspec.specialization.layers import find_blocks
from nspec.specialization.masks import NeuronMasks
from nspec.specialization.naming import Layer
from nspec.specialization.patterns import alike, nearest
from nspec.specialization.quantised import check_differentiable, is_packed

from .finetune import check_layers, default_task, freeze, tunable
from .hooks import add_hooks
from .layers import (
    Tuning,
    Values,
    attach,
    base_values,
    index_in,
    layer_of,
    parts_of,
    prepare,
    tuned_layers,
)

FORMAT = 1
_FILE, _READABLE = "neurons.safetensors", "neurons.json"


def save_neurons(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    tasks: Sequence[str] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Writes the neurons of a model that have parameters of their own: ``neurons.safetensors`` and ``neurons.json``.

    Args:
        model: after ``nspec.finetune`` or ``nspec.load_neurons``; a wrapper around it too (DistributedDataParallel).
        folder: to write into.
        tasks: whose; None: all.
        dtype: of the rows; None: that of the base's weights, in which the model computes with them. To go on training,
            save those in which they are trained (``torch.float32``).

    Raises:
        ValueError: no such neurons, or an unknown task.
        OSError: a file cannot be written; what was there is unchanged.

    Example:
        >>> import pathlib, tempfile
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> model = nspec.finetune(model, NeuronMasks({"cy": {"0": torch.arange(8) < 2}}), quiet=True)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_neurons(model, folder)
        ...     sorted(path.name for path in pathlib.Path(folder).iterdir())
        ['neurons.json', 'neurons.safetensors']
    """
    layers = {layer.qualified_name: layer for layer in tuned_layers(model)}
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no neurons with parameters of their own: call nspec.finetune(model, masks) first"
        )
    tuning: Any = next(iter(layers.values()))._nspec.shared
    known = list(tuning.index)
    if unknown := [task for task in tasks or () if task not in known]:
        raise ValueError(f"there are no neurons of task {unknown[0]!r}; {nearest(str(unknown[0]), known)}")
    tensors: dict[str, Tensor] = {}
    base: dict[str, str] = {}
    counts: dict[str, dict[str, int]] = {}
    for task in known if tasks is None else dict.fromkeys(tasks):
        digest, counts[task] = hashlib.sha256(), {}
        for block, index in tuning.index[task].items():
            if not len(index):
                continue
            counts[task][block] = len(index)
            tensors[f"{task}/{block}/rows"] = index.to("cpu", torch.int32)
            for part, layer_name, at in tuning.places[block]:
                layer = layers[layer_name]
                one = layer._nspec.sets[task]
                assert one is not None
                here = slice(at * len(index), (at + 1) * len(index))
                wanted = dtype or (layer.weight.dtype if one.base is not None else one_dtype(layer, task))
                if (rows := layer.neurons.of(task)) is not None:
                    tensors[f"{task}/{block}/{part}"] = _whole(rows)[here].to("cpu", wanted).contiguous()
                if (bias := layer.neuron_biases.of(task)) is not None:
                    tensors[f"{task}/{block}/{part}.bias"] = _whole(bias)[here].to("cpu", wanted).contiguous()
                _digest_base(digest, one, here)
        base[task] = digest.hexdigest()
    about: dict[str, Any] = {
        "format": FORMAT,
        "kind": "neurons",
        "base": {"name": _name_of(model), "dtypes": tuning.dtypes, "rows_sha256": base},
        "tasks": list(counts),
        "parts": tuning.parts,
        "biases": tuning.biases,
        "sizes": tuning.sizes,
        "neurons": counts,
    }
    about["sha256"] = _digest(about, tensors)
    with replacing(Path(folder) / _FILE) as part_file:
        try:
            save_file(tensors, part_file, metadata={"nspec": json.dumps(about, ensure_ascii=False)})
        except SafetensorError as error:  # what the library makes of a full disk
            raise OSError(5, str(error)) from error
    write_json(Path(folder) / _READABLE, about)


def one_dtype(layer: Any, task: str) -> torch.dtype:
    """The dtype of a layer's parameters for a task."""
    rows = layer.neurons.of(task)
    found: torch.dtype = (layer.neuron_biases.of(task) if rows is None else rows).dtype
    return found


def _whole(parameter: Tensor) -> Tensor:
    """A parameter as a tensor of this process, gathered where it is sharded."""
    tensor = parameter.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _name_of(model: nn.Module) -> str:
    """What the base calls itself."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if name := getattr(config, "_name_or_path", None):
            return str(name)
    return ""


def _digest_base(digest: Any, one: NeuronSet, here: slice) -> None:
    """Adds what the base has in some rows to a digest; nothing where it is packed."""
    for tensor in (one.base, one.base_bias):
        if tensor is not None:
            digest.update(tensor[here].detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy().data)


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


def load_neurons(
    model: nn.Module,
    folders: str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]],
    *,
    trained: bool = False,
    verify: bool = True,
    layers: Sequence[Layer] | None = None,
) -> nn.Module:
    """Puts neurons that :func:`save_neurons` wrote beside the base that they were trained on, and freezes it. In place.

    ``nspec.task(model, name)`` switches between those of several tasks; with one alone the model computes with it from now
    on. Sets may be added to a model that has some.

    Args:
        model: the base.
        folders: one, all of whose tasks are loaded; or by the name that a task is to have, each the folder of one task, or
            of several among which is that name.
        trained: whether the parameters are trained on; else they are frozen too.
        verify: whether the base must have the same numbers in these rows as the base of the training, to the bit.
        layers: as in ``nspec.specialize``.

    Returns:
        ``model`` itself.

    Raises:
        FileNotFoundError: no file there.
        ValueError: a file that is broken; another base: its rows, its blocks or their sizes differ; a task that is there
            already; sets whose parts or biases differ.

    Example:
        >>> import copy, tempfile
        >>> base = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> masks = NeuronMasks({"cy": {"0": torch.arange(8) < 2}})
        >>> model, x = nspec.finetune(copy.deepcopy(base), masks, quiet=True), torch.randn(3, 4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_neurons(model, folder)
        ...     loaded = load_neurons(base, folder)
        >>> torch.equal(loaded(x), model(x))
        True
    """
    stored = dict(_stored(folders))
    first = next(iter(stored.values()))
    for name, one in stored.items():
        for entry in ("parts", "biases"):
            if one.about[entry] != first.about[entry]:
                raise ValueError(
                    f"{one.path} has other {entry} than {first.path} (task {name}): sets beside one base have the same"
                )
    names = list(dict.fromkeys(block for one in stored.values() for block in one.about["parts"]))
    present = tuned_layers(model)
    known = {block.name: block for block in find_blocks(model, layers)}
    mine = alike(names, known)
    if lost := [name for name in names if name not in mine]:
        raise ValueError(
            f"{first.path} has neurons of block {lost[0]!r}, which the model does not have; {nearest(lost[0], known)}"
        )
    blocks = [known[mine[name]] for name in names]
    for one in stored.values():
        _check_sizes(one, mine, known)
    parts = {mine[name]: tuple(first.about["parts"][name]) for name in names}
    if present:
        tuning: Any = present[0]._nspec.shared
        if tuning.parts != parts or tuning.biases != first.about["biases"]:
            raise ValueError(f"{first.path} has other blocks or parts than the neurons that the model has already")
        if taken := [name for name in stored if name in tuning.index]:
            raise ValueError(f"the model has neurons of task {taken[0]!r} already: give another name")
        with torch.no_grad():
            for layer in present:
                if layer.is_writable():
                    layer.bring(None)
    else:
        every = {block.name: torch.ones(block.d_ff, dtype=torch.bool) for block in blocks}
        tunable(model, NeuronMasks({"all": every}), layers)
        check_layers(model, blocks, parts)
        tuning = Tuning(parts, bool(first.about["biases"]))
    if trained:
        check_differentiable(model)
    if verify:
        for one in stored.values():
            _check_base(one, mine, known)
    if not present:
        freeze(model)
        prepare(model, blocks, tuning)
        add_hooks(model)
    for name, one in stored.items():
        empty = torch.empty(0, dtype=torch.int64)
        index = {mine[block]: one.neurons.get(block, empty) for block in names}
        attach(model, blocks, name, index, {mine[block]: v for block, v in one.values.items()}, tuning, trained)
    default_task(model, list(tuning.index))
    return model


def _stored(folders: Any) -> Iterator[tuple[str, Stored]]:
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
    path = folder / _FILE
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
    if about.get("sha256") != _digest(about, tensors):
        raise ValueError(f"{path} is broken: its contents are not those that were written, by their SHA-256")
    return about, path, tensors


@contextlib.contextmanager
def _broken(path: Path) -> Iterator[None]:
    try:
        yield
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is broken: {error}; write it again") from error


def _digest(about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over what the metadata says, but for the digest itself, and over the tensors in the order of their names."""
    found = hashlib.sha256(json.dumps({key: value for key, value in about.items() if key != "sha256"}).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        found.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _check_sizes(one: Stored, mine: Mapping[str, str], known: Mapping[str, FeedForward]) -> None:
    for name, (d_ff, d_model) in one.about["sizes"].items():
        block = known[mine[name]]
        found = [block.d_ff, features(block.fc1)[0]]
        if found != [d_ff, d_model]:
            raise ValueError(
                f"{one.path} is of another base: {name} has d_ff={d_ff} and d_model={d_model} there, {found[0]} and "
                f"{found[1]} in the model"
            )
        if lost := [part for part in one.about["parts"][name] if part not in parts_of(block)]:
            raise ValueError(f"{one.path} is of another base: {name} has no {lost[0]} in the model")


def _check_base(one: Stored, mine: Mapping[str, str], known: Mapping[str, FeedForward]) -> None:
    """Raises ValueError unless the base has the same numbers in the rows as that of the training had."""
    digest = hashlib.sha256()
    dtypes = one.about["base"]["dtypes"]
    for name, index in one.neurons.items():
        block = known[mine[name]]
        for part in one.about["parts"][name]:
            layer: Any = layer_of(block, part)
            if is_packed(layer):
                raise ValueError(
                    f"{mine[name]}: the weights of the base are packed, and cannot be compared with those of the training: "
                    "give verify=False if it is the same base"
                )
            dtype = getattr(torch, str(dtypes[name][part]), None)
            if not isinstance(dtype, torch.dtype):
                raise ValueError(
                    f"{one.path}: the base of the training was packed: give verify=False if it is the same"
                )
            rows, bias = base_values(layer, index_in(block, part, index), part not in ("down", "fc2"))
            moved = NeuronSet(one.task, index, rows.to(dtype), None if bias is None else bias.to(dtype))
            _digest_base(digest, moved, slice(None))
    if digest.hexdigest() != one.about["base"]["rows_sha256"][one.task]:
        name = one.about["base"]["name"]
        then = {dtype for parts in dtypes.values() for dtype in parts.values()}
        layers: list[Any] = [layer_of(known[mine[block]], "fc1") for block in one.neurons]
        now = {str(layer.weight.dtype).removeprefix("torch.") for layer in layers}
        raise ValueError(
            f"{one.path} is of another base{f' ({name})' if name else ''}: the model has other numbers in these rows. Load "
            f"the base that they were trained on, in {', '.join(sorted(then))} (this one is in {', '.join(sorted(now))}); "
            "or, if neurons of another base are meant, give verify=False"
        )

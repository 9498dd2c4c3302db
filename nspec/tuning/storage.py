"""Neurons of tasks as files: the rows alone, to be put beside the base that they were trained on.

``neurons.safetensors`` holds, for each task and block, ``<task>/<block>/rows`` (int32 ``[k]``, the neurons) and for each
part ``<task>/<block>/<part>`` (``[k, d]``, those of a last layer transposed) and, where biases belong to a neuron,
``<task>/<block>/<part>.bias`` (``[k]``). Its metadata has one entry, ``nspec``, a JSON object: the base, with the SHA-256
of what it has in these rows, the tasks, the parts and the sizes of each block, and the digest of it all.
``neurons.json`` shows the same to people. No pickle anywhere.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
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

from .finetune import check_dtype, check_layers, default_task, freeze, trained_dtype, tunable
from .hooks import add_hooks
from .layers import (
    Tuning,
    Values,
    attach,
    base_values,
    index_in,
    layer_of,
    parameters_of,
    parts_of,
    prepare,
    tuned_layers,
)
from .stored import FILE, FORMAT, Stored, digest_of, stored_in

_READABLE = "neurons.json"


def save_neurons(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    tasks: Sequence[str] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Writes the neurons of a model that have parameters of their own: ``neurons.safetensors`` and ``neurons.json``.

    What else was trained (``also`` of ``nspec.finetune``) is not in them, and a warning says how much that is.

    Args:
        model: after ``nspec.finetune`` or ``nspec.load_neurons``; a wrapper around it too (DistributedDataParallel).
        folder: to write into.
        tasks: whose, one or more; None: all.
        dtype: of the rows; None: that of the base's weights, in which the model computes with them. To go on training
            without a loss of digits, save those in which they are trained (``torch.float32``).

    Raises:
        ValueError: no such neurons, or an unknown task, or ``tasks`` is empty. Nothing is written.
        TypeError: ``tasks`` is one text.
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
    if isinstance(tasks, str):
        raise TypeError(f"tasks is {tasks!r}, expected a list of names such as [{tasks!r}]")
    tasks = known if tasks is None else list(tasks)
    if not tasks:
        raise ValueError(f"tasks is empty, expected some of {', '.join(known)}, or None for all")
    if unknown := [task for task in tasks if task not in known]:
        raise ValueError(f"there are no neurons of task {unknown[0]!r}; {nearest(str(unknown[0]), known)}")
    own = {id(parameter) for parameter in parameters_of(model)}
    if others := sum(p.numel() for p in model.parameters() if p.requires_grad and id(p) not in own):
        warnings.warn(
            f"{others:,} numbers of other modules are trained too (also=...), and save_neurons writes neurons alone, which "
            "were trained beside these: save the whole model (nspec.merge(model, task).save_pretrained, or its state_dict)",
            stacklevel=2,
        )
    tensors: dict[str, Tensor] = {}
    base: dict[str, str] = {}
    counts: dict[str, dict[str, int]] = {}
    dtypes = {block: dict(parts) for block, parts in tuning.dtypes.items()}
    for task in dict.fromkeys(tasks):
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
                if one.base is not None:  # the model may have another dtype than when it was fine-tuned
                    dtypes[block][part] = str(layer.weight.dtype).removeprefix("torch.")
                _digest_base(digest, _in_dtype(one, layer.weight.dtype), here)
        base[task] = digest.hexdigest()
    about: dict[str, Any] = {
        "format": FORMAT,
        "kind": "neurons",
        "base": {"name": _name_of(model), "dtypes": dtypes, "rows_sha256": base},
        "tasks": list(counts),
        "parts": tuning.parts,
        "biases": tuning.biases,
        "sizes": tuning.sizes,
        "neurons": counts,
    }
    about["sha256"] = digest_of(about, tensors)
    with replacing(Path(folder) / FILE) as part_file:
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


def _in_dtype(one: NeuronSet, dtype: torch.dtype) -> NeuronSet:
    """A set with what the base has in another dtype; the same where it is packed."""
    if one.base is None:
        return one
    return NeuronSet(
        one.task, one.index, one.base.to(dtype), None if one.base_bias is None else one.base_bias.to(dtype)
    )


def _digest_base(digest: Any, one: NeuronSet, here: slice) -> None:
    """Adds what the base has in some rows to a digest; nothing where it is packed."""
    for tensor in (one.base, one.base_bias):
        if tensor is not None:
            digest.update(tensor[here].detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy().data)


def load_neurons(
    model: nn.Module,
    folders: str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]],
    *,
    trained: bool = False,
    dtype: torch.dtype | None = None,
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
        dtype: of the parameters; None: of those that are trained, as in ``nspec.finetune``, float32, or that of the weight
            or the file where it is wider; of others that of the file. Rows that were saved in bfloat16 are the same
            numbers in float32, and so are the outputs.
        verify: whether the base must have the same numbers in these rows as the base of the training, to the bit.
        layers: as in ``nspec.specialize``.

    Returns:
        ``model`` itself.

    Raises:
        FileNotFoundError: no file there.
        ValueError: a file that is broken; another base: its rows, its blocks or their sizes differ; a task that is there
            already; sets whose parts or biases differ; a dtype that is not floating.

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
    check_dtype(dtype)
    stored = dict(stored_in(folders))
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
        values = {mine[block]: _cast(parts, known[mine[block]], dtype, trained) for block, parts in one.values.items()}
        attach(model, blocks, name, index, values, tuning, trained)
    default_task(model, list(tuning.index))
    return model


def _cast(
    values: Mapping[str, Values], block: FeedForward, dtype: torch.dtype | None, trained: bool
) -> dict[str, Values]:
    """The numbers of a block in the dtype in which they become parameters."""
    found = {}
    for part, (rows, bias) in values.items():
        wanted = dtype or (trained_dtype(layer_of(block, part), rows.dtype) if trained else rows.dtype)
        found[part] = Values(rows.to(wanted), None if bias is None else bias.to(wanted))
    return found


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
            _digest_base(digest, _in_dtype(NeuronSet(one.task, index, rows, bias), dtype), slice(None))
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

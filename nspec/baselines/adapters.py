"""Adapters (Bapna & Firat, 2019): after each layer a residual bottleneck for the task's group, in any ``nn.Module``.

``y = x + W_up relu(W_down LayerNorm(x) + b_down) + b_up``. W_up and b_up start at zero: new adapters change nothing. A
group may be one translation direction, or all directions of a language family.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nspec.nn.batch import TaskBatch, reorder
from nspec.nn.state import LayerState
from nspec.nn.switched import TaskSwitched
from nspec.specialization.feed_forward import features
from nspec.specialization.layers import find_blocks, nearest

from .structure import layer_around

_HANDLE = "_adapters_hook"  # on a layer: what takes the hook off, and keeps its number from others after unpickling
_NESTED = "_nested_without_adapters"  # on an nn.TransformerEncoder: what its use_nested_tensor was
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)  # their children are their content
_RESERVED = frozenset(dir(nn.ModuleDict()))  # no keys of one


class Bottleneck(nn.Module):
    """What one group adds to the hidden state: ``W_up relu(W_down LayerNorm(x) + b_down) + b_up``; nothing at first.

    Args:
        width: size of the hidden state.
        bottleneck: size between the two projections.
    """

    def __init__(self, width: int, bottleneck: int) -> None:
        super().__init__()
        # The factory's own device and type are set back here, so that a seed gives the same weights everywhere.
        place: dict[str, Any] = {"device": "cpu", "dtype": torch.float32}
        self.norm = nn.LayerNorm(width, **place)
        self.down, self.up = nn.Linear(width, bottleneck, **place), nn.Linear(bottleneck, width, **place)
        nn.init.xavier_uniform_(self.down.weight)
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., width]`` -> what is added to it, ``[..., width]``."""
        y: Tensor = self.up(F.relu(self.down(self.norm(x))))
        return y


class TaskAdapters(nn.Module, TaskSwitched):
    """The adapters of one layer: a bottleneck for each group of tasks. Without a task the hidden state passes as it is.

    Each group has parameters of its own, so that groups which a batch does not use get no gradient (None, not zero), and
    no optimiser moves them. A batch may hold several tasks (:class:`~nspec.nn.batch.TaskBatch`): each row goes through the
    bottleneck of its own.

    Args:
        width: size of the hidden state.
        groups: the group of each task.
        bottleneck: size between the two projections.

    Attributes:
        group_of: the group of each task.
        groups: the bottleneck of each group; the keys are the names, with ``.`` as ``%2E``.

    Raises:
        TypeError: ``groups`` is not a mapping of names to names, or a size is not an int.
        ValueError: no groups, an empty name, or a size below 1.

    Example:
        >>> adapters = TaskAdapters(8, {"en-de": "germanic", "en-nl": "germanic", "en-fr": "romance"}, bottleneck=4)
        >>> x = torch.randn(2, 8)
        >>> with nspec.task(adapters, "en-de"):
        ...     adapters(x).sum().backward()
        >>> adapters.groups["romance"].up.weight.grad is None
        True
    """

    def __init__(self, width: int, groups: Mapping[str, str], bottleneck: int) -> None:
        super().__init__()
        _check_groups(groups)
        _check_size("width", width)
        _check_size("bottleneck", bottleneck)
        self.group_of = dict(groups)
        self.width, self.bottleneck = width, bottleneck
        names = dict.fromkeys(self.group_of.values())
        self.groups = nn.ModuleDict({_key(name): Bottleneck(width, bottleneck) for name in names})
        self._nspec = LayerState()

    decodes_by_task = True  # adapters are part of the forward pass

    @property
    def tasks(self) -> list[str]:
        """The tasks that have a group."""
        return list(self.group_of)

    def use_of(self, tasks: tuple[Any, ...]) -> str | None:
        """The group of one task, so that two tasks of one may share a backward pass.

        Raises:
            ValueError: a task without a group; nothing is switched then.
        """
        for name in tasks:
            if name not in self.group_of:
                raise ValueError(f"there are no adapters of task {name!r}; {nearest(name, self.group_of)}")
        return sys.intern(self.group_of[tasks[0]]) if len(tasks) == 1 else None

    @torch.compiler.disable  # a graph for each group would reach the limit of recompilation, and all become eager
    def forward(self, x: Tensor) -> Tensor:
        """The hidden state ``x [..., width]`` with what the task's group adds to it, in the dtype of ``x``.

        Raises:
            ValueError: the rows of ``x`` do not fit the tasks of the batch, or ``x`` has another width.
        """
        if x.shape[-1] != self.width:
            raise ValueError(
                f"the layer's output is {x.shape[-1]} wide, its adapters {self.width}, as the last feed-forward layer "
                "inside is: expected the hidden state; name other layers with layers=[...]"
            )
        group, batch = use = self.begin()
        alone: Any = None if group is None else self.groups[_key(group)]
        if alone is None and batch is None:
            (marked,) = self._nspec.note(use, x)
            return x if marked is x else marked.clone()  # a mark is a view, which the model may not write into
        added = alone(x) if batch is None else self._by_sentence(x, batch)
        (added,) = self._nspec.note(use, added)
        return x + added.to(x.dtype)

    def _by_sentence(self, x: Tensor, batch: TaskBatch) -> Tensor:
        batch.check(x)
        groups = dict.fromkeys(self.group_of[task] for task in batch.names)
        if len(groups) == 1:
            y: Tensor = self._of(batch.names[0])(x)
            return y
        order, inverse, _ = batch.layout(x)
        tokens, bounds = reorder(x.reshape(-1, x.shape[-1]), order, inverse), batch.bounds(x)
        parts = zip(batch.names, bounds, bounds[1:])
        added = torch.cat([self._of(task)(tokens[start:stop]) for task, start, stop in parts])
        return reorder(added, inverse, order).view(x.shape)

    def _of(self, task: str) -> nn.Module:
        return self.groups[_key(self.group_of[task])]


def add_adapters(
    model: nn.Module,
    groups: Mapping[str, str],
    bottleneck: int,
    *,
    layers: Iterable[str] | None = None,
    seed: int = 0,
) -> nn.Module:
    """Puts adapters after the layers of ``model``, in place. Until they are trained it computes what it did before.

    Each layer gets a submodule ``adapters`` (:class:`TaskAdapters`), so that they are trained, moved, saved and loaded with
    the model, and a forward hook that applies them to the layer's output. ``nspec.task`` switches them. They are made in
    the dtype and on the device of their layer. The caller's random state is left alone.

    ``torch.compile`` leaves the adapters out of its graphs, whose number then does not grow with that of the groups;
    ``fullgraph=True`` is not possible.

    PyTorch's fused inference path is not taken by ``nn.TransformerEncoderLayer`` modules with adapters, whose results
    differ from it by rounding.

    Args:
        model: any module; not yet wrapped for distributed training or compiled.
        groups: the group of each task: the task itself for adapters of its own, or a family that several share.
        bottleneck: size between the two projections.
        layers: qualified names of modules, each with a feed-forward layer inside, whose output (a tensor, or a tuple that
            begins with it) is the hidden state. None: each module that holds a feed-forward block itself, such as the
            encoder and decoder layers of M2M100, NLLB, mBART and ``torch.nn``. Where the block lies in a module of its own,
            before the residual connection (T5), whole layers must be named.
        seed: of the down-projections.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: no layers, ones that must be named, an unknown one or one named twice, or one whose weights are
            offloaded or quantised; no groups or an empty name; ``bottleneck`` below 1; adapters are there already; the
            model knows other tasks; it is wrapped.
        TypeError: an argument of another type.

    Example:
        >>> model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), num_layers=2)
        >>> model = add_adapters(model, {"en-de": "germanic", "en-fr": "romance"}, bottleneck=4)
        >>> model = freeze_all_but_adapters(model)
        >>> len(adapter_parameters(model)), model.layers[0].linear1.weight.requires_grad
        (24, False)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, expected an nn.Module")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed is {seed!r}, expected an int")
    _check_groups(groups)
    _check_size("bottleneck", bottleneck)
    if hasattr(model, "_orig_mod") or isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise ValueError(f"the model is wrapped ({type(model).__name__}): add adapters first, then wrap or compile it")
    for module in model.modules():
        if isinstance(module, TaskAdapters):
            raise ValueError("the model has adapters already: call remove_adapters(model) first")
        if isinstance(module, TaskSwitched) and set(module.tasks) != set(groups):
            differ = sorted(set(module.tasks) ^ set(groups))
            raise ValueError(
                f"the model's masks and the groups of adapters are of different tasks: {', '.join(differ)}"
            )
    found = _layers(model, layers)
    for layer, like in found:
        _check_place(next(name for name, module in model.named_modules() if module is layer), like.weight)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the devices too
        made = [TaskAdapters(features(like)[1], groups, bottleneck) for _, like in found]
    for (layer, like), adapters in zip(found, made):
        layer.add_module("adapters", adapters.to(like.weight.device, like.weight.dtype).train(layer.training))
        layer.__dict__[_HANDLE] = layer.register_forward_hook(_adapt)
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and any(isinstance(m, TaskAdapters) for m in module.modules()):
            # It would give its layers nested tensors, which they take in the fused path alone.
            module.__dict__[_NESTED], module.use_nested_tensor = module.use_nested_tensor, False
    return model


def _check_place(name: str, weight: Tensor) -> None:
    """ValueError where adapters cannot be made like a layer's weight."""
    if weight.is_meta:
        raise ValueError(
            f"the weights of {name or 'the model'} are on the meta device (offloaded, or not loaded yet), where adapters "
            "would have no values: load the model whole, without offloading"
        )
    if not weight.is_floating_point():
        raise ValueError(
            f"the weights of {name or 'the model'} are {weight.dtype} (quantised), expected floating point, which adapters "
            "are trained in: load the model without quantisation"
        )


def _adapt(layer: Any, inputs: Any, output: Any) -> Any:
    """The forward hook. At module level, so that a model with adapters can be pickled and copied."""
    if isinstance(output, Tensor):
        return layer.adapters(output)
    if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
        changed = (layer.adapters(output[0]), *output[1:])
        return output._make(changed) if hasattr(output, "_make") else changed  # a namedtuple stays one
    shown = f"tuple of {type(output[0]).__name__}" if isinstance(output, tuple) and output else type(output).__name__
    raise TypeError(
        f"a layer with adapters ({type(layer).__name__}) gave a {shown}, expected its hidden state: a tensor, or a tuple "
        "that begins with it"
    )


def _layers(model: nn.Module, names: Iterable[str] | None) -> list[tuple[nn.Module, Any]]:
    """The layers to adapt, in order, each with the fc2 that tells its width, dtype and device."""
    modules = dict(model.named_modules())
    found: dict[str, nn.Module] = {}
    if names is None:
        try:
            blocks = find_blocks(model)
        except ValueError as error:
            raise ValueError(f"{error}. For adapters, name whole layers: layers=['encoder.layers.0', ...]") from error
        names_of = {id(module): name for name, module in modules.items()}
        found = {names_of[id(block.parent)]: block.fc2 for block in blocks}
        for name in found:
            if whole := layer_around(name, modules):
                raise ValueError(
                    f"{name} holds a feed-forward block alone: its output is not yet the hidden state of the layer around "
                    f"it ({whole}), where adapters belong; name whole layers with layers=[{whole!r}, ...]"
                )
    else:
        if isinstance(names, str):
            raise TypeError(f"layers is {names!r}, expected a list of names")
        for name in names:
            if name not in modules:
                raise ValueError(f"the model has no layer {name!r}; {nearest(str(name), filter(None, modules))}")
            if name in found:
                raise ValueError(f"layer {name!r} is named twice")
            try:
                found[name] = find_blocks(modules[name])[-1].fc2
            except ValueError as error:
                raise ValueError(f"layer {name!r} has no feed-forward block to tell its width: {error}") from error
        if not found:
            raise ValueError("layers is empty, expected names of layers, or None for those that are found")
    for name in found:
        layer = modules[name]
        if isinstance(layer, _CONTAINERS):
            raise ValueError(
                f"{name or 'the model'} is a {type(layer).__name__}, which cannot hold adapters beside its content: name "
                "the Transformer layers with layers=[...]"
            )
        if hasattr(layer, "adapters"):
            raise ValueError(f"{name or 'the model'} has an attribute 'adapters' of its own, where adapters would go")
    return [(modules[name], fc2) for name, fc2 in found.items()]


def remove_adapters(model: nn.Module) -> nn.Module:
    """Takes the adapters off, in place. The model's own parameters stay as they are, frozen or not.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: there are none.
    """
    adapter_parameters(model)  # raises where there is nothing to take off
    for module in list(model.modules()):
        if _HANDLE in module.__dict__:
            module.__dict__.pop(_HANDLE).remove()
            del module.adapters
        if _NESTED in module.__dict__:
            module.use_nested_tensor = module.__dict__.pop(_NESTED)
    return model


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of all adapters, in the order of layers and groups.

    Raises:
        ValueError: there are none.
    """
    found = [p for module in model.modules() if isinstance(module, TaskAdapters) for p in module.parameters()]
    if not found:
        raise ValueError(f"{type(model).__name__} has no adapters: call add_adapters(model, groups, bottleneck) first")
    return found


def freeze_all_but_adapters(model: nn.Module) -> nn.Module:
    """Lets only the adapters be trained: all else no longer requires gradients, and those that it had are dropped.

    Modes are left alone, so the dropout of the frozen model is on in training, as it was when the model was made.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: there are no adapters.
    """
    trained = {id(parameter) for parameter in adapter_parameters(model)}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained)
        if id(parameter) not in trained:
            parameter.grad = None  # an optimiser would still follow it
    return model


def _check_groups(groups: Any) -> None:
    if not isinstance(groups, Mapping):
        raise TypeError(f"groups is a {type(groups).__name__}, expected a mapping from task to the name of its group")
    if not groups:
        raise ValueError("groups is empty, expected the name of a group for each task")
    for task, group in groups.items():
        if not isinstance(task, str) or not isinstance(group, str):
            raise TypeError(f"groups has {task!r}: {group!r}, expected the name of a task and that of its group")
        if not task or not group:
            raise ValueError(f"groups has {task!r}: {group!r}, expected names that are not empty")


def _check_size(name: str, size: Any) -> None:
    if isinstance(size, bool) or not isinstance(size, int):
        raise TypeError(f"{name} is {size!r}, expected an int")
    if size < 1:
        raise ValueError(f"{name} is {size}, expected 1 or more")


def _key(group: str) -> str:
    """A group's key in an ``nn.ModuleDict``, which takes no dots and none of its own attributes."""
    key = group.replace("%", "%25").replace(".", "%2E")
    return f"%{ord(key[0]):02X}{key[1:]}" if key in _RESERVED else key

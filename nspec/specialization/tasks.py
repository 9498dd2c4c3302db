"""Switching a specialised model between tasks."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from nspec.nn.batch import TaskBatch
from nspec.nn.recompute import backward_pass
from nspec.nn.state import Around
from nspec.nn.switched import Holder, Switching, TaskSwitched, count_switch, fetches_ahead, traced
from nspec.nn.task_layers import TaskLayer
from nspec.nn.tuned_linear import TunedLayer

from .layers import nearest

_PASSES = 8  # in which no layer is left out each time by chance (LayerDrop)
_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module")  # torch.compile and activation checkpointing of one layer


def specialized_layers(model: nn.Module) -> list[TaskSwitched]:
    """The modules of ``model`` that know tasks, also through wrappers (DistributedDataParallel, torch.compile).

    Raises:
        ValueError: the model is not specialised, or something else stands where a specialised layer was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, expected a torch.nn.Module")
    layers: list[TaskSwitched] = []
    for module in model.modules():
        if isinstance(module, TaskSwitched):
            layers.append(module)
        if isinstance(around := module.__dict__.get("_nspec"), Around):
            _check_places(module, around.places)
    if not layers:
        raise ValueError(
            f"{type(model).__name__} is not specialised: call nspec.specialize(model, masks) or nspec.finetune first"
        )
    return layers


def remember_place(model: nn.Module, name: str) -> None:
    """Notes on the module around a specialised layer that the layer is there."""
    holder, _, attribute = name.rpartition(".")
    Around.of(model.get_submodule(holder)).places[attribute] = name


def _check_places(parent: nn.Module, places: dict[str, str]) -> None:
    for attribute, name in places.items():
        found: Any = getattr(parent, attribute, None)
        while not isinstance(found, TaskSwitched):
            inside: Any = getattr(found, "_modules", {})
            wrapped = next((inside[wrapper] for wrapper in _WRAPPERS if wrapper in inside), None)
            if wrapped is None:
                kind = f"{type(found).__module__}.{type(found).__name__}"
                raise ValueError(
                    f"{name} was specialised, and {kind} stands in its place now (an adapter, a quantised or another "
                    "layer), to which no mask applies: take it out, or merge it into the weights and specialise then. "
                    "Adapters on other layers, such as those of attention, are fine"
                )
            found = wrapped
        if "forward" in found.__dict__ and not calls_its_class(found):
            raise ValueError(
                f"{name} has a forward of its own, put on the module since it was specialised, which may compute the dense "
                "layer: take it off (del layer.forward)"
            )


def calls_its_class(module: Any) -> bool:
    """Whether a ``forward`` on the instance is a hook of accelerate around the one of the class."""
    return getattr(module.__dict__.get("_old_forward"), "__func__", None) is type(module).forward


def set_task(
    model: nn.Module,
    task: str | int | Sequence[str | int | None] | Tensor | None,
    *,
    batch_dim: int | None = None,
    flattened: bool = False,
) -> None:
    """Switches the model to the neurons of ``task``, or of the task of each sentence; None computes the dense model.

    It holds until the next call. Called where a batch is fetched (a collator, a data set) it would come too early, as
    loaders fetch ahead: a pass is an error then where accelerate's loader is seen to, and a worker process switches a copy
    that nobody runs. Put the task into the batch instead (``nspec.task_collator``, ``nspec.TaskTrainerMixin``).

    Args:
        model: specialised.
        task: a name, or its place in ``masks.tasks``; or for batches of several tasks a sequence, tensor or array with
            that of each sentence, in any order, and None for sentences that the dense model computes. A layer's input may
            then have ``n * k`` rows for n sentences, those of a sentence together (beams); another number of rows is an
            error of the pass. Layers whose tokens a router
            chooses (experts) take one task at a time. Numbers that are on a device are waited for.
        batch_dim: with a sequence, the dimension of the layers' input along which sentences lie; 1 for models that keep
            time first. None: each layer's own, where its class or the ``batch_first`` of an attention beside it says it
            (models of Transformers do, XLNet and Mask2Former among them), else 0, and an input that may be time first as
            well is an error (but in compiled code, which is not asked: give it there).
        flattened: with a sequence, whether layers whose input is a matrix ``[tokens, d_in]`` get the tokens of the whole
            batch there, equally many of each sentence, one sentence after another. OPT does, and is known to; else such a
            layer is an error unless it has a row for each sentence, or as many as a layer before it had tokens.

    A model is switched by one thread at a time: after this call any thread may run the model, and only this one may
    switch it, until it sets None or ends.

    Raises:
        ValueError: the model is not specialised or was changed since, has no masks of that task, a number is not that of
            a task, the sequence is empty, or ``batch_dim`` is negative.
        TypeError: the task is no name, number or None, nor a sequence of them.
        RuntimeError: another thread has switched the model.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> model = nspec.specialize(model, nspec.NeuronMasks({"en-de": {"0": torch.arange(8) < 6}}))
        >>> nspec.set_task(model, "en-de")  # until it is set again
        >>> nspec.set_task(model, None)  # the dense model
    """
    layers = specialized_layers(model)
    switch = check_task(task, layers, batch_dim, flattened)
    refuse_other_threads(layers)
    if any(layer.task is not None for layer in layers):
        _tell_uncalled(layers)
    count_switch(layers)
    for layer in layers:
        layer.set_task(switch)
    lasting = Switching(lasting=True, ahead=fetches_ahead())
    for layer in layers:
        if layer._nspec.block is None or layer._nspec.block.lasting:
            layer.hold(None if switch is None else lasting)


def refuse_other_threads(layers: Iterable[TaskSwitched]) -> None:
    """Raises RuntimeError where another thread has switched a layer. What a backward pass computes again may."""
    for layer in layers:
        block = layer._nspec.block
        if block is not None and block.open and block.elsewhere() and backward_pass() < 0:
            way = (
                "let it set None first (nspec.set_task(model, None))"
                if block.lasting
                else "hold a lock around nspec.task"
            )
            raise RuntimeError(
                f"{block.holder} has switched this model to {_shown(layer)}, and {Holder.present()} switches it now: a "
                f"model is switched by one thread at a time; {way}. To serve several tasks at once, run their sentences "
                "in one batch (nspec.task(model, [names])), or give each task a model of its own (nspec.merge(model, name))"
            )


def _shown(layer: TaskSwitched) -> str:
    task = getattr(layer, "task", None)
    return "no task" if task is None else repr(task) if isinstance(task, str) else f"the tasks of {len(task)} sentences"


def check_task(
    task: Any, layers: Sequence[TaskSwitched], batch_dim: int | None = None, flattened: bool = False
) -> str | TaskBatch | None:
    """What layers are switched to: the task as given, or the batch of a sequence. Raises as :func:`set_task` does."""
    if hasattr(task, "tolist"):  # a tensor or an array
        task = task.tolist()
    one = task is None or isinstance(task, (str, bool, int))
    if not one and not isinstance(task, Sequence):
        raise TypeError(
            f"task is {task!r}, expected the name of a task, its number or None, or one of these for each sentence"
        )
    known = layers[0].tasks
    names = [task_name(task, known)] if one else [task_name(each, known, place) for place, each in enumerate(task)]
    numbered = any(not (each is None or isinstance(each, str)) for each in ([task] if one else task))
    if numbered and any(layer.tasks != known for layer in layers):
        raise ValueError("a task is given by its number, and layers of the model count them differently: give its name")
    if not names:
        raise ValueError("the list of tasks is empty, expected the task of each sentence")
    if not one and batch_dim is not None:
        if isinstance(batch_dim, bool) or not isinstance(batch_dim, int):
            raise TypeError(f"batch_dim is {batch_dim!r}, expected a whole number")
        if batch_dim < 0:
            raise ValueError(f"batch_dim is {batch_dim}, expected 0 or more")
    distinct = dict.fromkeys(names)
    if list(distinct) == [None]:
        return None
    for name in distinct:
        for layer in layers:
            if not layer.knows(name):
                raise ValueError(unknown_task(name, layer))
    return names[0] if one else TaskBatch(names, batch_dim, flattened)


def task_name(task: Any, known: Sequence[str], sentence: int | None = None) -> str | None:
    """The name of a task that is given by its name or number, None for the base.

    Args:
        task: what was given. A name is not looked up.
        known: the tasks that numbers stand for.
        sentence: whose task it is, for messages.

    Raises:
        ValueError: a number that no task has.
        TypeError: it is neither a name nor a number nor None.
    """
    task = task.tolist() if hasattr(task, "tolist") else task  # numbers of NumPy and torch
    if task is None or isinstance(task, str):
        return task
    what = "task" if sentence is None else f"the task of sentence {sentence}"
    if isinstance(task, bool) or not isinstance(task, int):
        raise TypeError(f"{what} is {task!r}, expected the name of a task, its number, or None for the base")
    if not 0 <= task < len(known):
        raise ValueError(
            f"{what} is {task}, expected a number from 0 to {len(known) - 1}, the place of a task in masks.tasks, or None "
            "for the base"
        )
    return known[task]


def unknown_task(name: str | None, layer: TaskSwitched) -> str:
    """That a layer does not know a task, in words."""
    if name is None:
        return (
            f"some sentences have the task None, and {type(layer).__name__} layers take either a task for each sentence or "
            "None for the whole batch"
        )
    what = "neurons" if isinstance(layer, TunedLayer) else "masks"
    return f"there are no {what} of task {name!r}; {nearest(name, layer.tasks)}"


@contextlib.contextmanager
def task(
    model: nn.Module,
    name: str | int | Sequence[str | int | None] | Tensor | None,
    *,
    batch_dim: int | None = None,
    flattened: bool = False,
) -> Iterator[None]:
    """Within the block the model is switched to task ``name``; after it, to what it was before.

    A task may be given by its number too, its place in ``masks.tasks``. A sequence or tensor gives the task of each
    sentence of a batch, None where the dense model is meant; see :func:`set_task`. The backward pass may run after the
    block: activation checkpointing computes the forward pass again with the neurons that it used
    (``nspec.checkpoint_contexts`` where one backward pass holds several tasks). Blocks may end in another order than they
    began: the one that began last holds.

    The block belongs to its thread, and to its task of asyncio: another that runs or switches the model meanwhile gets a
    RuntimeError. A server holds a lock around the block, runs the requests of several tasks as one batch, or gives each
    task a model (``nspec.merge``).

    Layers that no pass calls, because code reads their weights instead, are warned of once where a block ends (or
    :func:`set_task` is called again): the first in which their weights have gradients, else the eighth. Code that calls a
    layer and reads its weight as well is not seen, but where mode ``forward`` would multiply the activations of a layer by
    its own weight (tied weights): that is an error where it is not compiled.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> masks = {"en-de": {"0": torch.arange(8) < 6}, "en-fr": {"0": torch.arange(8) > 3}}
        >>> model, batch = nspec.specialize(model, nspec.NeuronMasks(masks)), torch.randn(3, 4)
        >>> with nspec.task(model, "en-de"):  # forward and backward of one task
        ...     model(batch).square().mean().backward()
        >>> with nspec.task(model, ["en-fr", "en-de", None]):  # or the task of each sentence
        ...     model(batch).square().mean().backward()

    Raises:
        ValueError: as in :func:`set_task`.
        TypeError: as in :func:`set_task`.
        RuntimeError: another thread has switched the model.
    """
    layers = specialized_layers(model)
    switch = check_task(name, layers, batch_dim, flattened)
    with _block(layers):
        for layer in layers:
            layer.set_task(switch)
        yield
        if switch is not None:
            _tell_uncalled(layers)


def _tell_uncalled(layers: Sequence[TaskSwitched]) -> None:
    """Warns once of layers that never run: code that reads their weight instead computes the dense layer.

    At once where a weight has a gradient; else after some blocks, as a block may run no model, and a pass may leave layers
    out. Compiled layers do not tell when they run, and a router need not choose each expert.
    """
    known = [layer for layer in layers if isinstance(layer, TaskLayer)]  # those that are specialised still
    if not known:
        return
    shared = known[0]._nspec.shared
    shared.ended += 1
    if shared.missed or shared.traced != traced.calls:
        return
    unrun = [layer for layer in known if not (layer._nspec.routed or _has_run(layer))]
    trained = [layer for layer in unrun if _gradient(layer) is not None]
    missed = unrun if shared.ended >= _PASSES else trained
    if missed:
        shared.missed = True
        how = ", though weights of theirs have gradients" if trained else ""
        warnings.warn(
            f"{len(missed)} of {len(known)} specialised layers were never called in {shared.ended} nspec.task blocks"
            f"{how}; the first is {missed[0].qualified_name}. If the model has run, its code reads their weights "
            "without calling them, as in F.linear(x, fc1.weight), and computes and trains the dense layer: call the layer "
            "there, fc1(x). This is said once",
            stacklevel=4,
        )


def _gradient(layer: TaskLayer) -> Tensor | None:
    weight = layer._parameters.get("weight")
    return None if weight is None else weight.grad


def _has_run(layer: TaskLayer) -> bool:
    return layer.qualified_name in layer._nspec.shared.called


@contextlib.contextmanager
def task_by_layer(model: nn.Module, task_of: Callable[[str], str | None]) -> Iterator[None]:
    """Within the block each layer is switched to a task of its own; after it, to what it was before.

    So a model can compute with the encoder's neurons of one task and the decoder's of another.

    Args:
        model: specialised.
        task_of: gives the task of a layer, or None for the dense one, by the layer's qualified name in ``model``.

    Raises:
        ValueError: the model is not specialised, or a layer does not know its task; nothing is switched then.
        RuntimeError: another thread has switched the model.
    """
    specialized_layers(model)  # raises where there are none
    layers = {name: module for name, module in model.named_modules() if isinstance(module, TaskSwitched)}
    tasks = {name: check_task(task_of(name), [layer]) for name, layer in layers.items()}
    with _block(layers.values()):
        for name, layer in layers.items():
            layer.set_task(tasks[name])
        yield


@contextlib.contextmanager
def _block(layers: Iterable[TaskSwitched]) -> Iterator[None]:
    refuse_other_threads(layers)
    block = Switching(lasting=False)
    block.enter(layers)
    try:
        yield
    finally:
        block.leave()


def checkpoint_contexts(model: nn.Module) -> Callable[[], tuple[Any, Any]]:
    """A ``context_fn`` for ``torch.utils.checkpoint``: what is computed again uses the task of its forward pass.

    Needed where one backward pass holds forward passes of several tasks under the same layers, and where layers are
    compiled inside a checkpoint; elsewhere the layers find the task by themselves. Without reentrance only.

    Example:
        >>> model = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1))
        >>> model = nspec.specialize(model, nspec.NeuronMasks({"a": {"0": torch.tensor([True, False])}}))
        >>> options = {"use_reentrant": False, "context_fn": nspec.checkpoint_contexts(model)}
        >>> with nspec.task(model, "a"):
        ...     y = torch.utils.checkpoint.checkpoint(model, torch.ones(1, 1), **options)
        >>> y.sum().backward()

    Raises:
        ValueError: the model is not specialised.
    """
    layers = specialized_layers(model)

    def contexts() -> tuple[Any, Any]:
        return contextlib.nullcontext(), _switched(layers, [layer.switched_to() for layer in layers])

    return contexts


@contextlib.contextmanager
def _switched(layers: list[TaskSwitched], states: list[Any]) -> Iterator[None]:
    before = [layer.switched_to() for layer in layers]
    for layer, state in zip(layers, states):
        layer.switch(state._replace(set_in=backward_pass()))
    try:
        yield
    finally:
        for layer, state in zip(layers, before):
            layer.switch(state)

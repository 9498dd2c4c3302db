"""What masked neurons give, the same for every token: found by running each block's own code once."""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nspec.nn.ffn import CompactLayer
from nspec.specialization.feed_forward import FeedForward
from nspec.specialization.naming import check_no_adapter
from nspec.specialization.tasks import task as switched_to


class _Reached(BaseException):
    """fc2 got its activations: nothing of what follows is needed. No Exception, which a model's code may catch."""


def blocks_of(model: nn.Module) -> dict[str, FeedForward]:
    """The specialised blocks of a model in mode ``forward``, by the present name of fc1.

    Raises:
        ValueError: fc2 or the module around the block is not where it was, or fc2 carries an adapter.
    """
    every = dict(model.named_modules(remove_duplicate=False))
    blocks: dict[str, FeedForward] = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, CompactLayer) or layer._nspec.beside is None:
            continue
        parent, up, fc2 = (
            None if part is None else _now(part, layer.qualified_name, name) for part in layer._nspec.beside
        )
        check_no_adapter(str(fc2), every.get(str(fc2)))
        for part in (parent, up, fc2):
            if part is not None and part not in every:
                raise ValueError(
                    f"{name} was specialised with {part} beside it, which is not in the model (any more): merge the whole "
                    "model as it was specialised"
                )
        assert parent is not None
        assert fc2 is not None
        other = None if up is None else every[up]
        blocks[name] = FeedForward(name, every[parent], layer, every[fc2], other, layer._nspec.doubled)
    known = {id(layer) for block in blocks.values() for layer in (block.fc1, block.up)}
    for name, layer in model.named_modules():
        if isinstance(layer, CompactLayer) and id(layer) not in known:
            raise ValueError(
                f"{name} is a specialised layer without its block (the model was pickled by an earlier version, or is a "
                "part of another): despecialise the whole model and specialise it again"
            )
    return blocks


def _now(other: str, then: str, now: str) -> str:
    """The present name of the module ``other``, where the layer that was called ``then`` is called ``now``."""
    others, path = other.split(".") if other else [], then.split(".")
    common = 0
    while common < min(len(others), len(path)) and others[common] == path[common]:
        common += 1
    here = now.split(".")
    return ".".join([*here[: max(0, len(here) - len(path) + common)], *others[common:]])


class Constants:
    """Finds the constants of the blocks of a model.

    The layer's own code is run under the task, so that whatever it computes between fc1 and fc2 is in them, and what is
    not elementwise is the error that it always is.

    Args:
        model: specialised in mode ``forward``; a copy that nobody else runs.
        blocks: its blocks.
        task: the task.
    """

    def __init__(self, model: nn.Module, blocks: Mapping[str, FeedForward], task: str) -> None:
        self._model, self._blocks, self._task = model, blocks, task
        self._found: dict[str, Tensor | float] = {}
        self._alone: str | None = None

    def found(self, batch: Any = None) -> dict[str, Tensor | float]:
        """The constant of each neuron, ``[d_ff]``, or one number for all of a block.

        Args:
            batch: what the model is run on, for blocks that cannot be run on their own.

        Raises:
            ValueError: a weight is sharded or elsewhere; code between fc1 and fc2 is not elementwise, or could not be run.
        """
        if not self._blocks:
            return {}
        for block in self._blocks.values():
            _check_here(block)
        problems: dict[str, Exception] = {}
        with self._running():
            for name, block in self._blocks.items():
                problems[name] = self._run_alone(block)
            if batch is not None and self._missing():
                self._model(**batch) if isinstance(batch, Mapping) else self._model(batch)
            elif self._missing():
                self._run_examples()
        for name in self._missing():
            why = str(problems[name]).splitlines()[0] if str(problems[name]) else type(problems[name]).__name__
            raise ValueError(
                f"{name}: what its masked neurons give is not known, as its block does not run on its own ({why}): "
                f"give {'another' if batch is not None else 'a'} batch of the model, which runs this block: "
                "nspec.merge(model, task, compact=True, batch=batch)"
            )
        return self._found

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        """Within the block passes are those of the task, in eval mode, and each block says what fc2 gets."""
        layers = [layer for block in self._blocks.values() for layer in (block.fc1, block.up) if layer is not None]
        training = [module for module in self._model.modules() if module.training]
        device = str(layers[0].weight.device.type)
        try:
            for block in self._blocks.values():
                for layer in (block.fc1, block.up):
                    if layer is not None:
                        layer.__dict__["block"] = self._taker(block, layer)
            for module in training:
                module.training = False
            with (
                switched_to(self._model, self._task),
                torch.no_grad(),
                torch.autocast(device, enabled=False),
                torch.compiler.set_stance("force_eager")
                if "torch._dynamo" in sys.modules
                else contextlib.nullcontext(),
            ):
                yield
        finally:
            for layer in layers:
                layer.__dict__.pop("block", None)
            for module in training:
                module.training = True

    def _taker(self, block: FeedForward, layer: Any) -> Callable[..., Tensor]:
        def take(h: Any, weight: Tensor, bias: Tensor | None) -> Tensor:
            own: Any = block.fc2.weight
            if weight.data_ptr() != own.data_ptr():
                raise ValueError(
                    f"{block.name}: its activations are multiplied by another weight than that of its fc2, and dropping "
                    "neurons would not fit there: leave the block out of the masks"
                )
            h.compute()
            self._found[block.name] = h.constant.detach().clone() if isinstance(h.constant, Tensor) else h.constant
            if self._alone == block.name:
                raise _Reached
            y: Tensor = type(layer).block(layer, h, weight, bias)
            return y

        return take

    def _run_alone(self, block: FeedForward) -> Exception:
        """Runs the code around a block on a few numbers, up to fc2. Gives what went wrong last."""
        problem: Exception = RuntimeError("its code does not reach fc2")
        weight: Any = block.fc1.weight
        d_in = weight.shape[0] if getattr(block.fc1, "transposed", False) else weight.shape[1]
        g = torch.Generator().manual_seed(0)
        x = torch.randn(1, 2, d_in, generator=g).to(weight.device, weight.dtype)
        self._alone = block.name
        try:
            for given in (x, x[0]):
                for fill in (None, given):
                    try:
                        _call(block, given, fill)
                    except _Reached:
                        return problem
                    except Exception as error:
                        if _is_ours(error, block):
                            raise
                        problem = error
        finally:
            self._alone = None
        return problem

    def _missing(self) -> list[str]:
        return [name for name in self._blocks if name not in self._found]

    def _run_examples(self) -> None:
        """Runs the models of Transformers that read token ids on some; what they cannot run stays missing."""
        for _, model in pretrained_within(self._model):
            embedding = getattr(model.get_input_embeddings(), "weight", None)
            if getattr(model, "main_input_name", "") != "input_ids" or embedding is None:
                continue
            ids = (torch.arange(4, device=embedding.device) + 3)[None] % embedding.shape[0]
            given = {"input_ids": ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})}
            try:
                model(**given)
            except Exception as error:
                if any(_is_ours(error, block) for block in self._blocks.values()):
                    raise


def pretrained_within(model: nn.Module) -> list[tuple[str, Any]]:
    """The models of Transformers in a module, or itself, with their names; not those within others."""
    found: list[tuple[str, Any]] = []
    for name, module in model.named_modules():
        if is_pretrained(module) and not any(not outer or name.startswith(f"{outer}.") for outer, _ in found):
            found.append((name, module))
    return found


def is_pretrained(module: nn.Module) -> bool:
    """Whether it is a model of Transformers, which is not loaded to find that out."""
    library: Any = sys.modules.get("transformers.modeling_utils")
    return library is not None and isinstance(module, library.PreTrainedModel)


def _call(block: FeedForward, x: Tensor, fill: Any) -> None:
    """Runs the module around a block on ``x``, whatever else it wants being ``fill``."""
    if isinstance(block.parent, nn.Sequential):
        children = list(block.parent)
        if block.fc1 in children and block.fc2 in children:
            for child in children[children.index(block.fc1) : children.index(block.fc2) + 1]:
                x = child(x)
            return
    args, kwargs = [x], {}
    kinds = inspect.Parameter
    for parameter in [*inspect.signature(block.parent.forward).parameters.values()][1:]:
        if parameter.default is not kinds.empty or parameter.kind in (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD):
            continue
        if parameter.kind is kinds.KEYWORD_ONLY:
            kwargs[parameter.name] = fill
        else:
            args.append(fill)
    block.parent(*args, **kwargs)


def _is_ours(error: Exception, block: FeedForward) -> bool:
    """Whether it is about the block, and not about how it was called."""
    return isinstance(error, ValueError) and str(error).startswith(
        tuple(f"{layer.qualified_name}: " for layer in (block.fc1, block.up) if isinstance(layer, CompactLayer))
        + (f"{block.name}: ",)
    )


def _check_here(block: FeedForward) -> None:
    for layer in (block.fc1, block.up, block.fc2):
        weight: Any = None if layer is None else layer.weight
        if weight is not None and (weight.is_meta or hasattr(weight, "placements")):
            where = "elsewhere (meta)" if weight.is_meta else "sharded"
            raise ValueError(
                f"a weight of the block of {block.name} is {where}, and neurons cannot be dropped from it: load the whole "
                "model on one device, specialise it there, and merge"
            )

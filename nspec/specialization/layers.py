"""Finds the feed-forward blocks of a model, by structure and by name, and what a block says of itself."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .candidates import what_there_is
from .feed_forward import FeedForward, features, is_linear, is_transposed
from .naming import Layer, check_no_adapter, chosen
from .patterns import nearest as nearest
from .quantised import PACKS

# Attribute names of the linear layers of a block, as they are found in the field. A first layer of twice the width of the
# second's input computes gate and up behind one another.
PLAIN_NAMES = (
    ("fc1", "fc2"),  # fairseq, M2M100, NLLB, mBART, BART, Marian, OPT, Whisper, Phi
    ("linear1", "linear2"),  # torch.nn.TransformerEncoderLayer
    ("wi", "wo"),  # T5, Switch Transformers
    ("w_1", "w_2"),  # OpenNMT, The Annotated Transformer
    ("w1", "w2"),
    ("lin1", "lin2"),  # DistilBERT, XLM
    ("c_fc", "c_proj"),  # GPT-2, nanoGPT and its kin, Starcoder2
    ("up_proj", "down_proj"),  # Nemotron, Arcee, MPT
    ("dense_h_to_4h", "dense_4h_to_h"),  # GPT-NeoX, BLOOM, Falcon, Persimmon; fused in ChatGLM
    ("intermediate.dense", "output.dense"),  # BERT, RoBERTa, XLM-R, DeBERTa, ESM, ViT, MobileBERT
    ("intermediate", "output"),  # ProphetNet
    ("intermediate_dense", "output_dense"),  # wav2vec 2.0
    ("fc_in", "fc_out"),  # GPT-J, CodeGen
    ("linear_fc1", "linear_fc2"),  # Megatron, Qwen's vision encoders
    ("ffn", "ffn_output"),  # ALBERT
)
FUSED_NAMES = (
    ("gate_up_proj", "down_proj"),  # Phi-3, GLM
    ("Wi", "Wo"),  # ModernBERT
    ("gated_layers", "wo"),  # Jina BERT
    ("weights_in", "weights_out"),  # DINOv2
    ("w12", "w3"),  # DINOv2, xFormers
    ("input_linear", "output_linear"),  # Granite 4.0
)
GATED_NAMES = (  # gate, up, down
    ("gate_proj", "up_proj", "down_proj"),  # Llama, Mistral, Qwen, Gemma, OLMo
    ("wi_0", "wi_1", "wo"),  # T5 1.1, mT5, umT5, MADLAD-400
    ("w1", "w3", "w2"),  # Llama as released, Mixtral, torchtune
    ("w_1", "w_3", "w_2"),  # OpenNMT
    ("gate_proj", "inner_proj", "output_proj"),  # fairseq2
    ("w2", "w1", "c_proj"),  # Qwen as released
    ("fc1_g", "fc1_x", "fc2"),  # timm
    ("fc12", "fc11", "fc2"),  # Nomic BERT
)
_ACTIVATIONS = (
    *("activation_fn", "activation", "act_fn", "act", "activation_function", "activation_func", "intermediate_act_fn"),
    *("gelu_impl", "activation_func_impl", "ffn_act"),
)
_ROUTERS = ("router", "gate", "gating", "gate_network", "wg", "switch")
# Layers that keep time first, and do not say so themselves, by module and class.
_TIME_FIRST = (
    *("transformers.models.fsmt.", "transformers.models.xlnet.", "fairseq.modules."),
    "transformers.models.mask2former.modeling_mask2former.Mask2FormerMaskedAttentionDecoderLayer",
    "transformers.models.oneformer.modeling_oneformer.OneFormerTransformerDecoder",
    "transformers.models.bridgetower.modeling_bridgetower.BridgeTowerResidualAttention",
)
_BATCH_FIRST = "transformers.models."  # all others there
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_MIXING = (nn.Softmax, nn.Softmin, nn.Softmax2d, nn.LogSoftmax, nn.GLU, nn.MultiheadAttention)  # or of another width


def find_blocks(model: nn.Module, layers: Iterable[Layer] | None = None) -> list[FeedForward]:
    """The feed-forward blocks of ``model``, in the order of its modules.

    Args:
        model: any module.
        layers: the blocks to take: names of fc1 (of a gated block its gate projection); or tuples of names (fc1, fc2), or
            (gate, up, down), for linear layers with attribute names that are not known. Names may be patterns with ``*``,
            ``?`` and ``[...]``, as in :func:`nspec.specialization.patterns.matching`: ``"encoder"``, ``"*.fc1"``. In a
            tuple the names of a block are those whose wildcards stand for the same text:
            ``("*.intermediate.dense", "*.output.dense")``. None: all blocks whose linear layers (``nn.Linear`` and its
            subclasses, ``Conv1D`` of Transformers) have names in ``PLAIN_NAMES``, ``FUSED_NAMES`` or ``GATED_NAMES``, and
            ``nn.Sequential`` runs of Linear, an elementwise activation, (Dropout,) Linear; of those blocks the ones that
            give back the width that they get, as classifiers do not. A block that is in several places is taken once, by
            its first name.

    Raises:
        ValueError: nothing was found (the message lists layers that may be meant), a name that is not there,
            layers that do not fit together, one with an adapter, or a weight that is shared with another module.
        TypeError: ``layers`` is one text, or has something else than names and tuples of two or three.

    Example:
        >>> model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), num_layers=2)
        >>> [block.name for block in find_blocks(model)]
        ['layers.0.linear1', 'layers.1.linear1']
        >>> [block.name for block in find_blocks(model, ["layers.1"])]
        ['layers.1.linear1']
    """
    structural = list(_by_structure(model, every=layers is None))
    found = structural if layers is None else chosen(dict(model.named_modules()), structural, layers)
    if not found:
        names = ", ".join("/".join(names) for names in (*PLAIN_NAMES[:4], *FUSED_NAMES[:1], *GATED_NAMES[:3]))
        raise ValueError(
            f"no feed-forward block found in {type(model).__name__}: looked for linear layers named {names} and the like "
            "in one module, and for Linear-activation-Linear sequences, that give back the width they get. "
            f"{what_there_is(model)}"
        )
    _check_not_shared(model, found)
    return found


def _by_structure(model: nn.Module, every: bool) -> Iterator[FeedForward]:
    """The blocks there are; one with an adapter is an error if all are wanted, and else is none."""
    taken: set[int] = set()
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        for block in (*_by_names(prefix, module, every), *_in_sequence(prefix, module)):
            if id(block.fc1) not in taken:
                taken.add(id(block.fc1))
                yield block


def _by_names(prefix: str, module: nn.Module, every: bool) -> Iterator[FeedForward]:
    seen: set[int] = set()
    for names in (*GATED_NAMES, *FUSED_NAMES, *PLAIN_NAMES):
        parts = [_child(module, name) for name in names]
        if any(part is None for part in parts) or any(id(part) in seen for part in parts):
            continue
        for name, part in zip(names, parts) if every else ():
            check_no_adapter(prefix + name, part)
        fc1, *ups, fc2 = [part for part in parts if part is not None]
        if not all(map(is_linear, (fc1, *ups, fc2))):
            if ups:  # gated all the same: no two of them are a plain block
                seen.update(map(id, parts))
            continue
        (d_in, width), (d_ff, d_out) = features(fc1), features(fc2)
        fused = not ups and width == 2 * d_ff
        if d_out != d_in or (width != d_ff and not fused) or any(features(up) != (d_in, width) for up in ups):
            continue
        holder = _child(module, names[0].rpartition(".")[0]) if "." in names[0] else module
        beside = [child for child in holder.children() if child is not fc1 and child is not fc2] if holder else []
        if not ups and not fused and any(is_linear(child) and features(child) == (d_in, width) for child in beside):
            continue  # which may be multiplied: gated in a way that is not known
        seen.update(map(id, (fc1, *ups, fc2)))
        yield FeedForward(prefix + names[0], module, fc1, fc2, ups[0] if ups else None, fused)


def _child(module: nn.Module, name: str) -> nn.Module | None:
    found: nn.Module | None = module
    for part in name.split("."):
        found = None if found is None else found._modules.get(part)
    return found


def _in_sequence(prefix: str, module: nn.Module) -> Iterator[FeedForward]:
    if not isinstance(module, nn.Sequential):
        return
    children = [(n, m) for n, m in module.named_children() if not isinstance(m, (*_DROPOUTS, nn.Identity))]
    for (name, fc1), (_, act), (_, fc2) in zip(children, children[1:], children[2:]):
        if is_linear(fc1) and is_linear(fc2) and features(fc1) == features(fc2)[::-1] and _is_elementwise(act):
            yield FeedForward(prefix + name, module, fc1, fc2)


def _is_elementwise(module: nn.Module) -> bool:
    """Whether it is an activation: known as one, or without parameters and the same function of each number."""
    if isinstance(module, _MIXING) or is_linear(module):
        return False
    if type(module).__module__ in ("torch.nn.modules.activation", "transformers.activations"):
        return True
    if [*module.parameters(), *module.buffers(), *module.children()]:
        return False
    x, order = torch.linspace(-2, 2, 12).view(2, 6), torch.tensor([3, 0, 5, 1, 4, 2])
    with torch.no_grad():
        try:
            with torch.random.fork_rng(devices=[]):
                whole, turned = module.forward(x.clone()), module.forward(x.flip(0)[:, order])
        except Exception:  # of a module that takes something else
            return False
    fits = isinstance(whole, Tensor) and isinstance(turned, Tensor) and whole.shape == turned.shape == x.shape
    return fits and torch.equal(whole.flip(0)[:, order], turned) and not torch.equal(whole, x)


def _check_not_shared(model: nn.Module, blocks: Sequence[FeedForward]) -> None:
    """Raises ValueError where a projection is part of something else too; a whole block may be in several places."""
    everywhere = dict(model.named_modules(remove_duplicate=False))
    mine = {id(layer): block for block in blocks for layer in (block.fc1, block.up) if layer is not None}
    weights = {id(layer.weight) for block in blocks for layer in (block.fc1, block.up) if layer is not None}
    seen: dict[int, tuple[str, nn.Module]] = {}
    for name, module in everywhere.items():
        for attribute, parameter in module._parameters.items():
            if id(parameter) not in weights:
                continue
            first, other = seen.setdefault(id(parameter), (name, module))
            block = mine.get(id(module))
            if first != name and (
                other is not module or block is None or not is_within(name, block.parent, everywhere)
            ):
                raise ValueError(
                    f"{name}.{attribute} and {first}.{attribute} are one parameter: a projection whose rows are masked "
                    "cannot be shared (a whole block can: put the module that holds fc1 and fc2 in both places)"
                )


def is_within(name: str, parent: nn.Module, modules: Mapping[str, nn.Module]) -> bool:
    """Whether the module of a name is inside of another by that name; ``modules`` are all, by each of their names."""
    parts = name.split(".")
    return any(modules[".".join(parts[:end])] is parent for end in range(len(parts)))


def computes_linear(module: nn.Module) -> str | None:
    """Why a layer cannot be taken for ``nn.Linear`` or ``Conv1D`` by its weight and bias; None where it can.

    A subclass, or a ``forward`` that was put on the instance, may have no parameters and buffers beyond these. It is run on
    random numbers (matrices, batches and large ones) and compared, as in training and in evaluation. What cannot be run
    here (weights that are elsewhere) is believed.
    """
    if hasattr(module, "parametrizations"):
        return (
            "its weight is parametrised: make it permanent first (torch.nn.utils.parametrize.remove_parametrizations)"
        )
    own = type(module).forward is not nn.Linear.forward and type(module).__name__ != "Conv1D"
    if not own and "forward" not in vars(module):
        return None
    d_in, width = features(module)
    weight: Any = module.weight
    bias: Any = module.bias
    if not weight.is_floating_point():
        return f"its weight is {weight.dtype}, expected floating point (not quantised)"
    if more := _beyond_weight_and_bias(module):
        return f"it has {', '.join(more)} beside weight and bias: merge them into the weight first"
    if weight.is_meta or not weight.numel():
        return None
    matrix = weight.t() if is_transposed(module) else weight
    if list(matrix.shape) != [width, d_in]:
        return f"its weight has shape {list(weight.shape)}, expected {[width, d_in]}"
    generator = torch.Generator().manual_seed(0)
    large = 1e6 if torch.finfo(weight.dtype).max > 1e30 else 16.0  # 16-bit floats overflow
    inputs = [torch.randn(3, d_in, generator=generator), torch.randn(2, 3, d_in, generator=generator)]
    inputs = [x.to(weight.device, weight.dtype) for x in (*inputs, large * inputs[0])]
    exact = torch.promote_types(weight.dtype, torch.float32)
    training = module.training
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[weight.device] if weight.is_cuda else []):
            matrix, bias = matrix.to(exact), None if bias is None else bias.to(exact)
            for x in inputs:
                want = nn.functional.linear(x.to(exact), matrix, bias)
                most = float(want.abs().max()) * min(0.04, 8 * torch.finfo(weight.dtype).eps * d_in**0.5)  # by rounding
                for mode in (True, False):
                    got = module.train(mode).forward(x)
                    if not isinstance(got, Tensor) or got.shape != want.shape:
                        return "its output has another shape than that of nn.Linear"
                    if not (off := float((got.to(exact) - want).abs().max())) <= most:
                        return f"it computes something else than nn.Linear with its weight and bias (off by {off:.2g})"
    except (RuntimeError, TypeError, ValueError) as error:
        return f"it does not run on a tensor of {d_in} numbers ({str(error).splitlines()[0]})"
    finally:
        module.train(training)
    return None


def _beyond_weight_and_bias(module: nn.Module) -> list[str]:
    """The parameters and buffers that a layer has more, but for those that weight and bias are made of by a hook."""
    names = [name for name, _ in (*module.named_parameters(), *module.named_buffers())]
    made = tuple(f"{name}_" for name in ("weight", "bias") if name not in module._parameters)
    return [name for name in names if name not in ("weight", "bias") and not (made and name.startswith(made))]


def activation_of(block: FeedForward) -> Any:
    """What the module of a block says that its activation is: a function, a module or a name; None where nothing does."""
    if isinstance(block.parent, nn.Sequential):
        children = [m for m in block.parent.children() if not isinstance(m, (*_DROPOUTS, nn.Identity))]
        at = next((i for i, child in enumerate(children) if child is block.fc1), None)
        return None if at is None else children[at + 1]
    around = [m for m in block.parent.children() if any(child is block.fc1 for child in m.children())]
    for holder in (block.parent, *around):
        for attribute in _ACTIVATIONS:
            if (activation := getattr(holder, attribute, None)) is not None:
                return activation
    return None


def activation_dropouts(block: FeedForward) -> list[tuple[Any, str, str]]:
    """The dropouts that are known to lie between fc1 and fc2: the module and attribute with the rate, and a name to show.

    A layer may have others, which its first training pass finds.
    """
    names = ["activation_dropout", "activation_dropout_module", "relu_dropout", "relu_dropout_module"]
    names += ["intermediate_dropout"]  # wav2vec 2.0 and its kin
    attribute = block.name.rpartition(".")[2]
    if isinstance(block.parent, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)) or attribute == "wi":
        names.append("dropout")
    if attribute == "w_1":
        names.append("dropout_1" if hasattr(block.parent, "dropout_1") else "dropout")
    found: list[tuple[Any, str, str]] = []
    for name in names:
        value = getattr(block.parent, name, None)
        if isinstance(value, nn.Module) and isinstance(getattr(value, "p", None), (int, float)):
            found.append((value, "p", f"the rate of {name}"))
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found.append((block.parent, name, name))
    if isinstance(block.parent, nn.Sequential):
        children = list(block.parent.children())
        if block.fc1 in children and block.fc2 in children:
            between = children[children.index(block.fc1) : children.index(block.fc2)]
            found += [(m, "p", f"the rate of {type(m).__name__}") for m in between if isinstance(m, _DROPOUTS)]
    return found


def is_relu(activation: Any) -> bool:
    """Whether an activation is ReLU, by its name, class or function."""
    if isinstance(activation, str):
        return activation == "relu"
    if isinstance(activation, nn.Module):
        return isinstance(activation, nn.ReLU)
    return activation in (nn.functional.relu, torch.relu, torch.relu_, nn.functional.relu_)


def fast_paths(model: nn.Module, blocks: Sequence[FeedForward]) -> list[tuple[nn.Module, str, Any]]:
    """What keeps ``nn.TransformerEncoder`` from its fused inference path, which would not call fc1 and fc2.

    Modules, each with an attribute and the value that does it; nested tensors are of that path too. And what keeps 4-bit
    weights from being packed for inference, for good.
    """
    parents = {id(block.parent) for block in blocks if isinstance(block.parent, nn.TransformerEncoderLayer)}
    found: list[tuple[nn.Module, str, Any]] = []
    for module in model.modules():
        if id(module) in parents:
            found.append((module, "activation_relu_or_gelu", 0))
        if isinstance(module, nn.TransformerEncoder) and any(id(layer) in parents for layer in module.layers):
            found.append((module, "use_nested_tensor", False))
        if module.__dict__.get(PACKS):
            found.append((module, PACKS, False))
    return found


@contextlib.contextmanager
def without_fast_path(model: nn.Module, blocks: Sequence[FeedForward]) -> Iterator[None]:
    """Within the block ``nn.TransformerEncoder`` calls fc1 and fc2 in every pass."""
    changed = [(module, name, getattr(module, name), value) for module, name, value in fast_paths(model, blocks)]
    for module, name, _, value in changed:
        setattr(module, name, value)
    try:
        yield
    finally:
        for module, name, before, _ in changed:
            setattr(module, name, before)


def batch_dim_of(model: nn.Module, block: FeedForward) -> int | None:
    """The dimension of sentences in the layer's input, where that is known; None elsewhere.

    It is by the class of the module that computes the block or of the one around that, or where an attention beside the
    block says so (``batch_first``).
    """
    holder = model.get_submodule(block.name.rpartition(".")[0])
    path = next((name for name, module in model.named_modules() if module is block.parent), "")
    around = [holder, block.parent, *([model.get_submodule(path.rpartition(".")[0])] if path else [])]
    kinds = [f"{type(module).__module__}.{type(module).__qualname__}" for module in around]
    if any(kind.startswith(_TIME_FIRST) for kind in kinds):
        return 1
    for module in around:
        said = {child.batch_first for child in module.children() if isinstance(child, nn.MultiheadAttention)}
        if len(said) == 1:
            return 0 if said.pop() else 1
    return 0 if any(kind.startswith(_BATCH_FIRST) for kind in kinds) else None


def flattens(block: FeedForward) -> bool:
    """Whether the layer is one of a model that is known to flatten a batch ``[sentences, length, d]`` to tokens."""
    return type(block.parent).__name__ in ("OPTDecoderLayer",)


def is_routed(model: nn.Module, name: str) -> bool:
    """Whether a router chooses the tokens of the layer of that name: it is an expert, or one of several beside a router."""
    return routed_within(model, name) is not None


def routed_within(model: nn.Module, name: str) -> nn.Module | None:
    """The module that holds the experts of which the layer of that name is one; None where no router chooses its tokens.

    Shared experts get all of them.
    """
    parts = name.split(".")
    for place, part in enumerate(parts):
        if "expert" in part.lower() and "shared" not in part.lower():
            return model.get_submodule(".".join(parts[:place]))
    for end in range(1, len(parts)):
        holder, items = model.get_submodule(".".join(parts[: end - 1])), model.get_submodule(".".join(parts[:end]))
        if isinstance(items, (nn.ModuleList, nn.ModuleDict)) and len(items) > 1:
            routers = (getattr(holder, router, None) for router in _ROUTERS)
            if any(isinstance(router, nn.Linear) and router.out_features == len(items) for router in routers):
                return holder
    return None

"""With padding excluded, counts are those of the sentences one by one, whatever the model and its batches look like."""

from __future__ import annotations

import warnings
from collections import namedtuple
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from models import m2m100
from torch import Tensor, nn

import nspec
from nspec.specialization.layers import find_blocks

SOURCE, TARGET = torch.tensor([8, 5, 7, 3]), torch.tensor([3, 7, 5, 8])
SQUARE = torch.tensor([8, 5, 7, 3, 1, 6, 2, 4])  # 8 sentences of at most 8 tokens


def one_by_one(model: nn.Module, sentences: list[dict[str, Any]]) -> dict[str, Tensor]:
    """The definition, by hooks of its own: what fc2 gets above 0, of sentences without padding."""
    counts = {pair.name: torch.zeros(pair.d_ff, dtype=torch.int64) for pair in find_blocks(model)}

    def hook(name: str) -> Any:
        def count(_: nn.Module, args: tuple[Tensor]) -> None:
            counts[name] += (args[0] > 0).flatten(0, -2).sum(0)

        return count

    hooks = [pair.fc2.register_forward_pre_hook(hook(pair.name)) for pair in find_blocks(model)]
    model.eval()  # with gradients: torch.nn's fused path would not call fc2
    for sentence in sentences:
        model(**sentence)
    for handle in hooks:
        handle.remove()
    return counts


def same(counts: nspec.ActivationCounts, want: dict[str, Tensor], prefix: str = "") -> None:
    assert counts.layers == [prefix + layer for layer in want]
    for layer, count in want.items():
        assert torch.equal(counts["t"][prefix + layer], count), layer
        assert int(count.sum()) > 0


def lively(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model.double()


def padding(lengths: Tensor, width: int = 8) -> Tensor:
    return torch.arange(width) >= lengths[:, None]


def text(source: Tensor = SOURCE, target: Tensor = TARGET) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """A batch of Transformers, source and target padded to one length; and its sentences without padding."""
    g = torch.Generator().manual_seed(3)
    ids, labels = (torch.randint(4, 90, (len(source), 8), generator=g) for _ in range(2))
    whole = {
        "input_ids": ids.masked_fill(padding(source), 1),
        "attention_mask": (~padding(source)).long(),
        "decoder_input_ids": labels.masked_fill(padding(target), 1),
        "decoder_attention_mask": (~padding(target)).long(),
    }
    length = {"input_ids": source, "attention_mask": source}
    apart = [{k: v[i : i + 1, : int(length.get(k, target)[i])] for k, v in whole.items()} for i in range(len(source))]
    return whole, apart


def fsmt() -> nn.Module:
    """Keeps time first in its layers, behind inputs with the batch first."""
    from transformers import FSMTConfig, FSMTForConditionalGeneration

    torch.manual_seed(1)
    options = {
        "src_vocab_size": 90, "tgt_vocab_size": 90, "d_model": 24, "encoder_layers": 1, "decoder_layers": 1,
        "encoder_ffn_dim": 40, "decoder_ffn_dim": 40, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
        "max_position_embeddings": 64, "use_cache": False,
    }  # fmt: skip
    model = FSMTForConditionalGeneration(FSMTConfig(**options))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(8)
    return model


@pytest.mark.parametrize("lengths", [(SOURCE, TARGET), (SQUARE, SQUARE.flip(0))], ids=["rectangle", "square"])
@pytest.mark.parametrize("build", [m2m100, fsmt])
def test_a_seq2seq_of_transformers_batch_or_time_first(build: Any, lengths: tuple[Tensor, Tensor]) -> None:
    model = build()
    whole, apart = text(*lengths)
    same(nspec.profile(model, {"t": [whole]}), one_by_one(model, apart))


class Wrapper(nn.Module):
    """Takes anything and passes it on, as PEFT's models of no task do."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base_model = nn.Module()
        self.base_model.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model.model(*args, **kwargs)


@pytest.mark.parametrize(
    ("wrap", "prefix"),
    [
        (nn.DataParallel, "module."),
        (lambda model: torch.compile(model, backend="eager"), "_orig_mod."),
        (Wrapper, "base_model.model."),
        (lambda model: nn.DataParallel(Wrapper(model)), "module.base_model.model."),
    ],
    ids=["DataParallel", "compiled", "adapted", "both"],
)
def test_encoder_and_decoder_are_told_apart_within_wrappers(wrap: Any, prefix: str) -> None:
    model = m2m100()
    whole, apart = text()
    want = one_by_one(model, apart)
    same(nspec.profile(wrap(model), {"t": [whole]}), want, prefix)
    positional = tuple(whole.values())  # the first arguments of M2M100's forward, in this order
    same(nspec.profile(wrap(model), {"t": [positional]}), want, prefix)


def opt() -> nn.Module:
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 90, "hidden_size": 24, "word_embed_proj_dim": 24, "ffn_dim": 40, "num_hidden_layers": 2}
    return lively(OPTForCausalLM(OPTConfig(**sizes, num_attention_heads=4, max_position_embeddings=64)))


@pytest.mark.parametrize("lengths", [SOURCE, SQUARE], ids=["rectangle", "square"])
def test_rows_that_a_layer_flattened_are_found_again(lengths: Tensor) -> None:
    model = opt()
    whole, apart = text(lengths, lengths)
    keys = ("input_ids", "attention_mask")
    same(
        nspec.profile(model, {"t": [{k: whole[k] for k in keys}]}),
        one_by_one(model, [{k: b[k] for k in keys} for b in apart]),
    )


def torch_batches(
    source: Tensor, target: Tensor, batch_first: bool
) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """For nn.Transformer: source and target of one length, and the sentences by themselves."""
    g = torch.Generator().manual_seed(2)
    x, y = (torch.randn(len(source), 8, 16, generator=g, dtype=torch.float64) for _ in range(2))

    def laid(z: Tensor) -> Tensor:
        return z if batch_first else z.transpose(0, 1)

    def causal(n: int) -> Tensor:
        return torch.ones(n, n, dtype=torch.bool).triu(1)

    whole = {
        "src": laid(x), "tgt": laid(y), "tgt_mask": causal(8), "src_key_padding_mask": padding(source),
        "tgt_key_padding_mask": padding(target), "memory_key_padding_mask": padding(source),
    }  # fmt: skip
    apart = [
        {"src": laid(x[i : i + 1, :n]), "tgt": laid(y[i : i + 1, :m]), "tgt_mask": causal(m)}
        for i, (n, m) in enumerate(zip(source.tolist(), target.tolist()))
    ]
    return whole, apart


@pytest.mark.parametrize("lengths", [(SOURCE, TARGET), (SQUARE, SQUARE.flip(0))], ids=["rectangle", "square"])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.filterwarnings("ignore:.*(nested_tensor|nested tensors|mismatched).*")
def test_torch_transformer_by_keyword_by_position_and_by_float_masks(
    batch_first: bool, lengths: tuple[Tensor, Tensor]
) -> None:
    torch.manual_seed(0)
    model = lively(nn.Transformer(16, 4, 1, 1, 40, dropout=0.1, batch_first=batch_first))
    whole, apart = torch_batches(*lengths, batch_first)
    want = one_by_one(model, apart)
    same(nspec.profile(model, {"t": [whole]}), want)
    order = [
        *("src", "tgt", "src_mask", "tgt_mask", "memory_mask"),
        *("src_key_padding_mask", "tgt_key_padding_mask", "memory_key_padding_mask"),
    ]
    positional = [whole.get(name) for name in order]
    same(nspec.profile(model, {"t": [tuple(positional)]}), want)
    named = namedtuple("Batch", order)(*positional)
    same(nspec.profile(model, {"t": [named]}), want)
    infinite = {
        name: torch.zeros(value.shape, dtype=torch.float64).masked_fill_(value, -torch.inf) if "mask" in name else value
        for name, value in whole.items()
    }
    same(nspec.profile(model, {"t": [infinite]}), want)


def test_the_source_does_not_say_what_is_padding_of_the_target() -> None:
    model = lively(nn.Transformer(16, 4, 1, 1, 40, batch_first=True))
    whole, _ = torch_batches(SOURCE, TARGET, batch_first=True)
    del whole["tgt_key_padding_mask"]
    with pytest.warns(UserWarning, match=r"which positions of decoder.layers.0.linear1 are padding") as warned:
        counts = nspec.profile(model, {"t": [whole, whole]})
    assert sum("padding" in str(w.message) for w in warned) == 1
    everything = nspec.profile(model, {"t": [whole, whole]}, padding="include")
    assert torch.equal(counts["t"]["decoder.layers.0.linear1"], everything["t"]["decoder.layers.0.linear1"])
    assert int(counts["t"]["encoder.layers.0.linear1"].sum()) < int(everything["t"]["encoder.layers.0.linear1"].sum())


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("lengths", [SOURCE, SQUARE], ids=["rectangle", "square"])
def test_torch_encoder_with_padding_and_its_nested_tensors(nested: bool, lengths: Tensor) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 40, dropout=0.1, batch_first=True)
    model = lively(nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested)).eval()
    x = torch.randn(len(lengths), 8, 16, dtype=torch.float64)
    want = one_by_one(model, [{"src": x[i : i + 1, :n]} for i, n in enumerate(lengths.tolist())])
    same(nspec.profile(model, {"t": [{"src": x, "src_key_padding_mask": padding(lengths)}]}), want)
    assert model.use_nested_tensor == nested
    assert all(layer.activation_relu_or_gelu == 1 for layer in model.layers)


class TimeFirst(nn.Module):
    """Layers as in fairseq: [length, batch, width], and a mask [batch, length] of padding."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 40), nn.Linear(40, 6)

    def forward(self, x: Tensor, encoder_padding_mask: Tensor | None = None) -> Tensor:
        return self.fc2(torch.relu(self.fc1(x)))


def fairseq_batches(lengths: Tensor) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    x = torch.randn(8, len(lengths), 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    whole = {"x": x, "encoder_padding_mask": padding(lengths)}
    return whole, [{"x": x[:n, i : i + 1]} for i, n in enumerate(lengths.tolist())]


def test_a_square_batch_is_placed_by_an_earlier_one_and_else_refused() -> None:
    model = lively(TimeFirst())
    first, first_apart = fairseq_batches(SOURCE)
    square, square_apart = fairseq_batches(SQUARE)
    same(nspec.profile(model, {"t": [first, square]}), one_by_one(model, first_apart + square_apart))
    with pytest.raises(ValueError, match=r"fc1: encoder_padding_mask gives a mask of shape \[8, 8\].*give valid="):
        nspec.profile(model, {"t": [square]})
    full, full_apart = fairseq_batches(torch.full((8,), 8))  # nothing is padded: the order does not matter
    same(nspec.profile(model, {"t": [full]}), one_by_one(model, full_apart))
    real = ~padding(SQUARE).t()
    same(nspec.profile(model, {"t": [square]}, valid=lambda layer, batch: real), one_by_one(model, square_apart))


class Flat(TimeFirst):
    def forward(self, x: Tensor, encoder_padding_mask: Tensor | None = None) -> Tensor:
        return super().forward(x.flatten(0, 1))


def test_flattened_rows_of_an_unknown_order_are_refused() -> None:
    whole, _ = fairseq_batches(SOURCE)
    with pytest.raises(ValueError, match=r"fc1: .*shape \[4, 8\], the activations have \[32\].* give valid=$"):
        nspec.profile(Flat().double(), {"t": [whole]})


class OwnIds(nn.Module):
    """An encoder and a decoder of one's own, fed with token ids; no configuration, no mask."""

    def __init__(self, pad: int | None) -> None:
        super().__init__()
        self.tokens = nn.Embedding(50, 6, padding_idx=pad)
        self.encoder, self.decoder = (nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 6)) for _ in range(2))

    def forward(self, src_tokens: Tensor, prev_output_tokens: Tensor) -> Tensor:
        return self.encoder(self.tokens(src_tokens)), self.decoder(self.tokens(prev_output_tokens))


def test_ids_are_padding_where_the_embedding_says_so() -> None:
    ids = {"src_tokens": torch.randint(2, 50, (4, 8)), "prev_output_tokens": torch.randint(2, 50, (4, 8))}
    whole = {name: v.masked_fill(padding(n), 1) for (name, v), n in zip(ids.items(), (SOURCE, TARGET))}
    apart = [{name: v[i : i + 1, : int(n[i])] for (name, v), n in zip(ids.items(), (SOURCE, TARGET))} for i in range(4)]
    model = lively(OwnIds(pad=1))
    same(nspec.profile(model, {"t": [whole]}), one_by_one(model, apart))
    with pytest.warns(UserWarning, match=r"the batch has src_tokens, prev_output_tokens"):
        nspec.profile(OwnIds(pad=None), {"t": [whole]})


def test_a_decoder_that_starts_from_the_padding_id_counts_that_place() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"vocab_size": 90, "d_model": 24, "d_kv": 6, "d_ff": 40, "num_layers": 1, "num_heads": 4}
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).double().eval()
    whole, apart = text()
    for one in (whole, *apart):
        del one["decoder_attention_mask"]
        one["decoder_input_ids"][:, 0] = 0
        one["decoder_input_ids"][one["decoder_input_ids"] == 1] = 0
    same(nspec.profile(model, {"t": [whole]}), one_by_one(model, apart))


def quiet(model: nn.Module, batch: Any, **options: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nspec.profile(model, {"t": [batch]}, **options)


def test_no_warning_where_there_is_nothing_to_warn_of() -> None:
    whole, _ = text()
    quiet(m2m100(), {key: torch.ones_like(v) if "mask" in key else v for key, v in whole.items()})
    quiet(nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 6)), torch.randn(9, 6))
    quiet(TimeFirst(), torch.randn(3, 4, 6), padding="include")
    quiet(TimeFirst(), torch.randn(3, 4, 6), valid=lambda layer, batch: None)
    with pytest.warns(UserWarning, match=r"the batch has x\. Give valid="):
        nspec.profile(TimeFirst(), {"t": [torch.randn(3, 4, 6)]})


class TwoTexts(TimeFirst):
    def forward(self, src: Tensor, tgt: Tensor, src_key_padding_mask: Tensor) -> Tensor:
        return super().forward(src + tgt)


def test_masks_that_cannot_be_read_are_one_clear_error() -> None:
    x = torch.randn(4, 8, 6)
    for mask, message in [
        (torch.ones(4, 7, dtype=torch.bool), r"mask of shape \[4, 7\], the activations have \[8, 4\]"),
        (torch.ones(2, 4, 8), r"has shape \[2, 4, 8\], expected \[batch, length\]"),
        (torch.full((4, 8), -0.5), "values other than 0 and -inf"),
        (torch.full((4, 8), 3), "values other than 0 and 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            nspec.profile(TimeFirst(), {"t": [{"x": x.transpose(0, 1), "encoder_padding_mask": mask}]})
    with pytest.raises(ValueError, match=r"fc1: the batch has a source and a target .*give valid="):
        nspec.profile(TwoTexts(), {"t": [(x, x, padding(SOURCE))]})
    with pytest.raises(ValueError, match=r"fc1: valid gave a mask of shape \[8, 4\], expected .* \[4, 8\]"):
        nspec.profile(TimeFirst(), {"t": [x]}, valid=lambda layer, batch: torch.ones(8, 4, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"fc1: valid gave torch.int64, expected a bool tensor"):
        nspec.profile(TimeFirst(), {"t": [x]}, valid=lambda layer, batch: torch.ones(4, 8, dtype=torch.int64))


def test_batches_that_no_model_takes_are_one_clear_error() -> None:
    model = m2m100()
    whole, _ = text()
    row = {key: value[0].tolist() for key, value in whole.items()}
    arrays = {key: value.numpy() for key, value in whole.items()}
    named = namedtuple("Batch", "input_ids")(whole["input_ids"])
    for batches, message in [
        ([whole], "batches is a list, expected the batches of each task"),
        ({"t": whole}, "batches of task t are one dict, expected a list of batches"),
        ({"t": whole["input_ids"]}, "batches of task t are one Tensor"),
        ({"t": named}, "batches of task t are one Batch"),
        ({"t": "text"}, "batches of task t are one str"),
        ({"t": 3}, "batches of task t are of type int"),
        ({"t": [row]}, "input_ids of a batch is a list, expected a tensor"),
        ({"t": [arrays]}, "input_ids of a batch is a ndarray, expected a tensor"),
        ({"t": [3]}, "a batch of task t is a int"),
    ]:
        with pytest.raises(TypeError, match=message):
            nspec.profile(model, batches)


def lazily(model: nn.Module, batches: list[Any]) -> Iterator[Any]:
    """A generator that uses the model itself, as back-translation does."""
    for batch in batches:
        assert model.training
        assert torch.is_grad_enabled()
        assert "forward" not in vars(model.fc1)
        model(batch)
        nspec.profile(model, {"other": [batch]}, padding="include")
        yield batch


def test_what_the_generator_of_batches_runs_does_not_count() -> None:
    model = TimeFirst().double().train()
    batches = [torch.randn(3, 4, 6, dtype=torch.float64) for _ in range(3)]
    want = one_by_one(model, [{"x": batch} for batch in batches])
    model.train()
    same(nspec.profile(model, {"t": lazily(model, batches)}, padding="include"), want)

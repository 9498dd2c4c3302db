"""A tiny model of each family of Transformers: its class, its configuration, and the names of its blocks' first layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_SEQ2SEQ = {
    "vocab_size": 90, "d_model": 24, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 40, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64,
    "pad_token_id": 1, "dropout": 0.0,
}  # fmt: skip
_STACK = {
    "vocab_size": 90, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 4,
    "pad_token_id": 1,
}  # fmt: skip
_LLAMA = {**_STACK, "num_key_value_heads": 4, "bos_token_id": 2, "eos_token_id": 3}
_T5 = {"vocab_size": 90, "d_model": 24, "d_kv": 6, "d_ff": 40, "num_layers": 1, "num_heads": 4, "pad_token_id": 1}
_GPT = {"vocab_size": 90, "n_embd": 24, "n_layer": 1, "n_head": 4, "bos_token_id": 2, "eos_token_id": 3}
_SWITCH = {**_T5, "num_decoder_layers": 1, "num_experts": 2, "num_sparse_encoder_layers": 1}
_BERT = "encoder.layer.0.intermediate.dense"
_T5_PLACES = ("encoder.block.0.layer.1.{}", "decoder.block.0.layer.2.{}")
_SIDES = ("model.encoder.layers.0.{}", "model.decoder.layers.0.{}")


def _at(places: tuple[str, ...], *names: str) -> list[str]:
    return [place.format(name) for place in places for name in names]


FAMILIES: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "M2M100": ("M2M100ForConditionalGeneration", _SEQ2SEQ, _at(_SIDES, "fc1")),
    "Marian": (
        "MarianMTModel",
        {**_SEQ2SEQ, "activation_function": "swish", "decoder_start_token_id": 1, "bos_token_id": 2},
        _at(_SIDES, "fc1"),
    ),
    "Bart": ("BartForConditionalGeneration", _SEQ2SEQ, _at(_SIDES, "fc1")),
    "NllbMoe": (
        "NllbMoeForConditionalGeneration",
        {**_SEQ2SEQ, "num_experts": 2, "encoder_sparse_step": 1, "decoder_sparse_step": 1},
        _at(_SIDES, "ffn.experts.expert_0.fc1", "ffn.experts.expert_1.fc1"),
    ),
    "T5": ("T5ForConditionalGeneration", _T5, _at(_T5_PLACES, "DenseReluDense.wi")),
    "T5 gated": (
        "T5ForConditionalGeneration",
        {**_T5, "feed_forward_proj": "gated-gelu"},
        _at(_T5_PLACES, "DenseReluDense.wi_0"),
    ),
    "SwitchTransformers": (
        "SwitchTransformersForConditionalGeneration",
        {**_SWITCH, "num_sparse_decoder_layers": 1},
        _at(_T5_PLACES, "mlp.experts.expert_0.wi", "mlp.experts.expert_1.wi"),
    ),
    "ProphetNet": (
        "ProphetNetForConditionalGeneration",
        {
            "vocab_size": 90, "hidden_size": 24, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40, "num_encoder_layers": 1,
            "num_decoder_layers": 1, "num_encoder_attention_heads": 4, "num_decoder_attention_heads": 4,
        },
        [f"prophetnet.{side}.layers.0.feed_forward.intermediate" for side in ("encoder", "decoder")],
    ),
    "Llama": ("LlamaForCausalLM", _LLAMA, ["model.layers.0.mlp.gate_proj"]),
    "Gemma3": ("Gemma3ForCausalLM", {**_LLAMA, "head_dim": 6}, ["model.layers.0.mlp.gate_proj"]),
    "Phi3": ("Phi3ForCausalLM", _LLAMA, ["model.layers.0.mlp.gate_up_proj"]),
    "Glm": ("GlmForCausalLM", {**_LLAMA, "head_dim": 6}, ["model.layers.0.mlp.gate_up_proj"]),
    "ModernBert": (
        "ModernBertModel",
        {**_STACK, "bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3},
        ["layers.0.mlp.Wi"],
    ),
    "Nemotron": ("NemotronForCausalLM", _LLAMA, ["model.layers.0.mlp.up_proj"]),
    "Arcee": ("ArceeForCausalLM", _LLAMA, ["model.layers.0.mlp.up_proj"]),
    "Starcoder2": ("Starcoder2ForCausalLM", _LLAMA, ["model.layers.0.mlp.c_fc"]),
    "GPTNeoX": ("GPTNeoXForCausalLM", _STACK, ["gpt_neox.layers.0.mlp.dense_h_to_4h"]),
    "GPT2": ("GPT2LMHeadModel", _GPT, ["transformer.h.0.mlp.c_fc"]),
    "GPTJ": ("GPTJForCausalLM", {**_GPT, "rotary_dim": 2}, ["transformer.h.0.mlp.fc_in"]),
    "Bloom": (
        "BloomForCausalLM",
        {"vocab_size": 90, "hidden_size": 24, "n_layer": 1, "n_head": 4},
        ["transformer.h.0.mlp.dense_h_to_4h"],
    ),
    "Falcon": (
        "FalconForCausalLM",
        {
            "vocab_size": 90, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4,
            "ffn_hidden_size": 40, "bos_token_id": 2, "eos_token_id": 3,
        },
        ["transformer.h.0.mlp.dense_h_to_4h"],
    ),
    "OPT": (
        "OPTForCausalLM",
        {
            "vocab_size": 90, "hidden_size": 24, "word_embed_proj_dim": 24, "ffn_dim": 40, "num_hidden_layers": 1,
            "num_attention_heads": 4,
        },
        ["model.decoder.layers.0.fc1"],
    ),
    "Bert": ("BertModel", {**_STACK, "is_decoder": True, "add_cross_attention": True}, [_BERT]),
    "XLMRoberta": ("XLMRobertaModel", _STACK, [_BERT]),
    "MobileBert": (
        "MobileBertModel",
        {**_STACK, "embedding_size": 8, "intra_bottleneck_size": 16, "num_feedforward_networks": 2},
        [_BERT, "encoder.layer.0.ffn.0.intermediate.dense"],
    ),
    "Albert": (
        "AlbertModel",
        {**_STACK, "embedding_size": 8, "bos_token_id": 2, "eos_token_id": 3},
        ["encoder.albert_layer_groups.0.albert_layers.0.ffn"],
    ),
    "DistilBert": (
        "DistilBertModel",
        {"vocab_size": 90, "dim": 24, "hidden_dim": 40, "n_layers": 1, "n_heads": 4, "pad_token_id": 1},
        ["transformer.layer.0.ffn.lin1"],
    ),
    "CTRL": ("CTRLModel", {"vocab_size": 90, "n_embd": 24, "dff": 40, "n_layer": 1, "n_head": 4}, ["h.0.ffn.0"]),
}  # fmt: skip


def build(family: str, meta: bool = False, **changes: Any) -> nn.Module:
    """The model in eval mode, in float64 and with lively weights; or without values on the meta device."""
    import transformers

    name, options, _ = FAMILIES[family]
    kind = getattr(transformers, name)
    config = kind.config_class(**(options | changes))
    if meta:
        with torch.device("meta"):
            return kind(config)
    torch.manual_seed(1)
    model = kind(config).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=0.0 if parameter.dim() > 1 else 0.3, std=0.5)
    return model

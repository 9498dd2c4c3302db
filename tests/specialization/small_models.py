"""Small models of the families that users bring, as data: how each is made, and what it reads."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

F = 72  # neurons: enough for a packed layout at a density of a half
_SEQ = {
    "vocab_size": 50, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": F, "decoder_ffn_dim": F,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "dropout": 0.0, "attention_dropout": 0.0,
    "activation_dropout": 0.0, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0, "max_position_embeddings": 32,
    "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": None,
}  # fmt: skip
_T5 = {
    "vocab_size": 50, "d_model": 16, "d_kv": 4, "d_ff": F, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 2,
    "dropout_rate": 0.0, "decoder_start_token_id": 0,
}  # fmt: skip
_LM = {
    "vocab_size": 50, "hidden_size": 16, "intermediate_size": F, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 32, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
_BERT = {
    "vocab_size": 50, "hidden_size": 16, "intermediate_size": F, "num_hidden_layers": 1, "num_attention_heads": 2,
    "max_position_embeddings": 32, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip


class Family(NamedTuple):
    """A family of models.

    Attributes:
        config: class of the configuration in transformers, or a function that makes the model.
        model: class of the model.
        options: of the configuration.
        reads: what the model is given.
        mixes: whether a batch of several tasks is its parts (attention across sentences, routing and padding aside).
    """

    config: Any
    model: str
    options: dict[str, Any]
    reads: str
    mixes: bool = True


def _seq(name: str, **options: Any) -> Family:
    return Family(f"{name}Config", f"{name}ForConditionalGeneration", _SEQ | options, "pairs")


def _lm(name: str, **options: Any) -> Family:
    return Family(f"{name}Config", f"{name}ForCausalLM", _LM | options, "text")


def _t5(name: str, **options: Any) -> Family:
    return Family(f"{name}Config", f"{name}ForConditionalGeneration", _T5 | options, "pairs")


def _torch_layers(batch_first: bool, activation: Any) -> Any:
    def make() -> nn.Module:
        options = {"dropout": 0.0, "batch_first": batch_first, "activation": activation}
        return nn.TransformerEncoder(
            nn.TransformerEncoderLayer(16, 2, F, **options), 2, enable_nested_tensor=False
        ).train()

    return Family(make, "", {"time_first": not batch_first}, "vectors")


_NEOX = {"rotary_pct": 0.5, "hidden_dropout": 0.0, "attention_dropout": 0.0}
FAMILIES: dict[str, Family] = {
    "M2M100": _seq("M2M100"),
    "Marian, swish": Family("MarianConfig", "MarianMTModel", _SEQ | {"activation_function": "swish"}, "pairs"),
    "MBart, gelu": _seq("MBart", activation_function="gelu"),
    "Bart, gelu_new": _seq("Bart", activation_function="gelu_new"),
    "Pegasus, quick_gelu": _seq("Pegasus", activation_function="quick_gelu"),
    "T5": _t5("T5"),
    "T5, gated-gelu": _t5("T5", feed_forward_proj="gated-gelu"),
    "mT5": _t5("MT5"),
    "LongT5": _t5("LongT5", encoder_attention_type="local"),
    "Llama": _lm("Llama"),
    "Llama, with biases": _lm("Llama", mlp_bias=True),
    "Mistral": _lm("Mistral"),
    "Qwen2": _lm("Qwen2"),
    "Qwen3": _lm("Qwen3", head_dim=8),
    "Gemma2": _lm("Gemma2", head_dim=8),
    "Gemma3": Family("Gemma3TextConfig", "Gemma3ForCausalLM", _LM | {"head_dim": 8}, "text"),
    "Phi3": _lm("Phi3"),
    "GPT2": Family(
        "GPT2Config", "GPT2LMHeadModel",
        {"vocab_size": 50, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_inner": F, "n_positions": 32, "resid_pdrop": 0.0,
         "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1},
        "text",
    ),
    "OPT": Family(
        "OPTConfig", "OPTForCausalLM",
        {"vocab_size": 50, "hidden_size": 16, "ffn_dim": F, "num_hidden_layers": 1, "num_attention_heads": 2,
         "max_position_embeddings": 32, "dropout": 0.0, "word_embed_proj_dim": 16, "pad_token_id": 1},
        "text",
    ),
    "BLOOM": Family(
        "BloomConfig", "BloomForCausalLM", {"vocab_size": 50, "hidden_size": 16, "n_layer": 1, "n_head": 2},
        "text",
    ),
    "Falcon": Family(
        "FalconConfig", "FalconForCausalLM",
        {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_hidden_size": F,
         "bias": True, "new_decoder_architecture": False, "alibi": False, "max_position_embeddings": 32},
        "text",
    ),
    "GPT-NeoX": _lm("GPTNeoX", **_NEOX),
    "Nemotron": _lm("Nemotron", hidden_act="relu2", mlp_bias=True),
    "BERT": Family("BertConfig", "BertModel", _BERT, "one"),
    "XLM-R": Family("XLMRobertaConfig", "XLMRobertaModel", _BERT, "one"),
    "DistilBERT": Family(
        "DistilBertConfig", "DistilBertModel",
        {"vocab_size": 50, "dim": 16, "hidden_dim": F, "n_layers": 1, "n_heads": 2, "dropout": 0.0,
         "attention_dropout": 0.0},
        "one",
    ),
    "Whisper": Family(
        "WhisperConfig", "WhisperForConditionalGeneration",
        _SEQ | {"num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 32, "suppress_tokens": None,
                "begin_suppress_tokens": None},
        "sound",
    ),
    "Speech2Text": Family(
        "Speech2TextConfig", "Speech2TextForConditionalGeneration",
        {key: value for key, value in _SEQ.items() if key != "max_position_embeddings"}
        | {"input_feat_per_channel": 8, "conv_channels": 16, "max_source_positions": 64, "max_target_positions": 32},
        "frames",
    ),
    "ViT": Family(
        "ViTConfig", "ViTModel",
        {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": F, "image_size": 16,
         "patch_size": 8, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
        "pictures",
    ),
    "CLIP": Family(
        "CLIPVisionConfig", "CLIPVisionModel",
        {"hidden_size": 16, "intermediate_size": F, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
         "patch_size": 8},
        "pictures",
    ),
    "SeamlessM4T, text": Family(
        "SeamlessM4TConfig", "SeamlessM4TForTextToText",
        {key: value for key, value in _SEQ.items() if key not in ("d_model", "encoder_ffn_dim", "decoder_ffn_dim")}
        | {"hidden_size": 16, "encoder_ffn_dim": F, "decoder_ffn_dim": F, "speech_encoder_layers": 1,
           "speech_encoder_attention_heads": 2, "speech_encoder_intermediate_size": F},
        "pairs",
    ),
    "NLLB-MoE": Family(
        "NllbMoeConfig", "NllbMoeForConditionalGeneration",
        _SEQ | {"num_experts": 2, "encoder_sparse_step": 1, "decoder_sparse_step": 1, "router_jitter_noise": 0.0,
                "moe_token_dropout": 0.0},
        "pairs", mixes=False,
    ),
    "torch.nn, batch first": _torch_layers(True, "gelu"),
    "torch.nn, time first": _torch_layers(False, nn.functional.silu),
}  # fmt: skip


def make(family: Family) -> nn.Module:
    """A model in float64, its biases not zero, as transformers would begin."""
    torch.manual_seed(0)
    if callable(family.config):
        model = family.config()
    else:
        import transformers

        config = getattr(transformers, family.config)(**family.options)
        model = getattr(transformers, family.model)._from_config(config, attn_implementation="eager")
    model = model.double().train()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 and name.endswith("bias"):
            nn.init.normal_(parameter, mean=0.1, std=0.5)
    return model


def inputs(family: Family, sentences: int = 4) -> dict[str, Tensor]:
    """What the model reads; no padding, so that a part of a batch is what it would be alone."""
    g = torch.Generator().manual_seed(3)
    ids, labels = (torch.randint(3, 50, (sentences, length), generator=g) for length in (6, 5))
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    return {
        "pairs": lambda: {"input_ids": ids, "labels": labels},
        "text": lambda: {"input_ids": ids, "labels": ids},
        "one": lambda: {"input_ids": ids},
        "sound": lambda: {"input_features": draw(sentences, 8, 32), "labels": labels},
        "frames": lambda: {"input_features": draw(sentences, 32, 8), "labels": labels},
        "pictures": lambda: {"pixel_values": draw(sentences, 3, 16, 16)},
        "vectors": lambda: {"src": draw(sentences, 5, 16)},
    }[family.reads]()


def output(family: Family, model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    """What is compared: ``[sentences, ...]``."""
    if family.reads == "vectors":
        x = given["src"]
        return model(x.transpose(0, 1)).transpose(0, 1) if family.options["time_first"] else model(x)
    found = model(**given)
    value: Tensor = found.logits if hasattr(found, "logits") else found.last_hidden_state
    return value

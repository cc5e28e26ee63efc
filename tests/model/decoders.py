"""Weights of transformers' decoders in ours: what a conversion does, written again for tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:  # Megatron is imported once a test has redirected it to the CPU
    from megatron_vlm.model.language import Language


@torch.no_grad()
def load_decoder(language: Language, weights: Mapping[str, torch.Tensor], prefix: str = "model.") -> None:
    """Copy a Qwen-shaped causal model's state dict into a whole decoder (one stage, one rank).

    `prefix`: where the base model stands; the head is `lm_head.weight`. New rows, if any, follow the base rows.
    """
    arch = language.arch
    table = weights[prefix + "embed_tokens.weight"]
    language.embedding.word_embeddings.weight.copy_(table[: arch.vocab_size])
    if len(table) > arch.vocab_size:
        language.embedding.new_rows.copy_(table[arch.vocab_size :])
    if not arch.tied_head:
        language.head.weight.copy_(weights["lm_head.weight"])
    language.decoder.final_layernorm.weight.copy_(weights[prefix + "norm.weight"])
    for index, layer in enumerate(language.decoder.layers):
        start = f"{prefix}layers.{index}."
        own = {name.removeprefix(start): value for name, value in weights.items() if name.startswith(start)}
        attention, mlp = layer.self_attention, layer.mlp
        layer.input_layernorm.weight.copy_(own["input_layernorm.weight"])
        layer.pre_mlp_layernorm.weight.copy_(own["post_attention_layernorm.weight"])
        attention.linear_qkv.weight.copy_(by_group([own[f"self_attn.{x}_proj.weight"] for x in "qkv"], arch.kv_heads))
        if arch.qkv_bias:
            attention.linear_qkv.bias.copy_(by_group([own[f"self_attn.{x}_proj.bias"] for x in "qkv"], arch.kv_heads))
        attention.linear_proj.weight.copy_(own["self_attn.o_proj.weight"])
        if arch.qk_norm:
            attention.q_layernorm.weight.copy_(own["self_attn.q_norm.weight"])
            attention.k_layernorm.weight.copy_(own["self_attn.k_norm.weight"])
        mlp.linear_fc1.weight.copy_(torch.cat([own["mlp.gate_proj.weight"], own["mlp.up_proj.weight"]]))
        mlp.linear_fc2.weight.copy_(own["mlp.down_proj.weight"])


def by_group(parts: list[torch.Tensor], groups: int) -> torch.Tensor:
    """[q; k; v] rows by key-value group: the queries of group 0, its key, its value, group 1, ..."""
    return torch.cat([part.unflatten(0, (groups, -1)) for part in parts], 1).flatten(0, 1)

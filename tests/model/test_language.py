"""The decoder against transformers, in float32 with random weights."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megatron_vlm.batch import PREFIX_BRANCH, Batch
from megatron_vlm.parallel.layout import Layout
from tests.model import tiny
from tests.model.decoders import load_decoder
from tests.model.reference import randomize

TOKENS = 40


def text(tokens: torch.Tensor) -> Batch:
    """Rows (b, s) of one example each, without images, a loss at every token."""
    b, s = tokens.shape
    whole = torch.full((b, s), 0, dtype=torch.int32)
    return Batch(
        tokens=tokens,
        targets=tokens.roll(-1, 1),
        loss_weights=torch.ones(b, s),
        positions=torch.arange(s).expand(b, s),
        examples=whole,
        branches=whole + PREFIX_BRANCH,
        is_vision=torch.zeros(b, s, dtype=torch.bool),
        sources=whole,
        crops=torch.empty(0, tiny.VISION.patches, tiny.VISION.patch_values, dtype=torch.uint8),
        crop_counts=(0,),
        windows=torch.empty(0, 1, dtype=torch.int64),
        rows=torch.arange(b),
    )


def transformers_model(arch):
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

    shape = {
        "hidden_size": arch.hidden,
        "num_hidden_layers": arch.layers,
        "num_attention_heads": arch.heads,
        "num_key_value_heads": arch.kv_heads,
        "intermediate_size": arch.mlp,
        "vocab_size": arch.vocab_size,
        "rope_parameters": {"rope_type": "default", "rope_theta": arch.rope_theta},
        "rms_norm_eps": arch.norm_eps,
        "tie_word_embeddings": arch.tied_head,
    }
    if arch.qk_norm:
        return Qwen3ForCausalLM(Qwen3Config(**shape, head_dim=arch.head_dim))
    return Qwen2ForCausalLM(Qwen2Config(**shape))


# Qwen2.5's heads are hidden / heads wide; Qwen3's are not.
QWEN2_5 = dataclasses.replace(tiny.QWEN2_5.language, head_dim=12)


@pytest.mark.parametrize("decoder", [tiny.ARCH.language, tiny.TIED.language, QWEN2_5], ids=["qwen3", "tied", "qwen2.5"])
def test_logits_and_losses_equal_transformers(one_rank, decoder):
    from megatron_vlm.model.build import build

    arch = dataclasses.replace(tiny.ARCH, language=decoder)
    reference = transformers_model(decoder).eval()
    randomize(reference)
    (model,) = build(tiny.config(arch, z_loss=0.0), Layout(1))
    load_decoder(model.language, reference.state_dict())
    tokens = torch.randint(decoder.vocab_size, (2, TOKENS), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = reference(tokens).logits
        found = model(text(tokens), logits_at=torch.arange(tokens.numel())).view_as(expected)
        losses = model(text(tokens))
    print(f"largest logit {expected.abs().max():.1f}, worst difference {(found - expected).abs().max():.1e}")
    assert expected.abs().max() > 1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    plain = torch.nn.functional.cross_entropy(expected.flatten(0, 1), tokens.roll(-1, 1).flatten(), reduction="none")
    torch.testing.assert_close(losses.flatten(), plain, rtol=0, atol=1e-4)


def test_new_rows_follow_the_base_rows(one_rank):
    from megatron_vlm.model.build import build

    (model,) = build(tiny.config(tiny.ARCH), Layout(1))
    embedding = model.language.embedding
    first = tiny.LANGUAGE.vocab_size
    embedded = embedding(torch.tensor([[0, first - 1, first, first + tiny.LANGUAGE.new_rows - 1]]))[0]
    table = torch.cat([embedding.word_embeddings.weight, embedding.new_rows])
    assert torch.equal(embedded, table[[0, first - 1, first, -1]])


def test_positions_restart(one_rank):
    """A row of two examples gives each the logits that it has alone."""
    from megatron_vlm.model.build import build

    (model,) = build(tiny.config(tiny.ARCH), Layout(1))
    randomize(model)
    tokens = torch.randint(tiny.LANGUAGE.vocab_size, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    packed = text(tokens)
    cut = 15
    examples = (torch.arange(TOKENS) >= cut).int()[None]
    positions = torch.cat([torch.arange(cut), torch.arange(TOKENS - cut)])[None]
    packed = dataclasses.replace(packed, examples=examples, positions=positions)
    with torch.no_grad():
        found = model(packed)[0]
        alone = [model(text(part)) for part in (tokens[:, :cut], tokens[:, cut:])]
    # The last target of each part alone is its own first token (roll), so it is left out.
    torch.testing.assert_close(found[: cut - 1], alone[0][0, :-1], rtol=0, atol=1e-5)
    torch.testing.assert_close(found[cut:-1], alone[1][0, :-1], rtol=0, atol=1e-5)

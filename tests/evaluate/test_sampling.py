"""Choosing the next token: transformers' rules, one by one and together."""

from __future__ import annotations

import pytest
import torch

from megatron_vlm.evaluate.sampling import Sampling, choose, narrowed, penalized

LOGITS = torch.randn(5, 40, generator=torch.Generator().manual_seed(0)) * 3
SEEN = [[1, 2, 2, 39], [], [7, 400], list(range(40)), [0]]


def test_rules_are_those_of_transformers():
    from transformers.generation import logits_process as theirs

    expected = LOGITS.clone()
    for row, ids in enumerate(SEEN):
        known = torch.tensor([[number for number in ids if number < 40]])
        if known.numel():
            rule = theirs.RepetitionPenaltyLogitsProcessor(1.3)
            expected[row] = rule(known, expected[row : row + 1].clone())[0]
    found = penalized(LOGITS, SEEN, 1.3)
    torch.testing.assert_close(found, expected)
    for top_k, top_p in ((7, 1.0), (0, 0.6), (12, 0.8), (1, 0.01), (40, 0.999)):
        expected = found / 0.7
        if top_k:
            expected = theirs.TopKLogitsWarper(top_k)(None, expected)
        if top_p < 1:
            expected = theirs.TopPLogitsWarper(top_p)(None, expected)
        torch.testing.assert_close(narrowed(found / 0.7, top_k, top_p), expected)


def test_greedy_is_the_likeliest_and_draws_are_seeded_and_fair():
    generator = torch.Generator()
    assert choose(LOGITS, SEEN, Sampling(), generator) == LOGITS.argmax(-1).tolist()
    drawn = [choose(LOGITS, SEEN, Sampling(temperature=1.0), generator.manual_seed(3)) for _ in range(2)]
    assert drawn[0] == drawn[1]
    assert choose(LOGITS, SEEN, Sampling(temperature=9.0, top_k=1), generator) == LOGITS.argmax(-1).tolist()
    coin = torch.tensor([[0.0, 1.0]]).expand(20_000, 2)
    share = sum(choose(coin, [[]] * 20_000, Sampling(temperature=2.0), generator)) / 20_000
    assert share == pytest.approx(torch.tensor(0.5).sigmoid().item(), abs=0.02)


@pytest.mark.parametrize(
    "settings", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}, {"repetition_penalty": 0.0}]
)
def test_settings_out_of_range_say_so(settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))}=.*needed"):
        Sampling(**settings)

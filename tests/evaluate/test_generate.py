"""A model of arithmetic stands for the real one: what it says depends on every token and patch that it may see."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_vlm.batch import PREFIX_BRANCH
from megatron_vlm.evaluate.generate import Prompt, generate

EOS, VOCABULARY, PATCH = 0, 50, 60
TOKENIZER = SimpleNamespace(eos=EOS, im_patch=PATCH, vision_ids=frozenset([PATCH]))


class Arithmetic(torch.nn.Module):
    """Next token = a hash of the visible tokens with their positions and of the patches behind the placeholders."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def encode(self, batch):
        patches = batch.crops.reshape(-1, batch.crops.shape[-1])
        return torch.tensor([[patches[[p for p in window if p >= 0]].sum()] for window in batch.windows.tolist()])

    def forward(self, batch, logits_at, images):
        tokens, examples, branches = (table[0].tolist() for table in (batch.tokens, batch.examples, batch.branches))
        positions = batch.positions[0].tolist()
        assert batch.is_vision[0].tolist() == [token == PATCH for token in tokens]
        self.calls.append(len(tokens))
        features = iter(images.flatten().tolist())
        values = [token + 1000 * int(next(features)) if token == PATCH else token for token in tokens]
        assert next(features, None) is None
        logits = torch.zeros(len(logits_at), VOCABULARY)
        for row, end in enumerate(logits_at.tolist()):
            state = 7
            for place in range(end + 1):
                if examples[place] == examples[end] and branches[place] in (PREFIX_BRANCH, branches[end]):
                    state = (state * 31 + values[place] * 17 + positions[place]) % 9973
            logits[row, state % VOCABULARY if state % 5 else EOS] = 1
        return logits


def _prompts():
    rng = np.random.default_rng(0)
    prompts = []
    for index in range(7):
        placeholders = 1 + index % 3
        windows = np.array([[2 * place, 2 * place + 1] if place % 2 else [place, -1] for place in range(placeholders)])
        crops = rng.integers(0, 255, (2, 4, 3), dtype=np.uint8)
        questions = [rng.integers(1, VOCABULARY, 2 + q).tolist() for q in range(1 + index % 4)]
        prompts.append(Prompt([1, *[PATCH] * placeholders, 2], questions, crops, windows))
    prompts.append(Prompt([1], [[5, 6]], np.zeros((0, 4, 3), np.uint8), np.zeros((0, 1), np.int64)))  # no image
    return prompts


def test_packed_branches_say_what_single_questions_say():
    prompts = _prompts()
    packed_model, alone_model = Arithmetic(), Arithmetic()
    packed = generate(packed_model, prompts, TOKENIZER, max_new_tokens=12, row_tokens=60)
    for prompt, answers in zip(prompts, packed, strict=True):
        for question, answer in zip(prompt.questions, answers, strict=True):
            single = Prompt(prompt.prefix, [question], prompt.crops, prompt.windows)
            # Alone the question is branch 0 of example 0; the arithmetic does not look at their numbers.
            ((alone,),) = generate(alone_model, [single], TOKENIZER, max_new_tokens=12)
            assert answer == alone
    assert len({len(answer) for answers in packed for answer in answers}) > 3  # they end at different rounds
    assert len(packed_model.calls) < len(alone_model.calls) / 3


def test_rows_keep_within_their_tokens_and_answers_within_theirs():
    model = Arithmetic()
    answers = generate(model, _prompts(), TOKENIZER, max_new_tokens=3, row_tokens=60)
    assert max(len(answer) for row in answers for answer in row) == 3
    # An example may grow while it runs: by one token per question and round.
    assert max(model.calls) <= 60 + 3 * sum(len(prompt.questions) for prompt in _prompts())


@pytest.mark.parametrize("row_tokens", [1, 1000])
def test_every_prompt_is_reported_finished_once(row_tokens):
    finished = []
    generate(Arithmetic(), _prompts(), TOKENIZER, max_new_tokens=5, row_tokens=row_tokens, progress=finished.append)
    assert sum(finished) == len(_prompts())

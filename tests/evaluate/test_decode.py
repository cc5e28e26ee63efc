"""With a cache the answers are those without, token for token: several prompts, images, a video, several questions."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_vlm.config.architecture import VISION_TOKENS
from megatron_vlm.convert import probe
from megatron_vlm.evaluate.prompt import Prompt
from megatron_vlm.evaluate.sampling import Sampling
from megatron_vlm.parallel.layout import Layout
from tests.evaluate.plain import generate
from tests.model import tiny
from tests.model.reference import randomize

ARCH = tiny.ARCH
#: Letters for ids, so that stop strings mean something.
TOKENIZER = SimpleNamespace(
    eos=3,
    im_patch=ARCH.token_id("<im_patch>"),
    vision_ids=frozenset(ARCH.token_id(name) for name in VISION_TOKENS),
    decode=lambda ids: "".join(chr(200 + number) for number in ids),
)


@pytest.fixture
def model(one_rank):
    from megatron_vlm.model.build import build

    (built,) = build(tiny.config(ARCH), Layout(1))
    randomize(built, 5)
    return built


def prompts() -> list[Prompt]:
    """Two images, text alone, a video, one image; one to three questions of different lengths."""
    return [
        Prompt(sample.prefix, sample.branches, sample.crops, sample.windows) for sample in probe.samples(ARCH, seed=2)
    ]


@pytest.mark.parametrize(
    "row_tokens", [pytest.param(1, marks=pytest.mark.slow), 10_000], ids=["one by one", "together"]
)
def test_cached_answers_are_the_uncached(model, row_tokens):
    from megatron_vlm.evaluate.decode import decode

    expected = generate(model, prompts(), TOKENIZER, max_new_tokens=64)
    found = decode(model, prompts(), TOKENIZER, max_new_tokens=64, row_tokens=row_tokens)
    assert found == expected
    said = [token for answers in found for answer in answers for token in answer]
    assert len(said) > 200 and len(set(said)) > 20


def test_attention_is_put_back_and_each_image_encoded_once(model, monkeypatch):
    from megatron_vlm.evaluate.decode import decode

    before = [layer.self_attention.core_attention for layer in model.language.decoder.layers]
    encoded = []
    monkeypatch.setattr(model, "encode", lambda batch, own=model.encode: encoded.append(len(batch.crops)) or own(batch))
    decode(model, prompts(), TOKENIZER, max_new_tokens=5)
    assert encoded == [sum(len(prompt.crops) for prompt in prompts())]
    assert [layer.self_attention.core_attention for layer in model.language.decoder.layers] == before


def test_one_prompt_with_many_questions_equals_questions_alone(model):
    from megatron_vlm.evaluate.decode import decode

    shared = prompts()[0]
    rng = np.random.default_rng(0)
    questions = [rng.integers(0, 160, length).tolist() for length in (1, 9, 4, 4, 20)]
    together = decode(model, [dataclasses.replace(shared, questions=questions)], TOKENIZER, max_new_tokens=20)
    alone = [
        decode(model, [dataclasses.replace(shared, questions=[question])], TOKENIZER, max_new_tokens=20)[0][0]
        for question in questions
    ]
    assert together == [alone]


def test_an_answer_ends_with_a_stop_string_and_is_told_as_it_comes(model):
    from megatron_vlm.evaluate.decode import decode

    (whole,) = decode(model, prompts()[1:2], TOKENIZER, max_new_tokens=30)[0]
    stop = TOKENIZER.decode(whole[9:12])
    told: list[tuple[int, int, int]] = []
    (cut,) = decode(
        model,
        prompts()[1:2],
        TOKENIZER,
        max_new_tokens=30,
        stop=["nowhere", stop],
        said=lambda *each: told.append(each),
    )[0]
    first = TOKENIZER.decode(whole).index(stop)
    assert cut == whole[: first + 3] and told == [(0, 0, token) for token in cut]


def test_draws_are_seeded_and_a_penalty_changes_the_answer(model):
    from megatron_vlm.evaluate.decode import decode

    def answer(**settings) -> list[int]:
        return decode(model, prompts()[1:2], TOKENIZER, max_new_tokens=40, sampling=Sampling(**settings))[0][0]

    assert answer(temperature=1.0, seed=1) == answer(temperature=1.0, seed=1) != answer(temperature=1.0, seed=2)
    assert len(set(answer(repetition_penalty=1e6))) == 40
    assert answer(temperature=3.0, top_k=1) == answer()


def test_a_prompt_that_is_too_long_is_refused(model):
    from megatron_vlm.evaluate.decode import decode

    short = Prompt([1], [[5, 6]], *(getattr(prompts()[1], name) for name in ("crops", "windows")))
    with pytest.raises(ValueError, match=r"prompt 1 has 13 tokens and may get 500 more, but .* 512 positions"):
        decode(model, [short, prompts()[1]], TOKENIZER, max_new_tokens=500)


def test_groups_keep_within_their_row_and_the_room_of_the_longest_prefix():
    from megatron_vlm.evaluate.decode import _groups

    def lengths(*prefixes: int) -> list[Prompt]:
        shared = prompts()[0]
        return [dataclasses.replace(shared, prefix=[1] * length, questions=[[5] * 10]) for length in prefixes]

    assert list(_groups(lengths(50, 200, 20, 20), 100)) == [[0], [1], [2, 3]]
    assert list(_groups(lengths(60, 0, 0, 0, 0), 100)) == [[0, 1, 2], [3, 4]]  # 3 x 60 <= 200 < 4 x 60

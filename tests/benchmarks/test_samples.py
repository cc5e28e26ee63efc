"""What benchmarks compare is the same work: the losses of both trainers on the same weights and samples."""

from __future__ import annotations

import pytest
import torch

from megatron_vlm.batch import PREFIX_BRANCH


@pytest.fixture
def maker():
    from benchmarks import samples, trainers

    return samples.Maker(trainers.TINY)


def made(maker, kind: str):
    """Two samples of a kind, of different length."""
    if kind == "text":
        return [maker.text(40, 10), maker.text(25, 5)]
    if kind == "image":
        return [maker.image(64, 64, 12, 6, 0), maker.image(150, 120, 20, 6, 4)]
    return [maker.video(3, 12, 6), maker.video(2, 12, 4)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["text", "image", "video"])
def test_both_trainers_have_the_same_loss_and_learn_alike(one_rank, maker, kind):
    from benchmarks import samples, trainers

    arch, chosen = trainers.TINY, made(maker, kind)
    freeze = ("vision", "connector") if kind == "text" else ()
    model = (trainers.qwen3 if kind == "text" else trainers.molmo2)(arch, freeze)
    own = trainers.ours(trainers.config(arch, freeze, "float32"), trainers.load_into(model))
    inputs = samples.padded(arch, chosen, torch.float32)
    ours = own([samples.packed(arch, [chosen])])
    theirs = trainers.theirs(model, autocast=False)(samples.plain_text(inputs) if kind == "text" else inputs)
    first, second = (ours(), theirs()), (ours(), theirs())
    assert first[0] == pytest.approx(first[1], rel=1e-5)
    assert second[0] < first[0] and second[1] < first[1]
    # The norm of all gradients is clipped together there, by component here.
    assert second[0] == pytest.approx(second[1], rel=2e-3)


def test_sequences_of_a_packed_row_are_its_samples_again(maker):
    """One sequence for each branch, the picture in front of each."""
    import dataclasses

    from benchmarks import packed, samples, trainers

    arch, chosen = trainers.TINY, [*made(maker, "image"), *made(maker, "text")]
    batch = samples.packed(arch, [chosen[:2], chosen[2:]], 400)
    patches, placeholder = arch.vision.patches, arch.token_id("<im_patch>")
    found = list(packed.sequences(batch, patches, placeholder))
    assert [one.tokens.tolist() for one in found] == [one.tokens.tolist() for one in chosen]
    for one, original in zip(found, chosen, strict=True):
        assert torch.equal(one.crops, original.crops) and one.answer == original.answer
        assert not len(original.crops) or (one.windows == original.windows).all()
    # Cut the answer of the first sample into two branches.
    length, answer = len(chosen[0].tokens), chosen[0].answer
    branches = batch.branches.clone()
    branches[0, length - answer - 1 : length - 3], branches[0, length - 3 : length] = 0, 1
    found = list(packed.sequences(dataclasses.replace(batch, branches=branches), patches, placeholder))
    assert len(found) == len(chosen) + 1 and (branches[0, 0] == PREFIX_BRANCH)
    assert [len(one.tokens) for one in found[:2]] == [length - 3, length - answer - 1 + 3]
    assert torch.equal(found[0].crops, found[1].crops)

"""From a message tree to tokens, targets, positions, branches and weights."""

import dataclasses
import math

import numpy as np
import pytest

from megatron_vlm.batch import PREFIX_BRANCH
from megatron_vlm.config.geometry import ImageGeometry, image_geometry
from megatron_vlm.data.example import Branch, Example, Media, Point, Points, Turn, from_json, to_json
from megatron_vlm.data.tree import TreeSettings, tokenize
from tests.data.world import ARCH, tokenizer

TOKENIZER = tokenizer()
SETTINGS = TreeSettings(TOKENIZER, image_geometry(ARCH, 4), "style", "uniform", 2048, 64, 0)
PHOTO = Media("0" * 64, 300, 200)
EOS = TOKENIZER.eos


def qa(prompt: str, *answers: str) -> Branch:
    return Branch("user_qa", tuple(Turn(prompt, answer) for answer in answers))


def branch_ids(*turns: tuple[str, str]) -> list[int]:
    """A conversation as Qwen's chat format has it, without the last EOS."""
    ids: list[int] = []
    for number, (asked, answered) in enumerate(turns):
        ids += [EOS, *TOKENIZER.user_turn(asked, first=False)] if number else TOKENIZER.user_turn(asked, first=True)
        ids += TOKENIZER.encode(answered)
    return ids


def test_one_branch_is_a_plain_sequence():
    found = tokenize(Example("a", (qa("what?", "a red cat"),)), "d", 0, SETTINGS)
    sequence = [EOS, *branch_ids(("what?", "a red cat")), EOS]
    assert found.tokens.tolist() == sequence[:-1]
    learned = len(TOKENIZER.encode("a red cat")) + 1
    assert found.targets[-learned:].tolist() == sequence[-learned:]
    assert found.loss_weights.tolist() == [0.0] * (len(sequence) - 1 - learned) + [1.0] * learned
    assert found.targets[:-learned].tolist() == [0] * (len(sequence) - 1 - learned)
    assert found.positions.tolist() == list(range(len(sequence) - 1))
    assert found.branches.tolist() == [PREFIX_BRANCH] + [0] * (len(sequence) - 2)
    assert not found.is_vision.any() and found.crops == 0


def test_turns_end_with_two_eos():
    found = tokenize(Example("a", (qa("what?", "cat", "box"),)), "d", 0, SETTINGS)
    assert found.tokens.tolist() == [EOS, *branch_ids(("what?", "cat"), ("what?", "box"))]
    text = TOKENIZER.decode(found.tokens)
    assert "cat<|im_end|><|im_end|>\n<|im_start|>user" in text
    learned = [TOKENIZER.decode([target]) for target in found.targets[found.loss_weights > 0]]
    assert "".join(learned) == "cat<|im_end|>box<|im_end|>"


def test_branches_share_the_prefix_and_restart():
    example = Example("a", (qa("one", "a red cat"), qa("two", "box"), qa("three", "dog")), (PHOTO,))
    found = tokenize(example, "d", 0, SETTINGS)
    prefix = int((found.branches == PREFIX_BRANCH).sum())
    assert found.tokens[0] == EOS and found.is_vision[1:prefix].all() and not found.is_vision[prefix:].any()
    assert prefix == 1 + found.layouts[0].tokens
    assert int((found.tokens == TOKENIZER.im_patch).sum()) == found.layouts[0].placeholders
    texts = set()
    for branch in range(3):
        inside = found.branches == branch
        assert found.positions[inside].tolist() == list(range(prefix, prefix + int(inside.sum())))
        assert found.targets[inside][-1] == EOS and found.loss_weights[inside][-1] == 1
        texts.add(TOKENIZER.decode(found.tokens[inside]))
        # Inside a branch the target is the branch's next token.
        learned = found.loss_weights[inside][:-1] > 0
        assert (found.targets[inside][:-1][learned] == found.tokens[inside][1:][learned]).all()
    assert texts == {
        TOKENIZER.decode(branch_ids(turn)) for turn in (("one", "a red cat"), ("two", "box"), ("three", "dog"))
    }


def test_a_branch_alone_is_the_branch_in_the_tree():
    """But for the order, which the tree draws, every branch has the tokens, positions and targets it has alone."""
    branches = (qa("one", "a red cat"), qa("two", "box"))
    tree = tokenize(Example("a", branches, (PHOTO,)), "d", 0, SETTINGS)
    alone = [tokenize(Example("a", (branch,), (PHOTO,)), "d", 0, SETTINGS) for branch in branches]
    prefix = tree.branches == PREFIX_BRANCH
    found = []
    for branch in range(2):
        mine = prefix | (tree.branches == branch)
        found.append(tuple(getattr(tree, name)[mine].tolist() for name in ("tokens", "positions", "targets")))
    assert sorted(found) == sorted(
        tuple(getattr(one, name).tolist() for name in ("tokens", "positions", "targets")) for one in alone
    )


def test_several_images_are_announced():
    media = (PHOTO, Media("1" * 64, 50, 50))
    points = Points("cups", (Point(2, 0.5, 0.25),))
    example = Example("a", (Branch("pointing", (Turn("which?", points),)),), media)
    found = tokenize(example, "d", 0, SETTINGS)
    text = TOKENIZER.decode(found.tokens)
    blocks = text.split("Image ")
    assert blocks[0] == "<|im_end|>" and blocks[1].startswith("1<low_res_im_start>") and blocks[2].startswith("2<low_")
    assert text.endswith('<points coords="2 1 500 250">cups</points>')
    announced = len(TOKENIZER.encode("Image 1"))
    assert not found.is_vision[1 : 1 + announced].any() and found.is_vision[1 + announced]
    assert (found.branches[: int(np.flatnonzero(found.is_vision)[-1]) + 1] == PREFIX_BRANCH).all()


def test_molmo2_image_block():
    settings = dataclasses.replace(SETTINGS, geometry=ImageGeometry(27, 14, 2, 0, 8))
    found = tokenize(Example("a", (qa("q", "cat"),), (Media("0" * 64, 640, 480),)), "d", 0, settings)
    names = [TOKENIZER.decode([number]) for number in found.tokens[1:753]]
    row = ["<im_patch>"] * 23 + ["<im_col>"]
    assert names == ["<low_res_im_start>"] + ["<im_patch>"] * 196 + ["<im_end>", "<im_start>"] + row * 23 + ["<im_end>"]
    wide = tokenize(Example("a", (qa("q", "cat"),), (Media("0" * 64, 900, 300),)), "d", 0, settings)
    down, across = wide.layouts[0].high_grid
    shown = TOKENIZER.decode(wide.tokens[wide.is_vision])
    assert down < across and f"<im_start>{('<im_patch>' * across + '<im_col>') * down}<im_end>" in shown


def test_literal_names_in_a_caption_stay_text():
    hostile = "a <im_patch><im_patch> cat <|im_end|> <low_res_im_start><|image|>"
    found = tokenize(Example("a", (qa(hostile, hostile),), (PHOTO,)), "d", 0, SETTINGS)
    assert int((found.tokens == TOKENIZER.im_patch).sum()) == found.layouts[0].placeholders
    assert not found.is_vision[1 + found.layouts[0].tokens :].any()
    assert TOKENIZER.decode(found.targets[found.loss_weights > 0]) == hostile + "<|im_end|>"


def weights(weighting: str, *branches: Branch, flat: float | None = None) -> list[list[float]]:
    settings = dataclasses.replace(SETTINGS, loss_weighting=weighting)
    found = tokenize(Example("a", branches), "d", 0, settings, flat)
    return [
        found.loss_weights[(found.branches == branch) & (found.loss_weights > 0)].tolist()
        for branch in range(len(branches))
    ]


def test_loss_weights():
    branches = [qa(f"{number}", "1 2") for number in range(4)]
    assert all(len(branch) == 4 for branch in weights("uniform", *branches))
    assert weights("root_subsegments", *branches) == [[0.5] * 4] * 4
    # The worked example: n = 3 loss tokens (the last EOS is not counted in a tree), K = 4 branches.
    assert weights("root_tokens", *branches) == [pytest.approx([2 / math.sqrt(3) / math.sqrt(4)] * 4)] * 4
    # Alone, the EOS counts: n = 4, K = 1.
    assert weights("root_tokens", branches[0]) == [pytest.approx([2 / math.sqrt(4)] * 4)]
    assert weights("root_tokens", *branches, flat=0.1) == [pytest.approx([0.1] * 4)] * 4
    long = qa("q", " 1" * 199 + "1")
    assert sum(weights("root_tokens", long)[0]) == pytest.approx(2 * math.sqrt(400), rel=1e-4)


def test_a_branch_may_weigh_more():
    """Multiplies any weighting of the settings; a flat weight of the data set stands in its place."""
    plain, heavy = qa("1", "1 2"), dataclasses.replace(qa("2", "1 2"), weight=1.5)
    for weighting in ("uniform", "root_subsegments", "root_tokens"):
        one, other = sorted(branch[0] for branch in weights(weighting, plain, heavy))
        assert other == pytest.approx(1.5 * one) and one == pytest.approx(weights(weighting, plain, plain)[0][0])
    assert weights("uniform", plain, heavy, flat=0.2) == [pytest.approx([0.2] * 4)] * 2
    example = Example("a", (plain, heavy))
    assert from_json(to_json(example)) == example and "weight" not in to_json(Example("a", (plain,)))
    for wrong in (0.0, math.nan, math.inf, -1.0):
        with pytest.raises(ValueError, match="a branch has the weight"):
            Example("a", (dataclasses.replace(plain, weight=wrong),)).check()


def test_text_longer_than_a_row_is_cut_and_counted():
    settings = dataclasses.replace(SETTINGS, max_tokens=64)
    found = tokenize(Example("a", (qa("q", "1" * 500),)), "d", 0, settings)
    whole = tokenize(Example("a", (qa("q", "1" * 500),)), "d", 0, SETTINGS)
    assert len(found.tokens) == 64 and found.cut_tokens == len(whole.tokens) - 64
    assert (found.targets == whole.targets[:64]).all() and found.loss_weights[-1] == 1


def test_branches_beyond_the_row_are_dropped_before_weights():
    settings = dataclasses.replace(SETTINGS, max_tokens=64, loss_weighting="root_subsegments")
    found = tokenize(Example("a", tuple(qa(str(number), "1" * 15) for number in range(10))), "d", 0, settings)
    kept = int(found.branches[found.branches != PREFIX_BRANCH].max()) + 1
    assert found.dropped_branches == 10 - kept > 0
    assert set(found.loss_weights[found.loss_weights > 0].tolist()) == {np.float32(1 / math.sqrt(kept))}
    assert all((found.loss_weights[found.branches == branch] > 0).any() for branch in range(kept))


def test_what_has_a_place_has_something_to_learn():
    """At every length of row around those at which the question, the answer or a branch just fits."""
    example = Example("a", tuple(qa(str(number), "1" * 3) for number in range(3)))
    whole = tokenize(example, "d", 0, SETTINGS)
    refused, kept = [], []
    for room in range(2, len(whole.tokens) + 1):
        settings = dataclasses.replace(SETTINGS, max_tokens=room)
        try:
            found = tokenize(example, "d", 0, settings)
        except ValueError as error:
            assert "Raise data.sequence_length" in str(error)
            refused.append(room)
            continue
        learned = [bool(found.loss_weights[found.branches == branch].any()) for branch in range(3)]
        kept.append(sum(learned))
        assert learned == [number < sum(learned) for number in range(3)] and found.dropped_branches == 3 - sum(learned)
        assert set(found.branches.tolist()) - {PREFIX_BRANCH} == set(range(sum(learned)))
    first = int(np.flatnonzero(whole.loss_weights)[0])
    assert refused == list(range(2, first + 1)) and kept == sorted(kept) and set(kept) == {1, 2, 3}
    starts = [int(np.flatnonzero((whole.branches == branch) & (whole.loss_weights > 0))[0]) for branch in range(3)]
    assert [kept.count(number) for number in (1, 2)] == [starts[1] - starts[0], starts[2] - starts[1]]


def test_images_that_leave_no_room_are_refused():
    example = Example("a", (qa("q", "cat"),), (PHOTO,))
    with pytest.raises(ValueError, match="sample d/a: its images take .* rows of 40"):
        tokenize(example, "d", 0, dataclasses.replace(SETTINGS, max_tokens=40))
    with pytest.raises(ValueError, match="sample d/a has 5 crops; a row holds 4"):
        tokenize(example, "d", 0, dataclasses.replace(SETTINGS, max_crops=4))
    assert tokenize(example, "d", 0, dataclasses.replace(SETTINGS, max_crops=5)).crops == 5


def test_choices_are_keyed():
    example = Example("a", tuple(qa(str(number), "cat") for number in range(6)))

    def order(**changes) -> list[int]:
        arguments = {"dataset": "d", "visit": 0, "settings": SETTINGS} | changes
        return tokenize(example, **arguments).tokens.tolist()

    assert order() == order()
    assert order(visit=1) != order() != order(dataset="e") != order(settings=dataclasses.replace(SETTINGS, seed=1))


def test_unknown_settings_are_refused():
    with pytest.raises(ValueError, match="data.prompts='x'"):
        dataclasses.replace(SETTINGS, prompts="x")
    with pytest.raises(ValueError, match="data.loss_weighting='x'"):
        dataclasses.replace(SETTINGS, loss_weighting="x")


def test_a_share_of_visits_sees_a_single_image_in_more_crops():
    photo = dataclasses.replace(PHOTO, width=1500, height=1000)
    settings = dataclasses.replace(SETTINGS, high_resolution_crops=24)
    one, two = Example("a", (qa("what?", "cat"),), (photo,)), Example("a", (qa("what?", "cat"),), (photo, photo))
    crops = [tokenize(one, "d", visit, settings, high_resolution=0.3).crops for visit in range(400)]
    usual = tokenize(one, "d", 0, settings).crops
    assert usual <= 5 < max(crops) <= 25 and set(crops) == {usual, max(crops)}
    # 400 visits of a share of 0.3: five standard deviations are 46.
    assert abs(crops.count(max(crops)) - 120) < 46
    assert crops == [tokenize(one, "d", visit, settings, high_resolution=0.3).crops for visit in range(400)]
    assert {tokenize(two, "d", visit, settings, high_resolution=1.0).crops for visit in range(9)} == {2 * usual}

"""Published rows of every set that can be scored: read, stored, asked; the truth in the model's words is right."""

from __future__ import annotations

import pytest

from megatron_vlm.data import points
from megatron_vlm.data.example import Branch, Example
from megatron_vlm.data.sets.table import TABLE
from megatron_vlm.evaluate import kinds, tasks
from tests.data.sets.test_table import of

NAMES = [name for name, task in tasks.TASKS.items() if task.data in TABLE]


def truth(sample: Example, branch: Branch) -> str:
    answer = branch.turns[0].answer
    return answer if isinstance(answer, str) else points.write(answer, branch.style, seconds=bool(sample.video))


@pytest.mark.parametrize("name", NAMES)
def test_the_truth_is_right_and_nonsense_is_not(name, tmp_path):
    task = tasks.TASKS[name]
    samples = of(task.data, tmp_path)
    assert samples
    for sample in samples:
        for branch in sample.branches:
            question = kinds.of(sample, branch, radius=task.radius)
            found = kinds.verdict(kinds.KINDS[task.kind], question, truth(sample, branch))
            if task.kind == "vqa":  # three people are too few for a whole point
                assert found.value > 0.3
            else:
                assert (found.outcome, found.value) == ("right", 1.0), (question, found)
            assert kinds.verdict(kinds.KINDS[task.kind], question, "qqq").outcome != "right"


def test_every_set_for_evaluation_has_a_task():
    assert {name for name, entry in TABLE.items() if entry.evaluation_only} <= {
        task.data for task in tasks.TASKS.values()
    }


def test_masks_come_along_and_decide(tmp_path):
    (sample, *_) = of("molmo2_video_point_eval", tmp_path)
    question = kinds.of(sample, sample.branches[0])
    kind = kinds.KINDS["video pointing"]

    def recall(text: str) -> tuple[float, float]:
        return kinds.verdict(kind, question, f'<points coords="{text}">cup</points>').scores["recall"]

    # The mask has columns 20 to 39 of 60, at 2.5 and 3.0 s.
    assert recall("2.5 1 350 900") == recall("3.0 1 600 000") == (1, 1)
    assert recall("2.5 1 300 250") == recall("2.0 1 500 250") == recall("2.5 1 700 250") == (0, 1)
    (sample, *_) = of("molmo2_video_track_eval", tmp_path)
    assert sample.clip.rate == 1 and [p.at for p in sample.branches[0].turns[0].answer.objects[0]] == [0.0]
    assert [row[0] for row in sample.info["masks"]["the red car"][0]] == [0.0]


def test_all_places_must_lie_in_the_mask_and_point_bench_counts_its_own_way(tmp_path):
    found = {}
    for sample in of("point_bench", tmp_path):
        found[sample.info["category"]] = question = kinds.of(sample, sample.branches[0])
        assert question.prompt == "Point to the cups." and len(question.info["masks"]["place"]) == 1
    kind = kinds.KINDS["in mask"]

    def scores(category: str, *places: int) -> tuple[float, float]:
        coords = " ".join(f"{number} {x:03d} 250" for number, x in enumerate(places, 1))
        said = kinds.verdict(kind, found[category], f'<points coords="1 {coords}">cups</points>').scores
        assert said[f"accuracy, {category}"] == said["accuracy"]
        return said["accuracy"][0], said["Point-Bench's own"][0]

    # The mask is the right half.
    assert scores("spatial", 600) == (1, 1) and scores("spatial", 600, 100) == (0, 1)
    assert scores("spatial", 100, 600) == (0, 0)
    assert scores("counting", 600, 700, 800) == (1, 1) and scores("counting", 600, 700) == (1, 0)
    assert scores("counting", 600, 700, 100) == (0, 0)


def test_masks_of_referred_objects_come_along(tmp_path):
    for name, objects in (("mevis_eval", 2), ("ref_yt_vos_eval", 1), ("ref_davis17_eval", 2), ("reasonvos_eval", 1)):
        for sample in of(name, tmp_path):
            kept = sample.info["masks"]["the red car"]
            assert len(kept) == len(sample.branches[0].turns[0].answer.objects) == objects
            assert [row[0] for row in kept[0]] == [0.0, 0.5, 1.0, 1.5] and sample.clip.rate == 2


def test_all_answers_of_all_questions_about_an_image_come_along(tmp_path):
    (tree,) = of("coco_2014_vqa_multi", tmp_path)
    assert tree.info["answers"] == {f"What {i}?": ["cat", "cat", "dog"] for i in range(3)}


def test_statements_and_categories_come_along(tmp_path):
    assert of("molmo2_cap_eval", tmp_path)[0].info == {"statements": ["A dog runs", "It rains"]}
    sample = of("molmo2_video_count_eval", tmp_path)[2]
    found = kinds.verdict(kinds.KINDS["count"], kinds.of(sample, sample.branches[0]), "2")
    assert found.scores["accuracy, object"] == (1, 1)


def test_images_in_a_question_are_named_by_their_number(tmp_path):
    texts = [sample.branches[0].turns[0].prompt for sample in of("mmmu", tmp_path)]
    assert texts[0] == "What does Image 1 show?"
    assert texts[1].splitlines()[:3] == ["What does Image 1 show?", "A. a Image 2", "B. b"]
    assert of("muir_bench", tmp_path)[0].branches[0].turns[0].prompt.startswith("Is Image 1 like Image 2?")
    assert "A. x\nB. y" in of("ego_schema", tmp_path)[0].branches[0].turns[0].prompt

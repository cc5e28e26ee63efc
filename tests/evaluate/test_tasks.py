"""What is asked of a model: the words and the image block are those of training."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_vlm.config.geometry import image_geometry
from megatron_vlm.data.example import Branch, Clip, Example, Point, Tracks, Turn
from megatron_vlm.data.shards import Shards
from megatron_vlm.data.tree import TreeSettings, tokenize
from megatron_vlm.evaluate import tasks
from tests.data import world


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Shards:
    return Shards(world.build(tmp_path_factory.mktemp("world") / "shards"))


@pytest.fixture(scope="module")
def settings() -> TreeSettings:
    return TreeSettings(world.tokenizer(), image_geometry(world.ARCH, 4), "style", "uniform", 2048, 64, seed=0)


@pytest.mark.parametrize("dataset", ["captions", "pointing", "text"])
def test_a_question_begins_as_in_training(shards, settings, dataset):
    for index in range(shards.count(dataset, "train")):
        sample = shards.example(dataset, "train", index)
        asked = tasks.prompt(sample, shards, settings)
        trained = tokenize(sample, dataset, 0, settings)
        # The words may differ (paraphrases, hints of length), the image block may not.
        assert asked.prefix == trained.tokens[: len(asked.prefix)].tolist()
        assert len(asked.questions) == len(sample.branches)
        assert asked.crops.shape[0] == trained.crops
        placeholders = asked.prefix.count(settings.tokenizer.im_patch)
        assert len(asked.windows) == placeholders == trained.tokens.tolist().count(settings.tokenizer.im_patch)
        assert asked.windows.max(initial=-1) < asked.crops.shape[0] * settings.geometry.patches
        if dataset == "text":  # whose words are not varied
            whole = [*asked.prefix, *asked.questions[0]]
            assert whole == trained.tokens[: len(whole)].tolist() and trained.loss_weights[len(whole) - 1] > 0


def test_tracks_are_asked_for_at_the_clip_s_rate(settings):
    branch = Branch("video_point_track_per_frame", (Turn("cup", Tracks("cup", ((Point(0.0, 0.5, 0.5),),))),))
    words = tasks.question(Example("a", (branch,), clip=Clip(rate=6)), branch, settings)
    assert "6 FPS" in words or "6 frames per second" in words


def test_other_images_are_others_and_the_questions_stay(shards):
    samples = [shards.example("captions", "train", index) for index in range(8)]
    exchanged = tasks.with_other_images(samples)
    assert [sample.branches for sample in exchanged] == [sample.branches for sample in samples]
    assert all(a.media != b.media for a, b in zip(exchanged, samples, strict=True))
    assert sorted(map(str, (s.media for s in exchanged))) == sorted(map(str, (s.media for s in samples)))


def test_a_limit_takes_samples_evenly_and_always_the_same(shards):
    task = tasks.Task("captions", "answer", 8, split="train")
    everything = tasks.examples(shards, task)
    some = tasks.examples(shards, task, 3)
    assert [sample.key for sample in some] == [everything[i * len(everything) // 3].key for i in range(3)]


def test_a_data_set_or_split_that_is_not_there_is_named(shards):
    with pytest.raises(ValueError, match=r"has no data set 'chess'; it has captions, pointing, text"):
        tasks.examples(shards, tasks.Task("chess", "answer", 8))
    with pytest.raises(ValueError, match=r"has no samples of 'captions' in the split 'exam'; it has .*captions \("):
        tasks.examples(shards, tasks.Task("captions", "answer", 8, split="exam"))


def test_two_images_are_numbered_as_in_training(shards, settings):
    two = [s for s in tasks.examples(shards, tasks.Task("captions", "answer", 8, "train")) if len(s.media) == 2]
    assert two
    prefix = tasks.prompt(two[0], shards, settings).prefix
    starts = np.flatnonzero(np.asarray(prefix) == settings.tokenizer.new_token("<low_res_im_start>"))
    assert len(starts) == 2
    assert settings.tokenizer.decode(prefix[1 : starts[0]]) == "Image 1"

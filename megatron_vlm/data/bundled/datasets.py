"""The data sets of the sample manifest, sample by sample. Names, splits and styles: see `megatron_vlm.data.sample`."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from PIL import Image

from megatron_vlm.data.bundled import clips, film_texts, footage, photos, questions, scenes, stamps
from megatron_vlm.data.bundled.dialogues import dialogue
from megatron_vlm.data.bundled.stamps import Stamp
from megatron_vlm.data.example import Branch, Clip, Example, Media, Point, Points, Tracks, Turn

#: (data set, split, sample): what a builder hands on.
Item = tuple[str, str, Example]
#: Stores an image or a video file, gives back its name and size.
AddImage = Callable[[bytes], Media]
#: Longest side of a stored photograph, in pixels.
PHOTO_SIDE = 224
#: Images at the end of easy-vqa's published train split that become its validation split.
EASY_VQA_VALIDATION = 200


@dataclass(frozen=True)
class Counts:
    """How much is made."""

    easy_vqa_images: int = 4000
    """At most so many images of each published split."""
    train_scenes: int = 12_000
    validation_scenes: int = 200
    test_scenes: int = 1200
    new_kind_scenes: int = 200
    train_films: int = 2000
    validation_films: int = 40
    test_films: int = 200
    train_dialogues: int = 2000
    held_out_dialogues: int = 100


def easy_vqa(files: Mapping[str, bytes], add_image: AddImage, counts: Counts) -> Iterator[Item]:
    """The published questions, those of one image as branches of one sample. Answers as published, lower case."""
    for published in ("train", "test"):
        asked: dict[int, list[tuple[str, str]]] = {}
        for question, answer, image in json.loads(files[f"easy_vqa/data/{published}/questions.json"]):
            asked.setdefault(image, []).append((question, answer))
        first_validation = len(asked) - EASY_VQA_VALIDATION
        for image, pairs in sorted(asked.items())[: counts.easy_vqa_images]:
            split = "validation" if published == "train" and image >= first_validation else published
            media = add_image(files[f"easy_vqa/data/{published}/images/{image}.png"])
            branches = tuple(Branch("easy_vqa", (Turn(question, answer),)) for question, answer in pairs)
            yield "easy_vqa", split, Example(f"{published}/{image:04d}", branches, (media,), {"image": image})


def photographs(files: Mapping[str, bytes], add_image: AddImage) -> Iterator[Item]:
    """A sample per photograph with its captions and questions; two more where places are known."""
    for photo in photos.PHOTOS:
        image = _opened(files[photo.path])
        media = add_image(scenes.png(_shrunk(image)))
        branches = (
            Branch("long_caption", (Turn("", photo.caption),)),
            Branch("short_caption", (Turn("", photo.short),)),
            *(Branch("user_qa", (Turn(question, answer),)) for question, answer in photo.questions),
        )
        yield "photos", photo.split, Example(photo.name, branches, (media,))
        for dataset, style in (("photo_points", "pointing"), ("photo_points", "point_count")) if photo.points else ():
            places = tuple(
                Branch(style, (Turn(label, _fractions(label, places, image.size)),))
                for label, places in photo.points.items()
            )
            yield dataset, photo.split, Example(f"{photo.name}/{style}", places, (media,))


def composed(
    files: Mapping[str, bytes], add_image: AddImage, counts: Counts, cutouts: Sequence[Stamp] = ()
) -> Iterator[Item]:
    """Scenes with their captions, places, counts and questions: one image, a sample in each of five data sets.

    cutouts: objects are these instead of drawn ones.
    """
    used = [photo for photo in photos.PHOTOS if photo.topic]
    scenery = {photo.name: _cut(_opened(files[photo.path]), photo.scenery) for photo in used}
    everywhere = [(photo.name, photo.topic) for photo in used]
    trained_on = [(photo.name, photo.topic) for photo in used if photo.split == "train"]
    for split, wanted, count in (
        ("train", "train", counts.train_scenes),
        ("validation", "train", counts.validation_scenes),
        ("test", "held_out", counts.test_scenes),
        ("test", "new_kinds", counts.new_kind_scenes),
    ):
        for index in range(count):
            key = f"{wanted if split == 'test' else split}/{index:05d}"
            ground = trained_on if split == "train" else everywhere
            if cutouts:
                if wanted != "new_kinds":  # every held-out cut-out is of a new kind already
                    yield from _stamp_samples(stamps.plan(key, ground, cutouts, wanted), split, add_image, scenery)
                continue
            scene = scenes.plan(key, ground, wanted)
            media = (add_image(scenes.paint(scene, scenery)),)
            yield from _samples(scene, split, wanted, media)


def _samples(scene: scenes.Scene, split: str, wanted: str, media: tuple[Media, ...]) -> Iterator[Item]:
    info = scene.info()
    if wanted == "new_kinds":
        branches = questions.places("pointing", questions.new_kind_labels(scene))
        yield "pointing_new", split, Example(scene.key, branches, media, info)
        return
    asked = questions.held_out_labels(scene) if wanted == "held_out" else questions.labels(scene)
    yield "captions", split, Example(scene.key, questions.captions(scene), media, info)
    yield "pointing", split, Example(scene.key, questions.places("pointing", asked), media, info)
    yield "counting", split, Example(scene.key, questions.places("point_count", asked), media, info)
    yield "vqa", split, Example(scene.key, questions.questions(scene), media, info)
    yield "positions", split, Example(scene.key, questions.positions(scene), media, info)


def _stamp_samples(
    composed: stamps.Composed, split: str, add_image: AddImage, scenery: Mapping[str, Image.Image]
) -> Iterator[Item]:
    scene = composed.scene
    media = (add_image(scenes.paint(scene, scenery, composed.picture)),)
    labels = composed.labels()
    for dataset, branches in (
        ("captions", questions.captions(scene)),
        ("pointing", questions.places("pointing", labels)),
        ("counting", questions.places("point_count", labels)),
        ("vqa", composed.questions()),
        ("positions", questions.positions(scene)),
    ):
        yield dataset, split, Example(scene.key, branches, media, scene.info())


def films(files: Mapping[str, bytes], add_video: AddImage, counts: Counts) -> Iterator[Item]:
    """Clips of moving objects with captions, places, tracks and questions; then real footage."""
    used = [photo for photo in photos.PHOTOS if photo.topic]
    scenery = {photo.name: _cut(_opened(files[photo.path]), photo.scenery) for photo in used}
    for split, wanted, count in (
        ("train", "train", counts.train_films),
        ("validation", "train", counts.validation_films),
        ("test", "held_out", counts.test_films),
    ):
        ground = [(photo.name, photo.topic) for photo in used if split != "train" or photo.split == "train"]
        for index in range(count):
            film = clips.plan(f"{split}/{index:05d}", ground, wanted)
            media, info = (add_video(clips.paint(film, scenery)),), film.info()
            held_out = split == "test"
            yield "video_caption", split, Example(film.key, film_texts.captions(film), media, info)
            yield "video_vqa", split, Example(film.key, film_texts.questions(film), media, info)
            yield "video_points", split, Example(film.key, film_texts.points(film, held_out=held_out), media, info)
            branches = film_texts.tracks(film, held_out=held_out)
            yield "video_tracks", split, Example(film.key, branches, media, info, Clip(rate=clips.RATE))
    yield from _footage(files, add_video)


def _footage(files: Mapping[str, bytes], add_video: AddImage) -> Iterator[Item]:
    for shot in footage.SHOTS:
        media, key = (add_video(files[shot.path]),), f"footage/{shot.name}"
        clip = Clip(shot.start, shot.end)
        captions = (
            Branch("video_long_caption", (Turn("", shot.caption),)),
            Branch("video_short_caption", (Turn("", shot.short),)),
        )
        yield "video_caption", shot.split, Example(key, captions, media, clip=clip)
        if shot.questions:
            asked = tuple(Branch("user_qa", (Turn(question, answer),)) for question, answer in shot.questions)
            yield "video_vqa", shot.split, Example(key, asked, media, clip=clip)
        if shot.tracks:
            followed = tuple(
                Branch(
                    "video_point_track_per_frame",
                    (Turn(label, Tracks(label, (_track(places),))),),
                )
                for label, places in shot.tracks.items()
            )
            yield "video_tracks", shot.split, Example(key, followed, media, clip=replace(clip, rate=clips.RATE))


def _track(places: tuple[tuple[float, float], ...]) -> tuple[Point, ...]:
    return tuple(Point(number / clips.RATE, x, y) for number, (x, y) in enumerate(places))


def dialogues(counts: Counts) -> Iterator[Item]:
    """Text only. The held-out splits are other draws from the same rules, so some of their exchanges repeat."""
    for split, count in (
        ("train", counts.train_dialogues),
        ("validation", counts.held_out_dialogues),
        ("test", counts.held_out_dialogues),
    ):
        for index in range(count):
            yield "text", split, dialogue(f"{split}/{index:05d}")


def _fractions(label: str, places: tuple[tuple[float, float], ...], size: tuple[int, int]) -> Points:
    return Points(label, tuple(Point(1, x / size[0], y / size[1]) for x, y in places))


def _opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def _shrunk(image: Image.Image) -> Image.Image:
    scale = min(1.0, PHOTO_SIDE / max(image.size))
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)


def _cut(image: Image.Image, part: tuple[float, float, float, float]) -> Image.Image:
    left, top, right, bottom = part
    return image.crop(
        (int(left * image.width), int(top * image.height), int(right * image.width), int(bottom * image.height))
    )

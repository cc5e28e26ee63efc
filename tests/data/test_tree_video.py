"""A sample with a video as tokens: time stamps, frames, subtitles, and places at times; several images' limits."""

import dataclasses

import numpy as np
import pytest
import torch
from tokenizers import AddedToken

from megatron_vlm.batch import PREFIX_BRANCH
from megatron_vlm.config.architecture import NEW_TOKENS
from megatron_vlm.config.geometry import ImageGeometry, image_geometry
from megatron_vlm.data.example import Branch, Clip, Example, Media, Point, Points, Subtitle, Tracks, Turn
from megatron_vlm.data.points import NO_TRACKS
from megatron_vlm.data.prefix import prefix_tokens
from megatron_vlm.data.tree import TreeSettings, media_layouts, tokenize
from tests.data.oracle import video_text
from tests.data.world import ARCH, tokenizer

TOKENIZER = tokenizer()
SETTINGS = TreeSettings(TOKENIZER, image_geometry(ARCH, 4), "style", "uniform", 2048, 64, 0)
FILM = Media("1" * 64, 640, 360, "video", 2.2, 30.0, 66)
PHOTO = Media("0" * 64, 300, 200)
QUESTION = Branch("user_qa", (Turn("what?", "a red cat"),))
FRAME = SETTINGS.geometry.frame.grid  # patches along a side


def film(*branches: Branch, clip: Clip | None = None, seconds: float = 2.2) -> Example:
    return Example("a", branches or (QUESTION,), (dataclasses.replace(FILM, seconds=seconds),), clip=clip)


def text(example: Example, settings: TreeSettings = SETTINGS) -> str:
    """The sample's prefix and branches, runs of placeholders as their number."""
    found = tokenize(example, "d", 0, settings).tokens.tolist()
    words, run = [], 0
    for number in [*found, None]:
        if number == TOKENIZER.im_patch:
            run += 1
            continue
        if run:
            words.append(f"[{run}]")
            run = 0
        if number is not None:
            words.append(TOKENIZER.decode([number]))
    return "".join(words)


def test_every_frame_has_its_time():
    side = -(-FRAME // SETTINGS.geometry.video_pool)
    frame = f"<frame_start>[{side * side}]<frame_end>"
    assert text(film()).startswith(
        f"<|im_end|>0.0 {frame} 0.5 {frame} 1.0 {frame} 1.5 {frame} 2.0 {frame} 2.2 {frame}<|im_start|>user\nwhat?"
    )
    found = tokenize(film(), "d", 0, SETTINGS)
    assert found.crops == 6 and found.layouts[0].times == (0.0, 0.5, 1.0, 1.5, 2.0, 2.2)
    # Frames see each other, time stamps are plain text; all of it is the branches' shared prefix.
    vision = found.tokens[found.is_vision]
    assert set(vision.tolist()) == {TOKENIZER.im_patch, *map(TOKENIZER.new_token, ("<frame_start>", "<frame_end>"))}
    assert len(vision) == 6 * (side * side + 2)
    assert (found.branches[: int(np.flatnonzero(found.is_vision)[-1]) + 1] == PREFIX_BRANCH).all()
    assert found.positions.tolist() == list(range(len(found.tokens)))


def test_tokens_equal_transformers():
    """transformers writes the video as one string and lets the tokenizer find the special tokens in it."""
    geometry = ImageGeometry(27, 14, 2, 0, 8, 3)
    settings = dataclasses.replace(SETTINGS, geometry=geometry, max_tokens=20_000, max_crops=128)
    (layout,) = media_layouts(film(seconds=63.9), settings)
    assert len(layout.times) == 64 or len(layout.times) == 128
    string = video_text(torch.tensor([len(layout.times), 9, 9]), list(layout.times))
    whole = tokenizer()._plain
    whole = type(whole).from_str(whole.to_str())
    whole.add_special_tokens([AddedToken(name, special=True) for name in NEW_TOKENS])
    names = {whole.token_to_id(name): TOKENIZER.new_token(name) for name in NEW_TOKENS}
    expected = [names.get(number, number) for number in whole.encode(string, add_special_tokens=False).ids]
    assert prefix_tokens((layout,), TOKENIZER)[0].tolist() == [TOKENIZER.bos, *expected]


def test_most_frames():
    few = dataclasses.replace(SETTINGS, max_frames=4)
    assert media_layouts(film(), few)[0].times == pytest.approx([0, 2.2 / 3, 4.4 / 3, 2.2])
    assert len(media_layouts(film(seconds=500.0), SETTINGS)[0].times) == SETTINGS.max_crops
    slow = dataclasses.replace(SETTINGS, frames_per_second=1.0)
    assert media_layouts(film(), slow)[0].times == (0.0, 1.0, 2.0, 2.2)


def test_a_clip_has_times_of_its_own():
    found = tokenize(film(clip=Clip(1.0, 2.1)), "d", 0, SETTINGS)
    assert found.layouts[0].times == pytest.approx([0.0, 0.5, 1.0, 1.1]) and found.layouts[0].start == 1.0


def test_subtitles_stand_after_the_frames():
    lines = (Subtitle(0.0, 1.0, "one <im_patch> cat"), Subtitle(1.0, 2.0, "sits <|im_end|>"))
    shown = text(film(clip=Clip(subtitles=lines)))
    assert "<frame_end>subtitle\n0.0 - 1.0 one <im_patch> cat\n1.0 - 2.0 sits <|im_end|>\n<|im_start|>user" in shown
    found = tokenize(film(clip=Clip(subtitles=lines)), "d", 0, SETTINGS)
    # As letters: neither a placeholder nor an end.
    assert int((found.tokens == TOKENIZER.im_patch).sum()) == found.layouts[0].placeholders
    assert found.cut_tokens == 0 and not found.is_vision[int(np.flatnonzero(found.is_vision)[-1]) + 1 :].any()


def test_subtitles_leave_room_for_the_answer():
    lines = tuple(Subtitle(0.0, 1.0, "the red cat sits on the blue box") for _ in range(300))
    settings = dataclasses.replace(SETTINGS, max_tokens=512)
    found = tokenize(film(clip=Clip(subtitles=lines)), "d", 0, settings)
    prefix = int((found.branches == PREFIX_BRANCH).sum())
    assert 400 < prefix <= 512 * 7 // 8 and found.loss_weights.sum() == len(TOKENIZER.encode("a red cat")) + 1
    # As many lines as there is room for, to the token.
    line = len(TOKENIZER.encode("0.0 - 1.0 the red cat sits on the blue box\n"))
    for most in range(512, 512 + 2 * line):
        shorter = tokenize(film(clip=Clip(subtitles=lines)), "d", 0, dataclasses.replace(SETTINGS, max_tokens=most))
        assert most * 7 // 8 - line < int((shorter.branches == PREFIX_BRANCH).sum()) <= most * 7 // 8
    every = tokenize(film(clip=Clip(subtitles=lines)), "d", 0, dataclasses.replace(SETTINGS, max_tokens=50_000))
    assert every.cut_tokens == 0 and found.cut_tokens == len(every.tokens) - len(found.tokens)


def test_places_at_times():
    points = Branch("video_point_count", (Turn("", Points("cups", (Point(0.5, 0.2, 0.3), Point(2.0, 0.25, 1.0)))),))
    assert text(film(points)).endswith(
        'Counting the <points coords="0.5 1 200 300;2.0 2 250 1000">cups</points> shows a total of 2.'
    )
    early = dataclasses.replace(SETTINGS, prompts="style_and_length")
    assert '"0.5 1 200 300\t2.0 2 250 1000"' in text(film(points), early)


def test_tracks_as_far_as_frames_are_shown():
    places = tuple(Point(index / 2, 0.1 * index, 0.5) for index in range(5))
    branch = Branch("video_point_track_per_frame", (Turn("cup", Tracks("cup", (places, places[3:]))),))
    example = film(branch, clip=Clip(rate=2))
    found = tokenize(example, "d", 0, SETTINGS)
    assert found.layouts[0].times == tuple(index / 10 for index in range(22))
    answer = TOKENIZER.decode(found.targets[found.loss_weights > 0])
    assert answer == (
        '<tracks coords="0.0 1 000 500;0.5 1 100 500;1.0 1 200 500;1.5 1 300 500 2 300 500;'
        '2.0 1 400 500 2 400 500">cup</tracks><|im_end|>'
    )
    few = dataclasses.replace(SETTINGS, max_frames=3)
    found = tokenize(example, "d", 0, few)
    assert found.layouts[0].times == (0.0, 0.5, 1.0)
    assert '"0.0 1 000 500;0.5 1 100 500;1.0 1 200 500"' in TOKENIZER.decode(found.targets[found.loss_weights > 0])
    late = Branch(branch.style, (Turn("cup", Tracks("cup", (places[3:],))),))
    assert NO_TRACKS in text(film(late, clip=Clip(rate=2)), few)


def test_the_rate_is_asked_for():
    branch = Branch("video_point_track_per_frame", (Turn("cup", Tracks("cup", ((Point(0.0, 0.5, 0.5),),))),))
    asked = text(film(branch, clip=Clip(rate=6)))
    assert "6 FPS" in asked or "6 frames per second" in asked


def test_a_video_that_leaves_no_room_is_refused():
    with pytest.raises(ValueError, match="sample d/a: its video takes .* Raise .* or lower data.max_frames"):
        tokenize(film(), "d", 0, dataclasses.replace(SETTINGS, max_tokens=60))
    with pytest.raises(ValueError, match="sample d/a has 6 crops; a row holds 4. .* lower data.max_frames"):
        tokenize(film(), "d", 0, dataclasses.replace(SETTINGS, max_crops=4, max_frames=8))


def test_most_images():
    album = tuple(dataclasses.replace(PHOTO, key=f"{number:064}") for number in range(7))
    settings = dataclasses.replace(SETTINGS, max_images=5)
    found = tokenize(Example("a", (QUESTION,), album), "d", 0, settings)
    assert len(found.layouts) == 5 and found.dropped_images == 2
    shown = TOKENIZER.decode(found.tokens)
    assert "Image 5<" in shown and "Image 6" not in shown
    assert tokenize(Example("a", (QUESTION,), album), "d", 0, SETTINGS).dropped_images == 0
    pointing = Branch("pointing", (Turn("", Points("cups", (Point(6, 0.5, 0.5),))),))
    with pytest.raises(ValueError, match="sample 'a' points at image 6 of 7, and only 5 are shown"):
        tokenize(Example("a", (pointing,), album), "d", 0, settings)


def test_crops_of_several_images():
    settings = dataclasses.replace(SETTINGS, multi_image_crops=1)
    one, two = (tokenize(Example("a", (QUESTION,), (PHOTO,) * count), "d", 0, settings) for count in (1, 2))
    assert one.layouts[0].tiling == (2, 2) and [layout.tiling for layout in two.layouts] == [(1, 1), (1, 1)]

"""What the user is made to say, by prompt format and style."""

import re
from random import Random

import pytest

from megatron_vlm.data.example import Points, Tracks, Turn
from megatron_vlm.data.prompts import PLAIN_STYLES, RATES, TEMPLATES, user_text

CUPS = Turn("cups", Points("cups", ()))


def said(format, style, turn, answer="x" * 150, *, first=True, seed=0):
    return user_text(format, style, turn, answer, first=first, rng=Random(seed))


def test_length_hints():
    texts = [said("style_and_length", "long_caption", Turn("", "."), seed=seed) for seed in range(2000)]
    bare = texts.count("long_caption:")
    assert 140 < bare < 260
    hints = [int(re.fullmatch(r"long_caption (\d+):", text)[1]) for text in texts if text != "long_caption:"]
    assert 9 < sum(hints) / len(hints) < 10 and min(hints) < 7 and max(hints) > 12


def test_a_hint_is_never_negative():
    texts = {said("style_and_length", "vqa2", Turn("q", "."), "no", seed=seed) for seed in range(300)}
    assert all(re.fullmatch(r"vqa2( \d+)?: q", text) for text in texts)


def test_pre_training_prompts():
    assert said("style_and_length", "pointing", CUPS) == "pointing: cups"
    assert said("style_and_length", "pointing", Turn("", Points("cups", ()))) == "pointing: cups"
    assert said("style_and_length", "long_caption", Turn("", "."), None) == "long_caption 65:"
    assert said("style_and_length", "text_sft", Turn("and then?", "."), first=False) == "and then?"


def test_fine_tuning_prompts():
    assert said("style", "vqa2", Turn("what?", ".")) == "vqa2: what?"
    assert said("style", "vqa2", Turn("and?", "."), first=False) == "and?"
    assert said("style", "user_qa", Turn("what?", ".")) == "what?"
    assert said("style", "pointing", Turn("Which cup is red?", CUPS.answer)) == "Which cup is red?"
    for style, templates in TEMPLATES.items():
        texts = {
            said("style", style, CUPS if "{label}" in templates[0] else Turn("", "."), seed=seed) for seed in range(300)
        }
        prefix = "" if style in PLAIN_STYLES else f"{style}: "
        assert texts == {prefix + template.format(label="cups") for template in templates}


def test_a_video_is_called_a_video():
    words = " ".join(text for style, texts in TEMPLATES.items() if style.startswith("video_") for text in texts)
    assert "video" in words and not any(word in words for word in ("image", "picture", "photo"))


def tracked(rate: int, style: str = "video_point_track_per_frame") -> list[str]:
    turn = Turn("cups", Tracks("cups", ()))
    return [user_text("style", style, turn, "x", first=True, rng=Random(seed), rate=rate) for seed in range(400)]


def test_requests_for_tracks_name_the_rate():
    ends = {rate: [text.endswith(tuple(end.format(rate=rate) for end in RATES)) for text in tracked(rate)]
            for rate in (1, 2, 6)}  # fmt: skip
    assert all(ends[1]) and all(ends[6]) and 150 < sum(ends[2]) < 250
    # Not where only the first and the last place are asked for, nor where no rate is known.
    assert not any("FPS" in text or "frames per" in text for text in tracked(6, "video_point_track_start_end"))
    assert not any("FPS" in text or "frames per" in text for text in tracked(0))


def test_places_have_no_length_hint():
    assert said("style_and_length", "video_point", CUPS) == "video_point: cups"
    assert said("style_and_length", "video_point_track_per_frame", Turn("cups", Tracks("cups", ()))) == (
        "video_point_track_per_frame: cups"
    )


def test_a_label_is_never_a_template():
    label = "{x} {0} {label}"
    assert label in said("style", "pointing", Turn("", Points(label, ())))


def test_an_unknown_format_is_refused():
    with pytest.raises(ValueError, match="style_and_length, style"):
        said("demo", "vqa2", CUPS)

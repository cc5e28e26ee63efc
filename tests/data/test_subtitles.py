"""Subtitles: lines near a shown frame, as text."""

from megatron_vlm.data.example import Subtitle
from megatron_vlm.data.subtitles import text

LINES = (Subtitle(0.0, 1.25, "Good morning."), Subtitle(3.0, 3.5, "And now"), Subtitle(61.04, 62.0, "the end."))


def test_form():
    assert text(LINES, (0.0, 3.0, 61.5)) == (
        "subtitle\n0.0 - 1.2 Good morning.\n3.0 - 3.5 And now\n61.0 - 62.0 the end.\n"
    )


def test_only_lines_near_a_shown_frame():
    assert text(LINES, (0.0,)) == "subtitle\n0.0 - 1.2 Good morning.\n"
    assert text(LINES, (2.25,)) == "subtitle\n0.0 - 1.2 Good morning.\n3.0 - 3.5 And now\n"
    # A second before and after the line itself; its own ends count.
    assert text(LINES, (2.3, 30.0)) == text(LINES, (4.5,)) == "subtitle\n3.0 - 3.5 And now\n"
    assert text(LINES, (10.0, 60.0)) == "" == text((), (1.0,))

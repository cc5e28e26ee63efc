"""Lines of one's own with wrong values in any place: a named fault, or a sample that says nothing of it."""

from __future__ import annotations

from datetime import datetime

from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vlm.data import formats
from megatron_vlm.data.example import Media, from_json, to_json
from tests.data.sets.test_source import NO_TEXT, WRONG, changed, places

IMAGE = Media("0" * 64, 40, 20)
VIDEO = Media("1" * 64, 64, 48, "video", 4.0, 25.0, 100)
LINES = (
    ({"question": "What?", "answer": "Red.", "key": "asked", "info": {"id": 3}}, (IMAGE,)),
    ({"label": "dots", "points": [[10, 5], [30, 20, 1]], "style": "point_count", "prompt": "Dots?"}, (IMAGE,)),
    ({"branches": [{"caption": "Blue."}, {"label": "cats", "points": [], "unit": "percent"}]}, (IMAGE,)),
    (
        {"conversations": [{"from": "human", "value": "<image>Which?"}, {"from": "gpt", "value": "That."}]},
        (IMAGE, IMAGE),
    ),
    ({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}, ()),
    ({"label": "ball", "tracks": [[[12, 8, 0.0], [30, 7, 0.5]]], "rate": 2, "start": 0.5, "end": 3.5}, (VIDEO,)),
    ({"start": 1.0, "end": 3.5, "caption": "A film.", "subtitles": [[0.0, 1.5, "Hello."]]}, (VIDEO,)),
)
#: What JSON can hold of them.
JSON = WRONG.filter(lambda value: not isinstance(value, (bytes, datetime)))


@settings(max_examples=100, deadline=None)
@given(line=st.sampled_from(LINES), data=st.data())
def test_a_wrong_value_anywhere_is_a_named_fault_or_harmless(line: tuple[dict, tuple[Media, ...]], data: st.DataObject):
    record, media = line
    wrong = changed(record, data.draw(st.sampled_from(list(places(record)))), data.draw(JSON))
    try:
        sample = formats.read_record(wrong, key="k", media=media)
        text = to_json(sample)
        text.encode()
    except ValueError as error:
        assert str(error)
        return
    assert from_json(text) == sample
    for turn in (turn for branch in sample.branches for turn in branch.turns):
        said = f"{turn.prompt} {turn.answer if isinstance(turn.answer, str) else turn.answer.label}"
        assert not any(word in said for word in NO_TEXT)

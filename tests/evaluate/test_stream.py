"""Text comes whole: the pieces are the text, and no piece ends inside a character."""

from __future__ import annotations

import pytest

from megatron_vlm.data.tokens import Tokenizer
from megatron_vlm.evaluate.stream import Stream
from tests.convert import world


@pytest.mark.parametrize("text", ["two cats", "naïve café, 猫が二匹 🐈🐈 – done", "👩‍👩‍👧", ""])
def test_pieces_are_the_text_in_whole_characters(text: str) -> None:
    tokenizer, pieces = Tokenizer(world.tokenizer(), world.LANGUAGE), []
    ids = tokenizer.encode(text)
    stream = Stream(tokenizer, pieces.append)
    for token in ids:
        stream.add(token)
    stream.close()
    assert "".join(pieces) == text and "\ufffd" not in "".join(pieces)
    assert len(pieces) > 1 or len(ids) < 2
    if "猫" in text:
        assert len(pieces) < len(ids)  # this tokenizer cuts it into bytes


def test_bytes_that_are_no_character_do_not_hold_up_the_rest() -> None:
    tokenizer, pieces = Tokenizer(world.tokenizer(), world.LANGUAGE), []
    first = tokenizer.encode("猫")[0]
    stream = Stream(tokenizer, pieces.append)
    for token in [first] * 9:
        stream.add(token)
    stream.close()
    assert "".join(pieces) == tokenizer.decode([first] * 9) and len(pieces) == 3

"""Families of conversations: chat messages with or without images, texts with [USER] and [ASSISTANT] tags."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from megatron_vlm.data.example import Branch, Turn
from megatron_vlm.data.sets.draft import Draft
from megatron_vlm.data.sets.questions import check_images, without_places
from megatron_vlm.data.sets.row import LeftOut, Row, words

_TAGS = re.compile(r"\[(USER|ASSISTANT)\]")
_PLACEHOLDERS = re.compile(r"\s*<(?:image|video)>\s*|\(image \d+: <image>\)\s*", re.IGNORECASE)
_USER, _ASSISTANT = ("user", "human"), ("assistant", "gpt")
#: Rows of Tulu that Molmo2 leaves out, by a word in their category or source.
DROPPED = ("code", "coding", "non-english", "non_english", "puzzle", "verifiable", "hardcoded")


def chat(
    row: Row,
    *,
    style: str = "user_qa",
    with_media: bool = True,
    max_images: int = 0,
    min_images: int = 1,
    path: str = "",
) -> Iterator[Draft]:
    """`messages` of {role, content} or {from, value}, as one conversation. A system message goes before the first
    question. `<image>` in them is dropped: images come first. Rows with too many or too few images are left out."""
    media = row.media(path) if with_media else ()
    if with_media:
        check_images(len(media), min_images, max_images)
    yield Draft((Branch(style, turns(row)),), media)


def tulu(row: Row, *, max_first_tokens: int) -> Iterator[Draft]:
    """A text conversation of Tulu. Raises LeftOut for what Molmo2 leaves out: code, languages other than English,
    puzzles, verifiable reasoning, hardcoded sources, empty messages, special tokens, a long first message."""
    kind = f"{row.get('category') or ''} {row.get('source') or ''}".lower()
    if dropped := [word for word in DROPPED if word in kind]:
        raise LeftOut(f"it is of the kind {dropped[0]!r}.")
    for mark in ("empty_messages", "has_special_token"):
        if row.get(mark):
            raise LeftOut(f"it is marked {mark}.")
    if row.get("first_message_tokens") is not None and row.number("first_message_tokens") > max_first_tokens:
        raise LeftOut(f"its first message has more than {max_first_tokens} tokens.")
    yield from chat(row, style="text_sft", with_media=False)


def tagged(row: Row, *, style: str = "user_qa", unpointed: bool = False) -> Iterator[Draft]:
    """`question` is a text with [USER] and [ASSISTANT] tags that ends with the user; `answer` answers the last one.

    unpointed: ask for no places before questions of how many.
    """
    parts = _TAGS.split(row.text("question"))
    said = [(parts[place], parts[place + 1].strip()) for place in range(1, len(parts) - 1, 2)]
    if not said:
        said = [("USER", parts[0].strip())]
    said.append(("ASSISTANT", row.text("answer")))
    if unpointed:
        said = [(who, without_places(text) if who == "USER" else text) for who, text in said]
    messages = [{"role": who.lower(), "content": text} for who, text in said]
    yield Draft((Branch(style, turns(Row({"messages": messages}))),), row.media())


def fixed_answers(row: Row) -> Iterator[Draft]:
    """One `response` for each of `questions` (who are you?), without media. Molmo2 pairs most of them with a random
    image or video; here they stay text."""
    answer = row.text("response")
    for question in row.texts("questions"):
        yield Draft((Branch("user_qa", (Turn(question, answer),)),))


def turns(row: Row) -> tuple[Turn, ...]:
    """`messages` as pairs. Raises ValueError where user and assistant do not alternate."""
    messages = row.items("messages")
    texts: list[str] = []
    system = ""
    for message in messages:
        who, text = _message(row, message)
        if who == "system":
            system = text
            continue
        expected = _ASSISTANT if len(texts) % 2 else _USER
        if who not in expected or not text:
            raise ValueError(f"message {len(texts)} is {text[:40]!r} from {who!r}; needed a text from {expected[0]!r}.")
        texts.append(text)
    if not texts or len(texts) % 2:
        raise ValueError(f"a conversation of {len(texts)} messages: needed pairs of question and answer.")
    if system:
        texts[0] = f"System: {system}\n{texts[0]}"
    return tuple(Turn(asked, said) for asked, said in zip(texts[::2], texts[1::2], strict=True))


def _message(row: Row, message: Any) -> tuple[str, str]:
    if not isinstance(message, Mapping):
        raise row.bad("messages", message, "an object with role and content")
    who = words(message.get("role") or message.get("from"))
    text = words(message.get("content") or message.get("value"))
    return who, _PLACEHOLDERS.sub("", text).strip() if who in _USER else text.strip()

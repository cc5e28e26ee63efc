"""An answer on the terminal while it is being written."""

from __future__ import annotations

from collections.abc import Callable

from megatron_vlm.data.tokens import Tokenizer

#: Bytes of the longest character, and a token has at least one: what so many tokens leave open is no character.
LONGEST = 4


class Stream:
    """Hands on the text of tokens as they come, in whole characters."""

    def __init__(self, tokenizer: Tokenizer, write: Callable[[str], None]) -> None:
        self._tokenizer, self._write = tokenizer, write
        self._open: list[int] = []

    def add(self, token: int) -> None:
        """The next token of the answer."""
        self._open.append(token)
        text = self._tokenizer.decode(self._open)
        if not text.endswith("\ufffd") or len(self._open) >= LONGEST:
            self._open.clear()
            self._write(text)

    def close(self) -> None:
        """The answer has ended: what is still open is no whole character, and is written as what it is."""
        if self._open:
            self._write(self._tokenizer.decode(self._open))
            self._open.clear()

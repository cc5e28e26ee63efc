"""Text -> ids and back, over a `tokenizer.json`. Text from data is plain text: no string in it becomes a special id.

The tokenizer's own added tokens (`<|im_end|>`, ...) and the model's new ones (`<im_patch>`, ...) are reached by name
only. `train` makes a small tokenizer of the same kind.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import tokenizers

from megatron_vlm.config.architecture import NEW_TOKENS, VISION_TOKENS, LanguageArchitecture

#: Added tokens of Qwen3 that its chat format uses; a tokenizer must have the last two.
ADDED = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
#: What stands before a user's words in a turn; encoded with them.
USER = "user\n"


class Tokenizer:
    """Plain text <-> ids, and the ids that have a name.

    bos = eos: `<|im_end|>`, as Molmo2 does over Qwen3, which has no token for the beginning.
    hash:      sha256 of the tokenizer.json.
    """

    def __init__(self, definition: str, language: LanguageArchitecture, *, name: str = "tokenizer.json") -> None:
        self._definition, self._language, self._name = definition, language, name
        self.hash = hashlib.sha256(definition.encode()).hexdigest()
        self.vocab_size = language.vocab_size
        try:
            parsed = json.loads(definition)
            added = {token["content"]: int(token["id"]) for token in parsed["added_tokens"]}
            # The tokenizer of a Molmo2 export holds them already; elsewhere the model brings them.
            for row, token in enumerate(NEW_TOKENS):
                if added.get(token) == language.vocab_size + row:
                    del added[token]
            # Without its added tokens the library has no strings to look for: everything is plain text.
            plain = dict(parsed, added_tokens=[], post_processor=None, truncation=None, padding=None)
            self._plain = tokenizers.Tokenizer.from_str(json.dumps(plain))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{name} is not a tokenizer.json ({error}).") from error
        self._check(added)
        self.names = dict(added)
        self.names.update({token: self.vocab_size + row for row, token in enumerate(NEW_TOKENS)})
        self._strings = {number: token for token, number in self.names.items()}
        self.eos = self.bos = self.names["<|im_end|>"]
        self.im_patch = self.names["<im_patch>"]
        self.vision_ids = frozenset(self.names[token] for token in VISION_TOKENS)
        self._fixed = lru_cache(maxsize=4096)(self._encode)

    def _check(self, added: dict[str, int]) -> None:
        missing = [token for token in ADDED[1:] if token not in added]
        if missing:
            raise ValueError(f"{self._name} has no added token {' and '.join(missing)}; Qwen's chat format needs them.")
        largest = max([*self._plain.get_vocab().values(), *added.values()])
        if largest >= self.vocab_size:
            raise ValueError(
                f"{self._name} has ids up to {largest}, but the model's vocabulary has {self.vocab_size} rows. "
                "Choose the tokenizer of the preset (data.tokenizer), or a preset that fits this one (model.preset)."
            )

    @classmethod
    def load(cls, setting: str | Path, language: LanguageArchitecture) -> Tokenizer:
        """A tokenizer.json, a directory that holds one, or `sample`: the one of the bundled sample data.

        Raises ValueError where there is none, or where it does not fit the model's vocabulary.
        """
        if str(setting) == "sample":
            # Only here: the builder of the sample data itself needs this module.
            from megatron_vlm.data import sample

            path = Path(sample.build()) / "tokenizer.json"
        else:
            path = Path(setting)
            path = path / "tokenizer.json" if path.is_dir() else path
        if not path.is_file():
            raise ValueError(f"data.tokenizer={str(setting)!r}: there is no file {path}.")
        return cls(path.read_text(encoding="utf-8"), language, name=str(path))

    @property
    def definition(self) -> str:
        """The tokenizer.json."""
        return self._definition

    def __getstate__(self) -> dict[str, Any]:
        return {"definition": self._definition, "language": self._language, "name": self._name}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Tokenizer.__init__(self, state["definition"], state["language"], name=state["name"])

    def encode(self, text: str) -> list[int]:
        """Ids of plain text: `<|im_end|>` in it is encoded as its letters."""
        return self._plain.encode(text, add_special_tokens=False).ids

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each, on all cores and without Python's lock."""
        return [one.ids for one in self._plain.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_fixed(self, text: str) -> tuple[int, ...]:
        """`encode` for strings that come again and again (prompts, templates): remembered."""
        return self._fixed(text)

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.encode(text))

    def new_token(self, name: str) -> int:
        """Id of one of NEW_TOKENS."""
        return self.vocab_size + NEW_TOKENS.index(name)

    def user_turn(self, text: str, *, first: bool) -> list[int]:
        """Ids of a user's turn and of the opening of the answer, in Qwen's chat format."""
        return self.turn(self.encode(USER + text), first=first)

    def turn(self, ids: list[int], *, first: bool) -> list[int]:
        """`user_turn` of a text for which USER and the text are these ids."""
        start, end = self.names["<|im_start|>"], self.names["<|im_end|>"]
        newline, assistant = self.encode_fixed("\n"), self.encode_fixed("assistant\n")
        opening = [] if first else [end, *newline]
        return [*opening, start, *ids, end, *newline, start, *assistant]

    def decode(self, ids: Iterable[int], *, specials: bool = True) -> str:
        """Text of ids; those with a name as that name, or left out. Ids that mean nothing become U+FFFD."""
        pieces: list[str] = []
        run: list[int] = []
        for number in [*ids, None]:
            if number is not None and number not in self._strings and 0 <= number < self.vocab_size:
                run.append(int(number))
                continue
            if run:
                pieces.append(self._plain.decode(run, skip_special_tokens=False))
                run = []
            if number is not None and specials:
                pieces.append(self._strings.get(int(number), "\ufffd"))
        return "".join(pieces)


def train(texts: Iterable[str], vocab_size: int) -> str:
    """The tokenizer.json of a byte-level BPE trained on `texts`, with at most `vocab_size` ids.

    Digits are single tokens, any text comes back exactly, and the added tokens are Qwen3's, at the end.
    """
    added = list(ADDED)
    least = 256 + len(added)
    if vocab_size < least:
        raise ValueError(f"a byte-level tokenizer needs at least {least} ids, not {vocab_size}.")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size - len(added),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(added)
    return tokenizer.to_str()

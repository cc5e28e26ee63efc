"""A language model behind an OpenAI-compatible endpoint as the judge of captions.

Every request has a time limit and is tried again where the endpoint is slow, busy or talks nonsense. An answer on which
it gives no verdict is not scored; where it does not answer several questions in a row, it is not asked any more.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tenacity
import urllib3

from megatron_vlm.evaluate.statements import MOST_STATEMENTS, JudgeError, JudgeRefused

#: Seconds for one request, tries of one question, seconds to wait between them at most.
TIMEOUT_S, TRIES, LONGEST_WAIT_S = 60.0, 4, 20.0
#: Questions in a row without a verdict after which the endpoint counts as down.
PATIENCE = 3
#: Most bytes of a reply.
MOST_BYTES = 1 << 20
_SPLIT = (
    "Break the caption into short statements of one fact each, in the caption's own words where possible. Reply with a "
    "JSON array of strings and nothing else.\n\nCaption:\n{caption}"
)
_STATED = (
    "For each numbered statement, decide whether the caption states it or it follows directly from the caption. Reply "
    "with a JSON array of {count} strings, each `stated` or `not stated`, in the order of the statements, and nothing "
    "else.\n\nCaption:\n{caption}\n\nStatements:\n{statements}"
)
_ARRAY = re.compile(r"\[[^\[\]]*\]")


class _Again(Exception):
    """A reply that another try may mend."""


class Endpoint:
    """Judge at `url` (`https://host/v1`). Several threads may ask.

    key:  sent as a bearer token, never shown.
    kept: file of verdicts that were given before, by question: not asked again.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key: str = "",
        timeout_s: float = TIMEOUT_S,
        tries: int = TRIES,
        wait_s: float = 1.0,
        kept: Path | None = None,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"the judge's address {url!r} is no http(s) address. Needed one like https://host/v1.")
        self.name = f"{model} at {url}"
        self._url, self._model, self._tries, self._wait_s = f"{url.rstrip('/')}/chat/completions", model, tries, wait_s
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self._pool = urllib3.PoolManager(timeout=urllib3.Timeout(total=timeout_s), retries=False)
        self._silent, self._timeout_s = 0, timeout_s
        self._kept, self._known, self._writing = kept, _read(kept) if kept else {}, threading.Lock()

    def statements(self, caption: str) -> list[str]:
        if not caption.strip():
            return []
        found = self._ask(_SPLIT.format(caption=caption), _strings)
        return found[:MOST_STATEMENTS]

    def stated(self, statements: Sequence[str], caption: str) -> list[bool]:
        if not statements:
            return []
        numbered = "\n".join(f"{number}. {text}" for number, text in enumerate(statements, start=1))
        question = _STATED.format(count=len(statements), caption=caption, statements=numbered)
        return self._ask(question, lambda reply: _verdicts(reply, len(statements)))

    def _ask(self, question: str, read: Any) -> Any:
        digest = hashlib.sha256(f"{self._model}\n{question}".encode()).hexdigest()
        if digest not in self._known:
            found = self._asked(question, read)
            with self._writing:
                self._known[digest] = found
                if self._kept:
                    self._kept.parent.mkdir(parents=True, exist_ok=True)
                    with self._kept.open("a", encoding="utf-8") as file:
                        file.write(json.dumps([digest, found], ensure_ascii=False) + "\n")
        return self._known[digest]

    def _asked(self, question: str, read: Any) -> Any:
        if self._silent >= PATIENCE:
            raise JudgeError(f"not asked any more: no verdict {PATIENCE} times in a row")
        again = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(self._tries),
            wait=tenacity.wait_exponential(multiplier=self._wait_s, max=LONGEST_WAIT_S),
            retry=tenacity.retry_if_exception_type(_Again),
            reraise=True,
        )
        try:
            found = again(lambda: read(self._reply(question)))
        except _Again as error:
            self._silent += 1
            raise JudgeError(str(error)) from None
        self._silent = 0
        return found

    def _reply(self, question: str) -> str:
        """The text of one reply. Raises _Again where another try may help, ValueError where none will."""
        body = {"model": self._model, "temperature": 0, "messages": [{"role": "user", "content": question}]}
        try:
            with self._pool.request(
                "POST", self._url, body=json.dumps(body), headers=self._headers, preload_content=False, redirect=False
            ) as response:
                data, status = self._read(response), response.status
        except (urllib3.exceptions.HTTPError, OSError) as error:
            refused = isinstance(error, urllib3.exceptions.NewConnectionError)  # which counts as one that timed out
            if isinstance(error, urllib3.exceptions.TimeoutError) and not refused:
                raise _Again("no answer in time") from None
            raise _Again(f"no connection ({type(error).__name__})") from None
        if status in (408, 409, 425, 429) or status >= 500:
            raise _Again(f"status {status}")
        if status != 200:
            raise JudgeRefused(
                f"the judge at {self._url} refuses (status {status}): {data[:200].decode(errors='replace')!r}. Check "
                "--judge, --judge-model and OPENAI_API_KEY; finished answers are kept."
            )
        try:
            text = json.loads(data)["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError):
            raise _Again("a reply that is no chat completion") from None
        if not isinstance(text, str):
            raise _Again("a reply without text")
        return text

    def _read(self, response: urllib3.BaseHTTPResponse) -> bytes:
        """The whole reply, in the time of one request: the limit of a read says nothing of one that drips."""
        deadline, data = time.monotonic() + self._timeout_s, b""
        while len(data) < MOST_BYTES and (part := response.read1(MOST_BYTES)):
            data += part
            if time.monotonic() > deadline:
                raise _Again("no answer in time")
        return data


def _read(path: Path) -> dict[str, Any]:
    """What was kept; a line that was cut off is none."""
    found: dict[str, Any] = {}
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            digest, verdict = json.loads(line)
        except (ValueError, TypeError):
            continue
        found[digest] = verdict
    return found


def _strings(reply: str) -> list[str]:
    for match in _ARRAY.finditer(reply):
        try:
            found = json.loads(match[0])
        except ValueError:
            continue
        if found and all(isinstance(one, str) for one in found):
            return found
    raise _Again("a reply without a list")


def _verdicts(reply: str, count: int) -> list[bool]:
    words = [one.strip().lower() for one in _strings(reply)]
    if len(words) != count or not set(words) <= {"stated", "not stated"}:
        raise _Again(f"a reply that is no list of {count} verdicts")
    return [one == "stated" for one in words]

"""Ends a run in which a rank hangs: a table of all ranks, their Python stacks, and a non-zero exit code.

heartbeats/rank-00003.json     what a rank does, written every few seconds by a thread of its process
heartbeats/rank-00003.stacks   its Python stacks, written when the run is given up
heartbeats/late                the rank that was first too long in one phase; all others follow
hang.txt                       the table and the stacks of all ranks; also on stderr

A rank that holds Python's lock cannot answer: faulthandler's own timer, in C, then writes its stacks and ends it.
"""

from __future__ import annotations

import faulthandler
import json
import os
import shutil
import socket
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import torch.distributed as dist

from megatron_vlm.train.ending import Ending
from megatron_vlm.train.pulse import Pulse

FOLDER, LATE, REPORT = "heartbeats", "late", "hang.txt"
#: Exit code of every rank of a run that hung.
HUNG_CODE = 86
#: Seconds between heartbeats: a tenth of the limit, within these bounds.
BEAT_S = (0.2, 5.0)
#: Heartbeats that the ranks get to answer when one is late; at least so many seconds.
ANSWER_BEATS, ANSWER_S = 3, 3.0
#: How long a rank that fails listens for what the others failed of.
_HEAR_S = 1.0
#: Seconds between two looks at what others have written.
_POLL_S = 0.2
#: Functions of these files wait for other ranks.
_WAITING = ("torch/distributed/distributed_c10d.py", "pipeline_parallel/p2p_communication.py")

Beat = dict[str, Any]


class Watchdog:
    """Watches this rank, and listens to the others, while the `with` block runs.

    limit_s: longest time in one phase; 0 = no watchdog. After a longer one every process ends with HUNG_CODE.
    """

    def __init__(self, folder: Path, limit_s: float, pulse: Pulse) -> None:
        self._run, self._folder = folder, folder / FOLDER
        self._limit_s, self._pulse = limit_s, pulse
        self._beat_s = min(max(limit_s / 10, BEAT_S[0]), BEAT_S[1])
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self._main = threading.get_ident()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    @staticmethod
    def clear(folder: Path) -> None:
        """Remove what an earlier run left. Rank 0, before any rank enters."""
        shutil.rmtree(folder / FOLDER, ignore_errors=True)
        (folder / REPORT).unlink(missing_ok=True)
        (folder / FOLDER).mkdir(parents=True)

    def __enter__(self) -> Watchdog:
        if self._limit_s:
            self._stacks = open(self._file(self._rank, "stacks"), "w", encoding="utf-8")
            self._write()
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._done.set()
        if not self._limit_s:
            return
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        if error is not None:
            # A rank whose process is gone makes the others fail in their next collective, which names nobody.
            self._write(failed=f"{type(error).__name__}: {error}".splitlines()[0])
            if isinstance(error, RuntimeError):
                time.sleep(_HEAR_S)
                if culprit := self._gone(self._beats()):
                    error.add_note(culprit)
        self._stacks.close()
        if error is None:
            for ending in ("json", "stacks"):
                self._file(self._rank, ending).unlink(missing_ok=True)

    def _file(self, rank: int, ending: str) -> Path:
        return self._folder / f"rank-{rank:05d}.{ending}"

    def _watch(self) -> None:
        while True:
            # Re-armed with every beat: it goes off only if this thread gets no turn for so long.
            faulthandler.dump_traceback_later(1.5 * self._limit_s + ANSWER_S, exit=True, file=self._stacks)
            if self._done.wait(self._beat_s):
                return
            try:
                self._write()
                late = time.monotonic() - self._pulse.since > self._limit_s
                if late or (self._folder / LATE).exists():
                    self._give_up()
            except OSError as error:  # the file system is away, or full: no reason to end, and nowhere to say so
                print(f"rank {self._rank}: no heartbeat: {error}", file=sys.stderr, flush=True)

    def _write(self, **more: Any) -> None:
        pulse = self._pulse
        beat = {
            "rank": self._rank,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "time": time.time(),
            "step": pulse.step,
            "phase": pulse.phase,
            "for_s": round(time.monotonic() - pulse.since, 1),
            "waits_in": _waits_in(self._main),
            "keys": list(pulse.keys())[:64],
        }
        path = self._file(self._rank, "json")
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(beat | more) + "\n", encoding="utf-8")
        os.replace(temporary, path)

    def _beats(self) -> list[Beat | None]:
        """The last heartbeat of each rank; None = it gave none."""
        return [self._beat(rank) for rank in range(self._world)]

    def _beat(self, rank: int) -> Beat | None:
        try:
            return json.loads(self._file(rank, "json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def _give_up(self) -> None:
        """All ranks together: stacks, then one of them the report, then the end of every process."""
        (self._folder / LATE).touch()
        faulthandler.dump_traceback(file=self._stacks)
        self._stacks.flush()
        self._write(answered=True)
        deadline = time.monotonic() + max(ANSWER_S, ANSWER_BEATS * self._beat_s)
        # One rank, the first that answers, reads what all say. If all did, hundreds of ranks would read hundreds of
        # files each, over and over, and some would have no time to answer.
        while first := not self._answered_before():
            beats = self._beats()
            if time.monotonic() > deadline or all(beat and beat.get("answered") for beat in beats):
                break
            time.sleep(_POLL_S)
        if first:
            self._report(beats)
        else:
            # A launcher that sees one process end kills the others: not before the report is written.
            while time.monotonic() < deadline + self._beat_s + ANSWER_S and not (self._run / REPORT).exists():
                time.sleep(_POLL_S)
        os._exit(HUNG_CODE)

    def _answered_before(self) -> bool:
        """Whether a rank before this one has answered."""
        return any((beat := self._beat(rank)) and beat.get("answered") for rank in range(self._rank))

    def _report(self, beats: list[Beat | None]) -> None:
        words = verdict(beats)
        stacks = []
        for rank in range(self._world):
            try:
                text = self._file(rank, "stacks").read_text(encoding="utf-8").strip()
            except OSError:
                text = ""
            stacks.append(f"--- rank {rank}\n{text or '(no stacks: the process is gone, or Python is blocked in it)'}")
        page = f"{words}\n\n{table(beats)}\n\n" + "\n\n".join(stacks) + "\n"
        print(f"error: {page}", file=sys.stderr, flush=True)
        steps = [beat["step"] for beat in beats if beat]
        Ending("failed", words, max(0, min(steps) - 1)).write(self._run)
        temporary = self._run / f".{REPORT}"
        temporary.write_text(page, encoding="utf-8")
        os.replace(temporary, self._run / REPORT)

    def _gone(self, beats: list[Beat | None]) -> str:
        """Which rank's process is gone, or failed before the others; empty = not known."""
        for rank, beat in enumerate(beats):
            if beat and not beat.get("failed") and not _lives(beat):
                return f"The process of rank {rank} is gone. Its last heartbeat: {_place(beat)}."
        failed = [beat for beat in beats if beat and beat.get("failed")]
        first = min(failed, key=lambda beat: beat["time"], default=None)
        if first is None or first["rank"] == self._rank:
            return ""
        return f"Rank {first['rank']} failed first, in {_place(first)}: {first['failed']}"


def verdict(beats: list[Beat | None]) -> str:
    """The rank at fault, in a sentence: the one that does not answer, or that waits for nobody."""
    silent = [rank for rank, beat in enumerate(beats) if not (beat and beat.get("answered"))]
    busy = [beat for beat in beats if beat and beat.get("answered") and not beat["waits_in"]]
    if silent:
        last = beats[silent[0]]
        where = f"last heard of {time.time() - last['time']:.0f} s ago in {_place(last)}" if last else "never heard of"
        return f"The run hangs: rank {silent[0]} does not answer, {where}."
    if busy:
        late = max(busy, key=lambda beat: beat["for_s"])
        keys = f" (samples {', '.join(late['keys'][:3])}, ...)" if late["keys"] else ""
        return f"The run hangs: rank {late['rank']} is in {_place(late)}{keys}; {len(beats) - len(busy)} wait for it."
    calls = sorted({beat["waits_in"] for beat in beats if beat})
    return f"The run hangs: every rank waits for another, in {', '.join(calls)}."


def table(beats: list[Beat | None]) -> str:
    """One line a rank."""
    lines = [f"{'rank':>5}  {'step':>7}  {'phase':<10}  {'for s':>7}  {'waits in':<24}  {'host':<16}  samples"]
    for rank, beat in enumerate(beats):
        if beat is None:
            lines.append(f"{rank:>5}  never heard of")
            continue
        answers = "" if beat.get("answered") else f"  no answer since {time.time() - beat['time']:.0f} s"
        lines.append(
            f"{rank:>5}  {beat['step']:>7}  {beat['phase']:<10}  {beat['for_s']:>7}  {beat['waits_in'] or '-':<24}  "
            f"{beat['host'][:16]:<16}  {', '.join(beat['keys'][:2])}{answers}"
        )
    return "\n".join(lines)


def _place(beat: Beat) -> str:
    return f"phase {beat['phase']} of step {beat['step']}, since {beat['for_s']} s"


def _lives(beat: Beat) -> bool:
    """Whether the process of a heartbeat runs; of another host, whether the heartbeat is fresh."""
    if beat["host"] != socket.gethostname():
        return time.time() - beat["time"] < ANSWER_BEATS * BEAT_S[1]
    try:
        return psutil.Process(beat["pid"]).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _waits_in(thread: int) -> str:
    """The collective that a thread is in; empty = none."""
    frame = sys._current_frames().get(thread)
    while frame is not None:
        if frame.f_code.co_filename.replace(os.sep, "/").endswith(_WAITING):
            return frame.f_code.co_name
        frame = frame.f_back
    return ""

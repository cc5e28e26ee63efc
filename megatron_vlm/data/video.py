"""Video files -> timelines and frames, through PyAV. A file's own claims count only as far as they are checked.

Packets are read once to learn when each frame is shown (`scan`). Frames are then read by that time (`read`): forwards,
jumping only where a key frame lies between the decoder and the wanted frame. A file that gives other frames than it
promised is decoded from its beginning. h, w: pixels of a frame as displayed.
"""

from __future__ import annotations

import dataclasses
import io
import time
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import islice
from typing import Any, NamedTuple, NoReturn

import av
import av.error
import numpy as np

from megatron_vlm.data.timeline import MAX_FRAMES, Timeline

#: Most pixels of a frame and seconds of a video (and MAX_FRAMES); more is refused before it is decoded.
MAX_PIXELS = 8192 * 4352
MAX_SECONDS = 6 * 3600.0
#: Most seconds of one core spent on the frames that one call wants.
MAX_DECODE_S = 600.0
#: Codecs that are decoded, by FFmpeg's names.
CODECS = frozenset(
    "h264 hevc vp8 vp9 av1 libdav1d mpeg1video mpeg2video mpeg4 msmpeg4v1 msmpeg4v2 msmpeg4 h263 "
    "mjpeg cinepak ffv1 prores wmv1 wmv2 libvpx libvpx-vp9".split()
)
#: Frames at the beginning and key frames over the whole video that are tried before its packets are believed.
TRIED_FRAMES, TRIED_KEYS = 32, 4
#: A file is cut where this share of the time that its header promises is missing, and more than so many seconds: sound
#: files differ a little from their headers.
MISSING_SHARE, MISSING_S = 0.2, 1.0


class Scan(NamedTuple):
    """What a video file is, by its packets and its first frames."""

    timeline: Timeline
    width: int
    """Pixels as displayed."""
    height: int
    extension: str
    """That the file gets in a tar."""


def container_of(data: bytes) -> tuple[str, str]:
    """FFmpeg's name of the container, and the file's extension, by its first bytes.

    Only these containers hold their frames themselves; playlists, which name other files, are none of them. Raises
    ValueError for anything else.
    """
    if data[4:8] in (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide"):
        return "mov", "mp4"
    if data[:4] == b"\x1a\x45\xdf\xa3":
        return ("matroska", "webm") if b"webm" in data[:64] else ("matroska", "mkv")
    if data[:4] == b"RIFF" and data[8:12] == b"AVI ":
        return "avi", "avi"
    if len(data) > 376 and data[0] == data[188] == data[376] == 0x47:
        return "mpegts", "ts"
    raise ValueError("its first bytes are those of no container that is read (MP4/MOV, Matroska/WebM, AVI, MPEG-TS)")


def scan(data: bytes, *, name: str) -> Scan:
    """Read all packets, and decode a few frames. `name` is what an error calls the video.

    Raises ValueError, naming the video, where it is not of an allowed kind, exceeds a limit, is cut, or has no frame.
    """
    container, stream = _opened(data, name)
    try:
        with container:
            timeline = _timeline(container, stream, name)
            width, height, sound = _first_frames(data, timeline, name)
            timeline = dataclasses.replace(timeline, seekable=timeline.timed and sound)
            return Scan(timeline, width, height, container_of(data)[1])
    except av.error.FFmpegError as error:
        raise ValueError(f"video {name} cannot be read ({error}).") from error


def read(data: bytes, timeline: Timeline, moments: Sequence[float], *, name: str) -> Iterator[np.ndarray]:
    """The frame on the screen at each of the moments, (h, w, 3) uint8 RGB, turned as displayed.

    moments: seconds from the first frame's appearance, ascending. The same array may come several times.
    Raises ValueError, naming the video, where no frame decodes or MAX_DECODE_S is over.
    """
    wanted = timeline.shown(moments)
    clock = _Clock(name)
    done = 0
    if timeline.seekable:
        for pixels in _jumping(data, timeline, wanted, clock, name):
            yield pixels
            done += 1
    if done < len(wanted):
        yield from _from_the_start(data, timeline, wanted[done:], clock, name)


class _Clock:
    """Stops a decoder that takes too long: time of this thread, so that a busy machine changes no result."""

    def __init__(self, name: str) -> None:
        self._name, self._end = name, time.thread_time() + MAX_DECODE_S

    def check(self) -> None:
        if time.thread_time() > self._end:
            raise ValueError(f"video {self._name}: its frames took more than {MAX_DECODE_S:.0f} s to decode.")


def _opened(data: bytes, name: str) -> tuple[Any, Any]:
    """The container and its first stream of moving pictures."""
    try:
        form = container_of(data)[0]
        # No further file or address is opened, whatever the container names.
        container = av.open(
            io.BytesIO(data),
            format=form,
            io_open=_refuse,
            options={"protocol_whitelist": "none", "max_pixels": str(MAX_PIXELS)},
        )
    except (av.error.FFmpegError, ValueError) as error:
        raise ValueError(f"video {name} cannot be opened ({error}). Is the file whole?") from error
    streams = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
    fault = _fault(streams[0]) if streams else "holds no moving pictures"
    if fault:
        container.close()
        raise ValueError(f"video {name} {fault}.")
    # One thread for each video: several are decoded side by side.
    streams[0].codec_context.thread_count = 1
    return container, streams[0]


def _fault(stream: Any) -> str:
    codec = stream.codec_context
    if codec is None or codec.name not in CODECS:
        return f"has the codec {codec.name if codec else 'unknown'}; read are {', '.join(sorted(CODECS))}"
    if codec.width * codec.height > MAX_PIXELS:
        return f"has frames of {codec.width}x{codec.height} pixels; at most {MAX_PIXELS} are decoded"
    return ""


def _refuse(url: str, *_: object) -> NoReturn:
    raise ValueError(f"it names another file, {url!r}, which is refused")


def _timeline(container: Any, stream: Any, name: str) -> Timeline:
    unit = Fraction(stream.time_base)
    packets: list[tuple[int, int, bool, bool]] = []
    timed = True
    for packet in container.demux(stream):
        if not packet.size:
            continue
        if len(packets) == MAX_FRAMES:
            raise ValueError(f"video {name} has more than {MAX_FRAMES} frames.")
        at = packet.pts if packet.pts is not None else packet.dts
        if at is None:
            raise ValueError(f"video {name}: packet {len(packets)} says neither when it is shown nor when decoded.")
        timed = timed and packet.pts is not None
        packets.append((at, at + (packet.duration or 0), packet.is_keyframe, not packet.is_discard))
    if not any(seen for *_, seen in packets):
        raise ValueError(f"video {name} has no frames.")
    appear, vanish = (np.asarray(column, dtype=np.int64) for column in list(zip(*packets, strict=True))[:2])
    key, seen = (np.asarray(column, dtype=bool) for column in list(zip(*packets, strict=True))[2:])
    promised = stream.duration * unit if stream.duration else Fraction(container.duration or 0, av.time_base)
    _check_whole(float(promised), float(max(vanish.max(), vanish.max() - appear.min()) * unit), name)
    pts = np.unique(appear[seen])
    end = int(vanish[seen].max())
    if end <= pts[-1]:  # some containers do not say how long their last frame stays
        end = int(pts[-1]) + max(1, round(float(np.median(np.diff(pts)))) if len(pts) > 1 else round(1 / unit / 25))
    timeline = Timeline(pts, np.unique(appear[key]), unit, end, seekable=timed, timed=timed)
    if timeline.seconds > MAX_SECONDS:
        raise ValueError(f"video {name} lasts {timeline.seconds:.0f} s; at most {MAX_SECONDS:.0f} s are read.")
    return timeline


def _check_whole(promised_s: float, found_s: float, name: str) -> None:
    """Some containers count their length from 0, some from the first frame: `found_s` is the longer of the two."""
    missing = promised_s - found_s
    if missing > MISSING_S and missing > MISSING_SHARE * promised_s:
        raise ValueError(
            f"video {name} is cut: its header promises {promised_s:.1f} s, the last {missing:.1f} s of them are not in "
            "the file."
        )


def _first_frames(data: bytes, timeline: Timeline, name: str) -> tuple[int, int, bool]:
    """Width and height of the first frame as displayed, and whether the decoder gives what the packets promise: the
    first frames in their order, and key frames after a jump."""
    container, stream = _opened(data, name)
    with container:
        clock = _Clock(name)
        frames = [*islice(_decoded(container, stream, clock), TRIED_FRAMES)]
        if not frames:
            raise ValueError(f"video {name} has no frame that decodes.")
        sound = [frame.pts for frame in frames] == timeline.pts[:TRIED_FRAMES].tolist()
        keys = timeline.keys[timeline.keys > timeline.pts[0]]
        for key in keys[:: max(1, -(-len(keys) // TRIED_KEYS))].tolist():
            sound = sound and _jumps_to(key, container, stream, clock)
        size = frames[0].width, frames[0].height
        return (*(size[::-1] if frames[0].rotation % 180 == 90 else size), sound)


def _jumps_to(key: int, container: Any, stream: Any, clock: _Clock) -> bool:
    try:
        container.seek(key, stream=stream)
    except av.error.FFmpegError:
        return False
    found = (frame.pts for frame in _decoded(container, stream, clock) if frame.pts is None or frame.pts >= key)
    return next(found, None) == key


def _decoded(container: Any, stream: Any, clock: _Clock) -> Iterator[Any]:
    """Frames in the order in which they are shown; packets that do not decode are passed over."""
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets, None)
        except av.error.FFmpegError:
            return
        if packet is None:
            return
        clock.check()  # also where one packet after the other does not decode
        try:
            frames = packet.decode()
        except av.error.FFmpegError:
            continue
        yield from frames


def _jumping(data: bytes, timeline: Timeline, wanted: np.ndarray, clock: _Clock, name: str) -> Iterator[np.ndarray]:
    """The wanted frames as far as the file gives exactly what its packets promised."""
    container, stream = _opened(data, name)
    with container:
        frames, position = _decoded(container, stream, clock), None
        last, pixels = -1, np.empty(0)
        for place in wanted:
            if place == last:
                yield pixels
                continue
            target = int(timeline.pts[place])
            key = timeline.key_before(target)
            if position is None or key > position:
                try:
                    container.seek(key, stream=stream)
                except av.error.FFmpegError:
                    return
                frames = _decoded(container, stream, clock)
            frame = next((frame for frame in frames if frame.pts is None or frame.pts >= target), None)
            if frame is None or frame.pts != target:
                return
            last, position, pixels = place, target, _pixels(frame, name)
            yield pixels


def _from_the_start(
    data: bytes, timeline: Timeline, wanted: np.ndarray, clock: _Clock, name: str
) -> Iterator[np.ndarray]:
    """The wanted frames out of all that decode: where one is missing, the one before it stays on the screen."""
    container, stream = _opened(data, name)
    with container:
        done, before, pixels = 0, None, None
        for number, frame in enumerate(_decoded(container, stream, clock)):
            at = frame.pts if timeline.timed and frame.pts is not None else _tick(timeline, number)
            while done < len(wanted) and at > int(timeline.pts[wanted[done]]):
                if pixels is None:
                    pixels = _pixels(before if before is not None else frame, name)
                yield pixels
                done += 1
            if done == len(wanted):
                return
            before, pixels = frame, None
        if before is None:
            raise ValueError(f"video {name} has no frame that decodes.")
        pixels = _pixels(before, name) if pixels is None else pixels
        for _ in wanted[done:]:
            yield pixels


def _tick(timeline: Timeline, number: int) -> int:
    """When the file's frame `number` is shown; frames beyond those promised come after all others."""
    return int(timeline.pts[number]) if number < len(timeline.pts) else timeline.end + number


def _pixels(frame: Any, name: str) -> np.ndarray:
    if frame.width * frame.height > MAX_PIXELS:
        raise ValueError(
            f"video {name}: a frame of {frame.width}x{frame.height} pixels; at most {MAX_PIXELS} are read."
        )
    pixels = frame.to_ndarray(format="rgb24", threads=1)
    # The container says by how much the picture is to be turned, counter-clockwise.
    return np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90) % 4)) if frame.rotation else pixels

"""Video files: the frame on the screen at a moment, from every kind of file; what could harm is refused."""

import dataclasses
import io
import struct
from fractions import Fraction

import av
import numpy as np
import pytest

from megatron_vlm.data import video
from megatron_vlm.data.timeline import Timeline
from tests.data.clips import HEIGHT, WIDTH, clip, number, picture, steady

MOMENTS = [0.0, 0.1, 0.31, 0.5, 0.5, 1.27, 2.0, 3.9, 9.0]
SHOWN = [0, 1, 3, 5, 5, 12, 20, 39, 39]
KINDS = {
    "mp4": {},
    "b-frames": {"b_frames": 3},
    "one key frame": {"gop": 1000, "b_frames": 2},
    "key frames only": {"gop": 1},
    "matroska": {"container": "matroska", "b_frames": 2},
    "webm": {"container": "webm", "codec": "libvpx"},
    "transport stream": {"container": "mpegts", "b_frames": 2},
    "avi": {"container": "avi", "codec": "mpeg4", "unit": Fraction(1, 10)},
    "avi, b-frames": {"container": "avi", "codec": "mpeg4", "unit": Fraction(1, 10), "b_frames": 2},
    "index first": {"movflags": "faststart", "b_frames": 2},
    "fragments": {"movflags": "frag_keyframe+empty_moov"},
}


def made(kind: str, frames: int = 40) -> bytes:
    ticks = list(range(frames)) if "unit" in KINDS[kind] else steady(frames)
    return clip(ticks, **KINDS[kind])


def numbers(data: bytes, moments: list[float], timeline: Timeline | None = None) -> list[int]:
    timeline = timeline or video.scan(data, name="x").timeline
    return [number(pixels) for pixels in video.read(data, timeline, moments, name="x")]


@pytest.mark.parametrize("kind", KINDS)
def test_the_frame_on_the_screen(kind):
    data = made(kind)
    found = video.scan(data, name="x")
    assert (found.width, found.height, len(found.timeline.pts)) == (WIDTH, HEIGHT, 40)
    assert found.timeline.seconds == pytest.approx(4.0, abs=0.11)
    assert numbers(data, MOMENTS, found.timeline) == SHOWN
    # The same frames one by one, and from the file's beginning: a rank's share does not depend on the others'.
    assert [numbers(data, [moment], found.timeline)[0] for moment in MOMENTS] == SHOWN
    assert numbers(data, MOMENTS, dataclasses.replace(found.timeline, seekable=False)) == SHOWN
    assert numbers(data, MOMENTS, dataclasses.replace(found.timeline, seekable=False, timed=False)) == SHOWN


def test_pixels_are_those_of_a_decoder_that_reads_everything():
    data = made("b-frames")
    with av.open(io.BytesIO(data)) as container:
        every = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    found = [*video.read(data, video.scan(data, name="x").timeline, MOMENTS, name="x")]
    assert all(np.array_equal(pixels, every[place]) for pixels, place in zip(found, SHOWN, strict=True))
    assert found[3] is found[4]


def test_variable_frame_rate():
    ticks = [0, 40, 80, 1000, 1010, 1020, 3000, 3040]
    for container, codec in (("mp4", "libx264"), ("matroska", "libx264")):
        data = clip(ticks, container=container, codec=codec, gop=3)
        assert numbers(data, [0.0, 0.05, 0.5, 0.999, 1.0, 1.015, 2.0, 3.0, 5.0]) == [0, 1, 2, 2, 3, 4, 5, 6, 7]


def test_time_counts_from_the_first_frame():
    data = clip([5000 + at for at in steady(20)], container="matroska")
    assert numbers(data, [0.0, 0.35, 1.0]) == [0, 3, 10]


def test_only_what_is_needed_is_decoded(monkeypatch):
    decoded = []
    whole = video._decoded

    def counted(*arguments):
        for frame in whole(*arguments):
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr(video, "_decoded", counted)
    data = clip(steady(120), gop=10)
    timeline = video.scan(data, name="x").timeline
    decoded.clear()
    assert numbers(data, [0.2, 0.4, 9.25], timeline) == [2, 4, 92]
    # Frames 0 to 4, then from the key frame 90 on.
    assert len(decoded) <= 10
    decoded.clear()
    data = clip(steady(120), gop=1000)
    assert numbers(data, [0.2, 1.0, 9.0], dataclasses.replace(timeline, keys=timeline.keys[:1])) == [2, 10, 90]
    assert len(decoded) == 91  # once through, no way back


def long_video(repeats: int) -> bytes:
    """Many frames for little work: the packets of a short clip again and again, at later times."""
    stream = io.BytesIO()
    with av.open(io.BytesIO(clip(steady(12)))) as source, av.open(stream, "w", format="mp4") as out:
        packets = [packet for packet in source.demux(video=0) if packet.size]
        copy = out.add_stream_from_template(source.streams.video[0])
        length = round(Fraction(12, 10) / packets[0].time_base)
        base = [(bytes(packet), packet.pts, packet.dts, packet.is_keyframe, packet.time_base) for packet in packets]
        for turn in range(repeats):
            for content, pts, dts, key, unit in base:
                packet = av.Packet(content)
                packet.pts, packet.dts, packet.time_base = pts + turn * length, dts + turn * length, unit
                packet.is_keyframe, packet.stream = key, copy
                out.mux(packet)
    return stream.getvalue()


def test_thirty_thousand_frames():
    data = long_video(2500)
    timeline = video.scan(data, name="x").timeline
    assert len(timeline.pts) == 30_000 and timeline.seconds == pytest.approx(3000, abs=0.2)
    assert len(timeline.pack()) < 20_000
    assert numbers(data, [0.0, 1000.05, 2999.9], timeline) == [0, 10000 % 12, 29_999 % 12]


def test_a_claim_of_thirty_thousand_frames(monkeypatch):
    data = bytearray(made("avi"))
    at = data.index(b"strh") + 8 + 32  # dwLength of the stream header
    assert struct.unpack_from("<I", data, at)[0] == 40
    struct.pack_into("<I", data, at, 30_000)
    with pytest.raises(ValueError, match="video x is cut: its header promises 3000.0 s, the last 2996"):
        video.scan(bytes(data), name="x")
    # And where the index claims them: what there is comes out, the last frame stands for the rest.
    whole = bytes(made("mp4"))
    timeline = video.scan(whole, name="x").timeline
    step = int(timeline.pts[1])
    more = dataclasses.replace(timeline, pts=np.arange(30_000) * step, end=30_000 * step)
    assert numbers(whole, [0.0, 3.9, 4.0, 2000.0], more) == [0, 39, 39, 39]
    monkeypatch.setattr(video, "MAX_FRAMES", 39)
    with pytest.raises(ValueError, match="video x has more than 39 frames"):
        video.scan(whole, name="x")


def test_packets_that_the_decoder_does_not_follow(monkeypatch):
    """A file whose frames come out at other times than its packets have is decoded from its beginning, always."""
    data = made("b-frames")
    assert video.scan(data, name="x").timeline.seekable
    whole = video._timeline

    def moved(*arguments):
        timeline = whole(*arguments)
        pts = timeline.pts.copy()
        pts[20:] += 5
        return dataclasses.replace(timeline, pts=pts)

    monkeypatch.setattr(video, "_timeline", moved)
    timeline = video.scan(data, name="x").timeline
    assert not timeline.seekable and timeline.timed
    assert numbers(data, [0.5, 3.05, 3.55], timeline) == [5, 30, 35]
    monkeypatch.setattr(video, "_timeline", whole)
    monkeypatch.setattr(video, "_jumps_to", lambda *arguments: False)
    assert not video.scan(data, name="x").timeline.seekable


def test_a_stale_index_falls_back():
    """An index whose times are not the file's: frames at or before the moment, from the beginning."""
    data = made("b-frames")
    timeline = video.scan(data, name="x").timeline
    moved = dataclasses.replace(timeline, pts=timeline.pts + 7)
    assert numbers(data, [0.0, 0.5, 0.5, 2.0], moved) == [0, 5, 5, 20]
    wrong_keys = dataclasses.replace(timeline, keys=timeline.pts)
    assert numbers(data, [0.5, 1.75, 2.0], wrong_keys) == [5, 17, 20]


def test_damaged_packets_are_passed_over():
    data = bytearray(made("index first", 60))
    start = data.index(b"mdat")
    data[start + 600 : start + 900] = bytes(300)
    found = video.scan(bytes(data), name="x")
    pixels = [*video.read(bytes(data), found.timeline, [0.0, 2.0, 5.0], name="x")]
    assert len(pixels) == 3 and all(one.shape == (HEIGHT, WIDTH, 3) for one in pixels)
    assert number(pixels[2]) == 50


@pytest.mark.parametrize("kind", ["mp4", "index first", "matroska", "avi"])
def test_a_cut_file_is_an_error_that_names_it(kind):
    data = made(kind, 200)
    with pytest.raises(ValueError, match="video film-7 (cannot be opened|is cut)"):
        video.scan(data[: len(data) // 2], name="film-7")


@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_no_frames(container):
    stream = io.BytesIO()
    with av.open(stream, "w", format=container) as out:
        added = out.add_stream("libx264", rate=25)
        added.width, added.height, added.pix_fmt = 64, 48, "yuv420p"
        out.start_encoding()
    with pytest.raises(ValueError, match="video film-7 (has no frames|holds no moving pictures|cannot be opened)"):
        video.scan(stream.getvalue(), name="film-7")


def sound() -> bytes:
    stream = io.BytesIO()
    with av.open(stream, "w", format="mp4") as out:
        added = out.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
        frame.rate, frame.pts = 8000, 0
        out.mux(added.encode(frame))
        out.mux(added.encode(None))
    return stream.getvalue()


def test_sound_alone_is_no_video():
    with pytest.raises(ValueError, match="video film-7 holds no moving pictures"):
        video.scan(sound(), name="film-7")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"hello",
        b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nfile:///etc/passwd\n",
        b"ffconcat version 1.0\nfile /etc/passwd\n",
        b"<?xml version='1.0'?><MPD xmlns='urn:mpeg:dash:schema:mpd:2011'></MPD>",
        b"v=0\no=- 0 0 IN IP4 127.0.0.1\nc=IN IP4 127.0.0.1\nm=video 5000 RTP/AVP 96\n",
        b"[playlist]\nFile1=http://127.0.0.1/a.mp4\n",
        b"\x89PNG\r\n\x1a\n" + bytes(400),
    ],
)
def test_playlists_and_other_files_are_refused(data):
    with pytest.raises(ValueError, match="video film-7 cannot be opened .*no container that is read"):
        video.scan(data, name="film-7")


def test_a_container_that_names_another_file_opens_nothing(monkeypatch):
    """A QuickTime data reference to a file beside it: FFmpeg may not follow it."""
    data = bytearray(made("index first"))
    at = data.index(b"url \x00\x00\x00\x01")  # "the data are in this file"
    data[at : at + 8] = b"alis\x00\x00\x00\x00"
    opened = []
    monkeypatch.setattr(video, "_refuse", lambda url, *rest: opened.append(url))
    try:
        video.scan(bytes(data), name="x")
    except ValueError:
        pass
    assert not opened


def test_limits(monkeypatch):
    data = made("mp4")
    timeline = video.scan(data, name="x").timeline
    monkeypatch.setattr(video, "MAX_SECONDS", 3.0)
    with pytest.raises(ValueError, match="video x lasts 4 s; at most 3 s are read"):
        video.scan(data, name="x")
    monkeypatch.setattr(video, "MAX_DECODE_S", 0.0)
    with pytest.raises(ValueError, match="video x: its frames took more than 0 s to decode"):
        numbers(data, [3.0], timeline)
    monkeypatch.setattr(video, "MAX_PIXELS", WIDTH * HEIGHT - 1)
    with pytest.raises(ValueError, match="video x (has|cannot|: a frame)"):
        video.scan(data, name="x")
    monkeypatch.setattr(video, "MAX_PIXELS", WIDTH * HEIGHT)
    monkeypatch.setattr(video, "CODECS", frozenset(("hevc",)))
    with pytest.raises(ValueError, match="video x has the codec h264; read are hevc"):
        video.scan(data, name="x")


@pytest.mark.parametrize(("matrix", "turn"), [((0, 1, -1, 0), -1), ((-1, 0, 0, -1), 2), ((0, -1, 1, 0), 1)])
def test_turned_as_displayed(matrix, turn):
    """A phone's upright video is stored on its side, with a matrix in the track header."""
    data = bytearray(made("mp4"))
    at = data.index(b"tkhd") + 4 + 40
    a, b, c, d = (value << 16 for value in matrix)
    struct.pack_into(">iiiiiiiii", data, at, a, b, 0, c, d, 0, 0, 0, 1 << 30)
    found = video.scan(bytes(data), name="x")
    assert (found.height, found.width) == np.rot90(picture(0), turn).shape[:2]
    (pixels,) = video.read(bytes(data), found.timeline, [1.3], name="x")
    assert pixels.shape == (found.height, found.width, 3)
    assert number(np.rot90(pixels, -turn)) == 13

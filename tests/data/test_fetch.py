"""Getting files from a real server on the loopback that also fails, stalls, truncates, redirects and lies."""

from __future__ import annotations

import hashlib
import ipaddress
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from megatron_vlm.data.fetch import Fetcher, Later, Limits, Refused, _check_public
from tests.data.server import Server, send

CONTENT = bytes(range(256)) * 1000
LIMITS = Limits(allow_private=True, attempts=3, backoff_s=0.01, stall_s=0.8, max_s=5.0, max_bytes=300_000)


@pytest.fixture
def server() -> Iterator[Server]:
    one = Server()
    yield one
    one.stop()


def whole(handler: BaseHTTPRequestHandler, _: int) -> None:
    send(handler, body=CONTENT, Content_Type="image/jpeg")


def cut_then_rest(handler: BaseHTTPRequestHandler, seen: int) -> None:
    """Half of the file, then nothing; later the rest, from wherever it is asked."""
    asked = handler.headers.get("Range")
    if asked and handler.headers.get("If-Range") == '"one"':
        start = int(asked.removeprefix("bytes=").rstrip("-"))
        tail = CONTENT[start:]
        send(handler, 206, tail, Content_Range=f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}", ETag='"one"')
        return
    send(handler, 200, CONTENT[:100_000], Content_Length=str(len(CONTENT)), ETag='"one"')
    handler.close_connection = True


def fetch(server: Server, target: Path, answer: Callable[[BaseHTTPRequestHandler, int], None], **limits: float) -> int:
    server.answers["/file"] = answer
    fetcher = Fetcher(Limits(**{**LIMITS.__dict__, **limits}))
    return fetcher.fetch(f"{server.address}/file", target)


def test_a_file_arrives_whole_and_is_not_fetched_twice(server: Server, tmp_path: Path) -> None:
    target = tmp_path / "ab" / "file"
    assert fetch(server, target, whole) == len(CONTENT) == fetch(server, target, whole)
    assert target.read_bytes() == CONTENT and len(server.requests) == 1
    assert [path.name for path in target.parent.iterdir()] == ["file"]


def test_a_truncated_file_is_gone_on_with(server: Server, tmp_path: Path) -> None:
    fetch(server, tmp_path / "file", cut_then_rest)
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert server.requests[1][1]["Range"] == "bytes=100000-"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_download_that_was_killed_is_gone_on_with(server: Server, tmp_path: Path) -> None:
    with pytest.raises(Later, match="IncompleteRead"):
        fetch(server, tmp_path / "file", cut_then_rest, attempts=1)
    assert not (tmp_path / "file").exists()
    fetch(server, tmp_path / "file", cut_then_rest)
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_another_version_of_the_file_starts_anew(server: Server, tmp_path: Path) -> None:
    """The server's ETag changed: it answers with the whole new file, which must not be appended."""
    new = b"new" * 50_000

    def changed(handler: BaseHTTPRequestHandler, seen: int) -> None:
        if seen == 0:
            cut_then_rest(handler, seen)
        else:
            send(handler, body=new, ETag='"two"')

    fetch(server, tmp_path / "file", changed)
    assert (tmp_path / "file").read_bytes() == new


@pytest.mark.parametrize("headers", [{}, {"ETag": 'W/"one"'}])
def test_without_a_strong_etag_nothing_is_appended(server: Server, tmp_path: Path, headers: dict[str, str]) -> None:
    def cut_once(handler: BaseHTTPRequestHandler, seen: int) -> None:
        body = CONTENT[:5000] if seen == 0 else CONTENT
        send(handler, body=body, Content_Length=str(len(CONTENT)), **headers)
        handler.close_connection = True

    fetch(server, tmp_path / "file", cut_once)
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert "Range" not in server.requests[1][1]


def test_another_part_than_asked_for_is_not_appended(server: Server, tmp_path: Path) -> None:
    def wrong_once(handler: BaseHTTPRequestHandler, seen: int) -> None:
        if seen == 1:
            whole_range = f"bytes 0-{len(CONTENT) - 1}/{len(CONTENT)}"
            send(handler, 206, CONTENT, Content_Range=whole_range, ETag='"one"')
        else:
            cut_then_rest(handler, seen) if seen == 0 else whole(handler, seen)

    fetch(server, tmp_path / "file", wrong_once)
    assert (tmp_path / "file").read_bytes() == CONTENT and len(server.requests) == 3


def test_failures_are_tried_again_and_the_wait_asked_for_is_kept(server: Server, tmp_path: Path) -> None:
    def busy_once(handler: BaseHTTPRequestHandler, seen: int) -> None:
        send(handler, 503, Retry_After="1") if seen == 0 else whole(handler, seen)

    start = time.monotonic()
    fetch(server, tmp_path / "file", busy_once)
    assert 1.0 <= time.monotonic() - start < 3.0 and len(server.requests) == 2


def test_a_server_that_always_fails_is_given_up(server: Server, tmp_path: Path) -> None:
    with pytest.raises(Later, match="answer 500"):
        fetch(server, tmp_path / "file", lambda handler, _: send(handler, 500))
    assert len(server.requests) == LIMITS.attempts


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_a_dead_address_is_asked_once(server: Server, tmp_path: Path, status: int) -> None:
    with pytest.raises(Refused, match=f"answer {status}"):
        fetch(server, tmp_path / "file", lambda handler, _: send(handler, status))
    assert len(server.requests) == 1 and not any(tmp_path.iterdir())


def test_a_stalled_server_does_not_hold_us(server: Server, tmp_path: Path) -> None:
    def stall(handler: BaseHTTPRequestHandler, _: int) -> None:
        send(handler, body=b"x" * 10, Content_Length=str(len(CONTENT)))
        handler.wfile.flush()
        time.sleep(1.5)

    start = time.monotonic()
    with pytest.raises(Later, match="timed out"):
        fetch(server, tmp_path / "file", stall, attempts=1)
    assert time.monotonic() - start < 1.2


def test_a_server_that_drips_does_not_hold_us(server: Server, tmp_path: Path) -> None:
    """Bytes keep coming, each within the time for a stall; the whole takes too long."""

    def drip(handler: BaseHTTPRequestHandler, _: int) -> None:
        send(handler, Content_Length=str(len(CONTENT)))
        try:
            for _ in range(40):
                handler.wfile.write(b"x")
                time.sleep(0.1)
        except OSError:
            pass

    start = time.monotonic()
    with pytest.raises(Later, match="longer than 0.5 s"):
        fetch(server, tmp_path / "file", drip, attempts=1, max_s=0.5)
    assert time.monotonic() - start < 1.5


def test_headers_that_drip_do_not_hold_us(server: Server, tmp_path: Path) -> None:
    """Each byte within the time for a stall; the answer's first line would take ten seconds."""

    sent = []

    def drip(handler: BaseHTTPRequestHandler, _: int) -> None:
        with suppress(OSError):
            for byte in b"HTTP/1.1 200 OK\r\nX: " + b"x" * 80:
                handler.wfile.write(bytes([byte]))
                handler.wfile.flush()
                sent.append(byte)
                time.sleep(0.1)
        handler.close_connection = True

    with pytest.raises(Later):
        fetch(server, tmp_path / "file", drip, attempts=1, stall_s=0.3)
    assert len(sent) < 80


def test_an_empty_file_is_refused(server: Server, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="the file is empty"):
        fetch(server, tmp_path / "file", lambda handler, _: send(handler))
    assert not (tmp_path / "file").exists()


@pytest.mark.parametrize("told", [True, False])
def test_too_large_a_file_is_refused(server: Server, tmp_path: Path, told: bool) -> None:
    def large(handler: BaseHTTPRequestHandler, _: int) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "400000") if told else handler.send_header("Connection", "close")
        handler.end_headers()
        try:
            handler.wfile.write(b"x" * 400_000)
        except OSError:
            pass
        handler.close_connection = True

    with pytest.raises(Refused, match="300000"):
        fetch(server, tmp_path / "file", large)
    assert not any(path.suffix == ".part" or path.name == "file" for path in tmp_path.iterdir())


def test_redirects_are_followed_and_counted(server: Server, tmp_path: Path) -> None:
    def onward(handler: BaseHTTPRequestHandler, _: int) -> None:
        send(handler, 302, Location=f"/{int(handler.path[1:]) + 1}")

    server.answers |= {f"/{number}": onward for number in range(8)}
    server.answers["/3"] = whole
    fetcher = Fetcher(LIMITS)
    assert fetcher.fetch(f"{server.address}/0", tmp_path / "a") == len(CONTENT)
    server.answers["/3"] = onward
    with pytest.raises(Refused, match="more than 5 redirects"):
        fetcher.fetch(f"{server.address}/0", tmp_path / "b")


@pytest.mark.parametrize("location", ["file:///etc/passwd", "ftp://127.0.0.1/x", "gopher://x/"])
def test_redirects_to_other_protocols_are_refused(server: Server, tmp_path: Path, location: str) -> None:
    with pytest.raises(Refused, match="only http and https"):
        fetch(server, tmp_path / "file", lambda handler, _: send(handler, 302, Location=location))


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://x/y", "//x/y", "pipe:cat x", "http:///x"])
def test_other_protocols_are_refused(tmp_path: Path, url: str) -> None:
    with pytest.raises(Refused, match="only http and https"):
        Fetcher(LIMITS).fetch(url, tmp_path / "file")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0", "[::1]"])
def test_this_machine_is_not_asked_unless_allowed(server: Server, tmp_path: Path, host: str) -> None:
    """Also by a name: what counts is where the connection really goes."""
    server.answers["/file"] = whole
    port = server.address.rpartition(":")[2]
    with pytest.raises((Refused, Later), match="private, local or reserved|NewConnectionError"):
        Fetcher(Limits(attempts=1, stall_s=1.0)).fetch(f"http://{host}:{port}/file", tmp_path / "file")
    assert not server.requests


@pytest.mark.parametrize(
    "address",
    ["10.0.0.1", "192.168.1.1", "172.16.0.1", "169.254.169.254", "fe80::1", "fc00::1", "::ffff:10.0.0.1", "100.64.0.1",
     "224.0.0.1", "64:ff9b::10.0.0.1", "2002:a00:1::"],
)  # fmt: skip
def test_private_addresses_are_known(address: str) -> None:
    with pytest.raises(Refused, match="refused"):
        _check_public(ipaddress.ip_address(address))
    _check_public(ipaddress.ip_address("93.184.216.34"))


def test_a_changed_file_is_refused(server: Server, tmp_path: Path) -> None:
    server.answers["/file"] = whole
    right = hashlib.sha256(CONTENT).hexdigest()
    fetcher = Fetcher(LIMITS)
    with pytest.raises(Refused, match="was changed"):
        fetcher.fetch(f"{server.address}/file", tmp_path / "a", sha256="0" * 64)
    assert not any(tmp_path.iterdir())
    assert fetcher.fetch(f"{server.address}/file", tmp_path / "a", sha256=right) == len(CONTENT)


@pytest.mark.parametrize(
    ("headers", "message"),
    [({"Content_Type": "text/html; charset=utf-8"}, "a page"), ({"Content_Encoding": "gzip"}, "answered in gzip")],
)
def test_pages_and_compressed_answers_are_refused(
    server: Server, tmp_path: Path, headers: dict[str, str], message: str
) -> None:
    with pytest.raises(Refused, match=message):
        fetch(server, tmp_path / "file", lambda handler, _: send(handler, 200, b"<html>", **headers))


def test_hosts_are_not_hurried(server: Server, tmp_path: Path) -> None:
    server.answers["/file"] = whole
    fetcher = Fetcher(Limits(allow_private=True, per_host=20.0))
    start = time.monotonic()
    for number in range(5):
        fetcher.fetch(f"{server.address}/file", tmp_path / str(number))
    assert time.monotonic() - start >= 4 / 20

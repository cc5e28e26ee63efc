"""Get one file from an address of a stranger's choice, without harm: to us, to our network, to the server.

http and https only, at the first address and at every redirect. The address that a connection really has is checked, so
that a name that points into the private network is refused whatever it pointed to before. Caps on size, time and
redirects. A file appears whole and under its final name, or not at all; a partial one is gone on with where the server
proves by its ETag that it is still the same.
"""

from __future__ import annotations

import hashlib
import ipaddress
import os
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

import tenacity
import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import HTTPError
from urllib3.response import BaseHTTPResponse

#: Answers after which it is worth to ask again.
_LATER = (408, 425, 429, 500, 502, 503, 504)
_REDIRECTS = (301, 302, 303, 307, 308)
_CHUNK_BYTES = 1 << 16
#: Longest wait that a server may ask for.
_MAX_WAIT_S = 60.0
#: Addresses under which a gateway shows the whole of IPv4, private networks too (RFC 6052).
_TRANSLATED = ipaddress.IPv6Network("64:ff9b::/96")
AGENT = "megatron-vlm-download/1.0"


class Refused(ValueError):
    """The file is not there, not allowed or not what was promised: asking again is of no use."""


class Later(Exception):
    """The server or the network failed; it may work again in `wait_s` seconds."""

    def __init__(self, reason: str, wait_s: float = 0.0) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


@dataclass(frozen=True)
class Limits:
    """What a file may cost."""

    max_bytes: int = 2 << 30
    max_s: float = 600.0
    """For one attempt, whatever arrives meanwhile."""
    stall_s: float = 30.0
    """Without a byte."""
    redirects: int = 5
    attempts: int = 4
    backoff_s: float = 1.0
    """Before the second attempt; doubled for each further one."""
    per_host: float = 0.0
    """Most requests a second to one host. 0 = any."""
    allow_private: bool = False
    """Whether addresses of private networks, this machine included, may be asked."""


class Fetcher:
    """Gets files; safe to use from several threads.

    connections: kept open to one host.
    proxy:       address of a proxy. It resolves the names then, so only addresses given as numbers are checked here.
    """

    def __init__(self, limits: Limits, *, connections: int = 8, proxy: str = "") -> None:
        self.limits = limits
        self._proxied = bool(proxy)
        settings: dict[str, Any] = {"maxsize": connections, "block": False, "headers": {"User-Agent": AGENT}}
        self._pool = urllib3.ProxyManager(proxy, **settings) if proxy else urllib3.PoolManager(**settings)
        guarded = not limits.allow_private and not proxy
        self._pool.pool_classes_by_scheme = {scheme: _pool(scheme, guarded=guarded) for scheme in ("http", "https")}
        self._next: dict[str, float] = {}
        self._lock = threading.Lock()

    def fetch(self, url: str, target: Path, *, sha256: str = "") -> int:
        """Get the file at `url` to `target`; returns its bytes. A file that stands there already is left alone.

        sha256: of the content, where it is known.
        Raises Refused, or Later after the last attempt, with the reason.
        """
        if target.is_file():
            return target.stat().st_size
        target.parent.mkdir(parents=True, exist_ok=True)
        retrying = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(self.limits.attempts),
            wait=self._wait,
            retry=tenacity.retry_if_exception_type(Later),
            reraise=True,
        )
        return retrying(self._attempt, url, target, sha256)

    def _wait(self, state: tenacity.RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        asked = error.wait_s if isinstance(error, Later) else 0.0
        backoff = tenacity.wait_exponential_jitter(self.limits.backoff_s, _MAX_WAIT_S, jitter=self.limits.backoff_s)
        return max(min(asked, _MAX_WAIT_S), backoff(state))

    def _attempt(self, url: str, target: Path, sha256: str) -> int:
        part, tag = (target.with_name(f"{target.name}.{end}") for end in ("part", "tag"))
        deadline = time.monotonic() + self.limits.max_s
        try:
            response = self._open(url, part, tag, deadline)
            try:
                self._store(response, part, tag, deadline)
            finally:
                response.close()
        except HTTPError as error:
            # Also a connection that ends early: the length does not fit, what came so far is kept.
            raise Later(f"{type(error).__name__}: {error}") from error
        size = part.stat().st_size
        if sha256 and (found := _file_sha256(part)) != sha256:
            part.unlink()
            raise Refused(f"the content's sha256 is {found}, the data set says {sha256}: the file was changed.")
        os.replace(part, target)
        tag.unlink(missing_ok=True)
        return size

    def _open(self, url: str, part: Path, tag: Path, deadline: float) -> BaseHTTPResponse:
        """The answer that holds the file, redirects followed."""
        headers = {"Accept-Encoding": "identity"}
        if part.is_file() and tag.is_file():
            headers |= {"Range": f"bytes={part.stat().st_size}-", "If-Range": tag.read_text()}
        for _ in range(self.limits.redirects + 1):
            self._check_address(url)
            self._pace(urlsplit(url).hostname or "")
            timeout = urllib3.Timeout(connect=self.limits.stall_s, read=self.limits.stall_s)
            response = self._pool.request(
                "GET", url, headers=headers, redirect=False, retries=False, preload_content=False, timeout=timeout
            )
            if response.status not in _REDIRECTS:
                return _checked(response, part, tag)
            location = response.headers.get("Location")
            response.close()
            if not location:
                raise Refused(f"answer {response.status} without an address to go to.")
            url = urljoin(url, location)
            if time.monotonic() > deadline:
                raise Later(f"it took longer than {self.limits.max_s:g} s.")
        raise Refused(f"more than {self.limits.redirects} redirects.")

    def _store(self, response: BaseHTTPResponse, part: Path, tag: Path, deadline: float) -> None:
        going_on = response.status == 206
        size = part.stat().st_size if going_on else 0
        length = response.headers.get("Content-Length", "")
        if length.isdecimal() and size + int(length) > self.limits.max_bytes:
            part.unlink(missing_ok=True)
            raise Refused(f"it has {size + int(length)} bytes; at most {self.limits.max_bytes} are fetched.")
        etag = response.headers.get("ETag", "")
        if etag.startswith('"'):  # a weak one does not promise equal bytes
            tag.write_text(etag)
        elif not going_on:
            tag.unlink(missing_ok=True)
        with part.open("ab" if going_on else "wb") as file:
            while data := response.read1(_CHUNK_BYTES):
                size += len(data)
                if size > self.limits.max_bytes:
                    file.close()
                    part.unlink()
                    raise Refused(f"it has more than {self.limits.max_bytes} bytes.")
                file.write(data)
                if time.monotonic() > deadline:
                    raise Later(f"it took longer than {self.limits.max_s:g} s, {size} bytes came.")
        if not size:
            raise Refused("the file is empty.")

    def _check_address(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise Refused(f"address {url[:100]!r} is refused: only http and https are fetched.")
        if self._proxied and not self.limits.allow_private:
            try:
                address = ipaddress.ip_address(parts.hostname)
            except ValueError:
                return
            _check_public(address)

    def _pace(self, host: str) -> None:
        """Wait for this host's turn."""
        if not self.limits.per_host:
            return
        with self._lock:
            now = time.monotonic()
            turn = max(now, self._next.get(host, 0.0))
            self._next[host] = turn + 1 / self.limits.per_host
        time.sleep(max(0.0, turn - now))


def _checked(response: BaseHTTPResponse, part: Path, tag: Path) -> BaseHTTPResponse:
    """The answer, where it holds (the rest of) the file. Raises Refused or Later for any other."""
    status = response.status
    kind = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    if status in (200, 206):
        if status == 206 and not response.headers.get("Content-Range", "").startswith(f"bytes {_size(part)}-"):
            response.close()
            part.unlink(missing_ok=True)
            raise Later(f"it answered with another part: {response.headers.get('Content-Range')}.")
        if response.headers.get("Content-Encoding", "identity") != "identity":
            response.close()
            raise Refused(f"it answered in {response.headers['Content-Encoding']}, which was not asked for.")
        if kind == "text/html":
            response.close()
            raise Refused("it answered with a page (text/html), not with a file.")
        return response
    response.close()
    if status == 416:
        part.unlink(missing_ok=True)
        tag.unlink(missing_ok=True)
        raise Later("the part asked for does not exist (416); it starts anew.")
    if status in _LATER:
        wait = response.headers.get("Retry-After", "")
        raise Later(f"answer {status}", float(wait) if wait.isdecimal() else 0.0)
    raise Refused(f"answer {status}")


def _check_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> None:
    inner = getattr(address, "ipv4_mapped", None) or getattr(address, "sixtofour", None) or address
    if isinstance(inner, ipaddress.IPv6Address) and inner in _TRANSLATED:
        inner = ipaddress.IPv4Address(int(inner) & 0xFFFFFFFF)
    if not inner.is_global or inner.is_multicast:
        raise Refused(f"address {address} is private, local or reserved: refused. --allow-private-addresses allows it.")


def _checked_peer(connection: socket.socket) -> socket.socket:
    try:
        _check_public(ipaddress.ip_address(connection.getpeername()[0].partition("%")[0]))
    except Refused:
        connection.close()
        raise
    return connection


class _Timed:
    """A connection whose headers must all come within the time for a stall: urllib3 waits so long for each byte."""

    def getresponse(self) -> Any:
        waiting = threading.Timer(self.timeout, _end, (self.sock,))  # type: ignore[attr-defined]
        waiting.daemon = True
        waiting.start()
        try:
            return super().getresponse()  # type: ignore[misc]
        finally:
            waiting.cancel()


def _end(connection: socket.socket) -> None:
    """End a connection that another thread waits for, under its encryption."""
    with suppress(OSError):  # it ended by itself
        socket.socket.shutdown(connection, socket.SHUT_RDWR)


class _Connection(_Timed, HTTPConnection):
    pass


class _SecureConnection(_Timed, HTTPSConnection):
    pass


class _GuardedConnection(_Connection):
    def _new_conn(self) -> socket.socket:
        return _checked_peer(super()._new_conn())


class _GuardedSecureConnection(_SecureConnection):
    def _new_conn(self) -> socket.socket:
        return _checked_peer(super()._new_conn())


def _pool(scheme: str, *, guarded: bool) -> type[urllib3.HTTPConnectionPool]:
    """The kind of pool for a scheme."""
    if scheme == "http":
        kind = _GuardedConnection if guarded else _Connection
        return type("_Pool", (urllib3.HTTPConnectionPool,), {"ConnectionCls": kind})
    secure = _GuardedSecureConnection if guarded else _SecureConnection
    return type("_SecurePool", (urllib3.HTTPSConnectionPool,), {"ConnectionCls": secure})


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

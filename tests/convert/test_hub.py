"""Fetching a model by its id, from a hub on this machine's loopback."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from megatron_vlm.config import presets
from megatron_vlm.convert import hub
from tests.convert import world

ROOT = Path(__file__).parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
#: Of which a conversion wants the first two.
FILES = {
    "config.json": b"{}",
    "model.safetensors": b"weights" * 1000,
    "pytorch_model.bin": b"pickle",
    "modeling_remote.py": b"code",
    "original/model.safetensors": b"copy",
}


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's interface as a download needs, for the model org/name."""

    def log_message(self, *_: object) -> None: ...

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    files = FILES

    def answer(self, body: bool) -> None:
        path = self.path.split("?")[0]
        name = path.removeprefix(f"/org/name/resolve/{COMMIT}/")
        headers: dict[str, str] = {}
        if path.startswith("/api/models/org/name/tree/"):
            files = [
                {"type": "file", "path": key, "size": len(value), "oid": COMMIT} for key, value in self.files.items()
            ]
            data, status = json.dumps(files).encode(), 200
        elif path.startswith("/api/models/org/name"):
            siblings = [{"rfilename": key, "size": len(value)} for key, value in self.files.items()]
            data, status = json.dumps({"id": "org/name", "sha": COMMIT, "siblings": siblings}).encode(), 200
        elif name in self.files:
            data, status = self.files[name], 200
            headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
        else:
            data, status, headers = b"{}", 404, {"X-Error-Code": "RepoNotFound"}
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data)), "Content-Type": "application/json"}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(data)


@contextmanager
def serving(files: dict[str, bytes]) -> Iterator[str]:
    """The address of a hub with these files of org/name."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Serving", (Hub,), {"files": files}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def endpoint() -> Iterator[str]:
    with serving(FILES) as address:
        yield address


def tool(*words: str, cache: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: the hub's library reads the environment when it is imported."""
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / "convert_hf.py"), *words],
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(cache), **env},
        capture_output=True,
        text=True,
        timeout=250,
    )


@pytest.mark.slow
def test_only_what_a_conversion_reads_is_fetched_and_then_found_offline(endpoint, tmp_path):
    done = tool("download", "org/name", cache=tmp_path, HF_ENDPOINT=endpoint)
    assert done.returncode == 0, done.stderr
    assert "org/name: 2 files, 0.00 GB" in done.stderr
    folder = Path(done.stdout.strip().removeprefix("Fetched: "))
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) == ["config.json", "model.safetensors"]
    assert (folder / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    again = tool("download", "org/name", cache=tmp_path, HF_HUB_OFFLINE="1")
    assert again.returncode == 0 and again.stdout == done.stdout, again.stderr
    gone = tool("download", "org/other", cache=tmp_path, HF_ENDPOINT=endpoint)
    assert gone.returncode == 1 and gone.stderr.startswith("error: org/other could not be fetched"), gone.stderr
    assert "Traceback" not in gone.stderr


@pytest.mark.slow
def test_an_id_of_the_hub_is_imported_and_then_verified_offline(tmp_path):
    folder = world.folder(world.molmo2(presets.PRESETS["tiny"]), tmp_path / "folder", hub=True)
    files = {path.name: path.read_bytes() for path in folder.iterdir()} | {"modeling_remote.py": b"raise SystemExit(9)"}
    out = str(tmp_path / "checkpoint")
    with serving(files) as address:
        done = tool("import", "--molmo2", "org/name", "--out", out, cache=tmp_path / "cache", HF_ENDPOINT=address)
    assert done.returncode == 0, done.stderr
    assert "model.preset=tiny" in done.stdout and "org/name: 4 files" in done.stderr
    same = tool("verify", "org/name", out, cache=tmp_path / "cache", HF_HUB_OFFLINE="1")
    assert same.returncode == 0 and ", 0 differences." in same.stdout, same.stdout + same.stderr
    gone = tool("verify", "org/other", out, cache=tmp_path / "cache", HF_HUB_OFFLINE="1")
    assert gone.returncode == 1 and gone.stderr.startswith("error: org/other could not be fetched"), gone.stderr


def test_what_is_neither_a_folder_nor_an_id_is_refused(tmp_path):
    assert hub.local(str(tmp_path)) == tmp_path
    for path in ("nowhere", "a/b/c", "../secret", "org/na me"):
        with pytest.raises(ValueError, match="neither a directory nor an id of the hub"):
            hub.local(path)

"""Downloads from a hub and from hosts of pictures, both a real server on the loopback, by the command itself."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_vlm.data.sets.source import stored_name
from tests.data.server import Server, send
from tests.data.sets.test_table import picture
from tools import download_data

ROOT = Path(__file__).parents[2]
COMMIT = "f" * 40


@pytest.fixture
def server() -> Iterator[Server]:
    one = Server()
    yield one
    one.stop()


def hold(server: Server, repository: str, files: dict[str, bytes]) -> None:
    """Make the server the hub of one repository of data sets."""

    def answer(body: bytes, **headers: str) -> Callable[[BaseHTTPRequestHandler, int], None]:
        return lambda handler, _: send(handler, 200, body, **headers)

    api = f"/api/datasets/{repository}"
    tree = [{"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for path, data in files.items()]  # fmt: skip
    about = {"id": repository, "sha": COMMIT, "siblings": [{"rfilename": path} for path in files]}
    server.answers[f"{api}/revision/main"] = answer(json.dumps(about).encode())
    server.answers[f"{api}/tree/{COMMIT}?recursive=true&expand=false"] = answer(json.dumps(tree).encode())
    for path, data in files.items():
        etag = f'"{hashlib.sha1(data).hexdigest()}"'
        server.answers[f"/datasets/{repository}/resolve/{COMMIT}/{path}"] = answer(
            data, ETag=etag, X_Repo_Commit=COMMIT
        )


def parquet(rows: list[dict[str, object]]) -> bytes:
    stream = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), stream)
    return stream.getvalue()


def start(server: Server, out: Path, *arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "HF_ENDPOINT": server.address, "PYTHONPATH": str(ROOT), "HF_TOKEN": "secret-word"}
    command = [sys.executable, "tools/download_data.py", "--out", str(out), "--backoff-seconds", "0.01",
               "--stall-seconds", "0.5", "--attempts", "2", "--per-host", "0", *arguments]  # fmt: skip
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def run(server: Server, out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    with start(server, out, *arguments) as process:
        try:
            told = process.communicate(timeout=60)
        finally:
            process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, *told)


def row(url: str, sha256: str = "") -> dict[str, object]:
    return {"image_url": url, "image_sha256": sha256, "question": f"What is {url}?", "answer": "A cat."}


def test_a_data_set_arrives_and_what_is_missing_is_told(server: Server, tmp_path: Path) -> None:
    pictures = [picture(number) for number in range(4)]
    hashes = [hashlib.sha256(data).hexdigest() for data in pictures]

    def busy_once(handler: BaseHTTPRequestHandler, seen: int) -> None:
        send(handler, 503) if seen == 0 else send(handler, 200, pictures[1])

    server.answers |= {
        "/0": lambda handler, _: send(handler, 200, pictures[0]),
        "/1": busy_once,
        "/2": lambda handler, _: send(handler, 302, Location="/moved"),
        "/moved": lambda handler, _: send(handler, 200, pictures[2]),
        "/changed": lambda handler, _: send(handler, 200, pictures[3]),
        "/cut": lambda handler, _: send(handler, 200, b"x" * 5, Content_Length="50", Connection="close"),
        "/away": lambda handler, _: send(handler, 302, Location="file:///etc/passwd"),
    }
    web = server.address
    rows = [row(f"{web}/{number}", hashes[number]) for number in range(3)]
    rows += [row(f"{web}/0"), row(f"{web}/changed", hashes[0]), row(f"{web}/gone"), row(f"{web}/cut"),
             row(f"{web}/away"), row("ftp://x/y"), {**row(f"{web}/x"), "question": ""}]  # fmt: skip
    hold(server, "allenai/pixmo-ask-model-anything", {"data/train-00000-of-00001.parquet": parquet(rows)})
    asked = ["--datasets", "pixmo_ask_model_anything"]
    done = run(server, tmp_path / "out", *asked, "--allow-private-addresses")
    assert done.returncode == 0, done.stderr
    (report,) = json.loads((tmp_path / "out/report.json").read_text())
    assert report["annotations"] == "ok" and report["rows_left_out"] == 1
    assert (report["wanted"], report["fetched"]) == (8, 3), "/0 stands twice, and is fetched once"
    assert report["missing"] == {"changed": 1, "answer 404": 1, "cut off": 1, "not http": 2}
    assert f"{web}/gone" in report["examples"]["answer 404"][0]
    for number in range(3):
        assert (tmp_path / "out" / stored_name(f"{web}/{number}")).read_bytes() == pictures[number]
    assert "1 missing, answer 404" in done.stdout and "/gone" in done.stdout
    assert "secret-word" not in done.stdout + done.stderr + (tmp_path / "out/report.json").read_text()
    assert not any("Authorization" in headers for path, headers in server.requests if "/api/" not in path
                   and "/resolve/" not in path), "the hub's token is for the hub"  # fmt: skip

    asked_before = len([path for path, _ in server.requests if path in ("/0", "/1", "/2")])
    again = run(server, tmp_path / "out", *asked, "--allow-private-addresses")
    assert again.returncode == 0
    assert len([path for path, _ in server.requests if path in ("/0", "/1", "/2")]) == asked_before
    (report,) = json.loads((tmp_path / "out/report.json").read_text())
    assert report["fetched"] == 0 and report["present"] == 3


def test_a_download_that_is_killed_goes_on(server: Server, tmp_path: Path) -> None:
    """Killed in the middle of the annotations, then of a picture: nothing stands half under its name, what is there is
    not asked for again, and of the picture only the rest."""
    out, ended, halves = tmp_path / "out", threading.Event(), threading.Semaphore(0)
    bodies = [bytes([number]) * 200_000 for number in range(3)]
    rows = parquet([row(f"{server.address}/{number}", hashlib.sha256(body).hexdigest())
                    for number, body in enumerate(bodies)])  # fmt: skip
    annotations = "data/train-00000-of-00001.parquet"
    hold(server, "allenai/pixmo-ask-model-anything", {annotations: rows})
    sent: list[tuple[str, int]] = []

    def half_then_rest(body: bytes, **headers: str) -> Callable[[BaseHTTPRequestHandler, int], None]:
        """A first answer that stops in the middle until `ended`, if it is asked for the whole; else what is asked."""
        stopped: list[bool] = []

        def answer(handler: BaseHTTPRequestHandler, _: int) -> None:
            first = int(handler.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
            status = 206 if first else 200
            told = {**headers, "Content_Range": f"bytes {first}-{len(body) - 1}/{len(body)}"} if first else headers
            if handler.command == "HEAD" or stopped:
                sent.append((handler.path, len(body) - first if handler.command == "GET" else 0))
                send(handler, status, body[first:], **told)
                return
            stopped.append(True)
            send(handler, 200, body[: len(body) // 2], **{**headers, "Content_Length": str(len(body))})
            handler.wfile.flush()
            halves.release()
            ended.wait(120)
            handler.close_connection = True

        return answer

    hub = f"/datasets/allenai/pixmo-ask-model-anything/resolve/{COMMIT}/{annotations}"
    server.answers[hub] = half_then_rest(rows, ETag=f'"{hashlib.sha1(rows).hexdigest()}"', X_Repo_Commit=COMMIT)
    for number, body in enumerate(bodies):
        server.answers[f"/{number}"] = lambda handler, _, body=body: send(handler, 200, body)
    server.answers["/1"] = half_then_rest(bodies[1], ETag='"one"')
    asked = ["--datasets", "pixmo_ask_model_anything", "--allow-private-addresses", "--connections", "1",
             "--stall-seconds", "120"]  # fmt: skip
    table = out / "annotations/allenai--pixmo-ask-model-anything" / annotations
    pictures = [out / stored_name(f"{server.address}/{number}") for number in range(3)]
    part = pictures[1].with_name(f"{pictures[1].name}.part")

    def kill(come: Callable[[], bool]) -> list[Path]:
        """Start, kill when half of a file has come; which files stand there under their names."""
        with start(server, out, *asked) as process:
            assert halves.acquire(timeout=120)
            while not come():
                assert process.poll() is None
                time.sleep(0.01)
            process.kill()
        return [path for path in (table, *pictures) if path.exists()]

    assert kill(lambda: any(out.rglob("*.incomplete"))) == []
    assert kill(lambda: part.exists() and part.stat().st_size == 100_000) == [table, pictures[0]]
    assert table.read_bytes() == rows and pictures[0].read_bytes() == bodies[0]
    place, before = part.stat().st_ino, len(server.requests)
    ended.set()
    done = run(server, out, *asked)
    assert done.returncode == 0, done.stderr
    assert [path.read_bytes() for path in (table, *pictures)] == [rows, *bodies]
    assert pictures[1].stat().st_ino == place, "what had come was gone on with, and got its name whole"
    assert sorted(path.name for path in (out / "media").rglob("*") if path.is_file()) == sorted(
        path.name for path in pictures
    )
    media = [path for path, _ in server.requests[before:] if path in ("/0", "/1", "/2")]
    assert media == ["/1", "/2"] and ("/1", 100_000) in sent
    assert not any(path == hub and headers for path, headers in server.requests[before:] if "Range" in headers)
    (report,) = json.loads((out / "report.json").read_text())
    assert (report["wanted"], report["present"], report["fetched"]) == (3, 1, 2) and not report["missing"]


def test_private_addresses_are_refused_without_the_flag(server: Server, tmp_path: Path) -> None:
    rows = [row(f"{server.address}/0")]
    hold(server, "allenai/pixmo-ask-model-anything", {"data/train-00000-of-00001.parquet": parquet(rows)})
    done = run(server, tmp_path / "out", "--datasets", "pixmo_ask_model_anything")
    assert done.returncode == 0, done.stderr
    assert "1 missing, private address" in done.stdout
    assert "/0" not in [path for path, _ in server.requests]


def test_a_repository_that_does_not_exist_is_an_error_after_the_others(server: Server, tmp_path: Path) -> None:
    server.answers["/0"] = lambda handler, _: send(handler, 200, picture(0))
    rows = [row(f"{server.address}/0")]
    hold(server, "allenai/pixmo-ask-model-anything", {"data/train-00000-of-00001.parquet": parquet(rows)})
    names = ["--datasets", "pixmo_cap", "doc_qa", "pixmo_ask_model_anything"]
    done = run(server, tmp_path / "out", *names, "--allow-private-addresses")
    assert done.returncode == 1 and "no annotations of pixmo_cap, doc_qa;" in done.stderr
    assert "rrc.cvc.uab.es" in done.stdout, "what is to be got by hand is told"
    assert (tmp_path / "out" / stored_name(f"{server.address}/0")).is_file()


@pytest.mark.slow
def test_secrets_are_not_told(server: Server, tmp_path: Path) -> None:
    """Neither the hub's token, even if the hub itself repeats it, nor the password of a proxy."""

    def repeating(handler: BaseHTTPRequestHandler, _: int) -> None:
        told = handler.headers["Authorization"]
        send(handler, 403, json.dumps({"error": told}).encode(), X_Error_Message=f"not allowed: {told}")

    hold(
        server, "allenai/pixmo-ask-model-anything", {"data/train-00000-of-00001.parquet": parquet([row("http://h/0")])}
    )
    server.answers["/api/datasets/allenai/pixmo-cap/revision/main"] = repeating
    proxy = server.address.replace("http://", "http://someone:pass%20word@")
    done = run(server, tmp_path / "out", "--datasets", "pixmo_cap", "pixmo_ask_model_anything", "--proxy", proxy)
    assert done.returncode == 1 and any(headers.get("Authorization") == "Bearer secret-word"
                                        for _, headers in server.requests)  # fmt: skip
    told = [done.stdout, done.stderr]
    told += [path.read_text(errors="replace") for path in (tmp_path / "out").rglob("*") if path.is_file()]
    (report, other) = json.loads((tmp_path / "out/report.json").read_text())
    assert "HfHubHTTPError" in report["annotations"] or "403" in report["annotations"]
    assert other["missing"] == {"answer 404": 1}, "the proxy was asked"
    assert not [text for text in told for secret in ("secret-word", "pass%20word", "pass word") if secret in text]


def test_a_dry_run_asks_nobody(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    download_data.main(["--stage", "all", "--dry-run", "--out", str(tmp_path / "out")])
    told = capsys.readouterr().out
    for name in ("pixmo_cap ", "tulu4 ", "mevis_track ", "doc_qa ", "molmo2_hardcodes "):
        assert name in told
    assert "hub allenai/pixmo-cap " in told and "by hand: DocVQA" in told and "not verified: " in told
    assert not (tmp_path / "out").exists()
    download_data.main(["--stage", "pretraining", "--recipe", "educational", "--dry-run"])
    assert "allenai/tulu-3-sft-mixture" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "nothing was asked for"), (["--datasets", "pixmo_capp"], "did you mean pixmo_cap")],
)
def test_bad_requests_are_told(arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        download_data.main(arguments)


def test_a_place_that_cannot_be_written_is_told_before_anything_is_fetched(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(SystemExit, match="file: a file stands where a folder is needed"):
        download_data.main(["--datasets", "pixmo_cap", "--out", str(tmp_path / "file")])

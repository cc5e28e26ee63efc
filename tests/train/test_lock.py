"""Who may write into a run directory."""

import json
import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from megatron_vlm.train.lock import MISSED, Lock


def _locked_by(folder, **owner):
    folder.mkdir()
    (folder / "lock").write_text(json.dumps(owner))


def test_the_second_is_refused_with_the_name_of_the_first(tmp_path):
    with Lock(tmp_path / "run"):
        with pytest.raises(ValueError, match=f"run is in use by process {os.getpid()} on {socket.gethostname()}"):
            Lock(tmp_path / "run").__enter__()
    with Lock(tmp_path / "run"):
        pass
    assert not (tmp_path / "run").exists()  # made by the lock, and nothing came of it


def test_a_folder_that_was_there_or_holds_something_stays(tmp_path):
    with Lock(tmp_path):
        pass
    with Lock(tmp_path / "run"):
        (tmp_path / "run" / "config.yaml").write_text("")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.yaml"]


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    _locked_by(tmp_path / "run", host=socket.gethostname(), pid=dead.pid, started=time.time())
    with Lock(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / "lock").read_text())["pid"] == os.getpid()


def test_a_process_of_the_same_number_is_another_one(tmp_path):
    _locked_by(tmp_path / "run", host=socket.gethostname(), pid=os.getpid(), started=1.0)
    with Lock(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / "lock").read_text())["started"] > 1.0


@pytest.mark.parametrize("text", ['{"host": "elsewhere", "pid": 7}', "", "[1]"], ids=["other host", "empty", "no dict"])
def test_a_lock_of_another_host_is_stale_when_nobody_touches_it(tmp_path, text):
    (tmp_path / "lock").write_text(text)
    began = time.monotonic()
    with Lock(tmp_path, beat_s=0.02):
        assert time.monotonic() - began >= 0.02 * MISSED * 0.9


def test_a_lock_of_another_host_holds_while_it_is_touched(tmp_path):
    (tmp_path / "lock").write_text('{"host": "elsewhere", "pid": 7}')
    touching = threading.Timer(0.1, os.utime, (tmp_path / "lock",))
    touching.start()
    with pytest.raises(ValueError, match="in use by process 7 on elsewhere"):
        Lock(tmp_path, beat_s=0.1).__enter__()
    touching.join()


def test_the_holder_touches_its_lock(tmp_path):
    with Lock(tmp_path, beat_s=0.02):
        os.utime(tmp_path / "lock", (1, 1))
        deadline = time.monotonic() + 10
        while (tmp_path / "lock").stat().st_mtime < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_two_that_clear_the_same_stale_lock_do_not_both_get_it(tmp_path):
    """The slower one has read the stale lock, and clears when the faster one holds a new one already."""
    stale = {"host": "elsewhere", "pid": 7}
    with Lock(tmp_path):
        slower = Lock(tmp_path)
        slower._clear(stale)
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()

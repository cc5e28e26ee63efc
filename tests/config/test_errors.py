"""What a person is told of an error."""

from __future__ import annotations

import errno
import os

from megatron_vlm.config import errors


def told(action, *arguments) -> str:
    try:
        action(*arguments)
    except OSError as error:
        return errors.words(error)
    raise AssertionError("no error")


def test_errors_of_files_say_what_is_in_the_way_and_the_next_move(tmp_path):
    file = tmp_path / "file"
    file.write_text("x")
    assert told(open, tmp_path / "gone") == f"{tmp_path}/gone is not there. Check the name."
    assert told(open, tmp_path / "no" / "gone").endswith(f"nor is its folder {tmp_path}/no. Check the name, or make "
                                                         "the folder.")  # fmt: skip
    assert told(open, tmp_path) == f"{tmp_path} is a folder, where a file is needed. Name a file in it."
    for action, path in ((os.mkdir, file), (open, file / "below")):
        assert told(action, path).startswith(f"{path}: a file stands where a folder is needed")
    refused = errors.words(PermissionError(errno.EACCES, "Permission denied", "locked"))
    assert refused.startswith("locked: this user has no permission. Change the mode or owner")


def test_other_errors_keep_their_words_and_their_notes():
    full = OSError(errno.ENOSPC, "No space left on device", "shards")
    full.add_note("12 MB are free")
    assert errors.words(full) == "[Errno 28] No space left on device: 'shards'\n12 MB are free"
    assert errors.words(ConnectionError("no route")) == "no route"
    assert errors.words(ValueError("wrong")) == "wrong"

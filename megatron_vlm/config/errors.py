"""Errors in the words of a person who has to mend them: what was found, and the next move."""

from __future__ import annotations

from pathlib import Path


def words(error: BaseException) -> str:
    """The text of an error with its notes. Of the commonest errors of the file system, more than their number."""
    return "\n".join([_file(error) if isinstance(error, OSError) else str(error), *getattr(error, "__notes__", ())])


def _file(error: OSError) -> str:
    if not isinstance(error.filename, str):
        return str(error)
    path = Path(error.filename)
    if isinstance(error, PermissionError):
        return f"{path}: this user has no permission. Change the mode or owner of it or of its folder, or name another."
    if isinstance(error, FileNotFoundError):
        if path.parent.exists():
            return f"{path} is not there. Check the name."
        return f"{path} is not there, nor is its folder {path.parent}. Check the name, or make the folder."
    if isinstance(error, IsADirectoryError):
        return f"{path} is a folder, where a file is needed. Name a file in it."
    if isinstance(error, FileExistsError | NotADirectoryError):
        return f"{path}: a file stands where a folder is needed, or something has this name already. Name another."
    return str(error)

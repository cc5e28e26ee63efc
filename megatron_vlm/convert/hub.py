"""Models of the hub by id: fetched with huggingface_hub, which honours HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE."""

from __future__ import annotations

import re
import sys
from fnmatch import fnmatch
from pathlib import Path

#: What a conversion reads; in particular no code and no pickles.
FILES = ("*.safetensors", "*.safetensors.index.json", "config.json", "preprocessor_config.json", "tokenizer.json",
         "tokenizer_config.json", "generation_config.json")  # fmt: skip
_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def local(path: str) -> Path:
    """A directory as it is; an id of the hub (org/name) is fetched. ValueError for what is neither."""
    if Path(path).exists():
        return Path(path)
    if not _ID.fullmatch(path):
        raise ValueError(f"{path} is neither a directory nor an id of the hub (org/name). Check the path.")
    return fetch(path)


def fetch(repo: str, revision: str = "main") -> Path:
    """Fetch a model, its size shown first; the folder in the cache. ValueError where that fails."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    if not _ID.fullmatch(repo):
        raise ValueError(f"{repo!r} is not an id of the hub (org/name).")
    try:
        if not HF_HUB_OFFLINE:
            info = HfApi().model_info(repo, revision=revision, files_metadata=True)
            own = [file for file in info.siblings or () if "/" not in file.rfilename]
            wanted = [file for file in own if any(fnmatch(file.rfilename, name) for name in FILES)]
            size = sum(file.size or 0 for file in wanted)
            print(f"{repo}: {len(wanted)} files, {size / 1e9:.2f} GB", file=sys.stderr)
        # No folders: some repositories keep copies in other formats there.
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(FILES), ignore_patterns=["*/*"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise ValueError(
            f"{repo} could not be fetched: {error}. Check the id, the network, HF_ENDPOINT, and for gated models "
            "HF_TOKEN; a model that lies in the cache already is found with HF_HUB_OFFLINE=1."
        ) from error

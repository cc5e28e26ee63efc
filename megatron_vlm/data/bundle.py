"""Self-contained tars, read sample by sample: those of export.py, equal to what was written, and others.

Of WebDataset shards made elsewhere a sample is an image or a video with a caption (`key.jpg`, `key.txt`), or with a
JSON object in one of the forms of formats.py. Further members are left alone, but for pickles: those are refused.
"""

from __future__ import annotations

import hashlib
import lzma
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, cast

from megatron_vlm.data import formats
from megatron_vlm.data.example import KEY, Branch, Example, Media, Turn, from_json
from megatron_vlm.data.image import EXTENSIONS
from megatron_vlm.data.tar import check_end

CAPTIONS = ("txt", "caption", "cap", "text")
IMAGES = frozenset((*EXTENSIONS.values(), "jpeg", "tiff"))
VIDEOS = frozenset(("mp4", "webm", "mkv", "mov", "avi"))
#: What other readers unpickle, so that it may run anything. Never read here; a sample that has one is refused, because
#: it is made for such a reader and may be incomplete without it.
PICKLES = frozenset(("pyd", "pkl", "pickle", "pth", "pt"))

#: Most bytes of one sample's files, all in memory at once: a compressed tar of a few megabytes can hold any number.
MAX_SAMPLE_BYTES = 4 << 30
#: Names that webdataset keeps for itself.
_META = re.compile(r"__[^/]*__($|/)")


def read(
    tars: list[Path], add_image: Callable[[bytes], Media], add_video: Callable[[bytes], Media]
) -> Iterator[tuple[str, Example | ValueError]]:
    """(name, sample) of each sample of the tars, (name, error) for one that cannot be used.

    Local files only; a tar's member is never written to disk. Raises ValueError for what is no tar.
    """
    for path in tars:
        if not path.is_file():
            raise ValueError(f"{path} is no file; addresses and commands are refused. Download the tar first.")
    import webdataset.tariterators  # a second, and torch: only for those who import

    used: dict[str, int] = {}
    for path in tars:
        for sample in _whole(path, webdataset.tariterators.group_by_keys(_members(path))):
            name = f"{path.name}:{sample['__key__']}"
            try:
                yield name, _example(sample, used, add_image, add_video)
            except OSError:
                raise  # of the disk that media go to
            except Exception as error:  # a stranger's sample may be anything
                yield name, error if isinstance(error, ValueError) else ValueError(f"{type(error).__name__}: {error}")


def _whole(path: Path, samples: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The samples of a tar, an error of the tar named."""
    while True:
        try:
            sample = next(samples, None)
        except (tarfile.TarError, EOFError, OSError, ValueError, zlib.error, lzma.LZMAError) as error:
            # ValueError: a name twice in one sample
            raise ValueError(f"{path} cannot be read to its end: {error.args[0] if error.args else error}") from error
        if sample is None:
            return
        yield sample


def _members(path: Path) -> Iterator[dict[str, Any]]:
    """Files of a tar, compressed or not, as webdataset groups them into samples. In the place of one that must not be
    read stands why."""
    key, size = "", 0
    with tarfile.open(path, "r:*") as tar:
        end = 0
        for info in tar:
            tar.members = []  # type: ignore[attr-defined]  # or each would be kept
            if info.size < 0:
                raise ValueError(f"member {info.name!r} has {info.size} bytes: its header is broken")
            end = tar.offset
            if info.isdir() or _META.match(info.name):
                continue
            folder, _, base = info.name.rpartition("/")
            stem = f"{folder}/{base.partition('.')[0]}"
            key, size = stem, info.size + (size if stem == key else 0)
            data: bytes | ValueError
            if not info.isreg() or info.issparse():
                data = ValueError(f"its member {info.name!r} is no regular file: refused.")
            elif size > MAX_SAMPLE_BYTES:
                data = ValueError(f"it has more than {MAX_SAMPLE_BYTES} bytes: refused.")
            else:
                content = tar.extractfile(info)
                assert content is not None
                data = content.read()
            yield {"fname": info.name, "data": data, "__url__": path.name}
        check_end(cast(BinaryIO, tar.fileobj), end)


def _example(
    sample: dict[str, Any],
    used: dict[str, int],
    add_image: Callable[[bytes], Media],
    add_video: Callable[[bytes], Media],
) -> Example:
    for name, value in sample.items():
        if isinstance(value, ValueError):
            raise value
        if name.rpartition(".")[2] in PICKLES:
            raise ValueError(f"its member .{name} is a pickle, which can run code when it is read: refused.")
    media = tuple(
        add_video(data) if kind in VIDEOS else add_image(data)
        for name, data in sorted(sample.items(), key=_number)
        if (kind := name.rpartition(".")[2].lower()) in IMAGES | VIDEOS and isinstance(data, bytes)
    )
    key = _key(sample["__key__"], used)
    if "json" in sample:
        record = formats.parsed(sample["json"])
        if isinstance(record.get("media"), list) and isinstance(record.get("branches"), list):
            return _own(sample["json"].decode(), media)
        caption = next(
            (record[name] for name in ("caption", "text") if media and isinstance(record.get(name), str)), ""
        )
        if caption and not {"messages", "conversations", "points", "answer"} & set(record):
            return _captioned(key, caption, media)
        told = next((sample[name].decode() for name in CAPTIONS if name in sample), "").strip()
        if told and media and not formats.has_conversation(record):  # facts about the image beside its caption
            return _captioned(key, told, media)
        record = {name: value for name, value in record.items() if name not in ("key", "image_path", "image_paths")}
        return formats.read_record(record, key=key, media=media)
    caption = next((sample[name].decode() for name in CAPTIONS if name in sample), "")
    if not caption or not media:
        found = ", ".join(name for name in sample if not name.startswith("__"))
        raise ValueError(f"it has {found}; needed a JSON object, or an image with {' or '.join(CAPTIONS)}.")
    return _captioned(key, caption, media)


def _own(text: str, media: tuple[Media, ...]) -> Example:
    """A sample that export.write wrote. Raises ValueError where the files are not those that it names."""
    try:
        example = from_json(text)
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"its JSON is no sample ({type(error).__name__}: {error}).") from error
    if tuple(one.key for one in example.media) != tuple(one.key for one in media):
        raise ValueError("its media are not those that its JSON names.")
    example = replace(example, media=media)
    example.check()
    return example


def _captioned(key: str, caption: str, media: tuple[Media, ...]) -> Example:
    style = "video_long_caption" if media[0].kind == "video" else "long_caption"
    example = Example(key, (Branch(style, (Turn("", caption.strip()),)),), media)
    example.check()
    return example


def _number(item: tuple[str, Any]) -> tuple[int, str]:
    """`10.jpg` after `2.jpg`."""
    first = item[0].partition(".")[0]
    return (int(first) if first.isdecimal() else -1, item[0])


def _key(name: str, used: dict[str, int]) -> str:
    """A key that may be used: the name's, or what is left of it with its hash; numbered where it was used before."""
    key = name.lstrip("./")
    if not KEY.fullmatch(key):
        kept = re.sub(r"[^A-Za-z0-9_-]+", "_", key).strip("_")
        key = f"{kept}-{hashlib.sha256(name.encode(errors='surrogateescape')).hexdigest()[:12]}".lstrip("-")
    used[key] = used.get(key, 0) + 1
    return key if used[key] == 1 else f"{key}-{used[key]}"

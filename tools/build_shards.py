"""Turn JSONL files of one's own into the shards that training reads, or check shards.

    python tools/build_shards.py build my.jsonl --images photos/ --out my_shards
    python tools/build_shards.py verify my_shards

What a line may look like: `python tools/build_shards.py build --help`. Each file is one data set, named like the file.
Nothing appears at --out before all of it is written; an error names the file and the line. Train on the result with
data.manifest=my_shards data.mixture=my_shards/mixture.yaml.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from megatron_vlm.data import formats
from megatron_vlm.data.example import Media
from megatron_vlm.data.image import decode
from megatron_vlm.data.shards import Shards
from megatron_vlm.data.verify import verify
from megatron_vlm.data.writer import ShardWriter


def main(arguments: list[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    try:
        options.command(options)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def build(options: argparse.Namespace) -> None:
    """Write the shards and print what is in them."""
    if options.dataset and len(options.files) > 1:
        raise ValueError(f"--dataset names one data set, but {len(options.files)} files were given. Leave it out.")
    names = [options.dataset or file.stem for file in options.files]
    if len(set(names)) < len(names):
        raise ValueError(f"two files would make the same data set ({', '.join(names)}): rename one of them.")
    bad: list[str] = []
    with ShardWriter(options.out, shard_bytes=options.shard_mb * 2**20, overwrite=options.overwrite) as writer:

        def add_image(data: bytes) -> Media:
            decode(data, name=hashlib.sha256(data).hexdigest()[:12])  # an image that does not decode is an error now
            return writer.add_image(data)

        writer.add_file("mixture.yaml", _mixture(names).encode())
        for file, dataset in zip(options.files, names, strict=True):
            images = options.images or file.parent
            for number, line in _lines(file):
                try:
                    sample = formats.read_line(line, key=f"{number:08d}", images=images, add_image=add_image)
                    split = options.held_out_split if _held_out(sample.key, options.held_out) else options.split
                    writer.add(sample, dataset, split)
                except (ValueError, OSError) as error:
                    bad.append(f"{file}:{number}: {error}")
                    if len(bad) > options.max_bad:
                        raise ValueError("\n".join(bad) + _advice(options.max_bad)) from error
    for fault in bad:
        print(f"left out: {fault}", file=sys.stderr)
    shards = Shards(options.out)
    _print_counts(shards, len(bad))
    if options.held_out and not any(options.held_out_split in shards.splits(name) for name in shards.datasets):
        print(
            f"note: too few samples for --held-out {options.held_out:g}, none fell into {options.held_out_split!r}. "
            "Raise it, or train with eval.every=0.",
            file=sys.stderr,
        )


def check(options: argparse.Namespace) -> None:
    """Read every byte; exit with 1 where something is wrong."""
    faults = verify(options.directory)
    for fault in faults:
        print(fault, file=sys.stderr)
    if faults:
        raise ValueError(f"{options.directory}: {len(faults)} faults, listed above. Copy it again or build it anew.")
    _print_counts(Shards(options.directory), 0)
    print("sound")


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """(number from 1, text) of every line that is not empty, with a progress bar over the file's bytes."""
    with (
        file.open("rb") as stream,
        tqdm(total=file.stat().st_size, unit="B", unit_scale=True, desc=file.name, disable=None) as bar,
    ):
        for number, line in enumerate(stream, 1):
            bar.update(len(line))
            try:
                text = line.decode()
            except UnicodeDecodeError as error:
                raise ValueError(f"{file}:{number}: not UTF-8 ({error}).") from error
            if text.strip():
                yield number, text


def _held_out(key: str, share: float) -> bool:
    """Whether a sample is held out: decided by its key alone, so that it stays so when data are added."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") < share * 2**64


def _mixture(names: list[str]) -> str:
    """A mixture of all data sets: shares by the root of their sizes."""
    members = "".join(f"      - {name}\n" for name in names)
    return f"# Train with data.mixture=<this file>.\ngroups:\n  all:\n    rate: 1.0\n    members:\n{members}"


def _advice(allowed: int) -> str:
    if not allowed:
        return "\nNothing was written. Correct the line, or leave out up to N bad lines with --max-bad N."
    return f"\nNothing was written: more than --max-bad {allowed} lines are bad."


def _print_counts(shards: Shards, left_out: int) -> None:
    for dataset in shards.datasets:
        for split in shards.splits(dataset):
            print(f"{dataset:20} {split:12} {shards.count(dataset, split):8} samples")
    print(f"{shards.manifest['media']['count']} images, {left_out} lines left out, in {shards.directory}")


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    one = commands.add_parser("build", help="JSONL -> shards", description=formats.__doc__, formatter_class=raw)
    one.add_argument("files", nargs="+", type=Path, metavar="FILE.jsonl", help="each is one data set")
    one.add_argument("--out", required=True, type=Path, help="directory to write; must not exist")
    one.add_argument("--images", type=Path, help="folder that image paths start from (default: that of the JSONL file)")
    one.add_argument("--dataset", help="name of the data set (default: the file's name without .jsonl)")
    one.add_argument("--split", default="train", help="split of the samples (default: %(default)s)")
    one.add_argument(
        "--held-out", type=_share, default=0.0, metavar="SHARE", help="share of the samples kept out (default: 0)"
    )
    one.add_argument("--held-out-split", default="validation", help="split of those (default: %(default)s)")
    one.add_argument("--max-bad", type=int, default=0, help="bad lines to leave out and list (default: 0)")
    one.add_argument("--shard-mb", type=int, default=1024, help="size of a media shard in MiB (default: %(default)s)")
    one.add_argument("--overwrite", action="store_true", help="replace shards that stand at --out")
    one.set_defaults(command=build)
    other = commands.add_parser("verify", help="check every byte of shards")
    other.add_argument("directory", type=Path, help="directory with a manifest.json")
    other.set_defaults(command=check)
    return parser


def _share(text: str) -> float:
    share = float(text)
    if not 0 <= share < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a share: 0 or more, less than 1.")
    return share


if __name__ == "__main__":
    main()

"""Turn data into the shards that training reads: JSONL of one's own, downloaded data sets, tars made elsewhere.

    python tools/build_shards.py build my.jsonl --media files/ --out my_shards
    python tools/build_shards.py dataset pixmo_cap cosyn_point --source downloads --out my_shards --workers 16
    python tools/build_shards.py import tars/*.tar --dataset mine --out my_shards
    python tools/build_shards.py verify|stats my_shards
    python tools/build_shards.py repair my_shards --out sound_shards
    python tools/build_shards.py export my_shards --out tars

What a line may look like: `python tools/build_shards.py build --help`. Each file is one data set, named like the file.
Nothing appears at --out before all of it is written; an error names the file and the line. Train on the result with
data.manifest=my_shards data.mixture=my_shards/mixture.yaml.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import yaml
from tqdm import tqdm

from megatron_vlm.config import errors
from megatron_vlm.data import bundle, export, formats, mixture
from megatron_vlm.data.example import Media
from megatron_vlm.data.image import decode
from megatron_vlm.data.repair import QUARANTINE, repair
from megatron_vlm.data.sets import build as downloaded
from megatron_vlm.data.sets.table import TABLE
from megatron_vlm.data.shards import Shards
from megatron_vlm.data.stats import stats
from megatron_vlm.data.verify import verify
from megatron_vlm.data.writer import ShardWriter


def main(arguments: list[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    try:
        options.command(options)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {errors.words(error)}")


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
            folder = options.media or file.parent
            for number, line in _lines(file):
                try:
                    sample = formats.read_line(
                        line, key=f"{number:08d}", folder=folder, add_image=add_image, add_video=writer.add_video
                    )
                    split = options.held_out_split if _held_out(sample.key, options.held_out) else options.split
                    writer.add(sample, dataset, split)
                except ValueError as error:
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


def build_downloaded(options: argparse.Namespace) -> None:
    """Shards of data sets that tools/download_data.py got."""
    text = _mixture(options.names) if options.mixture is None else _restricted(options.mixture, options.names)
    result = downloaded.build(
        options.names,
        options.source,
        options.out,
        workers=options.workers,
        shard_bytes=options.shard_mb * 2**20,
        max_left_out=options.max_left_out,
        held_out=lambda key: _held_out(key, options.held_out),
        held_out_share=options.held_out,
        overwrite=options.overwrite,
        files={"mixture.yaml": text.encode()},
    )
    if not result.is_new:
        print(f"{options.out} is made of these files already. --overwrite makes it anew, as after more downloads.")
    for name, reasons in result.left_out.items():
        counts = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        print(f"{name}: left out {counts}; listed in {options.out / downloaded.LEFT_OUT}", file=sys.stderr)
    _print_counts(Shards(options.out), sum(reasons.total() for reasons in result.left_out.values()))


def import_tars(options: argparse.Namespace) -> None:
    """Shards of self-contained tars, of ours or of others."""
    bad: list[str] = []
    with ShardWriter(options.out, shard_bytes=options.shard_mb * 2**20, overwrite=options.overwrite) as writer:

        def add_image(data: bytes) -> Media:
            decode(data, name=hashlib.sha256(data).hexdigest()[:12])
            return writer.add_image(data)

        samples = tqdm(bundle.read(options.tars, add_image, writer.add_video), unit=" samples", disable=None)
        for name, sample in samples:
            try:
                if isinstance(sample, ValueError):
                    raise sample
                split = options.held_out_split if _held_out(sample.key, options.held_out) else options.split
                writer.add(sample, options.dataset, split)
            except ValueError as error:
                bad.append(f"{name}: {error}")
                if len(bad) > options.max_bad:
                    raise ValueError("\n".join(bad) + _advice(options.max_bad)) from error
        writer.add_file("mixture.yaml", _mixture([options.dataset]).encode())
    for fault in bad:
        print(f"left out: {fault}", file=sys.stderr)
    _print_counts(Shards(options.out), len(bad))


def export_tars(options: argparse.Namespace) -> None:
    """Self-contained tars, a folder for each data set."""
    shards = Shards(options.directory)
    for dataset in options.datasets or shards.datasets:
        for path in export.write(shards, dataset, options.out, shard_bytes=options.shard_mb * 2**20):
            print(path)


def repair_shards(options: argparse.Namespace) -> None:
    """Save what is sound; exit with 1 where something was lost."""
    result = repair(options.directory, options.out, shard_bytes=options.shard_mb * 2**20)
    for fault in result.left_out:
        print(f"{fault['file']} {fault['key']}: {fault['reason']}", file=sys.stderr)
    _print_counts(Shards(options.out), len(result.left_out))
    if result.left_out:
        raise ValueError(f"{len(result.left_out)} faults, listed above and in {options.out / QUARANTINE}; "
                         f"{result.kept} samples are saved.")  # fmt: skip


def show_stats(options: argparse.Namespace) -> None:
    """Print what is in the shards."""
    shards = Shards(options.directory)
    print(
        f"{'data set':36} {'split':10} {'samples':>9} {'branches':>9} {'media':>9} {'mean text':>9} {'max':>8}  styles"
    )
    for one in stats(shards):
        styles = ", ".join(f"{style} {count}" for style, count in list(one.styles.items())[:4])
        print(f"{one.dataset:36} {one.split:10} {one.samples:9} {one.branches:9} {one.media:9} "
              f"{one.mean_characters:9.0f} {one.max_characters:8}  {styles}")  # fmt: skip
    size = sum(entry["size"] for entry in shards.manifest["files"].values())
    media = shards.manifest["media"]
    print(f"{media['count']} media files in {len(media['shards'])} tars, {size / 1e6:.1f} MB in all")


def check(options: argparse.Namespace) -> None:
    """Read every byte; exit with 1 where something is wrong."""
    faults = verify(options.directory)
    for fault in faults:
        print(fault, file=sys.stderr)
    if faults:
        raise ValueError(
            f"{options.directory}: {len(faults)} faults, listed above. Copy it again, build it anew, or save what is "
            "sound with build_shards.py repair."
        )
    _print_counts(Shards(options.directory), 0)
    print("sound")


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line) of every line that is not empty, with a progress bar over the file's bytes."""
    with (
        file.open("rb") as stream,
        tqdm(total=file.stat().st_size, unit="B", unit_scale=True, desc=file.name, disable=None) as bar,
    ):
        for number, line in enumerate(stream, 1):
            bar.update(len(line))
            if line.strip():
                yield number, line


def _held_out(key: str, share: float) -> bool:
    """Whether a sample is held out: decided by its key alone, so that it stays so when data are added."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") < share * 2**64


def _mixture(names: list[str]) -> str:
    """A mixture of all data sets: shares by the root of their sizes."""
    members = "".join(f"      - {name}\n" for name in names)
    return f"# Train with data.mixture=<this file>.\ngroups:\n  all:\n    rate: 1.0\n    members:\n{members}"


def _restricted(name: str, datasets: list[str]) -> str:
    """A mixture with only those members that are built; groups without any are left out."""
    members = {member.name for member in mixture.load(name).members}
    if not members & set(datasets):
        raise ValueError(f"mixture {name!r} has none of {', '.join(datasets)}.")
    path = Path(name) if Path(name).is_file() else mixture.FOLDER / f"{name}.yaml"
    groups = yaml.safe_load(path.read_text(encoding="utf-8"))["groups"]
    for group in groups.values():
        group["members"] = [m for m in group["members"] if (m if isinstance(m, str) else m["name"]) in datasets]
    kept = {title: group for title, group in groups.items() if group["members"]}
    head = f"# {name}, without the data sets that were not built. Rates are scaled to sum to 1.\n"
    return head + yaml.safe_dump({"groups": kept}, sort_keys=False)


def _advice(allowed: int) -> str:
    if not allowed:
        return "\nNothing was written. Correct the line, or leave out up to N bad lines with --max-bad N."
    return f"\nNothing was written: more than --max-bad {allowed} lines are bad."


def _print_counts(shards: Shards, left_out: int) -> None:
    for dataset in shards.datasets:
        for split in shards.splits(dataset):
            print(f"{dataset:20} {split:12} {shards.count(dataset, split):8} samples")
    print(f"{shards.manifest['media']['count']} images and videos, {left_out} lines left out, in {shards.directory}")


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    one = commands.add_parser("build", help="JSONL -> shards", description=formats.__doc__, formatter_class=raw)
    one.add_argument("files", nargs="+", type=Path, metavar="FILE.jsonl", help="each is one data set")
    one.add_argument(
        "--media", "--images", type=Path, help="folder that paths of images and videos start from (default: that of "
        "the JSONL file)"
    )  # fmt: skip
    one.add_argument("--dataset", help="name of the data set (default: the file's name without .jsonl)")
    _add_splits(one)
    _add_output(one)
    one.set_defaults(command=build)
    sets = commands.add_parser(
        "dataset", help="downloaded data sets -> shards", description=downloaded.__doc__, formatter_class=raw
    )
    sets.add_argument(
        "names", nargs="+", metavar="NAME", help=f"data sets as mixtures name them; {len(TABLE)} are known"
    )
    sets.add_argument("--source", required=True, type=Path, help="directory that tools/download_data.py wrote")
    sets.add_argument("--workers", type=count, default=os.cpu_count() or 1, help="processes (default: %(default)s)")
    sets.add_argument("--max-left-out", type=share, default=0.2, metavar="SHARE",
                      help="share of a data set that may be missing or unsound (default: %(default)s)")  # fmt: skip
    sets.add_argument("--held-out", type=share, default=0.0, metavar="SHARE",
                      help="share of train that goes to validation (default: 0)")  # fmt: skip
    sets.add_argument("--mixture", help="write mixture.yaml as this one, without what is not built (default: by size)")
    _add_output(sets)
    sets.set_defaults(command=build_downloaded)
    tars = commands.add_parser(
        "import", help="WebDataset tars made elsewhere -> shards", description=bundle.__doc__, formatter_class=raw
    )
    tars.add_argument("tars", nargs="+", type=Path, metavar="FILE.tar")
    tars.add_argument("--dataset", required=True, help="name of the data set")
    _add_splits(tars)
    _add_output(tars)
    tars.set_defaults(command=import_tars)
    out = commands.add_parser(
        "export", help="shards -> self-contained WebDataset tars", description=export.__doc__, formatter_class=raw
    )
    out.add_argument("directory", type=Path, help="directory with a manifest.json")
    out.add_argument("--datasets", nargs="+", metavar="NAME", help="only these")
    _add_output(out, overwrite=False)
    out.set_defaults(command=export_tars)
    mend = commands.add_parser("repair", help="save what is sound in damaged shards")
    mend.add_argument("directory", type=Path, help="damaged directory; it is not changed")
    _add_output(mend, overwrite=False)
    mend.set_defaults(command=repair_shards)
    numbers = commands.add_parser("stats", help="what is in shards")
    numbers.add_argument("directory", type=Path, help="directory with a manifest.json")
    numbers.set_defaults(command=show_stats)
    other = commands.add_parser("verify", help="check every byte of shards")
    other.add_argument("directory", type=Path, help="directory with a manifest.json")
    other.set_defaults(command=check)
    return parser


def _add_splits(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--split", default="train", help="split of the samples (default: %(default)s)")
    parser.add_argument(
        "--held-out", type=share, default=0.0, metavar="SHARE", help="share of the samples kept out (default: 0)"
    )
    parser.add_argument("--held-out-split", default="validation", help="split of those (default: %(default)s)")
    parser.add_argument("--max-bad", type=int, default=0, help="bad lines or samples to leave out (default: 0)")


def _add_output(parser: argparse.ArgumentParser, *, overwrite: bool = True) -> None:
    parser.add_argument("--out", required=True, type=Path, help="directory to write; must not exist")
    parser.add_argument("--shard-mb", type=count, default=1024, help="size of a tar in MiB (default: %(default)s)")
    if overwrite:
        parser.add_argument("--overwrite", action="store_true", help="replace shards that stand at --out")


def count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number of at least 1.")
    return number


def share(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a share: 0 or more, less than 1.")
    return value


if __name__ == "__main__":
    main()

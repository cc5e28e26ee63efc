"""Get the data sets of a stage: annotations from the hub, images and videos from their addresses.

    python tools/download_data.py --stage pretraining --out downloads
    python tools/download_data.py --datasets pixmo_cap cosyn_point --out downloads
    python tools/download_data.py --stage sft --dry-run

Run it again to go on: what is there already is not fetched again. Annotations go to OUT/annotations/, media to
OUT/media/ under the hash of their address; OUT/report.json and OUT/report.txt say what is missing and why, and what a
person has to get (licences, archives), for which OUT/files/ is the place. HF_ENDPOINT and HF_TOKEN work as usual.
Then: python tools/build_shards.py dataset NAME ... --source OUT --out SHARDS
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError
from tqdm import tqdm

from megatron_vlm.config import errors
from megatron_vlm.data import mixture
from megatron_vlm.data.fetch import Fetcher, Later, Limits, Refused
from megatron_vlm.data.sets import source
from megatron_vlm.data.sets.entry import Entry
from megatron_vlm.data.sets.resolve import Finder, Missing
from megatron_vlm.data.sets.row import LeftOut
from megatron_vlm.data.sets.table import TABLE, find

#: Mixtures of each stage, by recipe. The long stage trains on the mixture of fine-tuning.
STAGES = {
    "molmo2": {"pretraining": ["molmo2_pretrain"], "sft": ["molmo2_sft"], "long": ["molmo2_sft"]},
    "educational": {"pretraining": ["educational_pretrain"], "sft": ["educational_sft"], "long": ["educational_sft"]},
}
#: Examples of missing files that the report lists for each data set and reason.
SHOWN = 5


@dataclass
class Report:
    """What became of one data set."""

    name: str
    annotations: str = ""
    """ok, or why there are none."""
    rows_left_out: int = 0
    """Rows that the reader refused, and drafts of rows whose media are wrong in themselves."""
    rows_not_wanted: int = 0
    """Rows that the recipe does not train on, and those about media kept for evaluation."""
    wanted: int = 0
    """Files that the rows name, each once."""
    present: int = 0
    fetched: int = 0
    fetched_bytes: int = 0
    missing: dict[str, int] = field(default_factory=dict)
    """Reason -> files."""
    examples: dict[str, list[str]] = field(default_factory=dict)
    by_hand: str = ""
    unverified: str = ""

    def miss(self, reason: str, what: str) -> None:
        self.missing[reason] = self.missing.get(reason, 0) + 1
        self.show(reason, what)

    def show(self, reason: str, what: str) -> None:
        shown = self.examples.setdefault(reason, [])
        if len(shown) < SHOWN:
            shown.append(what)


def main(arguments: list[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    try:
        names = _names(options)
        if options.dry_run:
            _print_plan(names)
            return
        options.out.mkdir(parents=True, exist_ok=True)  # a wrong place is an error now
        reports = [_download(name, find(name), options) for name in names]
        _write(reports, options.out)
        print((options.out / "report.txt").read_text(), end="")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {errors.words(error)}")
    failed = [report.name for report in reports if report.annotations != "ok"]
    if failed:
        sys.exit(f"error: no annotations of {', '.join(failed)}; {options.out / 'report.txt'} says why.")


def _names(options: argparse.Namespace) -> list[str]:
    """Data sets asked for, each once, in the order of the mixtures."""
    names = list(options.datasets or [])
    if options.stage:
        stages = STAGES[options.recipe]
        chosen = stages.values() if options.stage == "all" else [stages[options.stage]]
        members = [m.name for mixtures in chosen for file in mixtures for m in mixture.load(file).members]
        names = [name for name in members if not names or name in names] if names else members
    if not names:
        raise ValueError("nothing was asked for: give --stage, --datasets, or both (those of the stage).")
    for name in names:
        find(name)
    return list(dict.fromkeys(names))


def _print_plan(names: list[str]) -> None:
    for name in names:
        entry = find(name)
        where = f"hub {entry.hub} {' '.join(_wanted(entry))}" if entry.hub else "by hand"
        print(f"{name:44} {where}")
        for word, text in (("by hand", entry.by_hand), ("not verified", entry.unverified)):
            if text:
                print(f"{'':44} {word}: {text}")
    hand = sum(bool(find(name).by_hand) for name in names)
    repositories = {find(name).hub for name in names} - {""}
    print(f"{len(names)} data sets from {len(repositories)} repositories; {hand} need files that are got by hand.")


def _wanted(entry: Entry) -> list[str]:
    """Patterns of what is fetched from the hub."""
    patterns = [pattern for split in entry.splits.values() for pattern in entry.patterns(split)]
    return [*patterns, *filter(None, (entry.addresses, entry.joined[0] if entry.joined else ""))]


def _download(name: str, entry: Entry, options: argparse.Namespace) -> Report:
    report = Report(name, by_hand=entry.by_hand, unverified=entry.unverified)
    try:
        _get_annotations(name, entry, options)
        if entry.without:  # their media are not trained on
            _get_annotations(entry.without, find(entry.without), options)
        report.annotations = "ok"
        if not options.annotations_only:
            _fetch_media(name, entry, options, report)
    except (HfHubHTTPError, huggingface_hub.errors.LocalEntryNotFoundError, ValueError, OSError) as error:
        words = str(error).strip().splitlines() or [""]
        report.annotations = _without_secrets(f"{type(error).__name__}: {words[0]}", options.proxy)
    return report


def _without_secrets(words: str, proxy: str) -> str:
    """Words that a server or a library chose, without the hub's token and the proxy's password."""
    password = urlsplit(proxy).password or ""
    for secret in filter(None, (huggingface_hub.get_token(), password, unquote(password))):
        words = words.replace(secret, "***")
    return words


def _get_annotations(name: str, entry: Entry, options: argparse.Namespace) -> None:
    """From the hub, where they are published there. Raises ValueError where there is no file then."""
    if entry.hub:
        huggingface_hub.snapshot_download(
            entry.hub,
            repo_type="dataset",
            revision=options.revision,
            local_dir=options.out / entry.folder(name),
            allow_patterns=_wanted(entry),
            max_workers=min(8, options.connections),
        )
    source.splits(entry, name, options.out)


def _fetch_media(name: str, entry: Entry, options: argparse.Namespace, report: Report) -> None:
    fetcher = Fetcher(
        Limits(
            max_bytes=options.max_mb << 20,
            max_s=options.max_seconds,
            stall_s=options.stall_seconds,
            redirects=options.redirects,
            attempts=options.attempts,
            backoff_s=options.backoff_seconds,
            per_host=options.per_host,
            allow_private=options.allow_private_addresses,
        ),
        connections=options.connections,
        proxy=options.proxy,
    )
    lock, pending = threading.Lock(), set[Future[None]]()

    def get(url: str, sha256: str) -> None:
        try:
            size = fetcher.fetch(url, options.out / source.stored_name(url), sha256=sha256)
            with lock:
                report.fetched += 1
                report.fetched_bytes += size
        except (Refused, Later) as error:
            with lock:
                report.miss(_reason(error), _without_secrets(f"{url}: {error}", options.proxy))
        except OSError as error:  # a full disk, a folder that cannot be written
            with lock:
                report.miss(error.strerror or type(error).__name__, f"{url}: {error}")

    with (
        ThreadPoolExecutor(options.connections) as pool,
        tqdm(desc=name, unit=" files", disable=None) as bar,
    ):
        for url, sha256 in _addresses(name, entry, options.out, report, lock):
            bar.update()
            pending.add(pool.submit(get, url, sha256))
            if len(pending) > 4 * options.connections:  # millions of addresses: never all in memory
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                for one in done:
                    one.result()
        for one in pending:
            one.result()


def _addresses(
    name: str, entry: Entry, folder: Path, report: Report, lock: threading.Lock
) -> Iterator[tuple[str, str]]:
    """(address, sha256) of every file that is to be fetched; counts those that are there or have no address."""
    seen: set[bytes] = set()
    finder = Finder(folder, entry.media_folder(name))
    context = source.context(entry, name, folder, find)
    for pieces in source.splits(entry, name, folder).values():
        for piece in pieces:
            for place, draft in source.drafts(entry, piece, context):
                if isinstance(draft, LeftOut):
                    with lock:
                        report.rows_not_wanted += 1
                    continue
                if isinstance(draft, ValueError):
                    with lock:
                        report.rows_left_out += 1
                        report.show("row", f"{place}: {draft}")
                    continue
                for reference in draft.media:
                    # By address: two threads must never write one file.
                    key = hashlib.sha256((reference.url or reference.identity).encode()).digest()[:16]
                    if reference.data or key in seen:
                        continue
                    seen.add(key)
                    with lock:
                        report.wanted += 1
                        try:
                            finder.path(reference)
                            report.present += 1
                            continue
                        except Missing as error:
                            if not reference.url:
                                report.miss("to be got by hand", str(error))
                                continue
                        except ValueError as error:
                            report.miss("refused", str(error))
                            continue
                    yield reference.url, reference.sha256


def _reason(error: Exception) -> str:
    """A few words that many files share."""
    words = str(error)
    if words.startswith("answer "):
        return words
    for word, reason in (
        ("IncompleteRead", "cut off"), ("timed out", "stalled"), ("NameResolution", "no such host"),
        ("NewConnection", "no connection"), ("SSLError", "certificate"), ("sha256", "changed"),
        ("private", "private address"), ("only http", "not http"), ("redirects", "redirects"), ("a page", "a page"),
        ("longer than", "too slow"), ("bytes", "too large"),
    ):  # fmt: skip
        if word in words:
            return reason
    return type(error).__name__


def _write(reports: list[Report], folder: Path) -> None:
    """report.json and report.txt, each replaced in one step."""
    content = json.dumps([asdict(report) for report in reports], indent=1, ensure_ascii=False) + "\n"
    lines = [f"{'data set':44} {'wanted':>9} {'present':>9} {'fetched':>9} {'missing':>9}"]
    for one in reports:
        missing = sum(one.missing.values())
        lines.append(f"{one.name:44} {one.wanted:9} {one.present:9} {one.fetched:9} {missing:9}")
        if one.annotations != "ok":
            lines.append(f"    annotations: {one.annotations}")
        if one.rows_left_out:
            lines.append(f"    {one.rows_left_out} rows cannot be read, as {'; '.join(one.examples['row'])}")
        if one.rows_not_wanted:
            lines.append(
                f"    {one.rows_not_wanted} rows are not trained on: for evaluation, or left out by the recipe"
            )
        for reason, count in sorted(one.missing.items(), key=lambda item: -item[1]):
            lines.append(f"    {count} missing, {reason}, as {one.examples[reason][0]}")
        if one.by_hand:
            lines.append(f"    by hand, into {find(one.name).media_folder(one.name)}/: {one.by_hand}")
    for name, text in (("report.json", content), ("report.txt", "\n".join(lines) + "\n")):
        partial = folder / f"{name}.partial"
        partial.write_text(text, encoding="utf-8")
        partial.replace(folder / name)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group("what")
    what.add_argument("--stage", choices=["pretraining", "sft", "long", "all"], help="all data sets of a stage")
    what.add_argument("--recipe", choices=sorted(STAGES), default="molmo2", help="whose stages (default: %(default)s)")
    what.add_argument("--datasets", nargs="+", metavar="NAME", help=f"only these; {len(TABLE)} are known")
    what.add_argument("--out", type=Path, default=Path("downloads"), help="directory (default: %(default)s)")
    what.add_argument("--dry-run", action="store_true", help="say what would be fetched, and what is got by hand")
    what.add_argument("--annotations-only", action="store_true", help="no images and videos")
    what.add_argument("--revision", help="branch, tag or commit of the repositories (default: main)")
    how = parser.add_argument_group("how")
    how.add_argument("--connections", type=_positive, default=16, help="files at a time (default: %(default)s)")
    how.add_argument("--per-host", type=float, default=20.0, metavar="N",
                     help="most requests a second to one host, 0 = any (default: %(default)s)")  # fmt: skip
    how.add_argument("--attempts", type=_positive, default=4, help="for one file (default: %(default)s)")
    how.add_argument("--backoff-seconds", type=float, default=1.0, help="first wait, doubled (default: %(default)s)")
    how.add_argument("--max-mb", type=_positive, default=2048, help="largest file, MiB (default: %(default)s)")
    how.add_argument("--max-seconds", type=float, default=600.0, help="for one attempt (default: %(default)s)")
    how.add_argument("--stall-seconds", type=float, default=30.0, help="without a byte (default: %(default)s)")
    how.add_argument("--redirects", type=int, default=5, help="most redirects of a file (default: %(default)s)")
    how.add_argument("--proxy", default="", help="address of an http proxy for media")
    how.add_argument("--allow-private-addresses", action="store_true",
                     help="also ask hosts in private networks, and this machine")  # fmt: skip
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number of at least 1.")
    return number


if __name__ == "__main__":
    main()

"""Hugging Face weights to and from checkpoints of the trainer, and the proof that nothing was lost.

    python tools/convert_hf.py import --language Qwen3-0.6B --vision siglip2-so400m-patch14-384 --out CKPT
    python tools/convert_hf.py import --molmo2 Molmo2-4B --out CKPT
    python tools/convert_hf.py export --checkpoint CKPT --out DIR [--format transformers|hub|parts|language|vision]
    python tools/convert_hf.py verify A B [--logits]
    python tools/convert_hf.py download allenai/Molmo2-4B

One process, no GPU, two tensors in memory at a time. CKPT is what init.checkpoint= takes, at any parallel layout; a run
directory can be exported too. DIR and A, B may be ids of the hub (org/name), which are fetched first. Only safetensors
are read, and no code that comes with a model is run.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from megatron_vlm.config import errors


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    brings = commands.add_parser("import", help="Hugging Face -> checkpoint")
    brings.add_argument("--language", metavar="DIR", help="Qwen3 or Qwen2.5; with --vision")
    brings.add_argument("--vision", metavar="DIR", help="SigLIP, SigLIP2 or CLIP")
    brings.add_argument("--molmo2", metavar="DIR", help="a whole Molmo2, in either format")
    brings.add_argument("--out", metavar="CKPT", required=True, help="directory to write; must not exist or be empty")
    brings.add_argument("--connector", default="", help="attention_pooling, linear, mlp or resampler (the preset's)")
    brings.add_argument(
        "--connector-weights", metavar="DIR", default="", help="the folder `connector` of an export --format parts"
    )
    brings.add_argument(
        "--vision-layers", type=int, nargs="*", help="vision layers (0-based) that feed the connector (the preset's)"
    )
    brings.add_argument("--preset", default="", help="the preset that the model is (found from the config.json)")
    brings.add_argument("--dtype", choices=("bf16", "fp32"), help="bf16 where all sources are, else fp32")
    brings.add_argument("--seed", type=int, default=6198, help="of a new connector and new embedding rows")

    sends = commands.add_parser("export", help="checkpoint -> Hugging Face")
    sends.add_argument("--checkpoint", metavar="CKPT", required=True, help="a checkpoint, a folder of them, or a run")
    sends.add_argument("--out", metavar="DIR", required=True, help="folder to write; must not exist")
    sends.add_argument(
        "--format",
        default="transformers",
        help="transformers: Molmo2, native names (default); hub: Molmo2, names of the released checkpoints; parts: "
        "language model, vision tower and connector in a folder each; language, vision: one of them",
    )
    sends.add_argument("--dtype", choices=("bf16", "fp32"), help="as stored")
    sends.add_argument("--tokenizer", metavar="FILE", default="", help="tokenizer.json or its folder (the run's)")
    sends.add_argument("--shard-gb", type=float, default=5.0, help="largest file, in 10^9 bytes (default 5)")

    compares = commands.add_parser("verify", help="compare two of either kind, tensor by tensor")
    compares.add_argument("a", metavar="A")
    compares.add_argument("b", metavar="B")
    compares.add_argument("--logits", action="store_true", help="also run both on a batch, in float32")
    compares.add_argument(
        "--batch",
        metavar="FILE",
        default="",
        help="JSON with examples for --logits, e.g. "
        """[{"images": ["a.jpg", "b.png"], "texts": ["What is it? A cat."]}, {"video": "c.mp4", "texts": ["..."]}]; """
        "files are found from its folder (a built-in batch)",
    )
    compares.add_argument("--tokenizer", metavar="FILE", default="", help="of the texts in --batch (that of A or B)")
    compares.add_argument("--tolerance", type=float, default=1e-4, help="largest difference of logits (default 1e-4)")

    fetches = commands.add_parser("download", help="fetch a model from the hub (HF_ENDPOINT, HF_HOME, HF_HUB_OFFLINE)")
    fetches.add_argument("repo", metavar="ORG/NAME")
    fetches.add_argument("--revision", default="main")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    """Run the command; the exit code: 0, or 1 for an error or a difference."""
    asked = arguments(argv)
    if asked.command in ("import", "export"):
        # Passing over the modules' objects again and again takes a third of the start. Tensors are freed without it.
        gc.disable()
    try:
        return {"import": _import, "export": _export, "verify": _verify, "download": _download}[asked.command](asked)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {errors.words(error)}", file=sys.stderr)
        return 1


def _bar(what: str) -> tuple[Any, Callable[[int, int], None]]:
    from tqdm import tqdm

    bar = tqdm(desc=what, unit="B", unit_scale=True, mininterval=1)

    def advance(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)

    return bar, advance


def _import(asked: argparse.Namespace) -> int:
    from megatron_vlm.convert import hub, importing

    if bool(asked.molmo2) == bool(asked.language and asked.vision):
        raise ValueError("give --language DIR and --vision DIR, or --molmo2 DIR.")
    if asked.molmo2:
        model, sources = importing.molmo2(hub.local(asked.molmo2), preset=asked.preset)
    else:
        model, sources = importing.parts(
            hub.local(asked.language),
            hub.local(asked.vision),
            connector=asked.connector,
            vision_layers=None if asked.vision_layers is None else tuple(asked.vision_layers),
            preset=asked.preset,
            connector_weights=asked.connector_weights,
        )
    bar, advance = _bar("import")
    precision = {"bf16": "bf16", "fp32": "float32", None: ""}[asked.dtype]
    with bar:
        path = importing.bring(model, sources, asked.out, precision=precision, seed=asked.seed, progress=advance)
    layers = f" model.vision_layers={list(model.vision_layers)}" if model.vision_layers is not None else ""
    connector = f" model.connector={model.connector}" if model.connector else ""
    print(f"Written: {path}\nTrain from it: model.preset={model.preset}{connector}{layers} init.checkpoint={asked.out}")
    return 0


def _export(asked: argparse.Namespace) -> int:
    from megatron_vlm.checkpoint import directory, verify

    bar, advance = _bar("export")
    with bar, ThreadPoolExecutor(1) as thread:
        # Hashes take as long as importing torch, and need none of it.
        verifying = thread.submit(verify.verify, directory.find(asked.checkpoint))
        from megatron_vlm.convert import exporting

        exporting.send(
            asked.checkpoint,
            asked.out,
            asked.format,
            dtype=asked.dtype or "",
            tokenizer=asked.tokenizer,
            shard_bytes=int(asked.shard_gb * 1e9),
            progress=advance,
            verifying=verifying,
        )
    print(f"Written: {asked.out}")
    return 0


def _verify(asked: argparse.Namespace) -> int:
    from tqdm import tqdm

    from megatron_vlm.convert import compare, hub
    from megatron_vlm.parallel import cpu

    one, other = (compare.Side.open(hub.local(path)) for path in (asked.a, asked.b))
    with tqdm(desc="verify", unit=" tensors", total=compare.count(one, other), mininterval=1) as bar:
        found = list(compare.tensors(one, other, bar.update))
        count = bar.n
    for line in found:
        print(line)
    print(f"{count} tensors compared, {len(found)} differences.")
    if not asked.logits:
        return int(bool(found))
    # Before Megatron is imported, which only this needs. No GPU is used.
    cpu.enable("cpu")
    from megatron_vlm.convert import answers

    with answers.alone():
        apart = compare.logits(one, other, asked.batch, asked.tokenizer)
    bad = not apart.logits <= asked.tolerance
    print(
        f"Logits at {apart.places} places differ by up to {apart.logits:.3g} (largest {apart.largest:.3g}), token "
        f"losses by up to {apart.losses:.3g}: {'MORE' if bad else 'not more'} than {asked.tolerance:g}."
    )
    return int(bool(found) or bad)


def _download(asked: argparse.Namespace) -> int:
    from megatron_vlm.convert import hub

    print(f"Fetched: {hub.fetch(asked.repo, asked.revision)}")
    return 0


if __name__ == "__main__":
    code = main(sys.argv[1:])
    gc.freeze()  # nor are they looked at when the process ends
    sys.exit(code)

"""See one packed row of a recipe: what stands where, who sees whom, which rank holds what.

    python tools/preview.py examples/recipes/tiny/stage1.yaml
    python tools/preview.py RECIPE.yaml --window 3 --row 7 --out look data.max_crops=32
    python tools/preview.py RECIPE.yaml --context 8 --tensor 2        # as on another layout

Writes OUT/row.html, one page that holds everything it shows (tokens with id, position, branch, weight and target when
the mouse is over them; crops; the row as a band; the mask), and the band and the mask as OUT/band.png and OUT/mask.png.
Rows are those that training sees, numbered as in a run's ledger: row 0 of window 0 is the first of step 1.
"""

from __future__ import annotations

import argparse
import base64
import dataclasses
import html
import io
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from megatron_vlm.batch import PAD, PREFIX_BRANCH
from megatron_vlm.config import errors, load, presets
from megatron_vlm.config.geometry import ImageGeometry, image_geometry
from megatron_vlm.config.schema import Config
from megatron_vlm.data.loader import Loader, Share, Step
from megatron_vlm.data.tokens import Tokenizer
from megatron_vlm.model.mask import Places, visible
from megatron_vlm.parallel.layout import Layout
from megatron_vlm.parallel.split import even_counts, offsets

#: A colour for each sample of the row, in turn: readable under dark text, apart from each other side by side.
COLORS = ("#4c9be8", "#f2a541", "#6cc08b", "#c78bdb", "#e8746a", "#58c4c4", "#b7a24b", "#9aa4b2")
#: Pixels: width of the band and of the names before it, height of a lane, side of the mask, side of a crop on the page.
BAND, NAMES, LANE, MASK, CROP = 1110, 80, 34, 600, 96
#: Crops that the page shows of a sample.
SHOWN_CROPS = 24
LANES = ("sample", "images", "branch", "position", "loss weight")
STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:1240px;margin:2em auto;padding:0 1em;color:#1b1f24}"
    "h1{font-size:1.4em;margin:0}h2{font-size:1.1em;margin:1.6em 0 .3em}table{border-collapse:collapse;margin:.5em 0}"
    "td,th{padding:.15em .8em;text-align:right;border-bottom:1px solid #ddd}td:first-child,th:first-child"
    "{text-align:left}img{max-width:100%}.crops img{width:96px;margin:2px;image-rendering:auto}"
    ".text{font:13px/1.7 ui-monospace,monospace;overflow-wrap:anywhere;margin:.3em 0;padding:.4em .6em;"
    "background:#f6f7f9}"
    ".text b{font-weight:normal;background:#cfe3f7;border-radius:3px;padding:0 3px;color:#234}"
    ".text i{font-style:normal;border-bottom:3px solid #e2a100;background:#fff4d6}.note{color:#667}"
    ".key{display:inline-block;width:.8em;height:.8em;border-radius:2px;margin-right:.5em}"
    ".text span:hover,.text i:hover{outline:1px solid #333}.two{display:flex;gap:2em}.two>:first-child{flex:0 0 600px}"
)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", metavar="RECIPE.yaml")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="section.key=value", help="settings that win over the recipe"
    )
    parser.add_argument(
        "--window",
        type=int,
        default=0,
        help="window of samples (default 0); those before it may have to be planned too",
    )
    parser.add_argument(
        "--row", type=int, default=0, help="row in it, counted from 0; beyond its end the next window's"
    )
    parser.add_argument("--context", type=int, help="context-parallel ranks (default: the recipe's)")
    parser.add_argument(
        "--tensor", type=int, help="tensor-parallel ranks, which share the crops (default: the recipe's)"
    )
    parser.add_argument("--out", type=Path, default=Path("look"), help="folder of page and pictures (default: look)")
    asked = parser.parse_intermixed_args(arguments)
    try:
        print(f"{write(asked)}: open it in a browser")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {errors.words(error)}")


def write(asked: argparse.Namespace) -> Path:
    """The page of the row that the command line asks for."""
    for name in ("context", "tensor"):
        if (ranks := getattr(asked, name)) is not None and ranks < 1:
            raise ValueError(f"--{name} {ranks}: needed 1 rank or more.")
    config = load.load(asked.recipe, asked.overrides)
    context, tensor = asked.context or config.parallel.context, asked.tensor or config.parallel.tensor
    step = planned(config, asked.window, asked.row)
    page = Page(config, step, context, tensor)
    asked.out.mkdir(parents=True, exist_ok=True)
    page.band.save(asked.out / "band.png")
    page.mask.save(asked.out / "mask.png")
    path = asked.out / "row.html"
    path.write_text(page.html(f"{Path(asked.recipe).parent.name}/{Path(asked.recipe).stem}"), encoding="utf-8")
    return path


def planned(config: Config, window: int, row: int) -> Step:
    """The row as a step of its own, with all its crops."""
    if window < 0 or row < 0:
        raise ValueError(f"--window {window} --row {row}: both count from 0.")
    config = dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, micro_batch=1),
        data=dataclasses.replace(config.data, workers=0),
    )
    loader = Loader(config, presets.architecture(config.model), Share())
    try:
        return loader.row(window, row)
    finally:
        loader.close()


class Page:
    """One row and its pictures. s places of the row."""

    def __init__(self, config: Config, step: Step, context: int, tensor: int) -> None:
        arch = presets.architecture(config.model)
        self._config, self._step, self._batch = config, step, step.micro_batches[0]
        self._tokenizer = Tokenizer.load(config.data.tokenizer, arch.language)
        self._geometry: ImageGeometry = image_geometry(arch, config.data.image_crops)
        self._chunks = offsets(even_counts(config.data.sequence_length, context))
        ranks = Layout(context * tensor, tensor, context, vision=config.parallel.vision).crop_ranks
        self._crop_counts = even_counts(len(self._batch.crops), ranks)
        fields = ("tokens", "targets", "loss_weights", "positions", "examples", "branches", "is_vision")
        self._row = {name: getattr(self._batch, name)[0].numpy() for name in fields}
        self._used = int((self._row["examples"] != PAD).sum())
        self.band = self._band()
        self.mask = self._mask()

    def _band(self) -> Image.Image:
        """The row from left to right, a lane for each of LANES; red lines between context-parallel ranks."""
        length = len(self._row["tokens"])
        at = np.minimum(np.arange(BAND) * length // BAND, length - 1)
        image = Image.new("RGB", (NAMES + BAND, LANE * len(LANES)), "white")
        pen = ImageDraw.Draw(image)
        row = {name: values[at] for name, values in self._row.items()}
        longest = max(1, int(self._row["positions"].max()))
        heaviest = max(1e-9, float(self._row["loss_weights"].max()))
        for place in range(BAND):
            x = NAMES + place
            if row["examples"][place] == PAD:
                pen.line((x, 0, x, image.height), fill="#eceef1")
                continue
            color = COLORS[row["examples"][place] % len(COLORS)]
            branch = row["branches"][place]
            lanes = (
                1.0,
                1.0 if row["is_vision"][place] else 0.0,
                0.0 if branch == PREFIX_BRANCH else 0.35 + 0.6 * ((branch + 1) % 2),
                row["positions"][place] / longest,
                row["loss_weights"][place] / heaviest,
            )
            for lane, height in enumerate(lanes):
                bottom = (lane + 1) * LANE - 3
                if height:
                    top = bottom - max(2, int(height * (LANE - 6)))
                    pen.line((x, top, x, bottom), fill="#e2a100" if lane == 4 else color)
        for cut in self._chunks[1:-1]:
            x = NAMES + cut * BAND // length
            pen.line((x, 0, x, image.height), fill="#d00000", width=2)
        for lane, name in enumerate(LANES):
            pen.text((0, lane * LANE + LANE - 18), name, fill="#333")
        return image

    def _mask(self) -> Image.Image:
        """Queries down, keys across, one place of the row for each pixel or several; red lines between ranks."""
        length = len(self._row["tokens"])
        side = min(length, MASK)
        at = torch.arange(side) * length // side
        batch = self._batch
        places = Places(batch.examples[0][at].long(), batch.branches[0][at].long(), batch.is_vision[0][at], at)
        seen = visible(Places(*(one[:, None] for one in places)), Places(*(one[None] for one in places))).numpy()
        colors = np.array([tuple(int(color[i : i + 2], 16) for i in (1, 3, 5)) for color in COLORS], dtype=np.float64)
        own = colors[places.example.numpy() % len(COLORS)]
        vision = places.vision.numpy()
        both = vision[:, None] & vision[None]
        # Image blocks, which see both ways, are darker than causal text.
        pixels = np.where(both[..., None], own[:, None] * 0.75, own[:, None] * 0.55 + 115)
        pixels = np.where(seen[..., None], pixels, 255 - 10 * (places.example.numpy() == PAD)[None, :, None])
        image = Image.fromarray(pixels.astype(np.uint8))
        scale = max(1, MASK // side)
        image = image.resize((side * scale, side * scale), Image.Resampling.NEAREST)
        pen = ImageDraw.Draw(image)
        for cut in self._chunks[1:-1]:
            x = cut * image.width // length
            pen.line((0, x, image.width, x), fill="#d00000")
            pen.line((x, 0, x, image.width), fill="#d00000")
        return image

    def html(self, recipe: str) -> str:
        """The page."""
        step, data = self._step, self._config.data
        loss = int((self._row["loss_weights"] != 0).sum())
        title = f"{recipe}: window {step.window}, row {step.offset}"
        facts = (
            f"{step.samples} samples; {self._used:,} of {data.sequence_length:,} tokens "
            f"({self._used / data.sequence_length:.1%}), {step.crops} of {data.max_crops} crops "
            f"({step.crops / max(1, data.max_crops):.1%}); {step.image_tokens:,} image placeholders, {loss:,} tokens "
            f"with a loss, weights sum to {step.loss_weight:.2f}"
        )
        samples = "".join(self._sample(number, key) for number, key in enumerate(step.keys))
        return (
            f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
            f"<style>{STYLE}</style><h1>{html.escape(title)}</h1><p>{facts}.</p>"
            f'<img src="{_embedded(self.band)}" alt="the row as a band"><p class=note>From left to right the places of '
            "the row. Branches of a sample alternate in height; in each, positions go on from the prefix. Grey: padding"
            f"{'; red lines part the context-parallel ranks' if len(self._chunks) > 2 else ''}.</p>"
            f'<div class=two><div><h2>Who sees whom</h2><img src="{_embedded(self.mask)}" alt="the mask">'
            "<p class=note>Queries down, keys across. Dark: image blocks, both ways. Light: causal, own branch and "
            f"prefix.</p></div><div><h2>Samples</h2>{self._table()}<h2>Ranks of the replica</h2>{self._ranks()}</div>"
            f"</div>{samples}</html>\n"
        )

    def _table(self) -> str:
        lines = []
        for number, key in enumerate(self._step.keys):
            mine = self._row["examples"] == number
            branches = self._row["branches"][mine]
            count = len(set(branches[branches != PREFIX_BRANCH].tolist()))
            weights = self._row["loss_weights"][mine]
            cells = (
                int(mine.sum()),
                self._crops_of(number)[1],
                count,
                int((weights != 0).sum()),
                f"{weights.sum():.2f}",
            )
            lines.append(
                f"<tr><td>{_swatch(number)}{html.escape(key)}</td>"
                + "".join(f"<td>{cell}</td>" for cell in cells)
                + "</tr>"
            )
        head = "".join(
            f"<th>{name}</th>" for name in ("sample", "tokens", "crops", "branches", "loss tokens", "weight")
        )
        return f"<table><tr>{head}</tr>{''.join(lines)}</table>"

    def _ranks(self) -> str:
        lines = []
        per_chunk = len(self._crop_counts) // (len(self._chunks) - 1)
        for rank, (start, stop) in enumerate(itertools.pairwise(self._chunks)):
            crops = self._crop_counts[rank * per_chunk : (rank + 1) * per_chunk]
            used = int((self._row["examples"][start:stop] != PAD).sum())
            loss = int((self._row["loss_weights"][start:stop] != 0).sum())
            cells = (f"{start:,} to {stop - 1:,}", used, loss, " + ".join(map(str, crops)))
            lines.append(f"<tr><td>{rank}</td>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
        head = "".join(
            f"<th>{name}</th>" for name in ("context rank", "places", "used", "loss tokens", "crops encoded")
        )
        return f"<table><tr>{head}</tr>{''.join(lines)}</table>"

    def _crops_of(self, number: int) -> tuple[int, int]:
        """(first crop, crops) of a sample, from the windows of its placeholders."""
        is_patch = self._row["tokens"] == self._tokenizer.im_patch
        queries = int(is_patch.sum()) // max(1, len(self._batch.windows))
        mine = np.flatnonzero(is_patch & (self._row["examples"] == number))
        if not len(mine):
            return 0, 0
        first = int(is_patch[: mine[0]].sum()) // queries
        crops = self._batch.windows[first : first + len(mine) // queries].numpy() // self._geometry.patches
        found = crops[self._batch.windows[first : first + len(mine) // queries].numpy() != PAD]
        return int(found.min()), int(found.max() - found.min()) + 1

    def _sample(self, number: int, key: str) -> str:
        first, count = self._crops_of(number)
        shown = "".join(
            f'<img src="{_embedded(self._pixels(crop))}" alt="crop {crop}" title="crop {crop}">'
            for crop in range(first, first + min(count, SHOWN_CROPS))
        )
        more = f"<span class=note> and {count - SHOWN_CROPS} more</span>" if count > SHOWN_CROPS else ""
        mine = np.flatnonzero(self._row["examples"] == number)
        texts = ""
        for branch, places in itertools.groupby(mine.tolist(), key=lambda place: int(self._row["branches"][place])):
            name = "before the branches" if branch == PREFIX_BRANCH else f"branch {branch}"
            texts += f"<div class=note>{name}</div><div class=text>{''.join(self._text(list(places)))}</div>"
        return f"<h2>{_swatch(number)}{html.escape(key)}</h2><div class=crops>{shown}{more}</div>{texts}"

    def _pixels(self, crop: int) -> Image.Image:
        grid, size = self._geometry.grid, self._geometry.patch_size
        pixels = self._batch.crops[crop].numpy().reshape(grid, grid, size, size, 3)
        return Image.fromarray(pixels.transpose(0, 2, 1, 3, 4).reshape(grid * size, grid * size, 3)).resize(
            (CROP, CROP)
        )

    def _text(self, places: list[int]) -> Iterator[str]:
        """Tokens as words; runs of the same special token as one. Underlined: a loss on what follows the token."""
        row, names = self._row, self._tokenizer.names
        special = set(names.values())
        for token, run in itertools.groupby(places, key=lambda place: int(row["tokens"][place])):
            same = list(run)
            if token in special:
                count = f" × {len(same)}" if len(same) > 1 else ""
                yield f'<b title="{self._about(same[0])}">{html.escape(self._tokenizer.decode([token]))}{count}</b>'
                continue
            for place in same:
                word = html.escape(self._tokenizer.decode([token])).replace("\n", "⏎<br>")
                tag = "i" if row["loss_weights"][place] else "span"
                yield f'<{tag} title="{self._about(place)}">{word}</{tag}>'

    def _about(self, place: int) -> str:
        row = self._row
        weight = float(row["loss_weights"][place])
        said = f"place {place}, id {row['tokens'][place]}, position {row['positions'][place]}"
        if weight:
            said += f", weight {weight:.3g}, to predict {self._tokenizer.decode([int(row['targets'][place])])!r}"
        return html.escape(said, quote=True)


def _swatch(number: int) -> str:
    return f'<span class=key style="background:{COLORS[number % len(COLORS)]}"></span>'


def _embedded(image: Image.Image) -> str:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"


if __name__ == "__main__":
    main()

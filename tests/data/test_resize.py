"""Resizing gives torch's numbers, bit for bit."""

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from megatron_vlm.data.resize import resize, strips


def picture(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * 10_007 + width).integers(0, 256, (height, width, 3), dtype=np.uint8)


def expected(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    image = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None].float()
    resized = interpolate(image, size=(height, width), mode="bilinear", align_corners=False, antialias=False)
    return resized.round().to(torch.uint8)[0].permute(1, 2, 0).numpy()


# (height, width) from and to: larger, smaller, much smaller, by whole and half factors (ties), one pixel, odd sizes.
@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ((48, 64), (91, 111)), ((64, 48), (30, 31)), ((501, 333), (40, 30)), ((50, 70), (100, 140)),
        ((100, 140), (50, 70)), ((90, 60), (60, 90)), ((1, 1), (28, 14)), ((1, 90), (56, 42)), ((77, 1), (14, 14)),
        ((480, 640), (378, 378)), ((427, 640), (644, 644)), ((720, 1280), (378, 378)), ((33, 47), (33, 94)),
    ],
)  # fmt: skip
def test_equals_interpolate(source: tuple[int, int], wanted: tuple[int, int]) -> None:
    pixels = picture(*source)
    assert np.array_equal(resize(pixels, *wanted), expected(pixels, *wanted))


def test_flat_pictures_stay_flat() -> None:
    for value in (0, 1, 127, 255):
        assert (resize(np.full((37, 53, 3), value, np.uint8), 101, 29) == value).all()


def test_parts_are_those_of_the_whole() -> None:
    pixels = picture(61, 40)
    whole = resize(pixels, 90, 70)
    wanted = [range(3, 17), range(17, 20), range(60, 90), range(0, 1)]
    for rows, strip in zip(wanted, strips(pixels, 90, 70, wanted), strict=True):
        assert np.array_equal(strip, whole[rows.start : rows.stop])
    assert not list(strips(pixels, 90, 70, []))


def test_a_picture_of_the_wanted_size_is_kept() -> None:
    pixels = picture(20, 10)
    assert np.array_equal(resize(pixels, 20, 10), pixels)


def test_turned_and_read_only_pictures() -> None:
    pixels = picture(30, 21)
    pixels.setflags(write=False)
    for turned in (pixels[::-1], pixels[:, ::-1], pixels.transpose(1, 0, 2)):
        assert np.array_equal(resize(turned, 25, 35), expected(turned, 25, 35))

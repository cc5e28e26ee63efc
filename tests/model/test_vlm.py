"""The whole model against transformers' Molmo2: several images of different tilings, padded batch and packed row."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from megatron_vlm.batch import PAD, PREFIX_BRANCH, Batch
from megatron_vlm.config.architecture import VISION_TOKENS
from megatron_vlm.config.geometry import image_geometry, image_layout
from megatron_vlm.data.crops import cut, windows
from megatron_vlm.parallel.layout import Layout
from tests.model import tiny
from tests.model.reference import load_molmo2, molmo2

# 8 x 8 patches, so that crops overlap as Molmo2's do.
ARCH = dataclasses.replace(tiny.ARCH, vision=dataclasses.replace(tiny.VISION, image_size=112))
#: Width and height of the images of each sample: tilings 1x1 and 2x2; 1x3; none; 3x1, 1x1 and 1x2.
SAMPLES = [[(100, 90), (190, 200)], [(300, 80)], [], [(60, 280), (112, 112), (190, 90)]]
BRANCHES = [3, 1, 2, 2]


@dataclasses.dataclass
class Sample:
    """One prefix with its images, then branches; all one example."""

    tokens: list[int]
    branches: list[int]
    positions: list[int]
    crops: torch.Tensor
    windows: torch.Tensor

    def branch(self, number: int) -> Sample:
        """The prefix and one branch alone."""
        keep = [i for i, branch in enumerate(self.branches) if branch in (PREFIX_BRANCH, number)]
        return dataclasses.replace(
            self, **{name: [getattr(self, name)[i] for i in keep] for name in ("tokens", "branches", "positions")}
        )


def samples() -> list[Sample]:
    draw = np.random.default_rng(0)
    geometry = image_geometry(ARCH, 4)
    made = []
    for sizes, branches in zip(SAMPLES, BRANCHES, strict=True):
        tokens, crops, tables = [5], [], []
        for width, height in sizes:
            layout = image_layout(width, height, geometry)
            pixels = draw.integers(0, 256, (height, width, 3), dtype=np.uint8)
            table = windows(layout, geometry)
            tables.append(np.where(table == PAD, PAD, table + sum(map(len, crops)) * geometry.patches))
            crops.append(cut(pixels, layout, geometry, 0, layout.crops))
            tokens += image_tokens(layout)
            tokens.append(int(draw.integers(160)))
        prefix = len(tokens)
        branch_ids, positions = [PREFIX_BRANCH] * prefix, list(range(prefix))
        for branch in range(branches):
            length = int(draw.integers(3, 9))
            tokens += draw.integers(0, 160, length).tolist()
            branch_ids += [branch] * length
            positions += range(prefix, prefix + length)
        empty = np.empty((0, geometry.patches, ARCH.vision.patch_values), dtype=np.uint8)
        made.append(
            Sample(
                tokens,
                branch_ids,
                positions,
                torch.from_numpy(np.concatenate([empty, *crops])),
                torch.from_numpy(np.concatenate([np.empty((0, 4), dtype=np.int64), *tables])),
            )
        )
    return made


def image_tokens(layout) -> list[int]:
    ids = {name: ARCH.token_id(name) for name in VISION_TOKENS}
    rows, columns = layout.high_grid
    whole = [ids["<im_patch>"]] * (layout.global_grid[0] * layout.global_grid[1])
    high = ([ids["<im_patch>"]] * columns + [ids["<im_col>"]]) * rows
    return [ids["<low_res_im_start>"], *whole, ids["<im_end>"], ids["<im_start>"], *high, ids["<im_end>"]]


def batch(rows: list[list[Sample]]) -> Batch:
    """Rows of packed samples, padded to the longest."""
    length = max(sum(len(sample.tokens) for sample in row) for row in rows) + 3

    def whole(values, fill, dtype):
        lines = [[value for number, sample in enumerate(row) for value in values(number, sample)] for row in rows]
        return torch.tensor([line + [fill] * (length - len(line)) for line in lines], dtype=dtype)

    vision = {ARCH.token_id(name) for name in VISION_TOKENS}
    flat = [sample for row in rows for sample in row]
    tables, crops = [], 0
    for sample in flat:
        tables.append(sample.windows.where(sample.windows == PAD, sample.windows + crops * ARCH.vision.patches))
        crops += len(sample.crops)
    examples = whole(lambda number, sample: [number] * len(sample.tokens), PAD, torch.int32)
    return Batch(
        tokens=whole(lambda _, sample: sample.tokens, 0, torch.int64),
        targets=torch.zeros_like(examples, dtype=torch.int64),
        loss_weights=(examples != PAD).float(),
        positions=whole(lambda _, sample: sample.positions, PAD, torch.int64),
        examples=examples,
        branches=whole(lambda _, sample: sample.branches, PAD, torch.int32),
        is_vision=whole(lambda _, sample: [token in vision for token in sample.tokens], False, torch.bool),
        sources=examples,
        crops=torch.cat([sample.crops for sample in flat]),
        crop_counts=(crops,),
        windows=torch.cat(tables),
        rows=torch.arange(len(rows)),
    )


def expected_logits(reference, rows: list[Sample]) -> torch.Tensor:
    """transformers' logits of a padded batch of samples without branches."""
    made = batch([[row] for row in rows])
    images = {}
    if len(made.crops):
        images = {
            "pixel_values": made.crops.float() / 255 * 2 - 1,
            "image_token_pooling": made.windows,
            "image_grids": torch.tensor([[1, len(made.windows), 0, 0]]),
        }
    return reference(
        input_ids=made.tokens,
        attention_mask=(made.examples != PAD).long(),
        mm_token_type_ids=made.is_vision.long(),
        position_ids=made.positions.clamp(min=0),
        **images,
    ).logits


@pytest.fixture
def models(one_rank):
    from megatron_vlm.model.build import build

    reference = molmo2(ARCH)
    (model,) = build(tiny.config(ARCH), Layout(1))
    load_molmo2(model, reference)
    with torch.no_grad():
        yield model, reference


def test_padded_batch_equals_molmo2(models):
    model, reference = models
    rows = [sample.branch(0) for sample in samples()]
    expected = expected_logits(reference, rows)
    made = batch([[row] for row in rows])
    found = model(made, logits_at=torch.arange(made.tokens.numel())).view_as(expected)
    real = made.examples != PAD
    print(f"largest logit {expected.abs().max():.1f}, worst {(found - expected)[real].abs().max():.1e}")
    assert expected[real].abs().max() > 1
    torch.testing.assert_close(found[real], expected[real], rtol=0, atol=1e-4)


def test_packed_row_equals_molmo2_sample_by_sample(models):
    """Every sample of a packed row, every branch, has the logits that transformers gives it alone."""
    model, reference = models
    packed = samples()
    made = batch([packed[:2], packed[2:]])
    found = model(made, logits_at=torch.arange(made.tokens.numel())).view(*made.tokens.shape, -1)
    worst = 0.0
    for place, sample in enumerate(packed):
        row, example = divmod(place, 2)
        for branch in range(BRANCHES[place]):
            alone = sample.branch(branch)
            expected = expected_logits(reference, [alone])[0, : len(alone.tokens)]
            at = (made.examples[row] == example) & torch.isin(made.branches[row], torch.tensor([PREFIX_BRANCH, branch]))
            worst = max(worst, (found[row, at] - expected).abs().max().item())
    print(f"worst {worst:.1e}")
    assert worst < 1e-4


def test_images_and_their_mask_matter(models):
    """The comparison above could fail: other pixels, and image tokens that look back only, change the logits."""
    model, _ = models
    made = batch([samples()[:2]])
    places = torch.arange(made.tokens.numel())
    logits = model(made, logits_at=places)
    other = model(dataclasses.replace(made, crops=made.crops.flip(0)), logits_at=places)
    causal = model(dataclasses.replace(made, is_vision=torch.zeros_like(made.is_vision)), logits_at=places)
    assert (logits - other).abs().max() > 0.1
    assert (logits - causal).abs().max() > 0.1


def test_wrong_number_of_placeholders(models):
    model, _ = models
    made = batch([samples()[:1]])
    patch = ARCH.token_id("<im_patch>")
    count = int((made.tokens == patch).sum())
    for found, at, token in ((count - 1, made.tokens[0] == patch, 7), (count + 1, made.tokens[0] != patch, patch)):
        tokens = made.tokens.clone()
        tokens[0, at.nonzero()[0, 0]] = token
        with pytest.raises(ValueError, match=f"{found} image placeholders, but its crops give {count} features"):
            model(dataclasses.replace(made, tokens=tokens))


def test_no_tensor_of_row_by_row_entries(one_rank):
    """A packed row of 8,192 tokens through the whole model, forward and backward: nothing near S x S numbers."""
    from megatron_vlm.model.build import build
    from tests.model.test_attention import Largest

    s = 8192
    (model,) = build(tiny.config(tiny.ARCH, logit_chunk=64, residual_dropout=0.1), Layout(1))
    rows = [tiny.row(tiny.ARCH, number, 1024) for number in range(s // 1024)]
    joined = tiny.Row(*([] for _ in dataclasses.fields(tiny.Row)))
    for number, row in enumerate(rows):
        row.examples = [PAD if example == PAD else number * 10 + example for example in row.examples]
        shift = len(joined.crops) * tiny.VISION.patches
        row.windows = [[i if i == PAD else i + shift for i in window] for window in row.windows]
        for field in dataclasses.fields(tiny.Row):
            getattr(joined, field.name).extend(getattr(row, field.name))
    # And one example over half of the row, images and all.
    joined.examples = [joined.examples[0]] * (s // 2) + joined.examples[s // 2 :]
    joined.branches = [PREFIX_BRANCH] * (s // 2) + joined.branches[s // 2 :]
    made = tiny.join(tiny.ARCH, [joined], [0])
    assert made.tokens.shape == (1, s)
    with Largest() as largest:
        model(made).sum().backward()
    print(f"largest tensor: {largest.numbers:,} numbers; S x S would be {s * s:,}")
    # Rows times the widest layer, and a block's mask of at most 256 x 4,096, lie below.
    assert largest.numbers < s * s / 32

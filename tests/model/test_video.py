"""A packed row of a video and of two images through data and model, against transformers' processor and Molmo2."""

from __future__ import annotations

import dataclasses
import io

import av
import numpy as np
import pytest
import torch

from megatron_vlm.config.geometry import image_geometry
from megatron_vlm.data.collate import Collator, MicroBatch
from megatron_vlm.data.example import Branch, Clip, Example, Subtitle, Turn
from megatron_vlm.data.plan import Row, Sample
from megatron_vlm.data.shards import Shards
from megatron_vlm.data.tokens import Tokenizer
from megatron_vlm.data.tree import TreeSettings, tokenize
from megatron_vlm.data.writer import ShardWriter
from megatron_vlm.parallel.layout import Layout
from tests.data import world
from tests.data.clips import clip, steady
from tests.data.oracle import video_processed
from tests.model import tiny
from tests.model.reference import load_molmo2, molmo2

# 8 x 8 patches: crops overlap, and frames pooled 3 x 3 have windows with empty slots.
ARCH = dataclasses.replace(
    tiny.ARCH,
    vision=dataclasses.replace(tiny.VISION, image_size=112),
    language=dataclasses.replace(tiny.LANGUAGE, vocab_size=400, max_positions=1024),
)
GEOMETRY = image_geometry(ARCH, 4)
QUESTION = Branch("video_short_answer", (Turn("what is it?", "a red cat"),))
FILM = clip(steady(24), b_frames=2)
#: Frames of the film that its clip from 0.4 s on shows: at 0, 0.5, 1.0 and, as the last one, 1.2 s of the clip.
SHOWN, END = (4, 9, 14, 16), 1.6


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The micro-batch of one row, and the samples in it."""
    folder = tmp_path_factory.mktemp("shards") / "shards"
    rng = np.random.default_rng(0)
    part = Clip(0.4, END, subtitles=(Subtitle(0.0, 1.0, "the dog"),))
    with ShardWriter(folder) as writer:
        film = writer.add_video(FILM)
        photos = tuple(writer.add_image(world.picture(rng, "PNG", size)) for size in ((190, 200), (300, 80)))
        examples = [Example("film", (QUESTION,), (film,), clip=part), Example("photos", (QUESTION,), photos)]
        for example in examples:
            writer.add(example, "all", "train")
    tokenizer = Tokenizer(world.definition(), ARCH.language)
    settings = TreeSettings(tokenizer, GEOMETRY, "style", "uniform", 600, 24, 0)
    contents = [tokenize(example, "all", 0, settings) for example in examples]
    samples = tuple(
        Sample(example.key, 0, tuple(media.key for media in example.media), content)
        for example, content in zip(examples, contents, strict=True)
    )
    collator = Collator(Shards(folder), GEOMETRY, 600)
    return collator(MicroBatch((Row(0, samples, 0),), 0, 1, True)), contents


def expected_logits(reference, content, **pixels) -> torch.Tensor:
    """(s, vocab): transformers' logits of one sample alone."""
    tokens = torch.from_numpy(content.tokens)[None]
    return reference(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        mm_token_type_ids=torch.from_numpy(content.is_vision)[None].long(),
        position_ids=torch.from_numpy(content.positions)[None],
        **pixels,
    ).logits[0]


def processed_film() -> dict[str, torch.Tensor]:
    """transformers' inputs for the frames that are shown, decoded by reading the whole file."""
    with av.open(io.BytesIO(FILM)) as container:
        every = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    size = ARCH.vision.image_size
    found = video_processed(np.stack([every[number] for number in SHOWN]), size={"height": size, "width": size})
    return found | {"pixel_values_videos": found["pixel_values_videos"].float() / 255 * 2 - 1}


def test_a_video_and_images_in_one_row_equal_molmo2(one_rank, made):
    from megatron_vlm.model.build import build

    batch, (film, photos) = made
    assert film.layouts[0].times == pytest.approx((0.0, 0.5, 1.0, 1.2)) and batch.windows.shape[1] == 9
    reference = molmo2(ARCH)
    (model,) = build(tiny.config(ARCH), Layout(1))
    load_molmo2(model, reference)
    with torch.no_grad():
        found = model(batch, logits_at=torch.arange(len(film.tokens) + len(photos.tokens)))
        expected = [expected_logits(reference, film, **processed_film())]
        first = film.layouts[0].crops
        images = {
            "pixel_values": batch.crops[first:].float() / 255 * 2 - 1,
            "image_token_pooling": batch.windows[film.layouts[0].placeholders :, :4]
            - first * GEOMETRY.patches * (batch.windows[film.layouts[0].placeholders :, :4] >= 0),
            "image_grids": torch.tensor([[1, photos.layouts[0].placeholders + photos.layouts[1].placeholders, 0, 0]]),
        }
        expected.append(expected_logits(reference, photos, **images))
        other = dataclasses.replace(batch, crops=torch.cat([batch.crops[:first].flip(0), batch.crops[first:]]))
        changed = model(other, logits_at=torch.arange(len(film.tokens)))
    worst = (found - torch.cat(expected)).abs().max()
    print(f"largest logit {torch.cat(expected).abs().max():.1f}, worst {worst:.1e}")
    assert torch.cat(expected).abs().max() > 1 and worst < 1e-4
    # The comparison could fail: frames in another order give other logits.
    assert (changed - found[: len(film.tokens)]).abs().max() > 0.01

"""What two models say to the same examples, in float32.

Our model sees all examples packed into one row; transformers' sees every branch of every example by itself.
"""

from __future__ import annotations

import dataclasses
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_vlm.checkpoint import load
from megatron_vlm.config import load as config_load
from megatron_vlm.config.architecture import VISION_TOKENS, Architecture
from megatron_vlm.config.geometry import Layout, VideoLayout
from megatron_vlm.convert.probe import Sample, packed
from megatron_vlm.model.build import build
from megatron_vlm.parallel import groups
from megatron_vlm.parallel.layout import Layout as Ranks


@contextmanager
def alone() -> Iterator[None]:
    """torch.distributed and Megatron's groups for this process alone, without a launcher, a port or a GPU.

    parallel.cpu.enable("cpu") must have been called before Megatron was imported. Groups that exist already serve too.
    """
    # Megatron of its own defaults; nobody who converts can act on that.
    warnings.filterwarnings("ignore", "full scope is deprecated", UserWarning)
    if dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        groups.initialize(Ranks(1))
        yield
    finally:
        groups.destroy()
        dist.destroy_process_group()


@dataclass(frozen=True)
class Answer:
    """What a model says at every token of every branch: (k, vocabulary) float32, in the samples' order."""

    logits: torch.Tensor

    def losses(self, samples: Sequence[Sample]) -> torch.Tensor:
        """(k,) cross-entropy of the following token of the branch; of its first token at the last."""
        following = [number for s in samples for branch in s.branches for number in (*branch[1:], branch[0])]
        return torch.nn.functional.cross_entropy(self.logits, torch.tensor(following), reduction="none")


def ours(checkpoint: str | Path, chosen: Sequence[Sample]) -> Answer:
    """What the model of a checkpoint answers, in float32. Inside `alone`."""
    record = load.read(checkpoint)
    config = config_load.from_dict(record.config, f"in the checkpoint {record.path}")
    train = dataclasses.replace(config.train, precision="float32", recompute="none")
    config = dataclasses.replace(config.alone(), train=train)
    (model,) = build(config, Ranks(1))
    load.load(record.path, models=[model], config=config)
    batch, places = packed(model.arch, chosen)
    with torch.no_grad():
        return Answer(model.eval()(batch, logits_at=places))


def theirs(folder: str | Path, arch: Architecture, chosen: Sequence[Sample]) -> Answer:
    """What transformers' model of a folder answers, in float32. ValueError where transformers is not installed."""
    transformers = _transformers()
    kind = transformers.AutoModelForImageTextToText if any(s.layouts for s in chosen) else None
    if kind is None:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        molmo2 = config.model_type == "molmo2"
        kind = transformers.AutoModelForImageTextToText if molmo2 else transformers.AutoModelForCausalLM
    model = kind.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False).eval()
    with torch.no_grad():
        return Answer(torch.cat([_alone(model, arch, sample, ids) for sample in chosen for ids in sample.branches]))


def _transformers() -> Any:
    """transformers, without the torchvision that only its image processors want: beside a torch of another build,
    importing that fails."""
    hidden = "transformers" not in sys.modules and "torchvision" not in sys.modules
    if hidden:
        sys.modules["torchvision"] = None  # type: ignore[assignment]
    try:
        import transformers
    except ImportError:
        raise ValueError(
            "--logits runs Hugging Face folders by transformers: pip install 'transformers>=5.23'."
        ) from None
    finally:
        if hidden:
            del sys.modules["torchvision"]
    return transformers


def _alone(model: Any, arch: Architecture, sample: Sample, branch: tuple[int, ...]) -> torch.Tensor:
    """Logits (tokens of the branch, vocabulary) of one branch after its prefix."""
    ids = torch.tensor([*sample.prefix, *branch])[None]
    inputs: dict[str, torch.Tensor] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if sample.layouts:
        video = isinstance(sample.layouts[0], VideoLayout)
        vision = torch.tensor([arch.token_id(name) for name in VISION_TOKENS])
        mean, std = (
            torch.tensor(value).repeat(arch.vision.patch_values // 3) for value in (arch.vision.mean, arch.vision.std)
        )
        pixels = (torch.from_numpy(sample.crops).float() / 255 - mean) / std
        inputs |= {
            "mm_token_type_ids": torch.isin(ids, vision).long(),
            ("pixel_values_videos" if video else "pixel_values"): pixels,
            ("video_token_pooling" if video else "image_token_pooling"): torch.from_numpy(sample.windows),
            ("video_grids" if video else "image_grids"): torch.tensor([_grid(layout) for layout in sample.layouts]),
        }
    return model(**inputs).logits[0, len(sample.prefix) :].float()


def _grid(layout: Layout) -> list[int]:
    """Frames, rows and columns of a video; rows and columns of an image's global crop and of its canvas."""
    if isinstance(layout, VideoLayout):
        return [layout.crops, *layout.frame.global_grid]
    return [*layout.global_grid, *layout.high_grid]

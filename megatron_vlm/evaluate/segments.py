"""J and F of mask tracks as DAVIS defines them, and where masks come from: a predictor that is shown points.

h, w are pixels, t frames. A predictor is chosen by name (PREDICTORS); SAM 2 is used where its package is installed.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy import ndimage

from megatron_vlm.data import points, video
from megatron_vlm.data.example import Example, Tracks
from megatron_vlm.data.masks import unpacked
from megatron_vlm.data.media import Store
from megatron_vlm.evaluate.kinds import Question
from megatron_vlm.evaluate.places import MOST_PLACES
from megatron_vlm.evaluate.regions import SAME_TIME_S
from megatron_vlm.evaluate.score import Scores

#: Tolerance of a boundary as a share of the picture's diagonal.
BOUNDARY_SHARE = 0.008
#: Weights of SAM 2 that are asked for.
SAM2_WEIGHTS = "facebook/sam2.1-hiera-large"
#: Radius of the discs of the predictor without a model, as a share of the longer side.
DISC_SHARE = 0.05

#: (t, h, w, 3) uint8 frames, and for each object the points (frame, x, y) in pixels -> object -> (t, h, w) bool.
Predictor = Callable[[np.ndarray, Mapping[int, Sequence[tuple[int, float, float]]]], dict[int, np.ndarray]]


def region_similarity(found: np.ndarray, wanted: np.ndarray) -> float:
    """J: intersection over union of two (h, w) masks; 1 where both are empty."""
    union = np.logical_or(found, wanted).sum()
    return float(np.logical_and(found, wanted).sum() / union) if union else 1.0


def boundary_similarity(found: np.ndarray, wanted: np.ndarray) -> float:
    """F: harmonic mean of the shares of both boundaries that lie near the other one."""
    reach = np.ceil(BOUNDARY_SHARE * np.linalg.norm(found.shape))
    one, other = _boundary(found), _boundary(wanted)
    if not one.any() or not other.any():
        return float(not one.any() and not other.any())
    precision = (ndimage.distance_transform_edt(~other)[one] <= reach).mean()
    recall = (ndimage.distance_transform_edt(~one)[other] <= reach).mean()
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


def _boundary(mask: np.ndarray) -> np.ndarray:
    """Pixels that differ from their neighbour to the right, below, or both."""
    mask = mask.astype(bool)
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    return (mask ^ padded[:-1, 1:]) | (mask ^ padded[1:, :-1]) | (mask ^ padded[1:, 1:])


def j_and_f(found: Mapping[int, np.ndarray], wanted: Mapping[int, np.ndarray]) -> tuple[float, float]:
    """Mean J and F over the wanted objects and their frames. Masks are (t, h, w).

    Objects are paired so that the sum of J is largest; one that is paired with none has empty masks.
    """
    from scipy.optimize import linear_sum_assignment

    if not wanted:
        perfect = float(not any(mask.any() for mask in found.values()))
        return perfect, perfect
    names, claims = list(wanted), list(found)
    table = np.array([[_mean_j(found[c], wanted[n]) for c in claims] for n in names]).reshape(len(names), len(claims))
    pair = dict(zip(*(ends.tolist() for ends in linear_sum_assignment(-table)), strict=True))
    scores = []
    for row, name in enumerate(names):
        truth = wanted[name]
        said = found[claims[pair[row]]] if row in pair else np.zeros_like(truth)
        scores += [(region_similarity(a, b), boundary_similarity(a, b)) for a, b in zip(said, truth, strict=True)]
    j, f = np.mean(scores, axis=0)
    return float(j), float(f)


def _mean_j(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.mean([region_similarity(a, b) for a, b in zip(found, wanted, strict=True)]))


class Segmenter:
    """J and F of answers that follow objects, for samples whose masks are known.

    predictor: a name of PREDICTORS. Raises ValueError where there is none of this name, or its package is missing.
    """

    def __init__(self, store: Store, predictor: str) -> None:
        if predictor not in PREDICTORS:
            raise ValueError(f"--masks {predictor}: there is no such predictor; choose from {', '.join(PREDICTORS)}.")
        if predictor == "sam2":
            check_sam2()
        self.name, self._store, self._predict = predictor, store, PREDICTORS[predictor]

    def __call__(self, sample: Example, question: Question, said: str) -> Scores:
        """Over the moments at which an object has a mask; {} where none has. An object without a mask is not there."""
        wanted = question.wanted
        kept = question.info.get("masks", {}).get(wanted.label) if isinstance(wanted, Tracks) else None
        known = [row for rows in kept or () for row in rows]
        if not kept or not known or sample.video is None:
            return {}
        times = sorted({row[0] for row in known})
        height, width = known[0][1:3]
        truth = {number: np.zeros((len(times), height, width), bool) for number in range(1, len(kept) + 1)}
        for number, rows in enumerate(kept, start=1):
            for at, *mask in rows:
                truth[number][times.index(at)] = unpacked(*mask)
        prompts: dict[int, list[tuple[int, float, float]]] = {}
        for place in points.parse(said)[:MOST_PLACES]:
            near = [frame for frame, at in enumerate(times) if abs(at - place.at) <= SAME_TIME_S]
            for frame in near[:1]:
                mine = prompts.setdefault(place.id, [])
                if frame not in [one[0] for one in mine]:  # of several places the first, as in Molmo2
                    mine.append((frame, place.x * width, place.y * height))
        found = self._predict(self._frames(sample, times, (width, height)), prompts) if prompts else {}
        j, f = j_and_f(found, truth)
        name = f"J&F ({self.name})"
        return {name: ((j + f) / 2, 1), f"J ({self.name})": (j, 1), f"F ({self.name})": (f, 1)}

    def _frames(self, sample: Example, times: Sequence[float], size: tuple[int, int]) -> np.ndarray:
        assert sample.video is not None
        key, start = sample.video.key, sample.clip.start if sample.clip else 0.0
        moments = [start + at for at in times]
        frames = video.read(self._store.media(key), self._store.timeline(key), moments, name=sample.key)
        return np.stack([np.asarray(Image.fromarray(frame).resize(size)) for frame in frames])


def discs(frames: np.ndarray, points: Mapping[int, Sequence[tuple[int, float, float]]]) -> dict[int, np.ndarray]:
    """No model: a disc around each point, and nothing in frames without one. What points alone are worth."""
    count, height, width = frames.shape[:3]
    rows, columns = np.ogrid[:height, :width]
    radius = DISC_SHARE * max(height, width)
    masks = {number: np.zeros((count, height, width), bool) for number in points}
    for number, places in points.items():
        for frame, x, y in places:
            masks[number][frame] |= (columns - x) ** 2 + (rows - y) ** 2 <= radius**2
    return masks


def sam2(frames: np.ndarray, points: Mapping[int, Sequence[tuple[int, float, float]]]) -> dict[int, np.ndarray]:
    """SAM 2's video predictor, prompted with each object's points; weights from the hub (SAM2_WEIGHTS).

    Objects are followed forward from the first frame in which any has a point.
    Ran with sam2 1.1.0 and random weights on a CPU; never with trained ones, nor on a GPU.
    """
    check_sam2()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    predictor = _sam2_predictor(device)
    masks = {number: np.zeros(frames.shape[:3], bool) for number in points}
    # It remembers frames in bf16, whatever its weights are in: autocast, as its authors use it.
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode(), torch.autocast(device, torch.bfloat16):
        for number, frame in enumerate(frames):
            Image.fromarray(frame).save(Path(folder, f"{number:05d}.jpg"), quality=95)
        state = predictor.init_state(video_path=folder)
        for number, places in points.items():
            for frame, x, y in places:
                predictor.add_new_points_or_box(
                    inference_state=state,
                    frame_idx=frame,
                    obj_id=number,
                    points=np.array([[x, y]], np.float32),
                    labels=np.array([1], np.int32),
                    clear_old_points=False,
                )
        for frame, numbers, logits in predictor.propagate_in_video(state):
            for place, number in enumerate(numbers):
                masks[number][frame] = (logits[place] > 0).cpu().numpy().reshape(frames.shape[1:3])
    return masks


@cache
def _sam2_predictor(device: str) -> Any:
    from sam2.sam2_video_predictor import SAM2VideoPredictor

    return SAM2VideoPredictor.from_pretrained(SAM2_WEIGHTS, device=device)


def check_sam2() -> None:
    """Raises ValueError where the package is not installed."""
    if importlib.util.find_spec("sam2") is None:
        raise ValueError(
            "--masks sam2 needs SAM 2, which is not installed: pip install sam2 (it brings its own torchvision). Or "
            "--masks discs: discs around the points, without a model."
        )


PREDICTORS: dict[str, Predictor] = {"discs": discs, "sam2": sam2}

"""HOTA against TrackEval's, frame scores and J&F by hand, J and F of masks against TrackEval's copy of DAVIS."""

import importlib.machinery
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from megatron_vlm.data.example import Branch, Clip, Example, Point, Tracks, Turn
from megatron_vlm.data.masks import packed, unpacked
from megatron_vlm.data.media import Files
from megatron_vlm.data.points import Place
from megatron_vlm.evaluate import report, segments
from megatron_vlm.evaluate.asking import Answer
from megatron_vlm.evaluate.regions import Spot
from megatron_vlm.evaluate.tasks import Task
from megatron_vlm.evaluate.tracking import hota, tracking
from tests.data.clips import clip, steady
from tests.evaluate.reference import cases


@pytest.mark.parametrize(("frames", "expected"), cases("hota"))
def test_hota_is_trackevals(frames, expected):
    table = [(objects, said, np.array(on, bool).reshape(len(objects), len(said))) for objects, said, on in frames]
    assert hota(table) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("height", "width", "wanted", "found", "j", "f"), cases("jf"))
def test_j_and_f_are_those_of_davis(height, width, wanted, found, j, f):
    truth, said = (np.stack([unpacked(height, width, counts) for counts in masks]) for masks in (wanted, found))
    assert [segments.region_similarity(a, b) for a, b in zip(said, truth, strict=True)] == pytest.approx(j, abs=1e-12)
    assert [segments.boundary_similarity(a, b) for a, b in zip(said, truth, strict=True)] == pytest.approx(f, abs=1e-12)
    both = segments.j_and_f({7: np.zeros_like(said), 9: said}, {1: truth})
    assert both == pytest.approx((np.mean(j), np.mean(f)), abs=1e-12)


def test_a_switch_of_identities_costs_association_only():
    # Two objects stand still for four frames; the answer swaps their ids after two.
    wanted = {1: [Spot(t / 2, 0.2, 0.5, 0.05) for t in range(4)], 2: [Spot(t / 2, 0.8, 0.5, 0.05) for t in range(4)]}
    said = [Place(t / 2, 1 if t < 2 else 2, 0.2, 0.5) for t in range(4)]
    said += [Place(t / 2, 2 if t < 2 else 1, 0.8, 0.5) for t in range(4)]
    scores = {name: part / whole for name, (part, whole) in tracking(said, wanted, (100, 100), rate=2).items()}
    assert scores["DetA"] == scores["F1 by frame"] == 1.0
    # Each match's pair is together in 2 of 4 + 4 - 2 frames.
    assert scores["AssA"] == pytest.approx(1 / 3) and scores["HOTA"] == pytest.approx((1 / 3) ** 0.5)


def test_frame_scores_are_means_over_the_frames_that_either_names():
    wanted = {1: [Spot(0.0, 0.5, 0.5, 0.1), Spot(0.5, 0.5, 0.5, 0.1)]}
    said = [Place(0.0, 1, 0.52, 0.5), Place(0.0, 2, 0.9, 0.9), Place(1.0, 1, 0.5, 0.5)]
    scores = {name: part / whole for name, (part, whole) in tracking(said, wanted, (100, 100), rate=2).items()}
    # Frames 0, 1, 2: one of two hits; none said; none there.
    assert scores["F1 by frame"] == pytest.approx(2 / 3 / 3) and scores["recall by frame"] == pytest.approx(1 / 3)
    assert scores["precision by frame"] == pytest.approx(0.5 / 3)


def test_points_become_masks_through_a_predictor():
    frames = np.zeros((2, 40, 60, 3), np.uint8)
    masks = segments.discs(frames, {3: [(0, 30.0, 20.0)]})
    assert set(masks) == {3} and not masks[3][1].any()
    assert masks[3][0].sum() == 29 and masks[3][0, 20, 33] and not masks[3][0, 20, 34]  # radius 3 of 60
    assert segments.j_and_f(masks, masks) == (1.0, 1.0) and segments.j_and_f({}, masks)[0] == 0.5


def test_sam_2_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(segments.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--masks sam2 needs SAM 2, which is not installed: pip install sam2"):
        segments.sam2(np.zeros((1, 4, 4, 3), np.uint8), {1: [(0, 1.0, 1.0)]})


def grown(frame: np.ndarray, x: float, y: float) -> np.ndarray:
    """A real predictor of the simplest kind: the connected pixels around a place that have about its colour."""
    alike = np.abs(frame.astype(int) - frame[round(y), round(x)]).max(axis=-1) < 40
    parts, _ = ndimage.label(alike)
    return parts == parts[round(y), round(x)]


class Sam2:
    """The methods of sam2 1.1.0's SAM2VideoPredictor that are used, with its names and defaults, over `grown`: an
    object goes on from the middle of its mask in the frame before."""

    loaded: list[str] = []

    @classmethod
    def from_pretrained(cls, model_id, **kwargs):
        assert set(kwargs) <= {"device"}
        cls.loaded.append(model_id)
        return cls()

    def init_state(self, video_path, offload_video_to_cpu=False, offload_state_to_cpu=False,
                   async_loading_frames=False):  # fmt: skip
        files = sorted(Path(video_path).iterdir(), key=lambda path: int(path.stem))
        return {"frames": [np.asarray(Image.open(path)) for path in files], "points": {}}

    def add_new_points_or_box(self, inference_state, frame_idx, obj_id, points=None, labels=None,
                              clear_old_points=True, normalize_coords=True, box=None):  # fmt: skip
        assert points.shape == (1, 2) and labels.tolist() == [1]
        inference_state["points"].setdefault(obj_id, {})[frame_idx] = points[0]

    def propagate_in_video(self, inference_state, start_frame_idx=None, max_frame_num_to_track=None, reverse=False):
        assert torch.is_autocast_enabled("cpu"), "the real one mixes bf16 and float32 without"
        points, frames = inference_state["points"], inference_state["frames"]
        places: dict[int, np.ndarray] = {}
        for number in range(min(min(each) for each in points.values()), len(frames)):
            logits = torch.full((len(points), 1, *frames[0].shape[:2]), -1.0)
            for row, (name, given) in enumerate(points.items()):
                if number in given or name in places:
                    mask = grown(frames[number], *given.get(number, places.get(name)))
                    logits[row, 0][torch.from_numpy(mask)] = 1.0
                    places[name] = np.argwhere(mask).mean(axis=0)[::-1]
            yield number, list(points), logits


def test_places_become_masks_through_the_interface_of_sam_2(monkeypatch):
    package = types.ModuleType("sam2.sam2_video_predictor")
    package.SAM2VideoPredictor = Sam2
    parent = types.ModuleType("sam2")
    parent.__spec__ = importlib.machinery.ModuleSpec("sam2", None)
    monkeypatch.setitem(sys.modules, "sam2", parent)
    monkeypatch.setitem(sys.modules, "sam2.sam2_video_predictor", package)
    segments._sam2_predictor.cache_clear()
    frames = np.full((4, 60, 80, 3), 30, np.uint8)
    truth = {number: np.zeros((4, 60, 80), bool) for number in (1, 2)}
    for frame in range(4):  # a red square goes right; a green one appears in the third frame
        truth[1][frame, 10:30, 5 + 4 * frame : 25 + 4 * frame] = True
        truth[2][frame, 35:55, 50:70] = frame >= 2
        frames[frame][truth[1][frame]], frames[frame][truth[2][frame]] = (220, 30, 30), (30, 200, 30)
    found = segments.sam2(frames, {7: [(0, 15.0, 20.0)], 4: [(2, 60.0, 45.0), (3, 60.0, 45.0)]})
    assert set(found) == {4, 7} and not found[4][:2].any()
    j, f = segments.j_and_f(found, truth)
    assert j > 0.9 and f > 0.95  # not 1: the frames are JPEGs, and their colours run
    segments.sam2(frames[:1], {1: [(0, 15.0, 20.0)]})
    assert Sam2.loaded == [segments.SAM2_WEIGHTS], "weights are loaded once"
    segments._sam2_predictor.cache_clear()


def test_masks_of_every_published_form_are_the_same():
    mask = np.zeros((4, 5), bool)
    mask[1:3, 2:4] = True
    runs = {"size": [4, 5], "counts": [9, 2, 2, 2, 5]}  # down the columns
    assert packed(mask.tolist()) == packed(runs) == packed({"size": [4, 5], "counts": packed(mask)[2]})
    assert np.array_equal(unpacked(*packed(mask)), mask)
    with pytest.raises(ValueError, match="a mask must be COCO run lengths"):
        packed("1100")


def test_j_and_f_of_an_answer_on_a_real_film(tmp_path):
    # Two frames of a film in which the object's mask is a disc: the predictor without a model finds it at the point.
    film = clip(steady(4, fps=2), size=(60, 40))
    files = Files()
    media = files.add_video(film, name="film")
    disc = segments.discs(np.zeros((1, 40, 60, 3), np.uint8), {1: [(0, 30.0, 20.0)]})[1][0]
    masks = [[[at, *packed(disc)] for at in (0.0, 0.5)]]
    wanted = Tracks("dot", ((Point(0.0, 0.5, 0.5), Point(0.5, 0.5, 0.5)),))
    branch = Branch("video_point_track_per_frame", (Turn("dot", wanted),))
    sample = Example("a", (branch,), (media,), {"masks": {"dot": masks}}, Clip(rate=2))
    task = Task("t", "tracking", 8)

    def scores(said: str) -> dict[str, float]:
        segmenter = segments.Segmenter(files, "discs")
        ((one,),) = report.judge(task, [sample], {"a": Answer("a", (said,))}, masks=segmenter)
        return {name: part / whole for name, (part, whole) in one.verdict.scores.items()}

    right = scores('<tracks coords="0.0 1 500 500;0.5 1 500 500">dot</tracks>')
    assert right["HOTA"] == right["J&F (discs)"] == right["J (discs)"] == right["F (discs)"] == 1.0
    half = scores('<tracks coords="0.0 1 500 500">dot</tracks>')  # nothing in the second frame
    assert half["J&F (discs)"] == 0.5
    assert scores("nothing")["J&F (discs)"] == 0.0
    twice = scores('<tracks coords="0.0 1 500 500;0.0 1 100 100;0.5 1 500 500">dot</tracks>')
    assert twice["J&F (discs)"] == 1.0  # of an object's places in one frame the first


def test_a_predictor_that_there_is_not_is_named():
    with pytest.raises(ValueError, match="--masks sam9: there is no such predictor; choose from discs, sam2"):
        segments.Segmenter(Files(), "sam9")

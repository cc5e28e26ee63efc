"""HOTA against TrackEval's, frame scores and J&F by hand, J and F of masks against TrackEval's copy of DAVIS."""

import numpy as np
import pytest

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


def test_a_predictor_that_there_is_not_is_named():
    with pytest.raises(ValueError, match="--masks sam9: there is no such predictor; choose from discs, sam2"):
        segments.Segmenter(Files(), "sam9")

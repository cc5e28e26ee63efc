"""The table: sets that are for evaluation only, with what scoring needs. See entry.py for how to add a data set.

Validation splits of the recipes' own sets (VQA v2, TextVQA, ChartQA, DocVQA, InfographicVQA, A-OKVQA, ScienceQA,
PixMo-Count) are in images.py. Not read: MeViS' challenge split `valid`, whose answers are not published.
"""

from __future__ import annotations

from typing import Any

from megatron_vlm.data.sets.entry import Entry
from megatron_vlm.data.sets.questions import questions
from megatron_vlm.data.sets.scored import (
    choices,
    masked_tracks,
    masked_video_points,
    numbers,
    numeric_answers,
    place_in_mask,
    several_images,
    stated_captions,
    written_choices,
)
from megatron_vlm.data.sets.tracks import tracks

_TEST = {"test": "test"}
_YOUTUBE = "the videos by their ids on YouTube"
_LONG_VIDEO_BENCH = {"video": "video_path", "options": "candidates", "answer_index": "correct_choice"}


def _set(family: Any, by_hand: str = "", *, splits: dict[str, str] | None = None, **more: Any) -> Entry:
    return Entry(family, splits=splits or _TEST, evaluation_only=True, by_hand=by_hand, **more)


def _video_choices(by_hand: str, *, columns: dict[str, str] | None = None, path: str = "", **more: Any) -> Entry:
    options = {"style": "video_multiple_choice"} | ({"path": path} if path else {})
    return _set(choices, by_hand, columns=columns or {}, options=options | more.pop("options", {}), **more)


def _masked_tracks(name: str, split: str, by_hand: str, masks: str, *, media: str, object: str = "-") -> Entry:
    return _set(tracks, by_hand, hub=f"allenai/molmo2-{name}", config="track", splits={"test": split},
                columns={"object": object}, options={"task": "track", "masks": masks}, media=media,
                verified="reader")  # fmt: skip


MOLMO2_EVAL = {
    "molmo2_video_point_eval": _set(
        masked_video_points, f"{_YOUTUBE}, at 2 frames a second, and MammalNet's", hub="allenai/Molmo2-VideoPointEval",
        splits={"test": "val"}, columns={"timestamps": "two_fps_timestamps", "video": "video_id"},
        media="molmo2_video_point", verified="reader", unverified="the table of addresses",
    ),
    "molmo2_video_count_eval": _set(
        numbers, f"{_YOUTUBE}, at 2 frames a second", hub="allenai/Molmo2-VideoCountEval", splits={"test": "val"},
        columns={"start": "clip_start", "end": "clip_end"}, options={"style": "video_count"},
        media="molmo2_video_point", verified="reader",
    ),
    "molmo2_video_track_eval": _set(
        masked_tracks, "clips of APTv2, dancetrack, sportsmot, personpath22 and sav, as the repository says",
        hub="allenai/Molmo2-VideoTrackEval", files=("*/{split}-*.parquet", "data/{split}-*.parquet"),
        columns={"label": "exp", "width": "w", "height": "h"}, options={"path": "{video_dataset}/{clip}"},
        verified="reader",
    ),
    "molmo2_cap_eval": _set(
        stated_captions, "vimeo_videos.zip of the repository, unpacked into vimeo/ without `vimeo_` in the names; "
        "BDD100K's and Ego4D's whole videos in bdd100k/ and ego4d/, named by their ids",
        hub="allenai/Molmo2-CapEval",
        columns={"statements": "atomic_statements", "caption": "aggregated_caption", "start": "video_start",
                 "end": "video_end"},
        options={"style": "video_long_caption", "path": "{source}/{video_id}"}, verified="reader",
    ),
}  # fmt: skip

IMAGE_EVAL = {
    "countbench_qa": _set(numbers, hub="vikhyatk/CountBenchQA", columns={"count": "number"},
                          options={"style": "point_count"}, verified="card"),
    "real_world_qa": _set(written_choices, hub="xai-org/RealworldQA", options={"style": "eval_multiple_choice"},
                          verified="reader"),
    "mmmu": _set(several_images, hub="MMMU/MMMU", files=("*/validation-*.parquet",), one_tree=False,
                 options={"style": "eval_multiple_choice"}, verified="card"),
    "muir_bench": _set(several_images, hub="MUIRBENCH/MUIRBENCH", one_tree=False, columns={"images": "image_list"},
                       options={"style": "eval_multi_image_mc"}, verified="reader"),
    "blink": _set(several_images, hub="BLINK-Benchmark/BLINK", files=("*/val-*.parquet",), one_tree=False,
                  columns={"options": "choices"}, options={"style": "eval_multi_image_mc"}, verified="card, program"),
    "mmiu": _set(several_images, "the archives of the repository, so that 2D-spatial/... lie as rows name them; rows "
                 "whose answer is none of their options are left out", hub="FanqingM/MMIU-Benchmark",
                 files=("all.parquet",), one_tree=False, columns={"images": "input_image_path", "answer": "output"},
                 options={"style": "eval_multi_image_mc"}, verified="reader, layout"),
    "math_vista": _set(numeric_answers, hub="AI4Math/MathVista", splits={"test": "testmini"},
                       columns={"image": "decoded_image"},
                       options={"style": "vqa2", "choice_style": "eval_multiple_choice"}, verified="card, reader"),
    "point_bench": _set(place_in_mask, "selected_images.zip and selected_masks.zip of the repository, unpacked",
                        hub="PointArena/pointarena-data", files=("data.json",), columns={"question": "user_input"},
                        options={"path": "selected_images/{category}/{image_filename}",
                                 "mask": "selected_masks/{category}/{mask_filename}"}, verified="reader",
                        unverified="steerable questions go without the place of the mark, as Molmo2 asks them"),
    "ai2d_test": _set(choices, hub="lmms-lab/ai2d", columns={"answer_index": "answer"},
                      options={"style": "ai2_diagram"}, verified="card, program"),
    "coco_2014_vqa_test": _set(questions, hub="lmms-lab/VQAv2", files=("data/validation-*.parquet",),
                               options={"style": "vqa2"}, verified="card"),
}  # fmt: skip

#: Videos at 6 frames a second, all of a set in one folder, named as its rows do; beside them the masks as published.
TRACK_EVAL = {
    "mevis_eval": _masked_tracks(
        "mevis", "valid_u", "MeViS' videos of valid_u; valid_u/mask_dict.json of MeViS_release.zip",
        "valid_u/mask_dict.json", media="mevis", object="anno_id"),
    "ref_yt_vos_eval": _masked_tracks(
        "ref-yt-vos", "valid", "Ref-YouTube-VOS' videos of valid, under its own licence; its masks in "
        "valid/Annotations/VIDEO/QUERY/", "valid/Annotations/{video}/{qid}", media="ref_yt_vos"),
    "ref_davis17_eval": _masked_tracks(
        "ref-davis17", "valid", "DAVIS-2017-trainval-480p.zip: videos of all frames, and DAVIS/Annotations/480p/",
        "DAVIS/Annotations/480p/{video}", media="ref_davis17", object="obj_id"),
    "reasonvos_eval": _masked_tracks(
        "reasonvos", "test", "ReasonVOS' videos; its masks in ReasonVOS/Annotations/",
        "ReasonVOS/Annotations/{object}", media="reasonvos", object="anno_id"),
}  # fmt: skip

VIDEO_EVAL = {
    "mvbench": _video_choices("the videos of the repository's archives in one folder, whatever their task",
                              hub="OpenGVLab/MVBench", files=("json/*.json",), columns={"options": "candidates"},
                              verified="reader"),
    "tomato": _video_choices("videos of https://github.com/yale-nlp/TOMATO", files=("*.json",),
                             columns={"video": "key", "answer_index": "answer"}, path="{demonstration_type}/{video}",
                             verified="reader"),
    # Answers of its test part are not published: they are "NA".
    "motionbench": _set(written_choices, "MotionBench/self-collected and MotionBench/public-dataset of the repository "
                        "in one folder", hub="zai-org/MotionBench", files=("MotionBench/video_info.meta.jsonl",),
                        explode="qa", columns={"video": "video_path", "start": "-", "end": "-"},
                        options={"style": "video_multiple_choice"}, verified="reader"),
    "temp_compass": _set(written_choices, "tempcompass_videos.zip of the repository", hub="lmms-lab/TempCompass",
                         files=("multi-choice/test-*.parquet",), columns={"video": "video_id"},
                         options={"style": "video_multiple_choice"}, verified="card, program"),
    "perception_test_val": _video_choices("https://github.com/google-deepmind/perception_test",
                                          hub="lmms-lab/PerceptionTest_Val",
                                          files=("mc_question_val/validation-*.parquet",),
                                          columns={"video": "video_name", "answer_index": "answer_id"},
                                          verified="program"),
    "ego_schema": _video_choices("the archives of the repository", hub="lmms-lab/egoschema",
                                 files=("Subset/test-*.parquet",),
                                 columns={"video": "video_idx", "options": "option", "answer_index": "answer"},
                                 verified="reader"),
    "nextqa_mc_test": _video_choices("NExT-QA's videos", hub="lmms-lab/NExTQA", files=("MC/test-*.parquet",),
                                     options={"options": ("a0", "a1", "a2", "a3", "a4")}, media="nextqa_mc",
                                     columns={"answer_index": "answer"}, verified="reader"),
    "video_mme": _video_choices(_YOUTUBE, hub="lmms-lab/Video-MME", files=("videomme/test-*.parquet",),
                                columns={"video": "videoID", "category": "duration"}, verified="reader"),
    "video_mme_subtitles": _video_choices(
        f"{_YOUTUBE}; subtitles.json of allenai/Molmo2-VideoMME beside them", hub="lmms-lab/Video-MME",
        files=("videomme/test-*.parquet",), columns={"video": "videoID", "category": "duration"}, media="video_mme",
        options={"style": "video_multiple_choice_w_subtitle", "subtitles": "subtitles.json", "member": "video"},
        verified="reader"),
    "long_video_bench": _video_choices("the archives of the repository", hub="longvideobench/LongVideoBench",
                                       files=("lvb_val.json",), columns=_LONG_VIDEO_BENCH, verified="reader"),
    "long_video_bench_subtitles": _video_choices(
        "the archives of the repository; its subtitles in subtitles/", hub="longvideobench/LongVideoBench",
        files=("lvb_val.json",), media="long_video_bench",
        columns=_LONG_VIDEO_BENCH | {"subtitles_start": "starting_timestamp_for_subtitles", "seconds": "duration"},
        options={"style": "video_multiple_choice_w_subtitle", "subtitles": "subtitles/{subtitle_path}"},
        verified="reader"),
    "lvbench": _set(written_choices, _YOUTUBE, hub="zai-org/LVBench", files=("video_info.meta.jsonl",), explode="qa",
                    columns={"video": "key"}, options={"style": "video_multiple_choice"}, verified="reader"),
    "mlvu_mc": _video_choices("the archives of the repository", hub="MLVU/MVLU", files=("MLVU/json/*.json",),
                              columns={"options": "candidates"}, verified="reader", unverified="folders"),
    "video_eval_pro_mc": _video_choices("the archives of the repository", hub="TIGER-Lab/VideoEval-Pro",
                                        verified="reader"),
}  # fmt: skip

EVALUATION: dict[str, Entry] = {**MOLMO2_EVAL, **IMAGE_EVAL, **TRACK_EVAL, **VIDEO_EVAL}

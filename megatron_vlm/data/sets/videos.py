"""The table: videos with captions, questions, moments and places. See entry.py for how to add a data set.

Most raw videos need their own licence: `by_hand` says where, and files/<media>/ is where they go.
"""

from __future__ import annotations

from typing import Any

from megatron_vlm.data.sets.captions import captions, moments, video_captions
from megatron_vlm.data.sets.conversations import chat
from megatron_vlm.data.sets.entry import Entry
from megatron_vlm.data.sets.places import video_points
from megatron_vlm.data.sets.questions import judged_choices, labels, question_pairs, questions

SCHEMA = "column names"
YOUTUBE = "youtube_id_to_urls_mapping.json"
FIVE = ("a0", "a1", "a2", "a3", "a4")
_QA = {"style": "video_short_answer", "choice_style": "video_multiple_choice"}


def _qa(by_hand: str, *, hub: str = "", unverified: str = "", columns: dict[str, str] | None = None,
        options: dict[str, Any] | None = None, **more: Any) -> Entry:  # fmt: skip
    """Questions about videos, open or with options."""
    return Entry(questions, hub=hub, columns=columns or {}, options=_QA | (options or {}), by_hand=by_hand,
                 unverified=unverified, **more)  # fmt: skip


def _moments(by_hand: str, files: str, *, unverified: str = "", **more: Any) -> Entry:
    return Entry(moments, files=(files,), by_hand=by_hand, unverified=unverified, **more)


def _llava_video(kind: str) -> Entry:
    return Entry(chat, hub="lmms-lab/LLaVA-Video-178K",
                 files=(f"*_academic_v0_1/*_academic_{kind}_v0_1_qa_processed.json",),
                 columns={"messages": "conversations"},
                 options={"style": "video_multiple_choice" if kind == "mc" else "video_short_answer"},
                 media="llava_video", by_hand="archives *_academic_v0_1_videos_*.tar.gz of the repository")  # fmt: skip


def _video_point(low: int, high: int) -> Entry:
    """Molmo2-VideoPoint: all eight configurations, rows with low to high places."""
    return Entry(
        video_points,
        hub="allenai/Molmo2-VideoPoint",
        files=("*/{split}-*.parquet", "data/*/{split}-*.parquet"),
        columns={"timestamps": "two_fps_timestamps", "start": "clip_start", "end": "clip_end"},
        options={"min_count": low, "max_count": high},
        chat_share=0.2,
        addresses=YOUTUBE,
        media="molmo2_video_point",
        by_hand="generated_videos/ of the repository and MammalNet's; all videos at 2 frames a second",
    )


MOLMO2 = {
    "vixmo3_top_level_captions_min_3": Entry(  # Molmo2-Cap
        video_captions,
        hub="allenai/Molmo2-Cap",
        splits={"train": "train", "validation": "val"},
        columns={"start": "video_start", "end": "video_end"},
        options={
            "styles": {
                "video_caption": "video_short_caption",
                "merged_caption": "video_merged_caption",
                "video_frame_merged_caption": "video_long_caption",
            },
            "min_score": 3,
        },
        addresses=YOUTUBE,
        media="youtube",
        unverified="name of the table of addresses",
    ),
    "molmo2_human_qa": Entry(  # Molmo2-AskModelAnything
        questions,
        hub="allenai/Molmo2-AskModelAnything",
        files=("data/HumanQA-*.parquet", "HumanQA*.parquet"),
        options={"style": "user_qa"},
        addresses=YOUTUBE,
        media="youtube",
        unverified="file names; table of addresses",
    ),
    "molmo2_syn_captions_qa": Entry(  # Molmo2-VideoCapQA
        questions,
        hub="allenai/Molmo2-VideoCapQA",
        files=("data/CapQA-*.parquet", "CapQA*.parquet"),
        columns={"question": "Question", "answer": "Answer", "negatives": "NegativeAnswers"},
        options=_QA,
        addresses=YOUTUBE,
        media="youtube",
        unverified="file names; table of addresses",
    ),
    "molmo2_syn_captions_subtitle_qa": Entry(  # Molmo2-VideoSubtitleQA
        questions,
        hub="allenai/Molmo2-VideoSubtitleQA",
        files=("data/SubtitleQA-*.parquet", "SubtitleQA*.parquet"),
        columns={
            "question": "Question", "answer": "Answer", "negatives": "NegativeAnswers", "subtitles": "subtitle",
        },
        options=_QA | {"choice_style": "video_multiple_choice_w_subtitle"},
        addresses=YOUTUBE,
        media="youtube",
        unverified="file names",
    ),
    "vixmo_points_minmax_0_5": _video_point(0, 5),
    "vixmo_points_minmax_6_25": _video_point(6, 25),
    "vixmo_points_minmax_26_60": _video_point(26, 60),
    "academic_points_clip_63s_2fps": Entry(
        video_points,
        hub="allenai/molmo2-academic-video-points",
        splits={"train": "train", "validation": "val"},
        columns={"video": "video_name", "label": "category", "start": "clip_start_time", "end": "clip_end_time"},
        options={"path": "{subset}/{video}"},
        by_hand="the videos of its subsets, at 2 frames a second",
        unverified="which column holds the label",
    ),
}  # fmt: skip

QUESTIONS = {
    "tgif": _qa("TGIF's GIFs from https://github.com/raingo/TGIF-Release", hub="allenai/Molmo2-TGIF",
                files=("Train_*_question.csv",), columns={"video": "gif_name"},
                options={"options": ("a1", "a2", "a3", "a4", "a5")}),
    "tvqa_with_sub": _qa("TVQA's clips from https://nlp.cs.unc.edu/data/jie/tvqa", hub="allenai/Molmo2-TVQA",
                         columns={"question": "q", "answer_index": "answer_idx", "video": "vid_name", "span": "ts"},
                         options={"options": FIVE, "choice_style": "video_multiple_choice_w_subtitle"},
                         unverified=SCHEMA),
    "paxion": _qa("Ego4D's and Something-Something's videos", hub="allenai/Molmo2-Paxion", unverified=SCHEMA),
    "llava_video_mc_academic": _llava_video("mc"),
    "llava_video_oe_academic": _llava_video("oe"),
    "perception_test": Entry(questions, files=("mc_question_{split}.json",), explode="mc_question",
                             columns={"answer_index": "answer_id", "video": "key"}, options=_QA,
                             by_hand="https://github.com/google-deepmind/perception_test"),
    "nextqa_mc": _qa("NExT-QA's videos from https://github.com/doc-doc/NExT-QA", files=("{split}.csv",),
                     columns={"answer_index": "answer"}, options={"options": FIVE}),
    "news_video_qa_filtered": _qa("https://cvit.iiit.ac.in/research/projects/cvit-projects/videoqa",
                                  hub="allenai/Molmo2-NewsVideoQA", unverified=SCHEMA),
    "how2qa": _qa("videos of How2QA; annotations as JSON lines", files=("{split}.jsonl",),
                  columns={"question": "q", "answer_index": "answer_id", "video": "vid_name", "span": "ts"},
                  options={"options": FIVE[:4]}, unverified=SCHEMA),
    "sutd_trafficqa": _qa("https://github.com/SUTDCV/SUTD-TrafficQA", files=("R3_{split}.jsonl",),
                          columns={"question": "q_body", "answer_index": "answer", "video": "vid_filename"},
                          options={"options": ("option0", "option1", "option2", "option3")}),
    "social_iq2": _qa("Social-IQ 2.0's videos", hub="PediaMedAI/Social-IQ-Video", files=("**/qa_{split}.json",),
                      columns={"question": "q", "answer_index": "answer_idx", "video": "vid_name"},
                      options={"options": FIVE[:4]}, unverified="file names"),
    "sportsqa_oe": _qa("https://github.com/HopLee6/Sports-QA", files=("{split}.json",), unverified=SCHEMA),
    "cinepile_with_sub": _qa("the clips' addresses are in yt_clip_link", hub="allenai/Molmo2-cinepile",
                             columns={"options": "choices", "answer_index": "answer_key_position",
                                      "video": "videoID"},
                             options={"choice_style": "video_multiple_choice_w_subtitle"}, unverified=SCHEMA),
    "clevrer": Entry(judged_choices, files=("{split}.json",), explode="questions",
                     columns={"video": "video_filename"}, by_hand="http://clevrer.csail.mit.edu",
                     options={"style": "video_short_answer", "choice_style": "video_multiple_choice_multiple_correct"}),
    "funqa": _qa("videos of the repository", hub="fesvhtr/FunQA", files=("**/funqa_{split}.json",),
                 columns={"question": "instruction", "answer": "output", "video": "visual_input"}),
    "star": _qa("Charades' videos; annotations from https://bobbywu.com/STAR", files=("STAR_{split}.json",),
                columns={"options": "choices", "video": "video_id"}),
    "intent_qa": _qa("NExT-QA's videos; https://github.com/JoseponLee/IntentQA", files=("{split}.csv",),
                     columns={"answer_index": "answer"}, options={"options": FIVE}, media="nextqa_mc"),
    "video_localized_narratives": Entry(question_pairs, files=("*_{split}_qa_text_only.json",),
                                        columns={"video": "video_id", "qa_pairs": "qa_pairs"},
                                        options={"style": "video_short_answer"},
                                        by_hand="https://google.github.io/video-localized-narratives",
                                        unverified=SCHEMA),
    "road_text_vqa": _qa("https://cvit.iiit.ac.in (RoadTextVQA)", files=("{split}.json",), within="data",
                         columns={"answer": "answers"}, unverified=SCHEMA),
    "countix_oe": Entry(labels, hub="allenai/Molmo2-Countix", media="kinetics", by_hand="Kinetics' videos",
                        columns={"label": "count", "start": "repetition_start", "end": "repetition_end"},
                        options={"question": "How often is the movement repeated?"}, unverified=SCHEMA),
    "camerabench_qa": _qa("videos of the repository", hub="allenai/Molmo2-CameraBenchTrain", unverified=SCHEMA),
    "motionbench_train": Entry(question_pairs, files=("{split}*.jsonl",), columns={"video": "video_path",
                               "qa_pairs": "qa"}, options={"style": "video_short_answer"},
                               by_hand="https://huggingface.co/datasets/THUDM/MotionBench", unverified=SCHEMA),
    "moments_in_time_qa": Entry(labels, files=("trainingSet.csv",), columns={"video": "path"},
                                options={"question": "What is happening in this video?"},
                                by_hand="http://moments.csail.mit.edu; give trainingSet.csv the header path,label"),
    "kinetics_qa": Entry(labels, files=("{split}.csv",), media="kinetics",
                         columns={"video_id": "youtube_id", "start": "-", "end": "-"},
                         options={"question": "What is being done in this video?"},
                         by_hand="Kinetics' clips, named by their youtube_id"),
    # Educational recipe only.
    "activitynet_qa": _qa("ActivityNet's videos; questions joined with answers of "
                          "https://github.com/MILVLG/activitynet-qa", files=("{split}.json",), media="activitynet",
                          columns={"video": "video_name"}),
    "videochatgpt": _qa("ActivityNet's videos", hub="lmms-lab/VideoChatGPT", files=("Generic/test-*.parquet",),
                        columns={"video": "video_name"}, media="activitynet",
                        unverified="the educational list names 100k rows; the published instructions are elsewhere"),
}  # fmt: skip

MOMENTS = {
    "charades_sta_all_qa": _moments("https://github.com/jiyanggao/TALL and Charades' videos",
                                    "charades_sta_{split}.txt", media="charades"),
    "coin_all_qa": _moments("https://coin-dataset.github.io", "COIN.json", within="database", explode="annotation",
                            where={"subset": "training"},
                            columns={"video": "key", "span": "segment", "caption": "label"}),
    "youcook2_all_qa": _moments("http://youcook2.eecs.umich.edu", "youcookii_annotations_trainval.json",
                                within="database", explode="annotations", where={"subset": "training"},
                                columns={"video": "key", "span": "segment", "caption": "sentence"}),
    "activitynet_all_qa": _moments("http://activity-net.org", "{split}.jsonl", media="activitynet",
                                   unverified="one line a sentence: video, start, end, caption (published as lists)"),
    "ego4d_all": _moments("https://ego4d-data.org (licence)", "{split}.jsonl", media="ego4d",
                          unverified="one line a narration: video, start, end, caption"),
    "epic_kitchens_qa": _moments("https://epic-kitchens.github.io", "EPIC_100_{split}.csv",
                                 columns={"start": "start_timestamp", "end": "stop_timestamp",
                                          "caption": "narration"}),
    "qv_highlights": _moments("https://github.com/jayleicn/moment_detr", "highlight_{split}_release.jsonl",
                              columns={"video": "vid", "span": "relevant_windows.0", "caption": "query"}),
    "video_localized_narratives_caption": Entry(captions, hub="allenai/Molmo2-VideoLocalizedNarrativesCaptionHf",
                                                media="video_localized_narratives",
                                                options={"style": "video_short_caption"},
                                                by_hand="https://google.github.io/video-localized-narratives",
                                                unverified=SCHEMA),
}  # fmt: skip

VIDEOS: dict[str, Entry] = {**MOLMO2, **QUESTIONS, **MOMENTS}

"""The table: videos with captions, questions, moments and places. See entry.py for how to add a data set.

Most raw videos need their own licence: `by_hand` says where, and files/<media>/ is where they go.
"""

from __future__ import annotations

from typing import Any

from megatron_vlm.data.sets.captions import captions, moments, object_captions, video_captions
from megatron_vlm.data.sets.conversations import chat
from megatron_vlm.data.sets.entry import Entry
from megatron_vlm.data.sets.places import video_points
from megatron_vlm.data.sets.questions import antonyms, judged_choices, labels, question_pairs, questions

YOUTUBE = "youtube_id_to_urls_mapping.json"
FIVE = ("a0", "a1", "a2", "a3", "a4")
_QA = {"style": "video_short_answer", "choice_style": "video_multiple_choice"}


def _qa(by_hand: str, *, columns: dict[str, str] | None = None, options: dict[str, Any] | None = None,
        verified: str = "reader", **more: Any) -> Entry:  # fmt: skip
    """Questions about videos, open or with options."""
    return Entry(questions, columns=columns or {}, options=_QA | (options or {}), by_hand=by_hand, verified=verified,
                 **more)  # fmt: skip


def _moments(by_hand: str, files: str, *, verified: str = "reader", **more: Any) -> Entry:
    return Entry(moments, files=(files,), by_hand=by_hand, verified=verified, **more)


def _llava_video(kind: str, *sources: str) -> Entry:
    """The academic part: questions about videos of other sets."""
    return Entry(chat, hub="lmms-lab/LLaVA-Video-178K", files=tuple(f"*_{one}/*{kind}*.json" for one in sources),
                 columns={"messages": "conversations"},
                 options={"style": "video_multiple_choice" if kind == "mc" else "video_short_answer",
                          "path": "{data_source}/{video}"},
                 media="llava_video", by_hand="the repository's archives, unpacked in their folders",
                 verified="reader")  # fmt: skip


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
        verified="reader",
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
        verified="reader",
        unverified="file names beyond those of a split HumanQA; table of addresses",
    ),
    "molmo2_syn_captions_qa": Entry(  # Molmo2-VideoCapQA
        questions,
        hub="allenai/Molmo2-VideoCapQA",
        files=("data/CapQA-*.parquet", "CapQA*.parquet"),
        columns={"question": "Question", "answer": "Answer", "negatives": "NegativeAnswers"},
        options=_QA,
        addresses=YOUTUBE,
        media="youtube",
        verified="reader",
        unverified="file names beyond those of a split CapQA; table of addresses",
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
        verified="reader",
        unverified="file names beyond those of a split SubtitleQA",
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
        verified="reader",
    ),
}  # fmt: skip

QUESTIONS = {
    "tgif": _qa("TGIF's GIFs from https://github.com/raingo/TGIF-Release, as MP4", hub="allenai/Molmo2-TGIF",
                files=("Train_*_question.csv",), columns={"video": "gif_name", "answer_index": "answer"},
                options={"options": ("a1", "a2", "a3", "a4", "a5")}),
    "tvqa_with_sub": _qa("TVQA's frames, 3 a second, from https://nlp.cs.unc.edu/data/jielei/tvqa, as videos",
                         hub="allenai/Molmo2-TVQA", files=("tvqa_{split}.jsonl",),
                         splits={"train": "train", "validation": "val"},
                         joined=("tvqa_preprocessed_subtitles.jsonl", "vid_name", "sub"),
                         columns={"question": "q", "answer_index": "answer_idx", "video": "vid_name", "span": "ts",
                                  "subtitles": "sub"},
                         options={"options": FIVE, "choice_style": "video_multiple_choice_w_subtitle"}),
    "paxion": Entry(antonyms, hub="allenai/Molmo2-Paxion",
                    files=("ssv2/antonyms/{split}_with_rel_path.json",),
                    columns={"video": "rel_vid_path", "opposite": "label_action_antonym_clip_text"},
                    by_hand="Something-Something V2's videos; the half about Ego4D's clips is not read", media="ssv2",
                    verified="reader"),
    "llava_video_mc_academic": _llava_video("mc", "perceptiontest", "nextqa"),
    "llava_video_oe_academic": _llava_video("oe", "activitynetqa", "nextqa"),
    "perception_test": Entry(questions, files=("mc_question_{split}.json", "all_{split}.json"), explode="mc_question",
                             columns={"answer_index": "answer_id", "video": "key"}, options=_QA,
                             by_hand="https://github.com/google-deepmind/perception_test: one of the two files",
                             verified="reader"),
    "nextqa_mc": _qa("NExT-QA's videos from https://github.com/doc-doc/NExT-QA, named by the number in train.csv",
                     files=("{split}.csv",), columns={"answer_index": "answer"}, options={"options": FIVE}),
    "news_video_qa_filtered": _qa("videos/train from https://cvit.iiit.ac.in/research/projects/cvit-projects/videoqa",
                                  hub="allenai/Molmo2-NewsVideoQA", files=("json_files/raw_files/new_{split}.json",),
                                  columns={"video": "uni_clipped_id"}),
    "how2qa": _qa("annotations how2QA_train_release.csv and videos from https://github.com/ych133/How2R-and-How2QA",
                  files=("how2QA_{split}_release.csv",), header=("video", "span", "n0", "n1", "n2",
                                                                            "question", "answer"),
                  options={"wrong": ("n0", "n1", "n2")}),
    "sutd_trafficqa": _qa("https://github.com/SUTDCV/SUTD-TrafficQA", files=("R2_{split}.jsonl",),
                          columns={"question": "q_body", "answer_index": "answer", "video": "vid_filename"},
                          options={"options": ("option0", "option1", "option2", "option3")}),
    "social_iq2": _qa("Social-IQ 2.0's videos", hub="PediaMedAI/Social-IQ-Video", files=("**/qa_{split}.json",),
                      columns={"question": "q", "answer_index": "answer_idx", "video": "vid_name"},
                      options={"options": FIVE[:4]}, unverified="file names"),
    "sportsqa_oe": _qa("meta-data/ of https://ndownloader.figshare.com/files/57448480; videos of HopLeeTop/Sports-QA",
                       files=("{split}.json", "meta-data/{split}.json")),
    "cinepile_with_sub": _qa("the clips, {video_id}/{video_id}.mp4; subtitles, one text without times, are not read",
                             hub="allenai/Molmo2-cinepile", explode="examples",
                             columns={"options": "choices", "answer_index": "answer_key_position", "video": "video_id",
                                      "subtitles": "-"},
                             options={"path": "{video}/{video}.mp4"}),
    "clevrer": Entry(judged_choices, files=("{split}.json",), explode="questions",
                     columns={"video": "video_filename"}, by_hand="http://clevrer.csail.mit.edu", verified="reader",
                     options={"style": "video_short_answer", "choice_style": "video_multiple_choice_multiple_correct"}),
    # Tasks whose answers are times are left out, as in Molmo2; its questions with options are not read.
    "funqa": _qa("videos of the repository", hub="fesvhtr/FunQA", files=("FunQA_{split}.json",),
                 where={"task": ("H2", "H3", "H4", "C2", "C3", "M2", "M3")},
                 columns={"question": "instruction", "answer": "output", "video": "visual_input"}),
    "star": _qa("Charades' videos; annotations from https://bobbywu.com/STAR", files=("STAR_{split}.json",),
                columns={"options": "choices", "video": "video_id"}),
    "intent_qa": _qa("NExT-QA's videos; https://github.com/JoseponLee/IntentQA", files=("{split}.csv",),
                     columns={"answer_index": "answer"}, options={"options": FIVE}, media="nextqa_mc"),
    "video_localized_narratives": Entry(question_pairs, within="annotations", media="oops",
                                        files=("videoqa/text_output/oops_{split}/qa_text_output.json",),
                                        columns={"video": "video_name"},
                                        options={"style": "video_short_answer",
                                                 "names": {"question": "raw_question", "answer": "raw_answer"}},
                                        by_hand="videoqa.zip of https://google.github.io/video-localized-narratives, "
                                        "videos of https://oops.cs.columbia.edu", verified="reader"),
    "road_text_vqa": _qa("http://cvit.iiit.ac.in/images/datasets/RoadTextVQA/train.json; videos of "
                         "https://github.com/georg3tom/RoadtextVQA", files=("{split}.json",), within="data"),
    "countix_oe": Entry(labels, hub="allenai/Molmo2-Countix", media="kinetics", by_hand="Kinetics-700's videos",
                        files=("countix_{split}_mapped.csv",), columns={"label": "count", "video": "video_path"},
                        options={"question": "How often is the movement repeated?"}, verified="reader"),
    "camerabench_qa": _qa("videos from https://github.com/sy77777en/CameraBench", hub="allenai/Molmo2-CameraBenchTrain",
                          files=("camerabench_qa.parquet",), explode="mc_qa_list",
                          columns={"video": "video_path", "question": "Question", "answer": "Answer",
                                   "negatives": "NegativeAnswers"}),
    "motionbench_train": Entry(captions, hub="zai-org/MotionBench", files=("MotionBenchCaption-{split}/{split}.jsonl",),
                               columns={"video": "video_path", "caption": "motion_caption"},
                               options={"style": "video_motion_caption"},
                               by_hand="videos of the repository, MotionBenchCaption-train/videos", verified="reader"),
    "moments_in_time_qa": Entry(labels, files=("{split}.csv",), columns={"video": "video_path"},
                                options={"question": "What is happening in this video?"},
                                by_hand="http://moments.csail.mit.edu; give train.csv the header video_path,label",
                                verified="reader"),
    "kinetics_qa": Entry(labels, files=("{split}.csv",), media="kinetics",
                         columns={"video_id": "youtube_id", "start": "-", "end": "-"},
                         options={"question": "What is being done in this video?"},
                         by_hand="Kinetics' clips, named by their youtube_id"),
    # Educational recipe only.
    "activitynet_qa": _qa("ActivityNet's videos; questions joined with answers of "
                          "https://github.com/MILVLG/activitynet-qa", files=("{split}.json",), media="activitynet",
                          columns={"video": "video_name"}),
    "videochatgpt": _qa("ActivityNet's videos", hub="lmms-lab/VideoChatGPT", files=("Generic/test-*.parquet",),
                        columns={"video": "video_name"}, media="activitynet", verified="",
                        unverified="the educational list names 100k rows; the published instructions are elsewhere"),
}  # fmt: skip

# Molmo2 asks for the label of each part, cut out; we also ask where in the whole video it is.
MOMENTS = {
    "charades_sta_all_qa": _moments("https://github.com/jiyanggao/TALL and Charades' videos",
                                    "charades_sta_{split}.txt", media="charades"),
    "coin_all_qa": _moments("https://coin-dataset.github.io", "COIN.json", within="database", explode="annotation",
                            where={"subset": "training"},
                            columns={"video": "key", "span": "segment", "caption": "label"}),
    "youcook2_all_qa": _moments("http://youcook2.eecs.umich.edu", "youcookii_annotations_trainval.json",
                                within="database", explode="annotations", where={"subset": "training"},
                                columns={"video": "key", "span": "segment", "caption": "sentence"}),
    "activitynet_all_qa": _moments("http://activity-net.org", "activity_net.v1-3.min.json", media="activitynet",
                                   within="database", explode="annotations", where={"subset": "training"},
                                   columns={"video": "key", "span": "segment", "caption": "label"}),
    "ego4d_all": Entry(questions, files=("ego4d_cached_{split}_metadata.parquet",), explode="message_list",
                       where={"corrupt": False}, columns={"video": "clip"}, options=_QA, media="ego4d",
                       by_hand="https://storage.googleapis.com/molmo-datasets/ego4d_cached_train_metadata.parquet; "
                       "clips cut out of https://ego4d-data.org (licence) as its columns uid, start and end say",
                       verified="reader"),
    "epic_kitchens_qa": _moments("https://epic-kitchens.github.io", "EPIC_100_{split}.csv",
                                 columns={"start": "start_timestamp", "end": "stop_timestamp",
                                          "caption": "narration"}),
    "qv_highlights": _moments("https://github.com/jayleicn/moment_detr", "highlight_{split}_release.jsonl",
                              columns={"video": "vid", "span": "relevant_windows.0", "caption": "query"}),
    "video_localized_narratives_caption": Entry(object_captions, hub="allenai/Molmo2-VideoLocalizedNarrativesCaptionHf",
                                                files=("hf_dataset/*.arrow",), media="video_localized_narratives",
                                                columns={"actors": "actor_names"}, verified="reader",
                                                by_hand="the videos of OOPS, Kinetics-700, UVO and OVIS that it names"),
}  # fmt: skip

VIDEOS: dict[str, Entry] = {**MOLMO2, **QUESTIONS, **MOMENTS}

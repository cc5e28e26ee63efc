"""Three small rows of every data set of the table, as its annotations are published: see `verified` in the entries.

`IMAGE` stands for the bytes of an image; a list of rows is written into the file that the entry looks for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_vlm.data.sets.table import TABLE

Row = dict[str, Any]
IMAGE = "<image>"
WEB = "https://pictures.example/"


def three(make: Callable[[int], Row]) -> list[Row]:
    return [make(number) for number in range(3)]


def embedded() -> Row:
    return {"bytes": IMAGE, "path": None}


def track(i: int) -> Row:
    """A red car that drives to the right, a second one that is hidden at first."""
    frames = [
        {"frame": f * 3, "time": f * 0.5, "points": [
            {"id": 0, "point": [64.0 + 64 * f, 36.0], "occluded": False},
            {"id": 1, "point": [320.0, 180.0], "occluded": f == 0}]}
        for f in range(3)
    ]  # fmt: skip
    return {"id": f"t{i}", "video": f"v{i}", "clip": None, "expression": "The Red Car", "fps": 6, "sampling_fps": 2,
            "width": 640, "height": 360, "mask_id": ["0", "1"], "frame_trajectories": frames,
            "video_dataset": "mevis"}  # fmt: skip


def video_point(i: int) -> Row:
    count = (2, 8, 30)[i]
    places = [{"x": 10.0 + n, "y": 20.0} for n in range(count)]
    return {"video_id": f"v{i}", "video_source": "youtube", "video_duration": 40.0, "category": "object",
            "label": "Cup", "count": count, "two_fps_timestamps": [11.0, 12.5], "raw_timestamps": [11.02, 12.48],
            "raw_frames": [1, 2], "points": [places[:1], places[1:]], "clip_start": 10.0, "clip_end": 30.0,
            "question": "How many cups are shown?", "annotator_unsure": False}  # fmt: skip


def choices(i: int) -> Row:
    return {f"a{n}": f"option {n}" for n in range(5)} | {"answer": str(i)}


def caption_qa(i: int) -> Row:
    return {"video_id": f"v{i}", "Question": "What is it?", "Answer": "A cat.", "NegativeAnswers": ["A dog.", "A cow."],
            "Category": "object", "subtitle": [{"start": 0.0, "end": 2.5, "text": "meow"}]}  # fmt: skip


def talk(*roles: str) -> list[Row]:
    who = {"user": ("role", "content"), "assistant": ("role", "content"), "system": ("role", "content"),
           "human": ("from", "value"), "gpt": ("from", "value")}  # fmt: skip
    return [{who[role][0]: role, who[role][1]: f"<image>\nmessage {n}" if role in ("user", "human") else f"answer {n}"}
            for n, role in enumerate(roles)]  # fmt: skip


QA = {"question": "What is it?", "answer": "A cat."}
#: A mask of 40 x 60 pixels, columns 20 to 39 whole, as COCO writes it down.
RUNS = {"size": [40, 60], "counts": [800, 800, 800]}
WHOLE = {"size": [40, 60], "counts": [0, 2400]}
#: The right half of a picture of 40 x 20 pixels.
HALF = {"size": [20, 40], "counts": [400, 400]}
PAIRS = {"question": ["What?", "Why?"], "explanation": ["It shows.", "So."], "answer": ["A bar.", "Because."]}

#: By the data set's name, or by the start of it.
ROWS: dict[str, list[Row]] = {
    "pixmo_cap_qa_as_user_qa": three(lambda i: {
        "image_url": f"{WEB}{i}.jpg", "question": "[USER]What?[ASSISTANT]A cat.[USER]Where?", "answer": "On a mat."}),
    "pixmo_cap": three(lambda i: {"image_url": f"{WEB}{i}.jpg", "caption": "A cat.",
                                  "transcripts": ["So, a cat.", "It is"]}),
    "pixmo_points_train": three(lambda i: {
        "image_url": f"{WEB}{i // 2}.jpg", "image_sha256": "", "label": f"Cup {i}", "points": [{"x": 25.0, "y": 50.0}],
        "count": 1, "collection_method": "pointing"}),
    "pixmo_points_eval": three(lambda i: {
        "image_url": f"{WEB}eval{i}.jpg", "label": "Cup", "points": [{"x": 25.0, "y": 50.0}],
        "masks": [[[True, False], [True, False]]]}),
    "pixmo_points_high_freq": three(lambda i: {
        "image_url": f"{WEB}{i // 2}.jpg", "image_sha256": "", "label": f"Cup {i}", "points": [{"x": 25.0, "y": 50.0}],
        "count": 1, "collection_method": "counting"}),
    "pixmo_count": three(lambda i: {"image_url": f"{WEB}{i}.jpg", "label": "people", "count": 2,
                                    "points": {"x": [10.0, 30.0], "y": [10.0, 20.0]}}),
    "pixmo_ask_model_anything": three(lambda i: {"image_url": f"{WEB}{i // 2}.jpg", "image_sha256": "", **QA,
                                                 "question": f"What is {i}?"}),
    "pixmo_clocks": three(lambda i: {
        "example_id": f"e{i}", "watchface_id": f"w{i}", "watchface_name": "Plain", "watch_time": "2024-01-01 10:10:05",
        "time_format": "12_hour", "shows_seconds": True, "hour_visible": 10, "minute_visible": 10, "second_visible": 5,
        "text": f"The time is 10:1{i}:05."}),
    "pixmo_multi_points": three(lambda i: {
        "image_urls": [f"{WEB}{i}.jpg", f"{WEB}{i + 1}.jpg", f"{WEB}{i + 2}.jpg"], "image_sha256s": ["", "", ""],
        "labels": ["Dogs", "Cats", "dogs"],
        "points": [[{"x": 10.0, "y": 20.0}], [{"x": 50.0, "y": 50.0}], [{"x": 30.0, "y": 40.0}]],
        "counts": [1, 1, 1], "collection_method": "pointing"}),
    "pixmo_multi_image_qa": three(lambda i: {"image_urls": [f"{WEB}{i}.jpg", f"{WEB}{i + 1}.jpg"],
                                             "qa_pairs": {"question": ["Which?"], "answer": ["The first."]}}),
    "tulu4": three(lambda i: {"id": str(i), "messages": talk("system", "user", "assistant", "user", "assistant"),
                              "source": "wildchat", "category": "chat", "first_message_qwen3_tokens": 9,
                              "empty_messages": False, "has_special_token": False}),
    "tulu3": three(lambda i: {"id": str(i), "messages": talk("user", "assistant"), "source": f"flan {i}"}),
    "molmo2_hardcodes": three(lambda i: {"questions": [f"Who are you? {i}"], "response": "A model.", "images": []}),
    "cosyn_point": three(lambda i: {"image": embedded(), "questions": ["Point to the bar."], "names": ["bar"],
                                    "answer_points": [{"x": [50.0], "y": [25.0]}], "id": str(i)}),
    "cosyn_multidoc": three(lambda i: {"images": [embedded(), embedded()], "qa_pairs": PAIRS, "id": str(i),
                                       "metadata": {"num_images": 2}}),
    "cosyn_": three(lambda i: {"image": embedded(), "qa_pairs": PAIRS, "id": str(i)}),
    "coco_2014_vqa_multi": [{"image": "images/coco/train2014/COCO_train2014_000000000009.jpg", "message_list": [
        {"question": f"What {i}?", "question_id": i, "answers": ["cat", "cat", "dog"]} for i in range(3)]}],
    "okvqa": three(lambda i: {"image": f"images/coco/train2014/{i}.jpg", "image_id": i, "qas": [
        {"question": "What?", "question_id": i, "answers": [{"raw_answer": "cat"}, {"raw_answer": "cat"}]}]}),
    "a_okvqa": three(lambda i: {"image": f"images/coco/train2017/{i}.jpg", "message_list": [
        {"question": "What?", "question_id": str(i), "choices": ["cat", "dog", "cow", "pig"], "answer_idx": i,
         "direct_answers": ["cat", "cat", "dog"]}], "metadata/difficult_direct_answer": False}),
    "text_vqa": three(lambda i: {"image": f"text_vqa/train_images/{i}.jpg", "question": "What does it say?",
                                 "answers": ["stop", "stop"], "metadata/example_id": i}),
    "tally_qa": three(lambda i: {"image": f"images/vg/VG_100K/{i}.jpg", "message_list": [
        {"question": "How many?", "answer": str(i)}]}),
    "chart_qa_weighted": three(lambda i: {"image": embedded(), "query": f"What is {i}?", "label": ["14"],
                                          "human_or_machine": i % 2}),
    "doc_qa": three(lambda i: {"questionId": i, "question": f"What {i}?", "image": "documents/x_1.png", "docId": 1,
                               "answers": ["42", "42"], "data_split": "train"}),
    "info_qa": three(lambda i: {"questionId": i, "question": f"What {i}?", "image_local_name": "1.jpeg",
                                "image_url": f"{WEB}info", "answers": ["42"], "data_split": "train"}),
    "st_qa": three(lambda i: {"file_name": "1.jpg", "file_path": "vizwiz/1.jpg", "question": f"What {i}?",
                              "answers": ["stop"], "dataset": "vizwiz"}),
    "ai2_diagram": three(lambda i: {"image": f"{i}.png", "question": "Which?", "options": ["A", "B"], "answer": i % 2}),
    "science_qa_img": three(lambda i: {"image": embedded(), "question": f"Which {i}?", "choices": ["x", "y"],
                                       "answer": i % 2, "hint": "Look." if i else "", "lecture": "", "solution": ""}),
    "tabwmp_da": three(lambda i: {"key": str(i), "question": "How much?", "choices": None, "answer": "1,043"}),
    "dv_qa": three(lambda i: {"image": "bar_train_1.png", "question": f"What {i}?", "answer": "4", "question_id": i}),
    "figure_qa": three(lambda i: {"image_index": 0, "question_string": f"Is {i}?", "answer": i % 2, "question_id": i}),
    "plot_qa": three(lambda i: {"image_index": 0, "question_string": f"What {i}?", "answer": 4.5, "type": "bar"}),
    "gqa": three(lambda i: {"key": str(i), "imageId": "77", "question": f"Is {i}?", "answer": "yes"}),
    "mantis_instruct": three(lambda i: {
        "example_id": str(i), "subset": "nlvr2", "images": [f"mantis/nlvr2/{i}{n}.jpg" for n in "ab"],
        "mc_question": ["Is it so?", "Which?"], "oe_question": ["So?", "Which?"], "direct_answer": ["Yes", "both"],
        "choices": [["Yes", "No"], ["left", "right", "both"]], "correct_choice_idx": [0, 2]}),
    "vixmo3": three(lambda i: {
        "video_id": f"v{i}", "video_start": 0.0, "video_end": 20.0, "annotation_score": 3.5, "video_caption": "Short.",
        "merged_caption": "Merged.", "video_frame_merged_caption": "Long and wide."}),
    "molmo2_human_qa": three(lambda i: {"video_id": f"v{i // 2}", "question": f"What {i}?", "answer": "A cat."}),
    "molmo2_syn": three(caption_qa),
    "vixmo_points": three(video_point),
    "academic_points": three(lambda i: {
        "subset": "x", "video_name": f"v{i}", "video_duration": 20.0, "category": "cup", "count": 1,
        "timestamps": [2.0], "points": [[{"x": 10.0, "y": 10.0}]], "clip_start_time": 0.0, "clip_end_time": 20.0}),
    "tgif": three(lambda i: {"gif_name": f"tumblr_{i}", "question": "What?", "a1": "a", "a2": "b", "a3": "c", "a4": "d",
                             "a5": "e", "answer": str(i), "vid_id": f"ID{i}", "key": str(i)}),
    "tvqa_with_sub": three(lambda i: {"qid": i, "q": "Who?", "answer_idx": i, "ts": "6.01-14.2", "vid_name": f"v{i}",
                                      "show_name": "x"} | {k: v for k, v in choices(i).items() if k != "answer"}),
    "llava_video": three(lambda i: {"id": str(i), "conversations": talk("human", "gpt", "human", "gpt"),
                                    "data_source": "0_30_s_nextqa", "video": f"NextQA/v{i}.mp4"}),
    "perception_test": three(lambda i: {"key": f"video_{i}", "metadata": {"split": "train"}, "mc_question": [
        {"id": 0, "question": "What?", "options": ["x", "y", "z"], "answer_id": 1}]}),
    "nextqa_mc": three(lambda i: {"video": str(i), "frame_count": 9, "width": 1, "height": 1, "question": "why?",
                                  "qid": i, "type": "CW"} | choices(i)),
    "intent_qa": three(lambda i: {"video_id": str(i), "question": "why?", "qid": i, "type": "CW"} | choices(i)),
    "how2qa": three(lambda i: {"video": f"v{i}", "span": "[3.5:12]", "n0": "a", "n1": "b", "n2": "c",
                               "question": "What?", "answer": "right"}),
    "sutd_trafficqa": three(lambda i: {"record_id": i, "vid_id": i, "vid_filename": f"{i}.mp4", "perspective": 0,
                                       "q_body": "What?", "q_type": "B", "option0": "a", "option1": "b", "option2": "",
                                       "option3": "", "answer": 1}),
    "social_iq2": three(lambda i: {"qid": str(i), "q": "How?", "vid_name": f"v{i}", "answer_idx": 2, "ts": "0.00-60.00"}
                        | choices(i)),
    "cinepile": three(lambda i: {"video_id": f"v{i}", "movie_name": "x", "subtitles": "<subtitle> Hello.", "examples": [
        {"question": "Who?", "choices": ["x", "y"], "answer_key_position": 1}]}),
    "clevrer": three(lambda i: {"scene_index": i, "video_filename": f"video_{i}.mp4", "questions": [
        {"question_id": 0, "question": "What color?", "question_type": "descriptive", "answer": "red"},
        {"question_id": 1, "question": "Which happens?", "question_type": "predictive", "choices": [
            {"choice_id": 0, "choice": "A hits B", "answer": "correct"},
            {"choice_id": 1, "choice": "B hits A", "answer": "wrong"}]}]}),
    "funqa": three(lambda i: {"instruction": "Why funny?", "visual_input": f"{i}.mp4", "output": "He fell.",
                              "task": "H2", "ID": str(i)}),
    "star": three(lambda i: {"question_id": str(i), "question": "What?", "video_id": f"v{i}", "start": 1.0, "end": 9.5,
                             "answer": "The book.", "choices": [{"choice_id": 0, "choice": "The cup."},
                                                                {"choice_id": 1, "choice": "The book."}]}),
    "video_localized_narratives_caption": three(lambda i: {
        "id": str(i), "video": f"oops/{i}.mp4", "captions": ["It runs.", "It hides."], "actor_names": ["Dog", "Cat"]}),
    "video_localized_narratives": three(lambda i: {"video_name": f"v{i}", "qa_pairs": [
        {"question_id": f"q{i}", "raw_question": "What is it?", "raw_answer": "A cat."}]}),
    "road_text_vqa": three(lambda i: {"questionId": i, "question": "What?", "answer": ["stop"], "video": f"v{i}.mp4"}),
    "countix_oe": three(lambda i: {"video_path": f"train/x/v{i}.mp4", "class": "push up", "count": 4}),
    "camerabench_qa": three(lambda i: {"video_path": f"v{i}.mp4", "mc_qa_list": [
        {"Question": "Which way?", "Answer": "Left.", "NegativeAnswers": ["Right.", "Up."]}]}),
    "paxion": three(lambda i: {"rel_vid_path": f"{i}.webm", "label": "Opening a book",
                               "label_action_antonym_clip_text": "Closing a book"}),
    "news_video_qa": three(lambda i: {"uni_clipped_id": f"389x{i}", **QA}),
    "sportsqa_oe": three(lambda i: {"video": f"v{i}", **QA, "type": "x"}),
    "moments_in_time": three(lambda i: {"video_path": f"running/{i}.mp4", "label": "running_fast"}),
    "kinetics": three(lambda i: {"label": "riding a bike", "youtube_id": f"y{i}", "time_start": "1", "time_end": "11"}),
    "activitynet_qa": three(lambda i: {"video_name": f"v{i}", **QA, "question_id": str(i)}),
    "videochatgpt": three(lambda i: {"video_name": f"v{i}", **QA}),
    "charades_sta": three(lambda i: {"line": f"V{i} 0.0 6.9##a person is putting a book on a shelf."}),
    "coin_all_qa": three(lambda i: {"key": f"v{i}", "class": "Bake", "subset": "training", "annotation": [
        {"id": "1", "label": "stir the mix", "segment": [1.0, 9.0]}]}),
    "youcook2": three(lambda i: {"key": f"v{i}", "duration": 99.0, "subset": "training", "annotations": [
        {"id": 0, "sentence": "stir the mix", "segment": [1, 9]}]}),
    "activitynet_all": three(lambda i: {"key": f"v{i}", "duration": 99.0, "subset": "training", "annotations": [
        {"label": "Playing harp", "segment": [0.0, 4.5]}]}),
    "ego4d_all": three(lambda i: {"clip": f"u{i}_1.000_5.000_custom_clip.mp4", "corrupt": i == 2, "message_list": [
        {"question": "Label the clip.", "answer": "walk", "style": "ego4d_mq_label_clip"}]}),
    "epic_kitchens": three(lambda i: {"narration_id": f"P01_{i}", "video_id": f"P01_{i}", "narration": "open door",
                                      "start_timestamp": "00:00:00.14", "stop_timestamp": "00:00:03.37"}),
    "qv_highlights": three(lambda i: {"qid": i, "query": "A dog runs", "duration": 150, "vid": f"v{i}_60.0_210.0",
                                      "relevant_windows": [[2, 10]], "saliency_scores": [[1, 2, 3]]}),
    "molmo2_video_point_eval": three(lambda i: {
        "video_id": f"v{i}", "video_source": "youtube", "video_duration": 20.0, "label": "Cup", "count": 1,
        "two_fps_timestamps": [2.5], "points": [{"x": 30.0, "y": 10.0}],
        "masks": [[{"frame_id": 5, "rle": RUNS}, {"frame_id": 6, "rle": RUNS}]]}),
    "molmo2_video_count_eval": three(lambda i: {
        "video_id": f"v{i}", "video_source": "youtube", "video_duration": 40.0, "category": "object", "label": "cup",
        "count": i, "question": "How many cups are shown?", "clip_start": 10.0, "clip_end": 30.0}),
    "molmo2_video_track_eval": three(lambda i: {
        "id": f"t{i}", "video": f"v{i}", "clip": f"c{i}", "video_dataset": "sav", "exp": "the red car", "fps": 2,
        "w": 60, "h": 40, "start_frame": 0, "end_frame": 3, "mask_id": ["0"],
        "points": [{"object_id": "0", "points": [[30.0, 10.0], [31.0, 10.0], [], [33.0, 10.0]]}],
        "masks": [{"object_id": "0", "masks": [RUNS, RUNS, None, RUNS]}]}),
    "molmo2_cap_eval": three(lambda i: {
        "video_id": f"v{i}", "source": "vimeo", "video_start": None, "video_end": None, "duration": 9.0,
        "aggregated_caption": "A dog runs. It rains.", "atomic_statements": ["A dog runs", "It rains"],
        "statement_categories": ["action", "scene"]}),
    "countbench_qa": three(lambda i: {"image": embedded(), "text": "cups", "question": "How many cups?", "number": i}),
    "real_world_qa": three(lambda i: {"image": embedded(), "question": "Which?\nA. left\nB. right", "answer": "B"}),
    "mmmu": three(lambda i: {
        "id": str(i), "question": "What does <image 1> show?", "options": "['a <image 2>', 'b']" if i else "[]",
        "image_1": embedded(), "image_2": embedded(), "image_3": None, "answer": "B", "question_type": "x"}),
    "muir_bench": three(lambda i: {"idx": i, "task": "Counting", "image_list": [embedded(), embedded()],
                                   "question": "Is <image> like <image>?", "options": ["Yes", "No"], "answer": "B"}),
    "blink": three(lambda i: {"idx": str(i), "image_1": embedded(), "image_2": embedded(), "image_3": None,
                              "question": "Which?", "choices": ["first", "second"], "answer": "(A)", "prompt": "x"}),
    "mmiu": three(lambda i: {
        "task": "jigsaw", "visual_input_component": "image", "source": "x", "options": "A: first\nB: second\nC: both",
        "question": "Which piece fits?", "context": "Choose.", "output": "B",
        "input_image_path": [f"./2D-spatial/jigsaw/{i}_{n}.jpg" for n in range(3)]}),
    "math_vista": three(lambda i: {
        "pid": str(i), "question": ("How many?", "What fraction?", "Which one?")[i], "image": f"images/{i}.jpg",
        "decoded_image": embedded(), "choices": (None, None, ["3/11", "8/11"])[i], "unit": None,
        "precision": (None, 1.0, None)[i], "answer": ("14", "0.6", "8/11")[i],
        "question_type": ("free_form", "free_form", "multi_choice")[i], "answer_type": ("integer", "float", "text")[i],
        "query": "Hint: ...", "metadata": {"category": "math-targeted-vqa", "task": "geometry problem solving"}}),
    "point_bench": three(lambda i: {
        "image_filename": f"{i}.jpg", "mask_filename": f"{i}_mask.png", "user_input": "Point to the cups.",
        "category": ("spatial", "counting", "steerable")[i], "count": (None, 3, None)[i]}),
    **dict.fromkeys(("mevis_eval", "ref_davis17_eval"), three(lambda i: track(i) | {
        "qid": str(i), "anno_id": ["70", "71"], "obj_id": ["1", "2"]})),
    **dict.fromkeys(("ref_yt_vos_eval", "reasonvos_eval"), three(lambda i: track(i) | {
        "qid": str(i), "anno_id": ["source_v_1"], "obj_id": ["1"], "mask_id": ["0"], "frame_trajectories": [
            {"frame": f * 3, "time": f * 0.5, "points": [{"id": 0, "point": [64.0, 36.0], "occluded": False}]}
            for f in range(3)]})),
    "ai2d_test": three(lambda i: {"image": embedded(), "question": "Which?", "options": ["x", "y"], "answer": "1"}),
    "coco_2014_vqa_test": three(lambda i: {
        "image": embedded(), "question": "What?", "multiple_choice_answer": "cat",
        "answers": [{"answer": word, "answer_id": n} for n, word in enumerate(["cat", "cat", "dog"])]}),
    "mvbench": three(lambda i: {"video": f"v{i}.mp4", "question": "What?", "candidates": ["x", "y"], "answer": "y"}),
    "tomato": three(lambda i: {"key": f"v{i}", "question": "What?", "options": ["x", "y"], "answer": 1,
                               "demonstration_type": "human"}),
    "motionbench": three(lambda i: {"video_path": f"v{i}.mp4", "qa": [
        {"uid": str(i), "start": 0, "end": 3, "question": "Which?\nA. left\nB. right", "answer": "B"}]}),
    "motionbench_train": three(lambda i: {"video_path": f"v{i}.mp4", "motion_caption": "A hand waves."}),
    "temp_compass": three(lambda i: {"video_id": f"v{i}", "question": "Which?\nA. left\nB. right", "answer": "A. left",
                                     "dim": "order"}),
    "perception_test_val": three(lambda i: {"video_name": f"v{i}", "question": "What?", "options": ["x", "y", "z"],
                                            "answer_id": "1"}),
    "ego_schema": three(lambda i: {"video_idx": f"v{i}", "question_idx": i, "question": "What?",
                                   "option": ["A. x", "B. y"], "answer": "1"}),
    "nextqa_mc_test": three(lambda i: {"video": str(i), "question": "why", "qid": i, "answer": i,
                                       **{k: v for k, v in choices(i).items() if k != "answer"}}),
    "video_mme": three(lambda i: {"video_id": f"{i}", "videoID": f"v{i}", "duration": "short", "question": "What?",
                                  "options": ["A. x.", "B. y."], "answer": "B", "question_id": str(i)}),
    "long_video_bench": three(lambda i: {"video_path": f"v{i}.mp4", "question": "What?", "candidates": ["x", "y"],
                                         "correct_choice": 1, "subtitle_path": "s.json",
                                         "starting_timestamp_for_subtitles": 20.0, "duration": 9.0}),
    "lvbench": three(lambda i: {"key": f"v{i}", "type": "cartoon", "video_info": {}, "qa": [
        {"uid": str(i), "question": "What?\n(A) x\n(B) y", "answer": "B", "time_reference": "00:15-00:19"}]}),
    "mlvu_mc": three(lambda i: {"video": f"v{i}.mp4", "question": "What?", "candidates": ["x", "y"], "answer": "y"}),
    "video_eval_pro_mc": three(lambda i: {"video": f"v{i}.mp4", "question": "What?", "options": ["A. x", "B. y"],
                                          "answer": "A", "answer_text": "x"}),
}  # fmt: skip


def rows(name: str) -> list[Row]:
    """Rows of a data set: by its name, by the longest start of it, by its kind."""
    starts = [start for start in ROWS if name.startswith(start)]
    if starts:
        return ROWS[max(starts, key=len)]
    if TABLE[name].options.get("task"):
        return three(track)
    raise AssertionError(f"{name} has no rows here: add three, as they are published")

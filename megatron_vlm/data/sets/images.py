"""The table: text, and images with captions, questions and places. See entry.py for how to add a data set.

Hub ids and columns are those of the releases as the design's reference knows them; `unverified` says what is not.
"""

from __future__ import annotations

from megatron_vlm.data.sets.captions import captions
from megatron_vlm.data.sets.conversations import chat, fixed_answers, tagged, tulu
from megatron_vlm.data.sets.entry import Entry
from megatron_vlm.data.sets.places import image_points, multi_image_points, question_points
from megatron_vlm.data.sets.questions import labels, listed_choices, question_pairs, questions

TRAIN_VALIDATION = {"train": "train", "validation": "validation"}
TRAIN_VAL = {"train": "train", "validation": "val"}
COCO = "images as the rows name them, images/coco/train2014/...: from https://cocodataset.org"
ROBUST_READING = "annotations and images from https://rrc.cvc.uab.es (registration)"

#: Of sets whose questions and images were seen in a reader that hands the answers on unread.
ANSWERS = "name of the answers: answer and answers are read"
_TULU = {"messages": "messages", "first_message_tokens": "first_message_qwen3_tokens"}


def _points(method: str) -> Entry:
    """PixMo-Points, the part that was collected by `method`, without the images of its evaluation set."""
    return Entry(image_points, hub="allenai/pixmo-points", files=("data/{split}-*.parquet", "{split}-*.parquet"),
                 where={"collection_method": method}, without="pixmo_points_eval", verified="reader")  # fmt: skip


def _cosyn(kind: str, style: str, *, explained: bool = True) -> Entry:
    return Entry(question_pairs, hub="allenai/CoSyn-400K", config=kind, splits=TRAIN_VALIDATION, one_tree=False,
                 verified="reader", options={"style": style, "explained": explained})  # fmt: skip


def _cosyn_documents(kind: str) -> Entry:
    """Several images; rows with more than five are left out."""
    return Entry(question_pairs, hub="allenai/Molmo2-SynMultiImageQA", config=kind, one_tree=False, verified="reader",
                 options={"style": f"cosyn_multidoc_{kind}_exp", "explained": True, "max_images": 5})  # fmt: skip


def _mantis(part: str) -> Entry:
    """Images are named by path: those of TIGER-Lab/Mantis-Instruct."""
    return Entry(listed_choices, hub=f"allenai/molmo2-mantis-instruct-{part}", one_tree=False,
                 files=("data/{split}-*.parquet", "{split}-*.parquet"), media="molmo",
                 columns={"questions": "mc_question", "options": "choices", "answer_indices": "correct_choice_idx"},
                 options={"style": "mantis_instruct_mc", "min_images": 2, "max_images": 5},
                 by_hand="archives of TIGER-Lab/Mantis-Instruct, unpacked to mantis-instruct/{part}/train_images",
                 verified="reader")  # fmt: skip


def _by_image(hub: str, style: str, by_hand: str, within: str = "message_list", validation: str = "validation",
              choice_style: str = "", unverified: str = "", **columns: str) -> Entry:  # fmt: skip
    """A row for each image, its questions in one column; a configuration for each split."""
    return Entry(questions, hub=hub, files=("{split}/train-*.parquet",), explode=within, media="molmo",
                 splits={"train": "train", "validation": validation} if validation else {"train": "train"},
                 columns=columns, options={"style": style, "choice_style": choice_style}, by_hand=by_hand,
                 verified="reader", unverified=unverified)  # fmt: skip


CAPTIONS_AND_TALK = {
    "pixmo_cap": Entry(captions, hub="allenai/pixmo-cap", verified="reader"),
    "pixmo_cap_with_transcripts": Entry(
        captions, hub="allenai/pixmo-cap", options={"transcripts": True}, verified="reader"
    ),
    "pixmo_ask_model_anything": Entry(
        questions,
        hub="allenai/pixmo-ask-model-anything",
        options={"style": "user_qa", "unpointed": True},
        verified="reader",
    ),
    "pixmo_cap_qa_as_user_qa": Entry(
        tagged, hub="allenai/pixmo-cap-qa", options={"unpointed": True}, verified="reader"
    ),
    "pixmo_multi_image_qa_multi_only_max5": Entry(  # Molmo2-MultiImageQA
        question_pairs,
        hub="allenai/Molmo2-MultiImageQA",
        splits=TRAIN_VALIDATION,
        options={"style": "correction_qa", "min_images": 2, "max_images": 5},
        verified="reader",
    ),
    "tulu4": Entry(
        tulu,
        hub="allenai/molmo2-tulu4-classified",
        columns=_TULU,
        one_tree=False,
        options={"max_first_tokens": 4096},
        verified="reader",
    ),
    "tulu4_max_2304": Entry(
        tulu,
        hub="allenai/molmo2-tulu4-classified",
        columns=_TULU,
        one_tree=False,
        options={"max_first_tokens": 2304},
        verified="reader",
    ),
    # The text of the educational recipe; its rows are not classified, so nothing is left out.
    "tulu3": Entry(
        chat,
        hub="allenai/tulu-3-sft-mixture",
        one_tree=False,
        options={"style": "text_sft", "with_media": False},
        verified="card",
    ),
    "molmo2_hardcodes": Entry(fixed_answers, hub="allenai/molmo2-hardcodes", one_tree=False, verified="reader"),
    # For evaluation only, as in Molmo2: no released mixture trains on clocks.
    "pixmo_clocks": Entry(
        labels,
        hub="allenai/pixmo-clocks",
        files=("data/{split}-*.parquet",),
        splits={"test": "validation"},
        columns={"label": "text"},
        options={"style": "user_qa", "question": "What time does the watch show?", "path": "{example_id}.png"},
        evaluation_only=True,
        by_hand="the faces, drawn from watchface_id and the time by facer.io: the repository has no images",
        verified="card",
    ),
}

PLACES = {
    "pixmo_points_eval": Entry(
        image_points,
        hub="allenai/pixmo-points-eval",
        splits={"test": "test"},
        options={"styles": ("pointing",)},
        evaluation_only=True,
        verified="reader",
    ),
    "pixmo_points_train": _points("pointing"),
    "pixmo_points_high_freq_train": _points("counting"),
    "pixmo_count_train": Entry(
        image_points,
        hub="allenai/pixmo-count",
        splits={"train": "train", "validation": "validation", "test": "test"},
        options={"in_pixels": True},
        verified="reader",
    ),
    "cosyn_point": Entry(
        question_points, hub="allenai/CoSyn-point", splits=TRAIN_VALIDATION, one_tree=False, verified="reader"
    ),
    "pixmo_multi_points": Entry(  # Molmo2-MultiImagePoint
        multi_image_points,
        hub="allenai/Molmo2-MultiImagePoint",
        verified="reader",
        unverified="Molmo2 reads a copy of it, molmo2-pixmo-multi-points, whose labels and points go by image",
    ),
}

ACADEMIC = {
    "coco_2014_vqa_multi": _by_image("allenai/molmo2-vqa2-2014", "vqa2", COCO, unverified=ANSWERS),
    "okvqa": _by_image("allenai/molmo2-okvqa", "okvqa", COCO, within="qas", validation="val"),
    "a_okvqa_mc": _by_image(
        "allenai/molmo2-a-ok-vqa", "a_okvqa_mc", COCO, validation="val", options="choices", answer_index="answer_idx"
    ),
    "a_okvqa_da": _by_image(
        "allenai/molmo2-a-ok-vqa", "a_okvqa_da", COCO, validation="val", answer="direct_answers", options="-"
    ),
    "text_vqa": _by_image(
        "allenai/molmo2-text-vqa",
        "text_vqa",
        "images as the rows name them, text_vqa/train_images/...: from https://textvqa.org/dataset",
        unverified=f"{ANSWERS}, and whether it stands in the row or in message_list: both are read",
    ),
    "tally_qa": _by_image(
        "allenai/molmo2-tally-qa",
        "tally_qa",
        f"{COCO}; Visual Genome's in images/vg",
        validation="",
        unverified=ANSWERS,
    ),
    # 7,398 questions by people (0), 20,901 by a program (1): weighted so that either half of them counts as much.
    "chart_qa_weighted": Entry(
        questions,
        hub="HuggingFaceM4/ChartQA",
        splits=TRAIN_VAL,
        columns={"question": "query", "answer": "label", "kind": "human_or_machine"},
        options={"style": "chart_qa", "weights": {0: 2 * 20_901 / 28_299, 1: 2 * 7_398 / 28_299}},
        verified="reader, card",
    ),
    "doc_qa": Entry(
        questions,
        files=("{split}_v1.0_withQT.json", "{split}_v1.0.json"),
        within="data",
        splits=TRAIN_VAL,
        columns={"answer": "answers", "image_path": "image"},
        options={"style": "doc_qa"},
        by_hand=f"DocVQA task 1: {ROBUST_READING}",
        verified="reader",
    ),
    "info_qa": Entry(
        questions,
        files=("infographicsVQA_{split}_v1.0*.json",),
        within="data",
        splits=TRAIN_VAL,
        columns={"answer": "answers", "image_path": "image_local_name", "image_url": "-"},
        options={"style": "info_qa"},
        by_hand=f"InfographicVQA: {ROBUST_READING}",
        verified="reader",
    ),
    "st_qa": Entry(
        questions,
        files=("{split}_task_3.json",),
        within="data",
        columns={"answer": "answers", "image_path": "file_path"},
        options={"style": "st_qa"},
        by_hand=f"Scene Text VQA task 3: {ROBUST_READING}",
        verified="reader",
    ),
    "ai2_diagram_v2_mix_transparent": Entry(
        questions,
        files=("{split}.jsonl",),
        options={"style": "ai2_diagram"},
        by_hand="AI2D from https://registry.opendata.aws/allenai-diagrams, one line a question: image, question, "
        "options, answer; upstream draws the letters on half of the images",
        unverified="the lines' form is ours",
    ),
    "science_qa_img": Entry(
        questions,
        hub="derek-thomas/ScienceQA",
        splits=TRAIN_VALIDATION,
        columns={"options": "choices"},
        options={"style": "science_qa", "hint": "hint"},
        verified="reader",
    ),
    "tabwmp_da": Entry(
        questions,
        files=("problems_{split}.json",),
        options={"style": "tabwmp_da", "path": "tables/{key}.png"},
        by_hand="TabMWP from https://github.com/lupantech/PromptPG",
        verified="program",
    ),
    "dv_qa": Entry(
        questions,
        files=("{split}_qa.json",),
        columns={"image_path": "image", "image": "-"},
        options={"style": "dv_qa"},
        by_hand="DVQA from https://github.com/kushalkafle/DVQA_dataset",
        verified="program",
    ),
    "figure_qa": Entry(
        questions,
        files=("{split}1/qa_pairs.json",),
        within="qa_pairs",
        columns={"question": "question_string"},
        options={"style": "figure_qa", "answers": {0: "No", 1: "Yes"}, "path": "train1/png/{image_index}.png"},
        by_hand="FigureQA from https://www.microsoft.com/en-us/research/project/figureqa-dataset",
    ),
    "plot_qa": Entry(
        questions,
        files=("{split}/qa_pairs_V2.json", "{split}/qa_pairs_V1.json"),
        within="qa_pairs",
        columns={"question": "question_string"},
        options={"style": "plot_qa", "path": "train/png/{image_index}.png"},
        by_hand="PlotQA from https://github.com/NiteshMethani/PlotQA",
    ),
    "gqa": Entry(  # educational recipe only
        questions,
        files=("{split}_balanced_questions.json",),
        splits=TRAIN_VAL,
        options={"style": "gqa", "path": "images/{imageId}.jpg"},
        by_hand="GQA from https://cs.stanford.edu/people/dorarad/gqa/download.html",
        verified="program",
    ),
    "mantis_instruct_llava_665k_multi_multi_only": _mantis("llava_665k_multi"),
    "mantis_instruct_nlvr2_multi_only": _mantis("nlvr2"),
    "mantis_instruct_spot-the-diff_multi_only": _mantis("spot-the-diff"),
}

SYNTHETIC = {
    **{f"cosyn_{kind}_exp": _cosyn(kind, f"cosyn_{kind}_exp")
       for kind in ("chart", "chemical", "diagram", "math", "music", "table")},
    "cosyn_document": _cosyn("document", "cosyn_document", explained=False),
    **{f"cosyn_multidoc_{kind}_exp": _cosyn_documents(kind)
       for kind in ("chart", "chemical", "diagram", "doc", "music", "table")},
}  # fmt: skip

IMAGES: dict[str, Entry] = {**CAPTIONS_AND_TALK, **PLACES, **ACADEMIC, **SYNTHETIC}

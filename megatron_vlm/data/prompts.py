"""What the user is made to say: style prefixes, length hints and paraphrases.

`style_and_length` (pre-training): `long_caption 83:`, `pointing: cups`. The number hints at the answer's length.
`style` (fine-tuning): no prefix where the request is in plain words, else `vqa2: What colour ...?`.
"""

from __future__ import annotations

from random import Random

from megatron_vlm.config.rules import CHOICES
from megatron_vlm.data.example import Points, Tracks, Turn

#: Styles whose answers are short or made of places whatever their form: no length hint. So are all answers of places.
POINTING_STYLES = ("pointing", "point_count", "cosyn_point")
#: Styles that `style` leaves without a prefix: asked as people ask.
PLAIN_STYLES = frozenset(
    (
        "point_count pointing cosyn_point user_qa long_caption short_caption correction_qa text_sft "
        "video_long_caption video_short_caption video_point_track_per_frame video_point_track_start_end "
        "video_single_point_track_start_end video_transcript video_clip_caption_start_end "
        "video_clip_caption_start_end_in_seconds video_clip_transcript_start_end "
        "video_clip_transcript_start_end_in_seconds video_frame_caption_timestamp "
        "video_frame_caption_timestamp_in_seconds video_point video_point_count video_count video_count_point "
        "multi_image_pointing multi_image_counting multi_image_point_then_count multi_image_count_then_point "
        "video_multiple_choice video_multiple_choice_count_without_pointing video_multiple_choice_multiple_correct "
        "video_multiple_choice_w_subtitle a_okvqa_mc ai2_diagram ai2_diagram_no_letter science_qa "
        "eval_multiple_choice multi_image_mc multi_image_mc_exp mantis_instruct_mc eval_multi_image_mc"
    ).split()
)
#: Share of pre-training prompts with a length hint, characters that one unit of it stands for, and its noise.
HINT_SHARE = 0.9
HINT_CHARACTERS = 15
HINT_NOISE = 25.0
#: The hint when an answer is wanted and none is known.
INFERENCE_HINT = 65

#: Requests in plain words, for samples that store none.
TEMPLATES: dict[str, tuple[str, ...]] = {
    "long_caption": (
        "Describe this image in detail.",
        "Write a long description of the image.",
        "What can be seen here? Leave nothing out.",
        "Give a thorough account of this picture.",
        "Tell me everything that this image shows.",
        "Please write a detailed caption.",
    ),
    "short_caption": (
        "Describe this image in one sentence.",
        "Write a short caption.",
        "What is this a picture of, in a few words?",
        "Give a brief description of the image.",
    ),
    "transcript": ("Talk me through this image.", "Describe the image as if you were speaking."),
    "pointing": (
        "Point to the {label}.",
        "Point at {label}.",
        "Show me where the {label} are.",
        "Where are the {label}?",
        "Find all {label} in the image.",
        "Mark every one of the {label}.",
        "Locate the {label}.",
    ),
    "point_count": (
        "How many {label} are there?",
        "Count the {label}.",
        "How many {label} can you see in this image?",
        "Tell me the number of {label}.",
        "What is the number of {label} in the picture?",
    ),
}
TEMPLATES["cosyn_point"] = TEMPLATES["pointing"]


def _of_video(template: str) -> str:
    for word in ("image", "picture", "photo"):
        template = template.replace(word, "video")
    return template


for _video_style, _image_style in (
    ("video_long_caption", "long_caption"),
    ("video_short_caption", "short_caption"),
    ("video_transcript", "transcript"),
    ("video_point", "pointing"),
    ("video_point_count", "point_count"),
    ("video_count", "point_count"),
    ("video_count_point", "point_count"),
):
    TEMPLATES[_video_style] = tuple(map(_of_video, TEMPLATES[_image_style]))
TEMPLATES["video_point_track_per_frame"] = (
    "Track the {label}.",
    "Follow {label} through the video.",
    "Where are the {label} in each frame?",
    "Point to the {label} in every frame.",
    "Track every one of the {label} over the whole video.",
)
TEMPLATES["video_point_track_start_end"] = (
    "Point to the {label} where they first appear and where they are last seen.",
    "Where do the {label} begin and end?",
    "Track the {label}: the first and the last place of each.",
)
#: What a request for tracks in every frame says about the frames meant. Videos annotated twice a second, the usual
#: rate, are asked without it half of the time.
RATES = (" Use {rate} FPS.", " Answer at {rate} frames per second.", " Give the places at {rate} FPS.")
USUAL_RATE, USUAL_SHARE = 2, 0.5


def user_text(
    format: str, style: str, turn: Turn, answer: str | None, *, first: bool, rng: Random, rate: int = 0
) -> str:
    """The user's words in one turn.

    format: data.prompts.
    answer: the text of the answer, for the length hint; None = not known (generation): the usual hint.
    first:  the conversation begins here; only then there is a prefix.
    rate:   times a second at which the sample's tracks were annotated; 0 = has none.
    """
    if format == "style":
        text = _in_words(style, turn, rng, rate)
        prefix = f"{style}:" if first and style not in PLAIN_STYLES else ""
    elif format == "style_and_length":
        text = turn.prompt or (turn.answer.label if isinstance(turn.answer, Points | Tracks) else "")
        prefix = _hinted(style, turn, answer, rng) if first else ""
    else:
        known = ", ".join(CHOICES["data.prompts"])
        raise ValueError(f"data.prompts={format!r} does not exist; choose one of {known}.")
    return " ".join(part for part in (prefix, text) if part)


def _in_words(style: str, turn: Turn, rng: Random, rate: int) -> str:
    """The stored question; where only a label or nothing is stored, a paraphrase of the request."""
    label = turn.answer.label if isinstance(turn.answer, Points | Tracks) else ""
    if style in TEMPLATES and turn.prompt in ("", label):
        text = rng.choice(TEMPLATES[style]).format(label=label)
        if rate and style.endswith("_track_per_frame") and (rate != USUAL_RATE or rng.random() >= USUAL_SHARE):
            text += rng.choice(RATES).format(rate=rate)
        return text
    return turn.prompt


def _hinted(style: str, turn: Turn, answer: str | None, rng: Random) -> str:
    if style in POINTING_STYLES or not isinstance(turn.answer, str):
        return f"{style}:"
    if answer is None:
        return f"{style} {INFERENCE_HINT}:"
    if rng.random() >= HINT_SHARE:
        return f"{style}:"
    noise = int(rng.gauss(0.0, HINT_NOISE))
    # Molmo2 lets the noise make the hint of a short answer negative; we stop at 0.
    return f"{style} {max(0, len(answer) + noise) // HINT_CHARACTERS}:"

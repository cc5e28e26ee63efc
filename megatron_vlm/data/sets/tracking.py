"""The table: tracking. See entry.py for how to add a data set.

Annotations are published ready-made, one configuration for each task; academic videos are at 6 frames a second.
"""

from __future__ import annotations

from megatron_vlm.data.sets.entry import Entry
from megatron_vlm.data.sets.tracks import tracks

#: Sets with masks of referred objects -> the tasks that they are trained on.
REFERRED = {
    "mevis": ("track", "ground", "single_point_track"),
    "ref_yt_vos": ("track",),
    "lv_vis": ("track", "ground", "single_point_track"),
    "vicas": ("track", "ground", "single_point_track"),
    "revos": ("track", "ground", "single_point_track"),
    "burst": ("track", "ground"),
    "ref_davis17": ("track",),
    "yt_vis": ("track",),
    "moca": ("track", "ground"),
}
#: Where the folder in that repository is called otherwise than we call the set.
FOLDERS = {"tnllt": "tnnlt"}
#: Sets with boxes of one object, all in one repository; the point is the box's middle.
BOXES = (
    "webuav", "got10k", "vasttrack", "trackingnet", "burst", "lvosv1", "lvosv2", "lasot", "uwcot", "webuot", "latot",
    "tnl2k", "tnllt",
)  # fmt: skip


def _molmo2(task: str) -> Entry:
    return Entry(tracks, hub="allenai/molmo2-track-instruction", config=task, options={"task": task},
                 by_hand="videos of its 16 sources, cut and named as allenai/Molmo2-VideoTrack says",
                 media="molmo2_video_track", verified="reader")  # fmt: skip


def _referred(name: str, task: str) -> Entry:
    return Entry(tracks, hub=f"allenai/molmo2-{name.replace('_', '-')}", config=task, options={"task": task},
                 by_hand=f"{name}'s videos under its own licence, at {4 if name == 'lv_vis' else 6} frames a second",
                 media=name, verified="reader")  # fmt: skip


def _boxes(name: str) -> Entry:
    return Entry(tracks, hub="allenai/molmo2-single-object-track", config=FOLDERS.get(name, name),
                 options={"task": "single_point_track", "clamp": True}, media=name,
                 by_hand=f"{name}'s videos under its own licence, at 6 frames a second",
                 verified="reader, layout")  # fmt: skip


TRACKING: dict[str, Entry] = {
    "molmo2_video_track": _molmo2("track"),
    "molmo2_video_track_ground": _molmo2("ground"),
    "molmo2_video_single_point_track": _molmo2("single_point_track"),
    **{f"{name}_{task}": _referred(name, task) for name, tasks in REFERRED.items() for task in tasks},
    **{f"{name}_sot": _boxes(name) for name in BOXES},
}

"""Subtitles as text after the frames of a video: `subtitle`, then a line for each.

subtitle
3.5 - 6.0 and this is how it is done
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence

from megatron_vlm.data.example import Subtitle

#: A line is kept where a frame is shown this close to it, in seconds.
NEAR = 1.0


def text(lines: Sequence[Subtitle], times: Sequence[float]) -> str:
    """The lines near a shown frame, in their order; "" where there is none.

    times: moments of the shown frames, ascending.
    """
    kept = [line for line in lines if _near(line, times)]
    if not kept:
        return ""
    return "subtitle\n" + "".join(f"{line.start:.1f} - {line.end:.1f} {line.text}\n" for line in kept)


def _near(line: Subtitle, times: Sequence[float]) -> bool:
    following = bisect.bisect_left(times, line.start - NEAR)
    return following < len(times) and times[following] <= line.end + NEAR

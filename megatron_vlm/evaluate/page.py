"""One page without a network: the table of scores, then the best and the worst answers of each task with pictures."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from PIL import Image

from megatron_vlm.data import image, points
from megatron_vlm.data.media import Store
from megatron_vlm.evaluate import draw
from megatron_vlm.evaluate.report import OTHERS, Judged, Report, interval, percent

#: Longest side of a picture on the page, and of a frame of a video, in pixels.
SIDE, FRAME_SIDE = 420, 130
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title><style>
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1180px; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse } td, th { padding: .3em .8em; border-bottom: 1px solid #ddd; text-align: left }
.cards { display: flex; flex-wrap: wrap; gap: 1em } .card { width: 350px; border: 1px solid #ddd; padding: .7em }
.card.film { width: 552px } .card img { max-width: 100%; display: block }
.right { color: #157f3b } .wrong { color: #b3261e } .not { color: #8a6d00 }
dl { margin: .5em 0 0 } dt { color: #777; font-size: .85em } dd { margin: 0 0 .3em; overflow-wrap: anywhere }
pre { white-space: pre-wrap; overflow-wrap: anywhere; color: #555 }
</style></head><body>
<h1>{{ title }}</h1>
<table><tr><th>task</th><th>score</th><th>value</th><th>95 % interval</th><th>questions</th>
<th>right</th><th>wrong</th><th>not scored</th></tr>
{% for report in reports %}{% for name, score in report.scores.scores.items() %}
<tr><td>{{ report.task if loop.first }}</td><td>{{ name }}</td><td>{{ percent(score) }}</td>
<td>{{ interval(score) }}{% if interval(score) %} <small>({{ score.interval }})</small>{% endif %}</td>
{% if loop.first %}<td>{{ report.scores.questions }}</td><td>{{ report.scores.right }}</td>
<td>{{ report.scores.wrong }}</td><td>{{ report.scores.not_scored.values() | sum }}</td>{% else %}<td colspan="4"></td>
{% endif %}</tr>
{% endfor %}{% for key, heading in others.items() %}{% if key in report and report[key].main %}
{% set score = report[key].scores[report[key].main] %}
<tr><td></td><td>{{ report[key].main }}, {{ heading }}</td><td>{{ percent(score) }}</td>
<td>{{ interval(score) }}</td><td colspan="4"></td></tr>{% endif %}{% endfor %}{% endfor %}</table>
<p>In the pictures, crosses are places that the model names, rings are true ones.</p>
{% for report in reports %}<h2>{{ report.task }}</h2>
{% for reason, count in report.scores.not_scored.items() %}<p class="not">{{ count }} not scored: {{ reason }}</p>
{% endfor %}{% for heading, cards in shown[report.task].items() %}<h3>{{ heading }}</h3><div class="cards">
{% for card in cards %}<div class="card{{ " film" if card.film }}">
{% if card.picture %}<img alt="" src="{{ card.picture }}">{% endif %}
<dl><dt>{{ card.key }}</dt><dd>{{ card.prompt }}</dd><dt>said</dt><dd>{{ card.said or "nothing" }}</dd>
<dt>true</dt><dd>{{ card.wanted }}</dd><dt class="{{ card.outcome }}">{{ card.outcome }}</dt>
<dd>{{ card.scores }}</dd></dl></div>
{% endfor %}</div>{% endfor %}{% endfor %}
<h2>How</h2><pre>{{ provenance }}</pre></body></html>
"""


def page(
    title: str, reports: Sequence[Report], shown: Mapping[str, Mapping[str, Sequence[Judged]]], store: Store, how: str
) -> str:
    """HTML. shown: task -> heading (best, worst) -> answers. how: provenance as text."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    cards = {
        task: {heading: [_card(one, store) for one in answers] for heading, answers in parts.items()}
        for task, parts in shown.items()
    }
    template = environment.from_string(_PAGE)
    return template.render(
        title=title,
        reports=reports,
        shown=cards,
        others=OTHERS,
        provenance=how,
        percent=percent,
        interval=interval,
    )


def _card(one: Judged, store: Store) -> dict[str, Any]:
    parts = [f"{name}: {part:.3g} of {whole:g}" for name, (part, whole) in one.verdict.scores.items()]
    return {
        "key": one.sample.key,
        "prompt": one.prompt,
        "said": one.said,
        "wanted": one.wanted,
        "outcome": one.verdict.outcome,
        "scores": one.verdict.reason or ", ".join(parts),
        "picture": _picture(one, store),
        "film": one.sample.video is not None,
    }


def _picture(one: Judged, store: Store) -> str:
    """The sample's media with places drawn on them, as a data address; "" where there is none or it does not decode."""
    sample = one.sample
    if not sample.media:
        return ""
    answer = sample.branches[one.branch].turns[0].answer
    try:
        if sample.video is None:
            drawn = draw.beside([_image(one, store, number) for number in range(1, len(sample.media) + 1)])
        else:
            key, start = sample.video.key, sample.clip.start if sample.clip else 0.0
            film = draw.Film(
                store.media(key),
                store.timeline(key),
                one.said,
                start=start,
                seconds=sample.seconds,
                true=answer,
                side=FRAME_SIDE,
            )
            drawn = film.sheet()
    except Exception:  # a file that does not decode was named where it was asked about
        return ""
    if sample.video is None:
        drawn.thumbnail((SIDE, SIDE))
    stream = io.BytesIO()
    drawn.convert("RGB").save(stream, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"


def _image(one: Judged, store: Store, number: int) -> Image.Image:
    pixels = image.decode(store.media(one.sample.media[number - 1].key), name=one.sample.key)
    answer = one.sample.branches[one.branch].turns[0].answer
    true = [(place.x, place.y) for place in draw.true_places(answer) if place.at == number]
    return draw.marked(pixels, [*draw.rings(true), *draw.crosses(points.parse(one.said), number)])

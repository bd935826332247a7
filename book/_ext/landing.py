"""What the first page shows beside the live model, made when it is built.

The directive `learning` draws the loss of the hour in book/hour and lets the
reader choose what the model wrote at a step; `map` lists the chapters of
each part as a map to click on; the role `reading` adds up the reading times
that chapters state. All of it works without JavaScript.
"""

import csv
import html
import json
import math
import re

from docutils import nodes
from llmnb_book import ROOT, chapters
from sphinx.util.docutils import SphinxDirective

HOUR = ROOT / "book" / "hour"
LANDMARKS = {
    "uniform": "a blind guess",
    "unigrams": "counting tokens",
    "bigrams": "counting pairs",
    "trigrams": "counting triples",
}


def minutes(chapter):
    """The reading time that a chapter states at its top."""
    text = chapter.path.read_text("utf-8")
    return int(re.search(r"Reading time: (\d+) minutes", text)[1])


def long(count):
    """Minutes in words: "45 minutes", "2 h 30"."""
    hours, rest = divmod(count, 60)
    return f"{hours} h {rest:02}" if hours else f"{rest} minutes"


# The loss, and the text that improves


def across(step, last):
    """Where a step stands, from 0 to 1: early steps get more room."""
    return math.log1p(step / 100) / math.log1p(last / 100)


def down(loss, top=7.4, bottom=1.4):
    """Where a loss stands, from 0 at the top to 1."""
    return (top - loss) / (top - bottom)


def line(points, name):
    """A line through (x, y) from 0 to 1, in a picture of 100 by 100."""
    text = " ".join(f"{100 * x:.2f},{100 * y:.2f}" for x, y in points)
    return f'<polyline class="{name}" points="{text}"/>'


def printable(text):
    """A sample without the characters that no page can show."""
    return re.sub(r"[\x00-\x09\x0b-\x1f\x7f]", "\ufffd", text)


def read_log():
    """The steps of the hour, and its losses where there are some."""
    with (HOUR / "log.csv").open() as file:
        rows = [(int(x["step"]), x) for x in csv.DictReader(file)]
    return [
        [(step, float(x[name])) for step, x in rows if x[name]]
        for name in ("loss", "val_loss")
    ]


def render_learning():
    """The loss of the hour, and a text at each of some steps."""
    trained, validated = read_log()
    samples = json.loads((HOUR / "samples.json").read_text("utf-8"))["after"]
    landmarks = json.loads((HOUR / "landmarks.json").read_text("utf-8"))
    last, held = validated[-1][0], dict(validated)
    lines = [
        line([(across(s, last), down(x)) for s, x in points], name)
        for points, name in ((trained, "train"), (validated, "held"))
    ]
    marks, dots, texts, rules = [], [], [], []
    for name, words in LANDMARKS.items():
        y = 100 * down(landmarks[name])
        marks.append(
            f'<span class="learn-mark" style="top:{y:.2f}%"><span>{words}: '
            f"{landmarks[name]:.2f}<i> nats</i></span></span>"
        )
    for step, text in samples.items():
        x, loss = across(int(step), last), held[int(step)]
        place = f"left:{100 * x:.2f}%;top:{100 * down(loss):.2f}%"
        dots.append(
            f'<label for="learn-{step}" style="{place}" '
            f'title="step {int(step):,}"></label>'
        )
        on = " checked" if step == "1000" else ""
        texts.append(
            f'<label class="learn-step"><input type="radio" name="learn" '
            f'id="learn-{step}"{on}> {int(step):,}</label>'
            f'<div class="learn-text"><p>After {int(step):,} steps, '
            f"{loss:.2f} nats a token on text it has never seen:</p>"
            f"<pre>{html.escape(printable(text))}</pre></div>"
        )
        rules.append(f".learn:has(#learn-{step}:checked) [for=learn-{step}]")
    return f"""<style>{",".join(rules)}{{
  background: var(--learn-line); scale: 1.5}}</style>
<div class="learn">
<div class="learn-plot"><svg viewBox="0 0 100 100" preserveAspectRatio="none"
  role="img" aria-label="The loss falls from {validated[0][1]:.2f} to
{validated[-1][1]:.2f} nats a token in {last:,} steps">
{"".join(lines)}</svg>{"".join(marks)}
<span class="learn-lines"><b>on text it has not seen</b>in training</span>
{"".join(dots)}</div>
<fieldset><legend>What it wrote after step</legend>
<div class="learn-steps">{"".join(texts)}</div></fieldset>
</div>"""


class Learning(SphinxDirective):
    """The loss of the hour with the text beside it."""

    def run(self):
        return [nodes.raw("", render_learning(), format="html")]


# The map of the book


def render_part(inside, words, need, end):
    """One part: what it needs, what it ends with, and its chapters."""
    cells = "".join(
        f'<li><a href="../notebooks/{x.place.removesuffix(".py")}.html" '
        f'data-name="{x.label} {html.escape(x.name)}" '
        f'aria-label="{x.label} {html.escape(x.name)}">'
        f"{x.label.partition('.')[2]}</a></li>"
        for x in inside
    )
    first = inside[0].place.removesuffix(".py")
    number = inside[0].label.partition(".")[0]
    time = long(sum(map(minutes, inside)))
    return f"""<section class="map-part map-{number}">
<h3><a href="../notebooks/{first}.html"><b>{number}</b> {words}</a></h3>
<p>{end}</p>
<ol>{cells}</ol>
<p class="map-need">{len(inside)} chapters, {time}; you need {need}</p>
</section>"""


class Map(SphinxDirective):
    """Every part with its chapters. A line: [words](link) | need | end."""

    has_content = True

    def run(self):
        parts = []
        for text in self.content:
            name, need, end = (x.strip() for x in text.split("|"))
            words = name[1 : name.index("]")]
            folder = re.search(r"notebooks/(\w+)/", name)[1]
            inside = [x for x in chapters().values() if x.part == folder]
            parts.append(render_part(inside, words, need, end))
        text = f'<nav class="map" aria-label="Map">{"".join(parts)}</nav>'
        return [nodes.raw("", text, format="html")]


# Reading times


def reading(name, raw, text, lineno, inliner, options=None, content=()):
    """The role `reading`: the time that chapters and parts take together."""
    wanted = text.split()
    found = [
        minutes(x)
        for x in chapters().values()
        if x.label in wanted or x.label.partition(".")[0] in wanted
    ]
    return [nodes.Text(long(sum(found)))], []


def setup(app):
    app.add_directive("learning", Learning)
    app.add_directive("map", Map)
    app.add_role("reading", reading)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

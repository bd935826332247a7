"""Figures that move: the numbers of a cell, and the script that draws them.

A cell that calls `llmnb.book.moving.moving` has an output of the kind MIME
beside its still picture. MyST-NB does not know that kind, so the numbers are
read from the notebook here, and put into the page as an empty figure with
its JSON. `_static/move.js` brings the figure to life and hides the still,
which is left for print and for readers without JavaScript.
"""

import json
from pathlib import Path

from docutils import nodes
from folds import code_cells

from llmnb.book.moving import MIME

SHOWN = ("display_data", "execute_result")


def read_figures(path):
    """For each cell by its place: its outputs' JSON, None for others."""
    cells = json.loads(Path(path).read_text("utf-8"))["cells"]
    return [
        [
            output["data"].get(MIME)
            for output in cell.get("outputs", [])
            if output["output_type"] in SHOWN
        ]
        for cell in cells
    ]


def figure(data):
    """The place of a figure in a page."""
    text, kind = data.replace("</", "<\\/"), json.loads(data)["kind"]
    return nodes.raw(
        "",
        f'<figure class="move" data-kind="{kind}">'
        f'<script type="application/json">{text}</script></figure>',
        format="html",
        kind=kind,
    )


def place_figures(app, doctree):
    """Put each figure where the line of text that stands for it is."""
    if not app.env.docname.startswith("notebooks/"):
        return
    figures = read_figures(app.env.doc2path(app.env.docname))
    for cell in code_cells(doctree):
        bundles = [
            node
            for node in cell.findall(nodes.container)
            if node.get("nb_element") == "mime_bundle"
        ]
        found = figures[cell["cell_index"]]
        for bundle, data in zip(bundles, found, strict=True):
            if data:
                bundle.replace_self(figure(data))


def add_scripts(app, pagename, templatename, context, doctree):
    """Load the scripts and the style of the figures that a page has."""
    raw = doctree.findall(nodes.raw) if doctree is not None else ()
    kinds = dict.fromkeys(node["kind"] for node in raw if "kind" in node)
    if kinds:
        app.add_css_file("move.css")
        for name in ["move.js", *(f"move/{kind}.js" for kind in kinds)]:
            app.add_js_file(name, loading_method="defer")


def setup(app):
    app.connect("doctree-read", place_figures)
    app.connect("html-page-context", add_scripts)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

"""The cards that show what a link leads to.

Each page's equations and figures get their ids, and what their cards hold is
kept: the equation as TeX, the figure with its caption, a glossary entry, the
signature of a function with its first sentence, a chapter's summary. It all
goes into one script, `_static/previews.js`, that `_static/cards.js` loads
when the first card is asked for.
"""

import json
import re
from pathlib import Path

from docutils import nodes
from links import CAPTION, TAG, anchor
from llmnb_book import chapters
from sphinx import addnodes


def plain(node):
    """A node's text, with its formulas as TeX between \\( and \\)."""
    if isinstance(node, nodes.math):
        return f"\\({node.astext()}\\)"
    if isinstance(node, (nodes.math_block, addnodes.index, nodes.raw)):
        return ""
    if isinstance(node, nodes.Text):
        return node.astext()
    return "".join(plain(x) for x in node.children)


def tidy(node):
    return " ".join(plain(node).split())


def mark_equations(doctree):
    """Give each tagged equation its id; yield the cards."""
    for equation in doctree.findall(nodes.math_block):
        tex = equation.astext()
        for number in TAG.findall(tex):
            name = anchor("eq", number)
            equation["ids"].append(name)
            yield name, {"head": f"({number})", "tex": TAG.sub("", tex)}


def mark_figures(doctree):
    """Give each figure its id, on the block above its caption."""
    for caption in doctree.findall(nodes.paragraph):
        match = CAPTION.match(caption.astext())
        if not match:
            continue
        name = anchor("fig", match[1])
        place = caption.parent.index(caption) - 1
        block = caption.parent[place] if place >= 0 else caption
        target = block if isinstance(block, nodes.container) else caption
        target["ids"].append(name)
        images = [x["uri"] for x in block.findall(nodes.image)]
        yield name, {"text": tidy(caption), "images": images}


def terms(doctree):
    """Of each entry of the glossary its id, the term, the definition."""
    for term in doctree.findall(nodes.term):
        for name in term["ids"]:
            yield name, term, term.parent[-1]


def cards_of_terms(doctree):
    """The glossary's entries."""
    for name, term, definition in terms(doctree):
        yield name, {"head": tidy(term), "text": tidy(definition[0])}


def cards_of_names(doctree):
    """The signatures of documented names, and what they do in a line."""
    for sign in doctree.findall(addnodes.desc_signature):
        text = next(sign.parent.findall(nodes.paragraph), None)
        card = {"code": sign.astext().replace("[source]", "").strip()}
        if text is not None:
            card["text"] = re.split(r"(?<=\.) ", tidy(text))[0]
        for name in sign["ids"]:
            yield name, card


def card_of_module(doctree, docname):
    """A module's name and its docstring's first paragraph."""
    name = docname.removeprefix("book/api/")
    text = next(doctree.findall(nodes.paragraph), None)
    if name.startswith("llmnb") and text is not None:
        yield f"module-{name}", {"code": name, "text": tidy(text)}


def card_of_page(doctree, docname):
    """A chapter's name and the sentence under its title."""
    summary = next(doctree.findall(nodes.block_quote), None)
    if docname in chapters() and summary is not None:
        yield f"{docname}.html", {"page": docname, "text": tidy(summary)}


def collect(app, doctree):
    """Name a page's targets and keep what their cards show."""
    docname = app.env.docname
    cards = dict(mark_equations(doctree))
    cards |= mark_figures(doctree)
    cards |= cards_of_terms(doctree)
    cards |= cards_of_names(doctree)
    cards |= card_of_module(doctree, docname)
    cards |= card_of_page(doctree, docname)
    app.env.metadata[docname]["previews"] = cards


def picture(app, images):
    """The address of the picture, of several formats, that was built."""
    for uri in images:
        name = app.env.images.get(uri, (None, ""))[1]
        path = Path(app.builder.imagedir) / name
        if name and (Path(app.outdir) / path).exists():
            return path.as_posix()
    return None


def finish_card(app, docname, card):
    """Add the chapter's name; turn a page's images into an address."""
    title = app.env.titles[docname].astext()
    card = dict(card)
    if card.pop("page", None):
        card["head"] = title
    elif docname.startswith("notebooks/"):
        card["from"] = title
    image = picture(app, card.pop("images", []))
    return card | ({"image": image} if image else {})


def write_script(app, name, variable, value):
    """Write a value as a script, which loads from the disk as well."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    path = Path(app.outdir) / "_static" / name
    path.write_text(f"window.{variable} = {text};\n", "utf-8")


def write_previews(app, error):
    if error or app.builder.name != "html":
        return
    cards = {}
    for docname, data in sorted(app.env.metadata.items()):
        for name, card in data.get("previews", {}).items():
            cards[name] = finish_card(app, docname, card)
    write_script(app, "previews.js", "llmnbPreviews", cards)


def setup(app):
    # after llmnb_book has given equations and captions their form
    app.connect("doctree-read", collect, priority=950)
    app.connect("build-finished", write_previews)
    app.add_js_file("cards.js", loading_method="defer")
    return {"parallel_read_safe": True, "parallel_write_safe": True}

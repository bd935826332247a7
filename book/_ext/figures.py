"""Put the notebooks' figures into their page, as SVG that follows the theme.

An SVG in an `<img>` cannot see whether the page is light or dark. So the
figure stands in the page itself, and the colours that it shares with
`llmnb.book.diagram.PALETTE` become variables, which `_static/figures.css` sets
for either. One name has three colours: `text` has the most contrast with the
page, `line` less, and `fill` bears letters in white or in ink. A colour that
the palette does not know, such as a heat map's, stays what it is.

The outlines of letters stand once in a page, at its end, not in each figure.
"""

import re
from pathlib import Path
from xml.etree import ElementTree

from docutils import nodes

from llmnb.book.diagram import PALETTE

SVG = "{http://www.w3.org/2000/svg}"
HREF = "{http://www.w3.org/1999/xlink}href"
NAMES = {colour: name for name, colour in PALETTE.items()}
NAMES |= {"#000000": "ink", "#ffffff": "paper", "#808080": "grey"}
WHITE_AND_BLACK = "#ffffff", "#000000"  # letters: on boxes, on heat maps
POINT = 100 / 72  # pixels, as in a notebook: figures have 100 dots an inch
WIDE = 600  # a wider figure is not shrunk to a phone's width: it scrolls
SHIFT = re.compile(r"translate\((\S+) 0\)")


def painted(style, kind):
    """A style with the palette's colours as variables of a kind."""

    def variable(match):
        what, colour = match.groups()
        name = NAMES.get(colour)
        if name is None or (kind == "text" and colour in WHITE_AND_BLACK):
            return match[0]
        sort = "line" if what == "stroke" and kind == "fill" else kind
        return f"{what}: var(--{sort}-{name})"

    return re.sub(r"(fill|stroke): (#\w{6})", variable, style)


# matplotlib's names of groups that hold marks and arrows, not areas
MARKS = ("Quiver", "PathCollection", "line2d")


def kind_of(element, kind, before):
    """How an element is painted; kind: its parent; before: its neighbour.

    A shape after an open line is the line's arrow head. What is used many
    times is a mark on a line. A text may have a box around it.
    """
    name = element.get("id", "")
    if name.startswith("text_"):
        return "text"
    if name.startswith("patch_"):
        return "fill"
    if kind == "fill":
        head = before is not None and "fill: none" in before.get("style", "")
        mark = element.tag == f"{SVG}use" or name.startswith(MARKS)
        return "line" if head or mark else "fill"
    return kind


class Figure:
    """One SVG on its way into a page.

    name: begins all its ids, so that no two figures of a page share one.
    glyphs: the outlines of letters that the page has so far, by id.
    """

    def __init__(self, text, name, glyphs):
        self.root = ElementTree.fromstring(text)
        self.name, self.glyphs = name, glyphs
        used = re.findall(r"url\(#(\w+)\)|href=\"#([\w-]+)\"", text)
        self.used = {x or y for x, y in used}
        self.walk(self.root, "fill")

    def walk(self, parent, kind):
        """Paint and rename what is in an element; kind: "text" in a text."""
        before = None
        for child in list(parent):
            if child.tag == f"{SVG}style":  # it would hold for the whole page
                parent.remove(child)
            elif kind == "text" and child.tag == f"{SVG}defs":
                self.take_glyphs(child)
                parent.remove(child)
            else:
                own = kind_of(child, kind, before)
                self.paint(child, own)
                self.walk(child, own)
            before = child

    def take_glyphs(self, definitions):
        """Move the outlines of letters to the page's."""
        for glyph in definitions:
            known = self.glyphs.setdefault(glyph.get("id"), glyph)
            known.set("d", " ".join(known.get("d", "").split()))

    def paint(self, element, kind):
        """Give an element its colours, and ids that are its page's only."""
        if "style" in element.attrib:
            element.set("style", painted(element.get("style"), kind))
        if "d" in element.attrib:
            element.set("d", " ".join(element.get("d").split()))
        own = element.attrib.pop("id", None)
        if own in self.used:
            element.set("id", f"{self.name}-{own}")
        for key in ("clip-path", "style", "mask"):
            if key in element.attrib:
                new = f"url(#{self.name}-"
                element.set(key, element.get(key).replace("url(#", new))
        target = element.attrib.pop(HREF, None)
        if target is not None:
            self.point(element, target, kind)

    def point(self, element, target, kind):
        """Let an element that uses another find it under its new id."""
        glyph = kind == "text" and target[1:] in self.glyphs
        if target.startswith("#") and not glyph:
            target = f"#{self.name}-{target[1:]}"
        element.set("href", target)
        shift = SHIFT.fullmatch(element.get("transform", ""))
        if glyph and shift:
            del element.attrib["transform"]
            element.set("x", shift[1])

    def html(self, label):
        """The figure as a part of a page; label: what it shows, in words."""
        width = float(self.root.get("viewBox").split()[2])
        for key in ("width", "height", "version"):
            self.root.attrib.pop(key, None)
        wide = " wide" if width * POINT > WIDE else ""
        self.root.set("class", f"drawing{wide}")
        self.root.set("role", "img")
        self.root.set("aria-label", label)
        self.root.set("style", f"width: {width * POINT:.0f}px")
        return f'<div class="drawing-frame">{markup(self.root)}</div>'


def markup(element):
    """An element as text without the prefixes of namespaces."""
    text = ElementTree.tostring(element, "unicode")
    return re.sub(r"(</?)ns\d:| xmlns:ns\d=\"[^\"]*\"", r"\1", text)


def sheet(glyphs):
    """The outlines of a page's letters, in a drawing that takes no room."""
    paths = "".join(markup(x) for x in glyphs.values())
    return f'<svg class="glyphs" aria-hidden="true">{paths}</svg>'


def draw_inline(app, doctree, docname):
    """Replace a page's images that are SVG made by a notebook."""
    if app.builder.name != "html" or not docname.startswith("notebooks/"):
        return
    glyphs = {}
    for number, image in enumerate(list(doctree.findall(nodes.image))):
        path = Path(app.srcdir, image["uri"])
        if path.suffix == ".svg":
            figure = Figure(path.read_text("utf-8"), f"f{number}", glyphs)
            label = image.get("alt", "")
            image.replace_self(
                nodes.raw("", figure.html(label), format="html")
            )
    if glyphs:
        doctree += nodes.raw("", sheet(glyphs), format="html")


def setup(app):
    # after llmnb_book has given the images their captions
    app.connect("doctree-resolved", draw_inline, priority=700)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

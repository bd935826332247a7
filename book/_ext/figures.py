"""Put the notebooks' figures into their page, as SVG that follows the theme.

An SVG in an `<img>` cannot see whether the page is light or dark. So the
figure stands in the page itself, and the colours that it shares with
`llmnb.book.diagram.PALETTE` become variables, which `_static/figures.css` sets
for either. One name has three colours: `text` has the most contrast with the
page, `line` less, and `fill` bears letters in white or in ink. A colour that
the palette does not know, such as a heat map's, stays what it is.

The outlines of letters stand once in a page, at its end, not in each figure.
A file of each figure is written too, for the cards of links to it.
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
LEGIBLE = 6.7  # pixels: on a phone a figure with smaller letters scrolls
SCALE = re.compile(r"scale\((0\.\d+) -0\.\d+\)")  # letters, of 100 points
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
        width = float(self.root.get("viewBox").split()[2]) * POINT
        for key in ("width", "height", "version"):
            self.root.attrib.pop(key, None)
        least = min(560, LEGIBLE / self.letters() * width)
        sizes = f"width: {width:.0f}px; --least: {least:.0f}px"
        self.root.attrib |= {"class": "drawing", "role": "img"}
        self.root.attrib |= {"aria-label": label, "style": sizes}
        return markup(self.root)

    def letters(self):
        """The height of the smallest letters, in pixels."""
        moves = (x.get("transform", "") for x in self.root.iter())
        sizes = [100 * float(x[1]) for x in map(SCALE.search, moves) if x]
        return min(sizes, default=10) * POINT


def markup(element):
    """An element as text without the prefixes of namespaces.

    Nor with what says nothing: white between elements, a group of one.
    """
    text = ElementTree.tostring(element, "unicode")
    text = re.sub(r"(</?)ns\d:| xmlns:ns\d=\"[^\"]*\"", r"\1", text)
    text = re.sub(r">\s+<", "><", text.replace(" />", "/>"))
    return re.sub(r"<g>(<(?:path|use)\b[^<>]*/>)</g>", r"\1", text)


def sheet(glyphs):
    """The outlines of a page's letters, in a drawing that takes no room."""
    paths = "".join(markup(x) for x in glyphs.values())
    return f'<svg class="glyphs" aria-hidden="true">{paths}</svg>'


def styles():
    """The colours of figures.css, for a file: dark where its address ends so.

    A picture in an `<img>` does not see the page, but it sees the end of its
    own address, `#dark`.
    """
    text = (Path(__file__).parents[1] / "_static/figures.css").read_text()
    light, dark = re.findall(r"(?:--[\w-]+: #\w+;\s*)+", text)
    return f"svg {{ {light} }} svg:target {{ {dark} }}"


def preview(drawing, glyphs):
    """A drawing as a file of its own, which a link's card shows."""
    used = set(re.findall(r' href="#([^"]+)"', drawing))
    own = "".join(markup(x) for name, x in glyphs.items() if name in used)
    start, rest = drawing.split(">", 1)
    start = start.replace("<svg", f'<svg xmlns="{SVG[1:-1]}" id="dark"')
    return f"{start}><style>{styles()}</style><defs>{own}</defs>{rest}"


def write_preview(app, uri, drawing, glyphs):
    """Write a figure's file to where the builder puts a page's images."""
    folder = Path(app.outdir, app.builder.imagedir)
    folder.mkdir(exist_ok=True)
    file = folder / app.env.images[uri][1]
    file.write_text(preview(drawing, glyphs), "utf-8")


def draw_inline(app, doctree, docname):
    """Replace a page's images that are SVG made by matplotlib."""
    drawn = docname.startswith("notebooks/") or docname == "book/results"
    if app.builder.name != "html" or not drawn:
        return
    glyphs = {}
    for number, image in enumerate(list(doctree.findall(nodes.image))):
        path = Path(app.srcdir, image["uri"])
        if path.suffix == ".svg":
            figure = Figure(path.read_text("utf-8"), f"f{number}", glyphs)
            drawing = figure.html(image.get("alt", ""))
            write_preview(app, image["uri"], drawing, glyphs)
            frame = f'<div class="drawing-frame">{drawing}</div>'
            image.replace_self(nodes.raw("", frame, format="html"))
    if glyphs:
        doctree += nodes.raw("", sheet(glyphs), format="html")


def setup(app):
    # after llmnb_book has given the images their captions
    app.connect("doctree-resolved", draw_inline, priority=700)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

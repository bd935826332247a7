"""Links to equations, figures, chapters, names and the glossary's words.

The notebooks write "(1.6.10)", "figure 1.6.3", "chapter 1.6" and
`layernorm_backward` as plain text. Here each becomes a link, in the text and
in the comments of code, and so does a word of the glossary in the chapter that
explains it. What exists is read from the notebooks' sources, so
a reference to nothing is a warning even where only some pages are built.
cards.py shows what a link leads to.
"""

import itertools
import re

from docutils import nodes
from llmnb_book import ROOT, chapters, pages
from sphinx import addnodes
from sphinx.util import logging

log = logging.getLogger(__name__)
LABEL = r"[\dA]\.\d+"
NUMBER = LABEL + r"\.\d+"
MORE = r"(?:(?:,| and| or| to|, and)\s+{0})*"
REFERENCE = re.compile(
    rf"(?P<eq>(?:[Ee]quations?\s+)?\({NUMBER}\))"
    rf"|(?P<fig>[Ff]igures?\s+{NUMBER}{MORE.format(NUMBER)})"
    rf"|(?P<chapter>[Cc]hapters?\s+{LABEL}{MORE.format(LABEL)})(?!\.\d)"
)
TAG = re.compile(rf"\\tag\{{({NUMBER})\}}")
CAPTION = re.compile(rf"Figure ({NUMBER})\.")
# a term of the glossary, and the first chapter in its definition
TERM = re.compile(r"^(\w.*)\n(?:  .+\n)*?  .*?\[Chapter\s+([\dA]\.\d+)", re.M)
COMMENT = re.compile(r'(<span class="(?:c1|sd)">)(.*?)(?=</span>)', re.S)
# text in these stays as it is
CLOSED = (
    nodes.reference,
    nodes.literal,
    nodes.literal_block,
    nodes.math,
    nodes.math_block,
    nodes.title,
    nodes.raw,
    addnodes.pending_xref,
    addnodes.desc_signature,
    addnodes.index,
)


def anchor(kind, number):
    """The id of an equation or a figure: eq-1-6-10."""
    return f"{kind}-{number.replace('.', '-')}"


def numbered():
    """The anchors of all equations and figures in the notebooks' sources."""
    found = set()
    for chapter in chapters().values():
        text = chapter.path.read_text("utf-8")
        found |= {anchor("eq", x) for x in TAG.findall(text)}
        captions = re.findall(rf"^# \*?{CAPTION.pattern}", text, re.M)
        found |= {anchor("fig", x) for x in captions}
    return found


class Targets:
    """Where references lead, and which of them lead nowhere."""

    def __init__(self, app):
        self.app, self.known = app, numbered()

    def address(self, kind, number, docname):
        """The address of a target from a page; of none and of itself, none."""
        label = number if kind == "chapter" else number.rsplit(".", 1)[0]
        page = pages().get(label)
        there = page and (
            kind == "chapter" or anchor(kind, number) in self.known
        )
        if not there:
            what = {"eq": "equation", "fig": "figure"}.get(kind, kind)
            text = f"there is no {what} {number}"
            log.warning(text, location=docname, type="llmnb", subtype="links")
            return None
        if page not in self.app.env.found_docs:
            return None
        link = self.app.builder.get_relative_uri(docname, page)
        return link if kind == "chapter" else link + "#" + anchor(kind, number)

    def split(self, text, docname):
        """Cut a text into pairs: a piece, and the address that it gets."""
        end = 0
        for match in REFERENCE.finditer(text):
            for kind, number, start, stop in self.pieces(match):
                link = self.address(kind, number, docname)
                if link:
                    yield text[end:start], None
                    yield text[start:stop], link
                    end = stop
        yield text[end:], None

    def pieces(self, match):
        """The references in a match: "figures 1.6.2 and 1.6.3" are two.

        The word before them belongs to the first.
        """
        kind, start = match.lastgroup, match.start()
        form = LABEL if kind == "chapter" else NUMBER
        for i, number in enumerate(re.finditer(form, match[0])):
            first = start + (number.start() if i else 0)
            yield kind, number[0], first, start + number.end() + (kind == "eq")


def around(node, kinds):
    """The nearest node of some kinds that holds a node, or is it, or None."""
    while node is not None and not isinstance(node, kinds):
        node = node.parent
    return node


def own_caption(text):
    """Whether a text begins the caption of a figure: it names itself."""
    paragraph = around(text, nodes.paragraph)
    first = paragraph is not None and paragraph.next_node(nodes.Text)
    return first is text and bool(CAPTION.match(text))


def join_lines(doctree):
    """Make one text of neighbouring lines, which the parser keeps apart."""
    for element in doctree.findall(nodes.TextElement):
        joined = []
        for kind, group in itertools.groupby(element.children, type):
            if kind is nodes.Text:
                joined.append(nodes.Text("".join(group)))
            else:
                joined += group
        element[:] = joined


def link_text(doctree, docname, targets):
    """Make links of the references in a page's text."""
    join_lines(doctree)
    for text in list(doctree.findall(nodes.Text)):
        if not REFERENCE.search(text) or around(text, CLOSED):
            continue
        head = CAPTION.match(text)[0] if own_caption(text) else ""
        new = [nodes.Text(head)] if head else []
        for piece, link in targets.split(text[len(head) :], docname):
            if link:
                new += [nodes.reference(piece, piece, refuri=link)]
                new[-1]["internal"] = True
            elif piece:
                new += [nodes.Text(piece)]
        if len(new) > 1:
            text.parent.replace(text, new)


class Names:
    """The public functions, classes and modules, by full and short name."""

    def __init__(self, app):
        self.app = app
        objects = app.env.domains["py"].objects
        self.full = {k: v for k, v in objects.items() if not v.aliased}
        self.short = {}
        for name, entry in self.full.items():
            if entry.objtype in ("function", "class"):
                self.short.setdefault(name.rsplit(".", 1)[1], []).append(name)

    def find(self, code, docname):
        """The full name that a piece of code means on a page, or None."""
        match = re.fullmatch(r"([A-Za-z_][\w.]*)(\(.*\))?", code)
        if not match or match[1] == "llmnb":
            return None
        name = match[1]
        if "." in name:
            full = f"llmnb.{name.removeprefix('llmnb.')}"
            return full if full in self.full else None
        # a plain word such as `step` is rather a variable of the chapter
        if not ("_" in name or name != name.lower() or match[2] == "()"):
            return None
        found = self.short.get(name, [])
        own = [x for x in found if self.module(x) in exports(docname)]
        found = own or found
        return found[0] if len(found) == 1 else None

    def module(self, name):
        return name.rsplit(".", 1)[0]

    def address(self, name, docname):
        entry = self.full[name]
        page = self.app.builder.get_relative_uri(docname, entry.docname)
        return f"{page}#{entry.node_id}"


def exports(docname):
    """The modules that a chapter writes."""
    chapter = chapters().get(docname)
    return {f"llmnb.{x}" for x in chapter.modules} if chapter else ()


def link_names(doctree, docname, names):
    """Link the first mention of each public name in a section."""
    seen = set()
    for literal in list(doctree.findall(nodes.literal)):
        if around(literal.parent, CLOSED):
            continue
        name = names.find(literal.astext(), docname)
        first = around(literal, nodes.section), name
        if name is None or first in seen:
            continue
        seen.add(first)
        address = names.address(name, docname)
        link = nodes.reference("", refuri=address, internal=True)
        link["classes"] = ["api-name"]
        literal.replace_self(link)
        link += literal


def homes():
    """The glossary's terms by the page of the chapter that explains them."""
    text = (ROOT / "book/glossary.md").read_text("utf-8")
    found = {}
    for term, label in TERM.findall(text[text.index("```{glossary}") :]):
        found.setdefault(pages()[label], []).append(term)
    return found


def mentions(doctree, term):
    """Where a page's sections have a term: texts and their matches."""
    forms = "|".join(map(re.escape, term.split(", "))).replace(r"\ ", r"\s+")
    pattern = re.compile(rf"\b({forms})(e?s)?\b", re.I)
    for text in doctree.findall(nodes.Text):
        section = around(text, nodes.section)
        below = section and section.parent is not doctree
        match = below and not around(text, CLOSED) and pattern.search(text)
        if match:
            yield text, match


def link_terms(doctree, docname, app, terms):
    """Link the glossary's words where their chapter explains them."""
    links = doctree.findall(nodes.reference)
    linked = {x.get("refuri", "").rpartition("#")[2] for x in links}
    known = app.env.domains["std"].objects
    for term in terms:
        # a book of some chapters only has no glossary
        page, name = known.get(("term", term), ("", ""))
        found = [] if name in linked else [*mentions(doctree, term)]
        if not page or not found:
            continue
        # a word that is explained is set in italics or bold, by itself
        text, match = min(found, key=lambda x: x[0] != x[1][0])
        address = app.builder.get_relative_uri(docname, page) + f"#{name}"
        link = nodes.reference(match[0], match[0], refuri=address)
        link["internal"] = True
        ends = text[: match.start()], text[match.end() :]
        new = [nodes.Text(ends[0]), link, nodes.Text(ends[1])]
        text.parent.replace(text, [x for x in new if x.astext()])


def link_comments(body, docname, targets):
    """Link the references in the comments of highlighted code."""

    def linked(match):
        return match[1] + "".join(
            f'<a class="reference internal" href="{link}">{piece}</a>'
            if link
            else piece
            for piece, link in targets.split(match[2], docname)
        )

    return COMMENT.sub(linked, body)


def link(app, doctree, docname):
    if app.builder.format != "html":
        return
    link_text(doctree, docname, app.llmnb_targets)
    if not docname.startswith("book/api/"):
        link_names(doctree, docname, Names(app))
    link_terms(doctree, docname, app, app.llmnb_homes.get(docname, ()))


def link_code(app, pagename, templatename, context, doctree):
    if "body" in context:
        body = context["body"]
        context["body"] = link_comments(body, pagename, app.llmnb_targets)


def start(app):
    app.llmnb_targets, app.llmnb_homes = Targets(app), homes()


def setup(app):
    app.connect("builder-inited", start)
    app.connect("doctree-resolved", link, priority=900)
    app.connect("html-page-context", link_code)
    app.add_css_file("links.css")
    return {"parallel_read_safe": True, "parallel_write_safe": True}

"""What the rendered book adds to Jupyter Book, as a Sphinx extension.

The pages are the notebooks as they stand; nothing in a notebook is written
for this extension. It numbers a chapter's page and puts its subject into the
index, says on each exported cell where the code goes, gives each figure its
caption as alternative text, shows plain-text docstrings without reading them
as markup, and lets a Markdown link point at a documented name:
`[text](api/llmnb.cpu.jit.md#llmnb.cpu.jit.kernel)`.
"""

import functools
import re
import sys
from pathlib import Path

import folds
from docstrings import block_lines, escape
from docutils import nodes
from sphinx import addnodes
from sphinx.ext.autodoc import Documenter, ModuleDocumenter
from sphinx.util import logging

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from llmnb.book.export import read_chapters  # noqa: E402

# the other extensions of this folder; they act after this one, in this order
PARTS = (
    "head",
    "links",
    "cards",
    "search_data",
    "weight",
    "figures",
    "live",
    "landing",
    "move",
)
DERIVED = re.compile(r"Derived in chapter ([\dA]\.\d+)\.")
# what one reads as one word, in the text of which nodes
TOGETHER = re.compile(
    r"(GPT-\d\w*|\d[\d.,]* (?:%|[KMGT]B(?:/s)?|[mµ]s|[MGT]FLOP(?:/s)?)(?!\w)"
    r"|\b[A-Z]\w* = \d[\d,]*(?!\w)"
    r"|\([A-Z]\w?, (?:[A-Z]\w?, )?[A-Z]\w?\))"
)
PROSE = nodes.paragraph, nodes.emphasis, nodes.strong
log = logging.getLogger(__name__)


@functools.cache
def chapters():
    """The chapters by their documents, in the order of the book."""
    found = read_chapters(ROOT / "notebooks")
    return {f"notebooks/{x.place.removesuffix('.py')}": x for x in found}


@functools.cache
def pages():
    """The document of each chapter, by its number."""
    return {chapter.label: page for page, chapter in chapters().items()}


def number_chapter(doctree, label):
    """Put "Chapter 1.6" above the title."""
    text = f"Chapter {label}"
    mark = nodes.inline(text, text, classes=["chapter-number"])
    title = next(doctree.findall(nodes.title))
    title.insert(0, [mark, nodes.Text(" ")])


def index_chapter(app, doctree, name):
    """Let search and the index find a chapter by its name in the contents."""
    section = next(doctree.findall(nodes.section))
    found = [("single", name, section["ids"][0], "main", None)]
    known = app.env.get_domain("index").entries
    known.setdefault(app.env.docname, []).extend(found)
    section.insert(1, addnodes.index(entries=found))


def name_module(module):
    """A module's name, linked to its page if it has public names."""
    name = nodes.literal(module, module)
    if not (ROOT / "book" / "api" / f"{module}.md").exists():
        return name
    return addnodes.pending_xref(
        "",
        name,
        refdomain="py",
        reftype="mod",
        reftarget=module,
        refexplicit=True,
        refwarn=True,
    )


def mark_exports(doctree, default):
    """Say above each exported cell which module its code becomes part of."""
    for cell in folds.code_cells(doctree):
        data = cell["cell_metadata"]
        if not folds.EXPORTED & folds.tags_of(cell):
            continue
        module = f"llmnb.{data.get('module', default)}"
        module = module.removesuffix(".__init__")
        label = nodes.paragraph(classes=["export-label"])
        label += [nodes.Text("exported to "), name_module(module)]
        if data.get("title"):
            label += nodes.Text(f": {data['title']}")
        cell.insert(0, label)


def free_tags(doctree):
    """Keep Sphinx from wrapping an equation of several lines in `split`.

    MathJax refuses a \\tag inside that, and the notebooks bring their own
    environments.
    """
    for equation in doctree.findall(nodes.math_block):
        if not equation.get("nowrap"):
            equation["nowrap"] = True
            equation[:] = [nodes.Text(f"\\[{equation.astext()}\\]")]


def outer(node):
    """The cell that holds a node, or else the node's block in its section."""
    while not isinstance(node.parent, (nodes.section, nodes.document)):
        node = node.parent
    return node


def caption_figures(app, doctree, docname):
    """Take an image's alternative text from the caption below its cell."""
    for image in doctree.findall(nodes.image):
        if image.get("alt"):
            continue
        block = outer(image)
        below = block.next_node(descend=False, siblings=True)
        text = below.astext() if isinstance(below, nodes.paragraph) else ""
        if not text.startswith("Figure "):
            log.warning(
                "%s: an image without a caption 'Figure N.M. ...' below it",
                docname,
                location=image,
            )
            continue
        image["alt"] = " ".join(text.split())
        below["classes"].append("figure-caption")


def keep_together(app, doctree, docname):
    """Let no line end inside a number with its unit, a shape, or "GPT-2"."""
    for text in [*doctree.findall(nodes.Text)]:
        if not isinstance(text.parent, PROSE):
            continue
        pieces = TOGETHER.split(text)
        if len(pieces) > 1:
            whole = [nodes.Text(x) for x in pieces]
            for i in range(1, len(pieces), 2):
                whole[i] = nodes.inline("", whole[i], classes=["whole"])
            text.parent.replace(text, [x for x in whole if x.astext()])


class SourceOrderDocumenter(ModuleDocumenter):
    """List a module's names as its source does: forward, then backward."""

    def sort_members(self, documenters, order):
        return Documenter.sort_members(self, documenters, order)


def describe(app, doctree, docname):
    """Keep the first paragraph as the description that search engines show."""
    first = next(doctree.findall(nodes.paragraph), None)
    if first is not None:
        text = " ".join(first.astext().split())
        app.env.metadata[docname]["description"] = text


def name_anchors(app, doctree, docname):
    """Let Markdown links reach API names and the glossary's terms."""
    slugs = app.env.metadata[docname].setdefault("myst_slugs", {})
    for node in doctree.findall(nodes.Element):
        for name in node["ids"]:
            if name.startswith(("llmnb.", "module-llmnb", "term-")):
                slugs.setdefault(name, (node.line or 0, name, name))


def mark_fields(doctree):
    """Let the style sheet tell a docstring's lists from others."""
    for listed in doctree.findall(nodes.definition_list):
        if isinstance(listed.parent, addnodes.desc_content):
            listed["classes"].append("fields")


def on_doctree(app, doctree):
    docname = app.env.docname
    if docname.startswith("notebooks/"):
        # the header in the .ipynb is in alphabetical order
        chapter = chapters()[docname]
        mark_exports(doctree, next(iter(chapter.modules), ""))
        folds.fold(doctree)
        number_chapter(doctree, chapter.label)
        index_chapter(app, doctree, chapter.name)
    free_tags(doctree)
    mark_fields(doctree)
    describe(app, doctree, docname)
    name_anchors(app, doctree, docname)


def show_docstring(app, what, name, obj, options, lines):
    """Show a docstring as the plain text it is.

    Paragraphs and lists of arrays stay what they are (docstrings.py), an
    indented block keeps its lines, and the closing "Derived in chapter N."
    becomes a link to that chapter.
    """
    summary, *blocks = re.split(r"\n\s*\n", "\n".join(lines).strip("\n"))
    # a summary is no list, even where it has a colon
    lines[:] = [escape(" ".join(summary.split())), ""]
    for block in blocks:
        derived = DERIVED.fullmatch(block.strip())
        if derived:
            page = pages()[derived[1]]
            link = f":doc:`chapter {derived[1]} </{page}>`"
            lines += [f"Derived in {link}.", ""]
        elif block.startswith(" "):
            lines += ["::", "", *("    " + x for x in block.split("\n")), ""]
        else:
            lines += block_lines(block)


def skip_bare_fields(app, what, name, obj, skip, options):
    """Leave out a class's fields that have no docstring of their own."""
    bare = not (callable(obj) or isinstance(obj, property))
    return True if what == "class" and bare else None


def setup(app):
    app.setup_extension("folds")
    app.add_autodocumenter(SourceOrderDocumenter, override=True)
    app.connect("doctree-read", on_doctree, priority=900)
    app.connect("autodoc-process-docstring", show_docstring)
    app.connect("autodoc-skip-member", skip_bare_fields)
    app.connect("doctree-resolved", caption_figures)
    app.connect("doctree-resolved", keep_together, priority=990)
    for name in PARTS:
        app.setup_extension(name)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

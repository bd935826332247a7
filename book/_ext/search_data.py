"""What the search knows: the prose of every section, in one script.

Sphinx's own index knows words and titles only, and cannot show text from the
disk. `_static/search-data.js` holds each page's name and the title, anchor
and prose of its sections; `_static/search.js` loads it at the first search.
"""

import re

from cards import terms, write_script
from docutils import nodes
from folds import is_cell
from sphinx import addnodes

# these hold no prose, or stand on their own
APART = (
    nodes.section,
    nodes.title,
    nodes.literal_block,
    nodes.math_block,
    nodes.raw,
    nodes.image,
    nodes.comment,
    addnodes.desc,
    addnodes.glossary,
    addnodes.index,
    addnodes.toctree,
    addnodes.pending_xref_condition,
)


def words(node):
    """A node's prose on one line, "…" in the place of each formula."""
    return " ".join("".join(texts(node)).split())


def texts(node):
    if isinstance(node, nodes.Text):
        yield node.astext()
    elif isinstance(node, nodes.math):
        yield "…"
    elif not isinstance(node, APART) and not is_code(node):
        for child in node.children:
            yield from texts(child)
        if not isinstance(node, nodes.Inline):
            yield " "


def is_code(node):
    return is_cell(node) or "export-label" in node.get("classes", [])


def prose(node):
    """The prose that belongs to a section and not to the ones in it."""
    return " ".join(filter(None, (words(x) for x in node.children)))


def title_of(section):
    """A section's title without the number above a chapter's."""
    text = section.next_node(nodes.title).astext()
    return " ".join(re.sub(r"^Chapter [\dA]\.\d+ ", "", text).split())


def sections(doctree):
    """The anchor, title and prose of each section, name and term."""
    for section in doctree.findall(nodes.section):
        yield section["ids"][0], title_of(section), prose(section)
    for entry in doctree.findall(addnodes.desc):
        name = entry[0]["ids"][0]
        yield name, name.rsplit(".", 1)[-1], prose(entry[-1])
    # the glossary's entries, each as a section of its own
    for name, term, definition in terms(doctree):
        yield name, term.astext(), words(definition)


def collect(app, doctree):
    app.env.metadata[app.env.docname]["sections"] = [*sections(doctree)]


def write(app, error):
    if error or app.builder.name != "html":
        return
    pages = []
    # the book's order, so that of equal hits the earlier comes first
    order = [*app.config.external_site_map, *sorted(app.env.found_docs)]
    for docname in dict.fromkeys(order):
        found = app.env.metadata.get(docname, {}).get("sections")
        if found:
            page = app.builder.get_target_uri(docname)
            pages.append([page, app.env.titles[docname].astext(), found])
    write_script(app, "search-data.js", "llmnbSearch", pages)


def setup(app):
    app.connect("doctree-read", collect, priority=960)
    app.connect("build-finished", write)
    app.add_js_file("search.js", loading_method="defer")
    app.add_css_file("search.css")
    return {"parallel_read_safe": True, "parallel_write_safe": True}

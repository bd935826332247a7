"""What the search knows: the prose of every section, in one script.

Sphinx's own index knows words and titles only, and cannot show text from the
disk. `_static/search-data.js` holds each page's name and the title, anchor
and prose of its sections; `_static/search.js` loads it at the first search.
"""

import json
from pathlib import Path

from docutils import nodes
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
    return "export-label" in node.get("classes", []) or (
        node.get("nb_element") == "cell_code"
    )


def prose(node):
    """The prose that belongs to a section and not to the ones in it."""
    return " ".join(filter(None, (words(x) for x in node.children)))


def title_of(section):
    """A section's title without the number above a chapter's."""
    title = next(section.findall(nodes.title), None)
    if title is None:
        return ""
    marks = [
        x.astext()
        for x in title.findall(nodes.inline)
        if "chapter-number" in x["classes"]
    ]
    text = title.astext().removeprefix(marks[0] if marks else "")
    return " ".join(text.split())


def sections(doctree):
    """The anchor, title and prose of each section and documented name."""
    for section in doctree.findall(nodes.section):
        yield section["ids"][0], title_of(section), prose(section)
    for entry in doctree.findall(addnodes.desc):
        sign = next(entry.findall(addnodes.desc_signature))
        content = next(entry.findall(addnodes.desc_content))
        if sign["ids"]:
            name = sign["ids"][0].rsplit(".", 1)[-1]
            yield sign["ids"][0], name, prose(content)


def terms(doctree):
    """The glossary's entries, each as a section of its own."""
    for entry in doctree.findall(nodes.definition_list_item):
        for term in entry.findall(nodes.term):
            definition = next(entry.findall(nodes.definition), None)
            for name in term["ids"] if definition else []:
                if name.startswith("term-"):
                    yield name, term.astext(), words(definition)


def collect(app, doctree):
    found = [list(x) for x in [*sections(doctree), *terms(doctree)]]
    app.env.metadata[app.env.docname]["sections"] = found


def name_of(app, docname):
    """A page's name as the contents have it, else its title."""
    entry = app.config.external_site_map.get(docname)
    return getattr(entry, "title", "") or app.env.titles[docname].astext()


def write(app, error):
    if error or app.builder.name != "html":
        return
    pages = []
    for docname in sorted(app.env.found_docs, key=order(app)):
        found = app.env.metadata.get(docname, {}).get("sections")
        if found:
            page = app.builder.get_target_uri(docname)
            pages.append([page, name_of(app, docname), found])
    text = json.dumps(pages, ensure_ascii=False, separators=(",", ":"))
    path = Path(app.outdir) / "_static" / "search-data.js"
    path.write_text(f"window.llmnbSearch = {text};\n", "utf-8")


def order(app):
    """The book's order, so that of equal hits the earlier comes first."""
    places = {name: i for i, name in enumerate(app.config.external_site_map)}
    return lambda docname: (places.get(docname, len(places)), docname)


def setup(app):
    app.connect("doctree-read", collect, priority=960)
    app.connect("build-finished", write)
    app.add_js_file("search.js", loading_method="defer")
    app.add_css_file("search.css")
    return {"parallel_read_safe": True, "parallel_write_safe": True}

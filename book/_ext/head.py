"""A page's names, and what its head tells other programs.

A chapter has one name everywhere, "1.8 Attention": in the contents, in the
tab, in the search and beside "previous" and "next". The head says what a
message that links to a page should show. `book/_config.yml` is the one place
for addresses: with `html: baseurl:` pages name their canonical address, with
`repository: url:` the chapters get buttons for Colab and Binder.
"""

from html import escape
from pathlib import Path

from docutils import nodes

CARD = "_static/card.png"  # drawn by social_card.py
LAUNCH = {
    "notebook_interface": "jupyterlab",
    "binderhub_url": "https://mybinder.org",
    "colab_url": "https://colab.research.google.com",
}
OWN = "https://github.com/executablebooks/"
INDEX = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="refresh" content="0; url={page}">
{links}<link rel="icon" href="_static/mark.svg">
</head>
<body><h1>{title}</h1><p>{text}</p>
<p><a href="{page}">Read the book</a></p></body>
</html>
"""


def name_page(app, doctree):
    """Let Sphinx call a page what the contents call it."""
    docname = app.env.docname
    entry = app.config.external_site_map.get(docname)
    if entry is not None and entry.title:
        title = nodes.title(entry.title, entry.title)
        app.env.titles[docname] = app.env.longtitles[docname] = title


def tags(app, pagename, title):
    """The head's lines about a page."""
    text = app.env.metadata.get(pagename, {}).get("description", "")
    home = app.config.html_baseurl
    place = app.builder.get_target_uri(pagename)
    card = home + CARD if home else "../" * place.count("/") + CARD
    found = {"type": "article", "title": title, "description": text}
    found |= {"site_name": app.config.html_title, "image": card}
    found |= {"image:width": 1200, "image:height": 630}
    if home:
        found["url"] = home + place
    lines = [f'<meta name="description" content="{escape(text)}" />']
    lines += [
        f'<meta property="og:{name}" content="{escape(str(value))}" />'
        for name, value in found.items()
        if value
    ]
    lines += ['<meta name="twitter:card" content="summary_large_image" />']
    return "\n".join(lines)


def add_tags(app, pagename, templatename, context, doctree):
    # a title is HTML; the pages without a source have no description
    if pagename in app.env.found_docs:
        title = app.env.titles[pagename].astext()
        context["metatags"] += tags(app, pagename, title)


def offer_launch(app):
    """Buttons that open a chapter elsewhere, once the book has an address."""
    options = app.config.html_theme_options
    # without an address Jupyter Book puts that of its own repository
    if not options.get("repository_url", OWN).startswith(OWN):
        options["launch_buttons"] = LAUNCH


def write_index(app, error):
    """index.html, for those who open the folder: it leads to the book."""
    if error or app.builder.name != "html":
        return
    root = app.config.root_doc
    page = app.builder.get_target_uri(root)
    text = app.env.metadata[root].get("description", "")
    home = app.config.html_baseurl
    link = f'<link rel="canonical" href="{escape(home + page)}">\n'
    head = link if home else ""
    head += tags(app, root, app.config.html_title).replace("../", "") + "\n"
    title, text = escape(app.config.html_title), escape(text)
    html = INDEX.format(title=title, text=text, page=page, links=head)
    (Path(app.outdir) / "index.html").write_text(html, "utf-8")


def setup(app):
    app.connect("builder-inited", offer_launch)
    app.connect("doctree-read", name_page, priority=910)
    app.connect("html-page-context", add_tags, priority=600)
    app.connect("build-finished", write_index)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

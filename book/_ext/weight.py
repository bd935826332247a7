"""Make the pages light: one style sheet, one script, a smaller MathJax.

The theme and its extensions bring fourteen files, most of them unused: an
icon font of 1.5 MB, a library of parts of which the book has a menu, style
rules for all of them, the search index on every page. Here their styles
become `_static/book.css`, without the rules that no page can use, and their
scripts `_static/book.js`. MathJax is put together from its own parts without
its menu. Pictures load when you come near them, and say their size so that
nothing jumps.
"""

import os
import re
import shutil
from importlib.util import find_spec
from pathlib import Path

MATHJAX = Path(find_spec("sphinx-mathjax-offline").origin).parent
MATHJAX /= "static/mathjax"
# startup comes first and starts MathJax when the rest has run
MATHJAX_PARTS = (
    "startup",
    "core",
    "input/tex",
    "output/chtml",
    "output/chtml/fonts/tex",
    "a11y/assistive-mml",
)
# of a theme's style sheets, these stand in its own templates
THEME_STYLES = ("basic.css", "styles/pydata-sphinx-theme.css")
THEME_SCRIPTS = ("scripts/pydata-sphinx-theme.js",)
LARGE = 60_000  # bytes; a larger script of an extension stays on its own
UNUSED = ("scripts/fontawesome.js", "scripts/bootstrap.js", "locales")
UNUSED += ("vendor/fontawesome",)


def gather(app, pagename, templatename, context, doctree):
    """Note the styles and scripts of a page; leave those that stay apart."""
    if app.builder.name != "html":
        return
    styles = [x.filename.split("?")[0] for x in context["css_files"]]
    app.llmnb_styles |= dict.fromkeys(styles)
    if pagename == "search":
        return
    apart = []
    for script in context["script_files"]:
        name = (script.filename or "").split("?")[0]
        body = script.attributes.get("body", "")
        if name and joins(app, name):
            app.llmnb_scripts[name] = None
        elif not body.startswith("DOCUMENTATION_OPTIONS"):
            apart.append(script)
    context["script_files"] = apart


def joins(app, name):
    """Whether a script becomes part of book.js."""
    path = Path(app.outdir) / name
    return path.exists() and path.stat().st_size < LARGE


def lazy_images(app, pagename, templatename, context, doctree):
    """Let pictures load when they come near, in the room they will take."""
    sizes = {v: k for k, v in app.builder.images.items()}

    def tag(match):
        name = re.search(r'src="[^"]*_images/([^"]+)"', match[0])
        room = name and size(Path(app.srcdir) / sizes.get(name[1], ""))
        known = "width=" in match[0] or not room
        room = "" if known else ' width="{}" height="{}"'.format(*room)
        return f'<img loading="lazy" decoding="async"{room} {match[1]}'

    if "body" in context:
        context["body"] = re.sub(r"<img (.*?>)", tag, context["body"])


def name_parts(app, pagename, templatename, context, doctree):
    """What a screen reader hears: no empty headers, folds by their text."""
    if "body" in context:
        empty = r'<th class="head[^"]*">(<p></p>)?</th>'
        body = re.sub(empty, "<td></td>", context["body"])
        label = ' aria-label="Toggle hidden content"'
        context["body"] = body.replace(label, "")


def size(path):
    """A PNG's width and height, or None."""
    data = path.read_bytes()[:24] if path.is_file() else b""
    if data[12:16] != b"IHDR":
        return None
    return int.from_bytes(data[16:20]), int.from_bytes(data[20:24])


# Styles


def rules(css):
    """Cut a style sheet into pairs: what stands before a block, the block."""
    start = depth = 0
    head = ""
    for i, c in enumerate(css):
        if c == ";" and depth == 0:
            yield css[start : i + 1], None
            start = i + 1
        elif c == "{":
            if depth == 0:
                head, start = css[start:i], i + 1
            depth += 1
        elif c == "}":
            depth -= 1
            if depth == 0:
                yield head, css[start:i]
                start = i + 1


def prune(css, words):
    """Leave out the rules whose classes stand on no page and in no script."""
    kept = []
    for head, block in rules(css):
        name = head.strip()
        if block is None:
            kept += [] if name.startswith(("@charset", "@import")) else [head]
        elif name.startswith(("@media", "@supports")):
            inside = prune(block, words)
            kept += [f"{head}{{{inside}}}"] if inside.strip() else []
        elif name.startswith("@"):
            icons = "fontawesome" in block or "keyframes fa-" in name
            kept += [] if icons else [f"{head}{{{block}}}"]
        else:
            parts = re.split(r",(?![^()]*\))", name)
            parts = [x for x in parts if is_used(x, words)]
            kept += [f"{','.join(parts)}{{{block}}}"] if parts else []
    return "".join(kept)


def is_used(selector, words):
    plain = re.sub(
        r":(?:not|is|where|has)\((?:[^()]|\([^()]*\))*\)", "", selector
    )
    names = re.findall(r"\.((?:[\w-]|\\.)+)", plain)
    icons = any(x.startswith("fa-") or x == "fa" for x in names)
    return not icons and all(x.replace("\\", "") in words for x in names)


def words_of(paths):
    """Every word that may be a class: in a page's classes, in a script."""
    found = set()
    for path in paths:
        text = path.read_text("utf-8")
        if path.suffix == ".html":
            for names in re.findall(r'class="([^"]*)"', text):
                found |= set(names.split())
            for code in re.findall(r"<script[^>]*>(.*?)</script>", text, re.S):
                found |= set(re.findall(r"[\w-]+", code))
        else:
            found |= set(re.findall(r"[\w-]+", text))
    return found


def move_addresses(css, folder):
    """Make a style sheet's relative addresses start from _static."""

    def moved(match):
        path = match[2]
        if re.match(r"[a-z]+:|[#/]", path):
            return match[0]
        path = os.path.normpath(os.path.join(folder, path))
        return f"url({match[1]}{path.replace(os.sep, '/')}{match[1]})"

    return re.sub(r"""url\((["']?)([^"')]+)\1\)""", moved, css)


def write_styles(app, static):
    own = {p.name for p in (Path(app.confdir) / "book/_static").rglob("*.css")}
    pages = [*Path(app.outdir).rglob("*.html")]
    words = words_of([*pages, *static.rglob("*.js")])
    names = [static / x for x in THEME_STYLES]
    names += [Path(app.outdir) / x for x in app.llmnb_styles]
    parts = []
    for path in names:
        css = path.read_text("utf-8")
        css = re.sub(r"/\*(?!!).*?\*/", "", css, flags=re.S)
        css = re.sub(r"/\*!.*?\*/", keep_licence(parts), css, flags=re.S)
        if path.name not in own:
            css = prune(css, words)
        parts.append(move_addresses(css, path.parent.relative_to(static)))
    text = re.sub(r"\s*\n\s*", "\n", "\n".join(parts))
    (static / "book.css").write_text(text, "utf-8")


def keep_licence(parts):
    """Move a licence's comment before the rules that it covers."""

    def kept(match):
        if "icense" in match[0] and "ontawesome" not in match[0]:
            parts.append(match[0])
        return ""

    return kept


# Scripts


def write_scripts(app, static):
    names = [Path(app.outdir) / x for x in app.llmnb_scripts]
    names += [static / x for x in THEME_SCRIPTS]
    parts = [re.sub(r"//# source.*", "", x.read_text("utf-8")) for x in names]
    # a ";" first: no file's "use strict" is meant for the next
    (static / "book.js").write_text(";" + "\n;\n".join(parts), "utf-8")


def write_mathjax(static):
    """MathJax of the parts that the pages use, and its fonts."""
    loaded = ", ".join(f'"{x}"' for x in MATHJAX_PARTS)
    parts = [(MATHJAX / f"{x}.js").read_text("utf-8") for x in MATHJAX_PARTS]
    parts.insert(1, f"MathJax.loader.preLoad({loaded})")
    folder = static / "mathjax"
    for name in ("output/chtml/fonts/woff-v2", "input/tex/extensions"):
        shutil.copytree(MATHJAX / name, folder / name, dirs_exist_ok=True)
    (folder / "book.js").write_text("\n;\n".join(parts), "utf-8")


def remove_unused(static):
    for name in UNUSED:
        path = static / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    for path in static.rglob("*.map"):
        path.unlink()


def finish(app, error):
    if error or app.builder.name != "html":
        return
    static = Path(app.outdir) / "_static"
    write_scripts(app, static)
    remove_unused(static)
    write_styles(app, static)
    write_mathjax(static)


def start(app):
    app.llmnb_styles, app.llmnb_scripts = {}, {}


def setup(app):
    app.connect("builder-inited", start)
    app.connect("html-page-context", gather, priority=950)
    app.connect("html-page-context", lazy_images, priority=950)
    app.connect("html-page-context", name_parts, priority=950)
    # after the other extensions have written their files
    app.connect("build-finished", finish, priority=900)
    app.add_css_file("icons.css")
    app.add_js_file("menus.js", loading_method="defer")
    return {"parallel_read_safe": True, "parallel_write_safe": True}

"""Make the pages light: one style sheet, one script, a smaller MathJax.

The theme and its extensions bring fourteen files, most of them unused: an
icon font of 1.5 MB, a library of parts of which the book has a menu, style
rules for all of them, the search index on every page. Here their styles
become `_static/book.css`, without the rules that no page can use, and their
scripts `_static/book.js`. MathJax is put together from its own parts without
its menu, and packed. Pictures load when you come near them, and say their size
so that nothing jumps.
"""

import gzip
import os
import re
import shutil
from base64 import b64encode
from importlib.resources import files
from pathlib import Path

from sphinx.util.images import get_image_size
from tinycss2 import parse_rule_list, parse_stylesheet, serialize

MATHJAX = Path(str(files("sphinx-mathjax-offline"))) / "static/mathjax"
# startup comes first and starts MathJax when the rest has run
MATHJAX_PARTS = {
    "startup": "startup",
    "core": "core",
    "input/tex-base": "input/tex-base",
    "[tex]/ams": "input/tex/extensions/ams",
    "output/chtml": "output/chtml",
    "output/chtml/fonts/tex": "output/chtml/fonts/tex",
    "a11y/assistive-mml": "a11y/assistive-mml",
}
FONTS = "output/chtml/fonts/woff-v2"
# MathJax is less than a third as long when packed. A browser that can't unpack
# it (Safari before 16.4) gets it plain. Who asks for `MathJax.startup.promise`
# in the meantime gets one that waits for its own, or ends if there is none.
UNPACK = """{
  const {src} = document.currentScript;
  const start = async () => {
    const script = document.createElement("script");
    let ready;
    if (window.DecompressionStream) {
      const bytes = Uint8Array.from(atob("PACKED"), x => x.charCodeAt(0));
      const plain = new DecompressionStream("gzip");
      const code = new Blob([bytes]).stream().pipeThrough(plain);
      script.text = await new Response(code).text();
    } else {
      script.src = src.replace(/book\\.js.*/, "plain.js");
      ready = new Promise(done => script.onload = script.onerror = done);
    }
    document.head.append(script);
    await ready;
    return MathJax.version && MathJax.startup.promise;
  };
  window.MathJax = {
    ...window.MathJax,
    loader: {paths: {mathjax: src.replace(/\\/[^/]*$/, "")}},
    // on a phone an equation has the room before it as well
    chtml: {displayAlign: innerWidth > 600 ? "center" : "left"},
    startup: {promise: start()},
  };
}
"""
# small fonts that many pages ask for: not a file each
INSIDE = ("MathJax_Zero", *(f"MathJax_Size{x}-Regular" for x in range(1, 5)))
DATA = 100_000  # bytes: a larger script holds data, not names of classes
# of a theme's style sheets, these stand in its own templates
THEME_STYLES = ("basic.css", "styles/pydata-sphinx-theme.css")
THEME_SCRIPTS = ("scripts/pydata-sphinx-theme.js",)
UNUSED = ("scripts/fontawesome.js", "scripts/bootstrap.js", "locales")
UNUSED += ("vendor/fontawesome",)


def gather(app, pagename, templatename, context, doctree):
    """Note the styles and scripts of all pages; leave those of this one."""
    if app.builder.name != "html":
        return
    shared = {x.filename for x in app.builder._orig_css_files}
    shared |= {x.filename for x in app.builder._orig_js_files}
    styles, scripts = context["css_files"], context["script_files"]
    names = [x.filename for x in styles if x.filename in shared]
    app.llmnb_styles |= dict.fromkeys(x.split("?")[0] for x in names)
    context["css_files"] = [x for x in styles if x.filename not in shared]
    if pagename != "search":
        names = [x.filename for x in scripts if x.filename in shared]
        app.llmnb_scripts |= dict.fromkeys(x for x in names if x)
        context["script_files"] = [x for x in scripts if stays(x, shared)]


def stays(script, shared):
    """Whether a script stands on its page: its own, or a few words in it."""
    body = script.attributes.get("body", "")
    options = body.startswith("DOCUMENTATION_OPTIONS")  # no one asks for them
    return not options and (body or script.filename not in shared)


def lazy_images(app, pagename, templatename, context, doctree):
    """Let pictures load when they come near, in the room they will take."""
    sizes = {v: k for k, v in app.builder.images.items()}

    def tag(match):
        name = re.search(r'src="[^"]*_images/([^"]+)"', match[0])
        uri = name and sizes.get(name[1])
        room = uri and get_image_size(Path(app.srcdir, uri))
        known = "width=" in match[0] or not room
        room = "" if known else ' width="{}" height="{}"'.format(*room)
        return f'<img loading="lazy" decoding="async"{room} {match[1]}'

    if "body" in context:
        context["body"] = re.sub(r"<img (.*?>)", tag, context["body"])


def tidy(app, pagename, templatename, context, doctree):
    """Leave out what is empty or says nothing.

    That is a header of no column, which a screen reader would announce, marks
    without a colour of their own, and words to the formatter.
    """
    if "body" in context:
        empty = r'<th class="head[^"]*">(<p></p>)?</th>'
        body = re.sub(empty, "<td></td>", context["body"])
        # names, commas and spaces have the colour of all code
        body = re.sub(r'<span class="[npw]">([^<]*)</span>', r"\1", body)
        body = re.sub(r' *<span class="c1"># fmt: skip</span>', "", body)
        # a long name at the head of a column or a page may break inside
        body = re.sub(r"(?s)<(th|h1)\b.*?</\1>", break_names, body)
        context["body"] = re.sub(r"(?s)<td>.*?</td>", keep_tuples, body)


def break_names(match):
    """HTML with a place to break after each "_" and "." within its names."""
    return re.sub(r"[_.](?=[a-z][^<>]*<)", r"\g<0><wbr/>", match[0])


SHAPE = re.compile(r"\((?:[\w+ ]+,)+[\w+ ]*\)(?=[^<>]*<)")


def keep_tuples(match):
    """A cell's HTML where no line ends inside a short tuple: (B, T)."""

    def kept(shape):
        short = len(shape[0]) < 13
        return f'<span class="whole">{shape[0]}</span>' if short else shape[0]

    math = 'class="math' in match[0]
    return match[0] if math else SHAPE.sub(kept, match[0])


# Styles


def prune(css, words):
    """Leave out the rules whose classes stand on no page and in no script."""
    return "".join(kept(parse_stylesheet(css, True, True), words))


def kept(rules, words):
    """The text of each rule that may hold for some page."""
    for rule in rules:
        if rule.type == "qualified-rule":
            parts = re.split(r",(?![^()]*\))", serialize(rule.prelude).strip())
            parts = [x for x in parts if is_used(x, words)]
            if parts:
                yield f"{','.join(parts)}{{{serialize(rule.content)}}}"
        elif rule.at_keyword in ("media", "supports"):
            inside = kept(parse_rule_list(rule.content, True, True), words)
            if inside := "".join(inside):
                head = f"@{rule.at_keyword}{serialize(rule.prelude)}"
                yield f"{head}{{{inside}}}"
        elif rule.at_keyword not in ("charset", "import"):
            text = rule.serialize()
            if "fontawesome" not in text and "keyframes fa-" not in text:
                yield text


def is_used(selector, words):
    plain = re.sub(
        r":(?:not|is|where|has)\((?:[^()]|\([^()]*\))*\)", "", selector
    )
    names = re.findall(r"\.((?:[\w-]|\\.)+)", plain)
    icons = any(x.startswith("fa-") or x == "fa" for x in names)
    return not icons and all(x.replace("\\", "") in words for x in names)


SET = re.compile(
    r"""(?<=[{;])\s*(--(?:bs|fa|pst)-[\w-]+):(?:"[^"]*"|[^;{}"])*(?:;|(?=}))"""
)


def drop_variables(css, others):
    """Leave out the themes' variables that no rule asks for.

    others: the text of files beside this one that may ask.
    """
    while True:
        asked = set(re.findall(r"--[\w-]+(?=[),])", css + others))
        idle = {x[1] for x in SET.finditer(css)} - asked
        if not idle:
            return css
        css = SET.sub(lambda x, idle=idle: "" if x[1] in idle else x[0], css)


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
    own.add("book.js")
    pages = [*Path(app.outdir).rglob("*.html")]
    scripts = [x for x in static.rglob("*.js") if x.stat().st_size < DATA]
    words = words_of([*pages, *scripts])
    names = [static / x for x in THEME_STYLES]
    names += [Path(app.outdir) / x for x in app.llmnb_styles]
    parts = []
    for path in names:
        css = path.read_text("utf-8")
        # a licence stands before the rules that it covers
        marked = re.findall(r"/\*!.*?\*/", css, re.S)
        parts += [x for x in marked if "icense" in x and "ontawesome" not in x]
        css = re.sub(r"/\*.*?\*/", "", css, flags=re.S)
        if path.name not in own:
            css = prune(css, words)
        parts.append(move_addresses(css, path.parent.relative_to(static)))
    text = re.sub(r"\s*([{};])\s*", r"\1", "\n".join(parts))
    others = (x for x in static.glob("*.[cj]s*") if x.name in own)
    text = drop_variables(text, "".join(x.read_text("utf-8") for x in others))
    (static / "book.css").write_text(text, "utf-8")


# Scripts


def write_scripts(app, static):
    names = [Path(app.outdir) / x for x in app.llmnb_scripts]
    names += [static / x for x in THEME_SCRIPTS]
    # lines of comments stay in the sources; so do the addresses of maps
    texts = [x.read_text("utf-8") for x in names]
    parts = [re.sub(r"^\s*//.*\n?", "", x, flags=re.M) for x in texts]
    # a ";" first: no file's "use strict" is meant for the next
    (static / "book.js").write_text(";" + "\n;\n".join(parts), "utf-8")


def write_mathjax(static):
    """MathJax of the parts that the pages use, and its fonts."""
    loaded = ", ".join(f'"{x}"' for x in MATHJAX_PARTS)
    files = [MATHJAX / f"{x}.js" for x in MATHJAX_PARTS.values()]
    parts = [x.read_text("utf-8") for x in files]
    parts.insert(1, f"MathJax.loader.preLoad({loaded})")
    text = "\n;\n".join(parts)
    for name in INSIDE:
        data = b64encode((MATHJAX / FONTS / f"{name}.woff").read_bytes())
        address = f"data:font/woff;base64,{data.decode()}"
        text = text.replace(f"%%URL%%/{name}.woff", address)
    folder = static / "mathjax"
    shutil.copytree(MATHJAX / FONTS, folder / FONTS, dirs_exist_ok=True)
    packed = b64encode(gzip.compress(text.encode(), mtime=0)).decode()
    (folder / "plain.js").write_text(text, "utf-8")
    (folder / "book.js").write_text(UNPACK.replace("PACKED", packed), "utf-8")


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
    app.connect("html-page-context", tidy, priority=950)
    # after the other extensions have written their files
    app.connect("build-finished", finish, priority=900)
    app.add_css_file("icons.css")
    app.add_js_file("menus.js", loading_method="defer")
    return {"parallel_read_safe": True, "parallel_write_safe": True}

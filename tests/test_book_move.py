"""Figures that move: what they show equals what Python computes.

The notebooks' outputs first, then the built pages in a browser. As in
test_book.py, the pages are skipped where they are not built.
"""

# ruff: noqa: F401, F811, I001 (fixtures)
import json
import math
import re

import numpy as np
import pytest
from processes import wait_for
from test_book import HTML, ROOT, Visit, address, browser, narrow, scheme
from test_book import visit, width

from llmnb.arena import footprint
from llmnb.book.moving import MIME
from llmnb.config import GPT2Config
from llmnb.gpu.simulator import Film, cuda, simulate, watch
from llmnb.model.layout import gpt2_layout
from llmnb.text import bpe

SCRIPTS = ROOT / "book" / "_static" / "move"
FIGURES = {
    "notebooks/1_by_hand/02_tokens": ["merges"],
    "notebooks/1_by_hand/12_adamw": ["valley"],
    "notebooks/1_by_hand/16_memory": ["arena"],
    "notebooks/2_cpu/04_matmul": ["tiles", "roofline"],
    "notebooks/2_cpu/05_attention": ["softmax"],
    "notebooks/3_gpu/01_threads": ["threads", "threads"],
    "notebooks/3_gpu/03_encoder": ["threads", "threads"],
    "notebooks/3_gpu/04_layernorm": ["threads"],
    "notebooks/3_gpu/05_elementwise": ["threads"],
    "notebooks/3_gpu/06_matmul": ["threads", "threads"],
    "notebooks/3_gpu/08_classifier": ["threads"],
    "notebooks/3_gpu/09_attention": ["threads", "threads"],
    "notebooks/3_gpu/10_adamw": ["threads"],
}


def figures(name):
    """The outputs of a notebook that hold a figure that moves."""
    book = json.loads((ROOT / f"{name}.ipynb").read_text("utf-8"))
    outputs = [o for c in book["cells"] for o in c.get("outputs", [])]
    return [o["data"] for o in outputs if MIME in o.get("data", {})]


def numbers(name, index=0):
    return json.loads(figures(name)[index][MIME])


def test_every_figure_that_moves_is_known_here():
    found = {}
    for path in sorted((ROOT / "notebooks").glob("*/[0-9]*.ipynb")):
        name = path.relative_to(ROOT).with_suffix("").as_posix()
        kinds = [json.loads(d[MIME])["kind"] for d in figures(name)]
        found |= {name: kinds} if kinds else {}
    assert found == FIGURES
    kinds = {kind for kinds in FIGURES.values() for kind in kinds}
    assert kinds == {path.stem for path in SCRIPTS.glob("*.js")}


@pytest.mark.parametrize("name", FIGURES)
def test_a_notebook_has_a_still_and_a_line_of_text(name):
    book = json.loads((ROOT / f"{name}.ipynb").read_text("utf-8"))
    for cell in book["cells"]:
        data = [o.get("data", {}) for o in cell.get("outputs", [])]
        for still, moving in zip(data, data[1:], strict=False):
            if MIME in moving:
                assert any(kind.startswith("image/") for kind in still)
                text = "".join(moving["text/plain"])
                assert 5 < len(text) < 80 and "\n" not in text
                assert "0x" not in text and "NaN" not in moving[MIME]


@pytest.mark.parametrize(
    "chapter", ["04_layernorm", "08_classifier", "10_adamw"]
)
def test_the_hasty_kernel_races_and_its_repair_does_not(chapter):
    for index, walk in enumerate(
        numbers(f"notebooks/3_gpu/{chapter}")["walks"]
    ):
        for steps in walk["steps"].values():
            assert any(step[9] for step in steps) == (index == 0), walk["name"]


# The built pages


class Figure:
    """A figure on a page, and the ways to ask it."""

    def __init__(self, visit, name, index=0):
        if not (HTML / f"{name}.html").exists():
            pytest.skip(f"{name} is not in the built book")
        self.page, self.numbers = visit.page, numbers(name, index)
        self.page.goto(f"{visit.home}/{name}.html", wait_until="commit")
        self.box = self.page.locator("figure.move").nth(index)
        self.box.locator(".move-place").wait_for()

    def press(self, *keys):
        self.box.focus()
        for key in keys:
            self.page.keyboard.press(key)

    def choose(self, text):
        self.box.locator(
            "fieldset label", has_text=re.compile(f"^{text}$")
        ).click()

    def slide(self, label, index):
        self.box.get_by_label(label, exact=True).fill(str(index))

    def data(self, name):
        return self.box.evaluate(f"x => x.dataset.{name}")

    def texts(self, selector):
        return self.box.locator(selector).all_inner_texts()

    @property
    def words(self):
        return self.box.locator(".move-words").inner_text()

    @property
    def place(self):
        return self.box.locator(".move-place").inner_text()


# What of a figure is wider than it, but for what scrolls in a box
STICKS_OUT = """() => [...document.querySelectorAll("figure.move *")]
    .filter(x => x.getBoundingClientRect().right
        > x.closest("figure").getBoundingClientRect().right)
    .filter(x => !x.closest("pre")).map(x => x.outerHTML.slice(0, 80))"""

# Whether each figure is shown, and whether its still is
SHOWN = """() => [...document.querySelectorAll("figure.move")].map(x => {
    const shown = y => y.getClientRects().length > 0;
    return [shown(x), shown(x.previousElementSibling)];
})"""


@pytest.mark.parametrize("name", FIGURES)
@narrow
def test_a_figure_moves_by_keys_and_buttons_fits_and_prints_its_still(
    visit, name
):
    for index in range(len(FIGURES[name])):
        figure = Figure(visit, name, index)
        label = figure.box.get_attribute("aria-label")
        assert re.fullmatch(r"Figure \d\.\d+\.\d+", label)
        figure.press("Home")
        assert figure.place.startswith("0 / ")
        first = figure.words
        figure.press("ArrowRight")
        assert figure.place.startswith("1 / ") and figure.words != first
        figure.box.get_by_role("button", name="step", exact=True).click()
        assert figure.place.startswith("2 / ")
        figure.box.get_by_role("button", name="step back").click()
        figure.press("ArrowLeft")
        assert figure.words == first
        figure.press("End")
        count = int(figure.place.split(" / ")[1])
        assert figure.place == f"{count} / {count}"
    for size in (390, 1280):
        figure.page.set_viewport_size({"width": size, "height": 844})
        assert figure.page.evaluate(STICKS_OUT) == []
    assert set(map(tuple, figure.page.evaluate(SHOWN))) == {(True, False)}
    figure.page.emulate_media(media="print")
    assert set(map(tuple, figure.page.evaluate(SHOWN))) == {(False, True)}
    assert visit.trouble == []


def test_the_still_is_there_without_javascript(browser, address):
    with Visit(browser, address, 1280, java_script_enabled=False) as visit:
        page = visit.page
        response = page.goto(f"{address}/notebooks/2_cpu/05_attention.html")
        if not response.ok:
            pytest.skip("the chapter is not in the built book")
        assert page.locator("figure.move").is_hidden()
        still = page.locator(".cell_output:has(figure.move) > :first-child")
        assert still.is_visible()


def test_nothing_moves_by_itself_or_against_the_readers_wish(visit):
    figure = Figure(visit, "notebooks/2_cpu/05_attention")
    bar = figure.box.locator(".move-sum i").first
    time = "x => getComputedStyle(x).transitionDuration"
    assert bar.evaluate(time) == "0.4s"
    figure.page.emulate_media(reduced_motion="reduce")
    assert bar.evaluate(time) == "0s"
    figure.page.wait_for_timeout(1200)
    assert figure.place.startswith("0 / ")
    figure.box.get_by_role("button", name="play").click()
    wait_for(lambda: not figure.place.startswith("0 / "))
    figure.box.get_by_role("button", name="pause").click()


# What they show


def filmed(walk, together):
    """What a walk's kernel leaves in its first array, and its races."""
    space = {"cuda": cuda, "np": np}
    exec(walk["code"][walk["main"]], space)
    args = [np.array(a[-1]) for a in walk["arrays"].values()]
    names = list(walk["arrays"])
    order = space[walk["main"]].__code__.co_varnames
    args = [args[names.index(x)] for x in order if x in names]
    film = Film(together)
    with watch(film=film):
        simulate(space[walk["main"]], 1, walk["block"], args)
    return args[0], sum(step.rival is not None for step in film.steps)


# Step from the start to the end: how many moments tell of a race?
RACES = """x => {
    const key = new KeyboardEvent("keydown", {key: "ArrowRight"});
    const last = Number(x.querySelector(".move-buttons input").max);
    let found = 0;
    for (let i = 0; i < last; i++) {
        x.dispatchEvent(key);
        found += x.querySelector(".move-words").innerText.startsWith("Race");
    }
    return found;
}"""


def test_threads_end_and_race_as_the_simulator_says(visit):
    figure = Figure(visit, "notebooks/3_gpu/01_threads", 1)
    for walk in figure.numbers["walks"]:
        figure.choose(walk["name"])
        for order in ("side by side", "one after the other"):
            figure.choose(order)
            want, races = filmed(walk, order == "side by side")
            figure.press("End")
            array = figure.box.locator(".move-array", has_text="out").last
            shown = array.locator(".move-cell b").all_inner_texts()
            got = [math.nan if x == "?" else float(x) for x in shown]
            assert np.array_equal(got, want, equal_nan=True), walk["name"]
            figure.press("Home")
            seen = figure.box.evaluate(RACES)
            assert (seen > 0) == (races > 0), walk["name"]


def test_the_small_tile_is_the_product(visit):
    figure = Figure(visit, "notebooks/3_gpu/06_matmul")
    figure.press("End")
    arrays = figure.numbers["walks"][0]["arrays"]
    a, b = (np.reshape(arrays[x][-1], arrays[x][:-1]) for x in "ab")
    shown = figure.texts(".move-array:last-child .move-cell b")
    assert list(map(float, shown)) == (a @ b.T).ravel().tolist()


def products_of(q, k):
    """Of each walk of 3.6 and 3.9 in small: the arrays that it leaves."""
    every = np.outer(q, k)
    seen = np.tril(every)
    return {
        "one step": {"out": every},
        "to_the_right": {"s": seen, "dq": seen @ k},
        "down": {"s": seen, "dk": seen.T @ q},
        "a small tile": {"s": every},
    }


@pytest.mark.parametrize(
    "name, index", [("06_matmul", 1), ("09_attention", 0), ("09_attention", 1)]
)
@pytest.mark.parametrize("order", ["side by side", "one after the other"])
def test_owners_in_small_write_the_products(visit, name, index, order):
    figure = Figure(visit, f"notebooks/3_gpu/{name}", index)
    walks = figure.numbers["walks"]
    for walk in walks:
        if len(walks) > 1:
            figure.choose(walk["name"])
        figure.choose(order)
        figure.press("End")
        factors = [np.array(a[-1]) for a in walk["arrays"].values()][-2:]
        for array, want in products_of(*factors)[walk["name"]].items():
            box = figure.box.locator(".move-array").filter(
                has=figure.page.get_by_text(array, exact=True)
            )
            shown = box.locator(".move-cell b").all_inner_texts()
            assert list(map(float, shown)) == want.ravel().tolist()
        assert not any(s[9] for x in walk["steps"].values() for s in x)


AWKWARD = [
    "hush, the rushes brush the thrush",
    "It's   42 trees,\n\n  naïve ones",
    "don't DON'T we'll 'twas  's",
    "🙂🚢 中文字 ß€ x̂ \u00a0\u2003\u0085\ufeff end ",
    "def f(x):\n\treturn x**2  # ½ ٣ ⅷ",
    "aaaaaaa" + " " * 7 + "bbb",
    "",
]


def test_merges_are_those_of_tiktoken(visit):
    figure = Figure(visit, "notebooks/1_by_hand/02_tokens")
    data = figure.numbers
    pairs = np.array(data["pairs"].split(), int).reshape(-1, 2).tolist()
    tokens = [bytes([i]) for i in range(256)]
    for a, b in pairs:
        tokens.append(tokens[a] + tokens[b])
    for i, size in enumerate(data["sizes"]):
        figure.slide("vocabulary", i)
        encoding = bpe.from_tokens("cut", tokens[: size - 1])
        for text in AWKWARD[: 7 if i in (1, 4) else 2]:
            line = text.replace("\n", " ")  # a field has no line ends
            figure.box.get_by_label("your text").fill(line)
            figure.press("End")
            shown = figure.texts(".move-piece small")
            assert list(map(int, shown)) == encoding.encode_ordinary(line)


SIZES = [(4, 256, 12, 768, 50257), (1, 16, 1, 64, 1000),
         (64, 1024, 48, 1600, 50257), (8, 128, 6, 384, 1000)]  # fmt: skip


def test_the_arena_has_pythons_size(visit):
    figure = Figure(visit, "notebooks/1_by_hand/16_memory")
    for B, T, L, C, V in SIZES:
        for letter, value in zip("BTLC", (B, T, L, C), strict=True):
            slider = figure.box.get_by_label(letter, exact=True)
            for i in range(int(slider.get_attribute("max")) + 1):
                slider.fill(str(i))
                if slider.get_attribute("aria-valuetext") == str(value):
                    break
        figure.choose("50,257" if V == 50257 else "1,024")
        cfg = GPT2Config(
            max_seq_len=1024, vocab_size=V, num_layers=L,
            num_heads=C // 64, channels=C,
        )  # fmt: skip
        want = sum(footprint(gpt2_layout(cfg, B, T)).values())
        assert int(figure.data("total")) == want


ROWS = ["1 0.2 1.5 0.4 2.6 0.9", "-3, -2, -1", "700 -700 710 1e3", "5"]


def test_online_softmax_keeps_pythons_maximum_and_sum(visit):
    figure = Figure(visit, "notebooks/2_cpu/05_attention")
    for text in ROWS:
        figure.box.get_by_label("scores").fill(text)
        row = np.array(re.split("[ ,]+", text), float)
        for end in range(4, len(row) + 4, 4):
            figure.press("ArrowRight")
            m = row[:end].max()
            assert float(figure.data("m")) == m
            total = float(figure.data("sum"))
            assert total == pytest.approx(np.exp(row[:end] - m).sum())


def descend(name, data, lr):
    """The last point of a path, in NumPy, by the equations of 1.12."""
    w, m, v = np.array(data["start"], float), 0.0, 0.0
    how = data["rules"][name]
    for step in range(1, data["steps"] + 1):
        g = np.array(data["curvature"]) * (w - data["lowest"])
        if name == "gradient descent":
            w = w - lr * g
        elif name == "momentum":
            m = how["beta"] * m + g
            w = w - lr * m
        else:
            m = how["beta1"] * m + (1 - how["beta1"]) * g
            v = how["beta2"] * v + (1 - how["beta2"]) * g**2
            mean = m / (1 - how["beta1"] ** step)
            root = np.sqrt(v / (1 - how["beta2"] ** step)) + how["eps"]
            w = (1 - lr * how.get("decay", 0)) * w - lr * mean / root
    return w


def test_optimisers_walk_as_in_python(visit):
    figure = Figure(visit, "notebooks/1_by_hand/12_adamw")
    data = figure.numbers
    slider = figure.box.get_by_label("learning rate")
    for rule in data["rules"]:
        figure.choose(rule)
        for index in (None, 5, 20, 40):
            if index is not None:
                slider.fill(str(index))
            lr = float(slider.get_attribute("aria-valuetext"))
            figure.press("End")
            got = json.loads(figure.data("point"))
            want = descend(rule, data, lr)
            assert got == pytest.approx(want.tolist(), rel=1e-9), rule
            flown = np.hypot(*(want - data["lowest"])) >= 1e3
            assert ("flown apart" in figure.words) == flown


def test_a_panel_of_b_comes_once_and_one_of_a_each_time(visit):
    figure = Figure(visit, "notebooks/2_cpu/04_matmul")
    rows, columns = (figure.numbers[x] for x in ("rows", "columns"))
    for step in range(1, rows * columns + 1):
        figure.press("ArrowRight")
        assert int(figure.data("second")) == step
        assert int(figure.data("third")) == -(-step // rows)
        lit = figure.box.locator("rect.move-now").all()
        a, b, tile = (x.bounding_box() for x in lit)
        assert a["y"] == pytest.approx(tile["y"], abs=1)
        assert b["x"] == pytest.approx(tile["x"], abs=1)
    assert figure.words.startswith(f"Tile {rows * columns}: ")


def test_the_roof_is_the_lower_of_two_limits(visit):
    figure = Figure(visit, "notebooks/2_cpu/04_matmul", 1)
    data = figure.numbers
    for copy, peak in ((data["copy"], data["peak"]), (819, 19500)):
        figure.box.get_by_label("memory, GB/s").fill(str(copy))
        figure.box.get_by_label("arithmetic, GFLOP/s").fill(str(peak))
        for layer, C, OC in data["layers"]:
            figure.choose(layer)
            figure.press("Home", "ArrowRight", "ArrowRight")
            bytes_moved = 4 * (4 * C + C * OC + 4 * OC)  # N = 4
            want = 2 * 4 * C * OC / bytes_moved
            assert float(figure.data("intensity")) == pytest.approx(want)
            roof = min(peak, copy * want)
            assert float(figure.data("roof")) == pytest.approx(roof)

"""The live model of the first page, in a browser, against Python.

Everything here loads the built page from the disk, as a reader would who
opens the folder. The page's pure functions are in `window.llmnbLive`.
"""

import functools
import json
import re
from pathlib import Path

import numpy as np
import pytest
from test_book import HTML, ROOT, TOO_WIDE, Visit, browser

from llmnb.model.generate import generate, window_start
from llmnb.reference.gpt2 import forward

landing = pytest.importorskip("landing", reason="it needs Sphinx")
live = pytest.importorskip("live", reason="it needs Sphinx")
__all__ = ["browser"]  # a fixture
FIRST = "book/intro.html"
LOADED = ("live-model.js", "gpt2.js", "live.js", "live.css")
READY = "document.querySelector('.live-token').textContent"
SHORT = "def close(self"
AWKWARD = [
    "",
    " ",
    "\n",
    "a",
    "  two  spaces   three ",
    "\n\n\n    indented\n\t\ttabbed\n",
    "it's we'll I'd they've IT'S don''t",
    "x = 12345.678e-9  # ½ ² Ⅷ ٣",
    "naïve café, Ünïcode, Ελλάδα, 日本語の文字, Привет",
    "👩‍👩‍👧‍👦 🏳️‍🌈 e\u0301 \u00a0nbsp\u2003em\u3000wide",
    "\ufeffmark \u0085next\u2028line\u200bzero\x00nul\x1c",
    "<|endoftext|> </script> \\n \"quoted\" 'x' `y` \\",
    "!!!???...---===>>>\u2026\u2014",
    "class A(B):\n    def __init__(self, *args, **kwargs):\n" * 3,
    " " * 100 + "x" + "=" * 80,
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 ﷽ \U0010ffff \ue000",
]


@functools.cache
def hour():
    """The model, its encoding, its weights, and those rounded to a byte."""
    model, encoding = live.load_hour()
    params = {n: np.array(x, np.float64) for n, x in model.params.items()}
    return model, encoding, params, live.round_params(params)


def ids_of(text):
    """A text's tokens, behind the one that begins it."""
    encoding = hour()[1]
    return [encoding.eot_token, *encoding.encode_ordinary(text)]


def logits(params, ids):
    """What NumPy computes, a row for each token."""
    model, encoding, _, _ = hour()
    row = np.array([ids])
    sizes = model.cfg.num_heads, encoding.n_vocab
    return forward(params, row, row, *sizes)[1]["logits"][0]


@pytest.fixture(scope="module")
def rounded():
    """A GPT2 with a short window and the weights that the page has."""
    from llmnb.model.gpt2 import GPT2

    model = GPT2.from_checkpoint(
        live.HOUR / "model.bin", 1, 40, backend="reference"
    )
    for name, array in hour()[3].items():
        model.params[name][...] = array
    return model


@pytest.fixture(scope="module")
def visit(browser):
    """The first page on a wide window, once the model has read its text."""
    with Visit(browser, HTML.resolve().as_uri(), 1280) as visit:
        start(visit)
        yield visit
        assert visit.trouble == []


def start(visit):
    """Open the first page, wait for the model, and keep it for the tests."""
    visit.page.goto(f"{visit.home}/{FIRST}")
    visit.page.wait_for_function(READY, timeout=20_000)
    visit.page.evaluate("""() => {
        const packed = window.llmnbModel;
        window.words = llmnbLive.tokenizer(packed);
        window.kept = llmnbLive.model(llmnbLive.unpack(packed), packed.config);
    }""")
    return visit.page


READ = """ids => {
    kept.readAll(ids);
    return ids.map((_, t) => [...kept.logitsAt(t)]);
}"""


def fill(page, text):
    """Put a text into the box, and wait until the model has read it."""
    page.evaluate(
        """text => {
        const area = document.querySelector(".live textarea");
        area.value = text;
        area.setSelectionRange(text.length, text.length);
        area.dispatchEvent(new Event("input"));
        document.querySelector(".live-token").textContent = "";
    }""",
        text,
    )
    page.wait_for_function(READY)


def bars(page):
    """The likeliest tokens, by number, and their percentages."""
    rows = page.locator(".live-next button").all()
    return [(int(x.get_attribute("data-id")), x.inner_text()) for x in rows]


def write(page, text, count, temperature, top_k=7):
    """What the page writes after a text: its first `count` tokens."""
    fill(page, text)
    page.evaluate(
        """settings => {
        for (const [name, value] of Object.entries(settings)) {
            const input = document.querySelector(`.live [name=${name}]`);
            input.value = value;
            input.dispatchEvent(new Event("input"));
        }
    }""",
        {"temperature": temperature, "top": top_k, "seed": 7},
    )
    page.click(".live-write")
    length = len(hour()[1].encode_ordinary(text)) + count
    page.wait_for_function(
        """n => document.querySelectorAll('.live-tokens span').length >= n
        || document.querySelector('.live-write').textContent == 'Write'""",
        arg=length,
        timeout=20_000,
    )
    if page.inner_text(".live-write") == "Stop":
        page.click(".live-write")
    return page.input_value(".live textarea")


# What the page computes


def test_the_logits_are_those_of_numpy(visit):
    _, _, params, small = hour()
    ids = ids_of(live.FIRST_TEXT)
    got = np.array(visit.page.evaluate(READ, ids))
    np.testing.assert_allclose(got, logits(small, ids), atol=1e-3, rtol=0)
    off = np.abs(got - logits(params, ids))
    assert off.max() < 1  # 0.67 when it was measured
    assert off.mean() < 0.15  # 0.11


def test_a_text_that_goes_on_costs_only_its_new_tokens(visit):
    ids = [1023, 35, 493, 121, 109, 770]
    whole = visit.page.evaluate(READ, ids)
    visit.page.evaluate(READ, [*ids[:3], 7, 7])
    assert visit.page.evaluate("ids => kept.keep(ids)", ids) == 3
    assert visit.page.evaluate(READ, ids) == whole


def test_the_tokens_are_those_of_tiktoken(visit):
    encoding = hour()[1]
    texts = [*AWKWARD, (ROOT / "book" / "glossary.md").read_text("utf-8")]
    texts += [p.read_text("utf-8") for p in (ROOT / "tests").glob("*.py")]
    got = visit.page.evaluate("texts => texts.map(words.encode)", texts)
    assert got == [encoding.encode_ordinary(x) for x in texts]
    back = visit.page.evaluate("ids => ids.map(words.decode)", got)
    assert back == texts


def test_draws_and_windows_are_those_of_python(visit):
    for seed in (0, 7, 2**32 - 1):
        got = visit.page.evaluate(
            """seed => { const next = llmnbLive.randomState(seed);
            return Array.from({length: 700}, next); }""",
            seed,
        )
        assert got == list(np.random.RandomState(seed).random_sample(700))
    got = visit.page.evaluate(
        "Array.from({length: 999}, (_, n) => llmnbLive.windowStart(n, 256))"
    )
    assert got == [window_start(n, 256) for n in range(999)]


def test_the_coldest_text_is_pythons_greedy_one(visit, rounded):
    want = generate(rounded, ids_of(SHORT), 30, temperature=0)
    got = write(visit.page, SHORT, 30, 0)
    assert got.startswith(SHORT + hour()[1].decode([*want]))


def test_a_seed_writes_what_it_writes_in_python(visit, rounded):
    want = generate(rounded, ids_of(SHORT), 20, 0.8, 40, seed=7)
    got = write(visit.page, SHORT, 20, 0.8, top_k=5)
    assert got.startswith(SHORT + hour()[1].decode([*want]))


# What the page does


def test_the_bars_are_the_likeliest_tokens_and_follow_typing(visit):
    page, small = visit.page, hour()[3]
    for text in ("import ", "import os\nfor i in "):
        fill(page, text)
        last = logits(small, ids_of(text))[-1]
        best = np.argsort(-last, kind="stable")[:10]
        assert [id for id, _ in bars(page)] == list(best)
    before = bars(page)
    page.focus(".live textarea")
    page.keyboard.type("ra")
    page.wait_for_function(
        "id => document.querySelector('.live-next button').dataset.id != id",
        arg=str(before[0][0]),
    )
    assert bars(page) != before


def test_a_bar_writes_its_token(visit):
    page, encoding = visit.page, hour()[1]
    fill(page, "import ")
    token = bars(page)[0][0]
    page.locator(".live-next button").first.click()
    want = "import " + encoding.decode([token])
    assert page.input_value(".live textarea") == want


def test_temperature_moves_the_bars(visit):
    page = visit.page
    fill(page, "for i in ")
    page.locator(".live [name=temperature]").fill("0.1")
    cold = bars(page)
    page.locator(".live [name=temperature]").fill("2")
    assert [id for id, _ in bars(page)] == [id for id, _ in cold]
    assert bars(page) != cold


def test_writing_streams_and_stops_and_starts_again(visit):
    page = visit.page
    fill(page, SHORT)
    page.click(".live-write")
    assert page.inner_text(".live-write") == "Stop"
    seen = []
    for _ in range(3):
        long = len(page.input_value(".live textarea"))
        page.wait_for_function(
            "n => document.querySelector('.live textarea').value.length > n",
            arg=long,
        )
        seen.append(long)
    assert seen == sorted({*seen})
    page.click(".live-write")
    assert page.inner_text(".live-write") == "Write"
    text = page.input_value(".live textarea")
    page.wait_for_timeout(300)
    assert page.input_value(".live textarea") == text
    page.click(".live-again")
    assert page.input_value(".live textarea") == SHORT
    page.click(".live-again")
    assert page.input_value(".live textarea") == live.FIRST_TEXT


def test_writing_at_once_goes_on_from_the_new_text(visit):
    page = visit.page
    page.click(".live [data-text=manual]")
    page.click(".live-write")
    begin = page.input_value(".live textarea")
    page.wait_for_function(
        "n => document.querySelector('.live textarea').value.length > n + 9",
        arg=len(begin),
    )
    title = page.inner_text(".live-title")
    page.click(".live-write")
    assert page.input_value(".live textarea").startswith(begin)
    assert title == "What comes next?"


def test_a_token_says_its_number_and_its_surprise(visit):
    page, text = visit.page, "import os\nimport sys"
    fill(page, text)
    ids = ids_of(text)
    z = logits(hour()[3], ids)[-2]
    cost = np.log(np.exp(z).sum()) - z[ids[-1]]
    told = page.inner_text(".live-token")
    assert f"token {ids[-1]}" in told
    assert f"{cost:.2f} nats" in told
    page.locator(".live-text").hover(position={"x": 20, "y": 20})
    tip = page.inner_text(".live-tip")
    assert f"token {ids[1]}" in tip
    assert "nats" in tip


def test_a_head_looks_where_numpy_says(visit):
    from llmnb.reference.gpt2 import attend

    page, (model, encoding, _, small) = visit.page, hour()
    ids = ids_of(live.FIRST_TEXT)
    row, heads = np.array([ids]), model.cfg.num_heads
    _, kept = forward(small, row, row, heads, encoding.n_vocab)
    want = attend(kept["blocks"][5]["qkv"], heads)[3][0, 3, -1]
    page.evaluate(READ, ids)
    got = page.evaluate("n => [...kept.row(5, 3, n)]", len(ids) - 1)
    np.testing.assert_allclose(got, want, atol=1e-5)
    fill(page, live.FIRST_TEXT)
    page.click("[data-head='5 3']")
    told = page.inner_text(".live-token")
    assert "block 5, head 3" in told
    assert page.locator(".live-lines path").count() == sum(want[1:-1] >= 0.04)


def test_a_long_text_is_cut_and_the_page_says_so(visit):
    page, text = visit.page, "x = y + 1\n" * 70
    ids = ids_of(text)
    first = window_start(len(ids), 256)
    assert first > 0
    fill(page, text)
    assert f"reads the last {len(ids) - first}" in page.inner_text(
        ".live-status"
    )
    assert page.locator(".live-tokens .out").count() == first - 1
    best = logits(hour()[3], ids[first:])[-1].argmax()
    assert bars(page)[0][0] == best
    fill(page, live.FIRST_TEXT)
    assert page.locator(".live-tokens .out").count() == 0


# How it looks, and what it weighs

NAMELESS = """() => [...document.querySelectorAll(
        ".live :is(button, input, textarea)")]
    .filter(x => !(x.getAttribute("aria-label") || x.textContent.trim()
        || x.labels?.[0]?.textContent.trim()))
    .map(x => x.outerHTML)"""


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_sticks_out_moves_or_is_nameless(browser, width):
    with Visit(browser, HTML.resolve().as_uri(), width, "dark") as visit:
        visit.page.add_init_script("""
            addEventListener("DOMContentLoaded", () => window.tall =
                document.querySelector(".live").offsetHeight);
            window.moved = 0;
            new PerformanceObserver(list => list.getEntries()
                .forEach(x => window.moved += x.value))
                .observe({type: "layout-shift", buffered: true})""")
        page = start(visit)
        tall = page.evaluate(
            "[tall, document.querySelector('.live').offsetHeight]"
        )
        assert tall[0] == tall[1]  # loading the model moved nothing
        loaded = page.evaluate("moved")
        write(page, SHORT, 40, 0.8)
        assert page.evaluate("moved") - loaded < 0.001  # nor did writing
        assert loaded < 0.05  # only letters, when their font came
        assert page.evaluate(TOO_WIDE) == []
        assert page.evaluate(NAMELESS) == []
        sizes = page.evaluate("""['pre', 'textarea'].map(x =>
            document.querySelector('.live-stack ' + x).scrollHeight)""")
        assert sizes[0] == sizes[1]  # the tokens lie under the text
        assert visit.trouble == []


def test_the_page_is_painted_before_the_model_is_loaded(visit):
    painted = visit.page.evaluate(
        'performance.getEntriesByName("first-contentful-paint")[0].startTime'
    )
    assert painted < 1000
    # the page does not ask for it; live.js does, later
    assert "live-model.js" not in (HTML / FIRST).read_text("utf-8")
    assert visit.page.locator("script[src*='live-model.js']").count() == 1


def test_the_model_fits_into_three_million_bytes(visit):
    sizes = [(HTML / "_static" / name).stat().st_size for name in LOADED]
    assert sum(sizes) <= 3_000_000, sizes


def test_a_step_of_the_hour_shows_its_text(visit):
    page = visit.page
    samples = json.loads((live.HOUR / "samples.json").read_text("utf-8"))
    for step, text in samples["after"].items():
        page.check(f"#learn-{step}")
        shown = page.locator(".learn-text:visible pre")
        want = landing.printable(text).split()
        assert shown.inner_text().split() == want


# The figures that the first page states


def test_the_first_page_states_what_was_measured():
    intro = (ROOT / "book" / "intro.md").read_text("utf-8")
    results = ROOT / "book" / "results" / "5-zen5.json"
    contest = json.loads(results.read_text("utf-8"))["contests"][1]
    ratio = next(x for x in contest["ratios"] if x["peer"] == "torch")
    assert contest["name"] == "124m-64"
    assert f"**{ratio['ratio']:.2f} ×**" in intro
    page = (ROOT / "notebooks/1_by_hand/14_page.ipynb").read_text("utf-8")
    lines = re.search(r"(\d+) lines of code in", page)[1]
    assert f"**{lines} lines**" in intro
    curve = ROOT / "notebooks/1_by_hand/18_training.ipynb"
    verdict = "100 losses       within 1e-06 of PyTorch's    ok"
    assert verdict in curve.read_text("utf-8")


def test_the_text_of_the_model_is_the_checkpoint_rounded():
    text = live.render_model()
    assert text.isascii()
    packed = json.loads(text.partition("=")[2].rstrip(";\n"))
    params, small = hour()[2:]
    for name, array in params.items():
        step = np.abs(array).max() / (40 if name in live.MATRICES else 4000)
        assert np.abs(small[name] - array).max() <= step / 2
    assert packed["parameters"] == sum(x.size for x in params.values())
    assert Path(live.HOUR / "model.bin").stat().st_size > 5_000_000

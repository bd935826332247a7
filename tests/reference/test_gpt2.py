"""The page: its gradient, and the model of the package beside it."""

import numpy as np
import pytest

import llmnb
from llmnb.book import poster
from llmnb.book.verify import numerical_gradient
from llmnb.model.tensors import parameter_shapes
from llmnb.reference import gpt2 as page

SHAPES = {
    "two blocks": (6, 7, 2, 2, 4),
    "odd": (9, 130, 2, 3, 51),
    "one of all": (1, 1, 1, 1, 1),
    "deep": (5, 20, 5, 1, 8),
    "wide": (32, 300, 1, 4, 64),
}


def drawn(shape, B=3, seed=0):
    """A configuration, wide random parameters, tokens and targets."""
    cfg, rng = llmnb.GPT2Config(*shape), np.random.default_rng(seed)
    params = {
        name: rng.normal(scale=0.5, size=size)
        for name, size in parameter_shapes(cfg).items()
    }
    batch = rng.integers(0, cfg.vocab_size, (2, B, cfg.max_seq_len))
    return cfg, params, batch[0], batch[1]


def on_the_page(cfg, p, tokens, targets):
    NH, V = cfg.num_heads, cfg.vocab_size
    loss, kept = page.forward(p, tokens, targets, NH, V)
    grads = page.backward(p, tokens, targets, NH, kept)
    return loss, kept["logits"], grads


def in_the_model(cfg, p, tokens, targets, backend, precision):
    model = llmnb.GPT2(cfg, *tokens.shape, backend, precision, seed=None)
    for name, values in p.items():
        model.params[name][...] = values
    loss = model.forward(tokens, targets)
    logits = model.logits.copy()
    model.backward()
    return loss, logits, model.grads


@pytest.mark.parametrize("shape", ["two blocks", "one of all"])
def test_every_gradient_is_that_of_central_differences(shape):
    cfg, p, tokens, targets = drawn(SHAPES[shape], B=2)
    tokens, targets = tokens[:, :5], targets[:, :5]  # a row of wpe unused
    _, _, grads = on_the_page(cfg, p, tokens, targets)
    assert grads.keys() == p.keys()

    def loss():
        NH, V = cfg.num_heads, cfg.vocab_size
        return page.forward(p, tokens, targets, NH, V)[0]

    for name, array in p.items():
        want = numerical_gradient(loss, array)
        assert np.abs(grads[name] - want).max() < 1e-8, name


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_models_bits_are_the_pages(shape):
    """The same operations on the same numbers in the same order."""
    problem = drawn(shape)
    loss, logits, grads = on_the_page(*problem)
    got = in_the_model(*problem, "reference", "fp64")
    assert got[0] == loss
    assert np.array_equal(got[1], logits)
    for name, want in grads.items():
        assert np.array_equal(got[2][name], want), name


@pytest.mark.parametrize(
    ("backend", "precision"),
    [("reference", "fp32"), ("cpu", "fp64"), ("cpu", "fp32")],
)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_model_differs_from_the_page_by_rounding(
    shape, backend, precision
):
    """Other orders of sums and another precision; no other mathematics.

    An epsilon in another place or the exact GELU would differ by 1e-5 and
    more in float64 too.
    """
    problem = drawn(shape)
    loss, logits, grads = on_the_page(*problem)
    got = in_the_model(*problem, backend, precision)
    tol = {"fp64": 1e-13, "fp32": 5e-5}[precision]
    assert abs(got[0] - loss) < tol * (1 + abs(loss))
    assert np.abs(got[1] - logits).max() < tol * np.abs(logits).max()
    for name, want in grads.items():
        far = np.abs(got[2][name] - want).max()
        assert far <= tol * max(np.abs(want).max(), 1e-3), name


def test_the_page_stays_a_page():
    """What the poster prints: at most 120 lines of at most 72 letters."""
    lines = poster.page_code(poster.PAGE.read_text("utf-8"))
    assert len(lines) <= 120
    assert max(map(len, lines)) <= 72
    imported = [x for x in lines if x.startswith(("import", "from "))]
    assert imported == ["import math", "import numpy as np"]


# The poster


def test_the_poster_prints_the_page_as_it_is():
    text = poster.PAGE.read_text("utf-8")
    assert not poster.is_stale(poster.POSTER.read_bytes(), text), (
        "the page has changed: run python -m llmnb.book.poster"
    )


def test_a_changed_page_makes_the_poster_stale(tmp_path, monkeypatch):
    text = poster.PAGE.read_text("utf-8")
    sheet, other = tmp_path / "poster.pdf", tmp_path / "gpt2.py"
    monkeypatch.setattr(poster, "POSTER", sheet)
    monkeypatch.setattr(poster, "PAGE", other)
    other.write_text(text)
    with pytest.raises(SystemExit, match="stale"):
        poster.main(["--check"])  # there is none
    poster.main([])
    poster.main(["--check"])
    assert sheet.stat().st_size < 200_000
    other.write_text(text.replace("1e-5", "1e-6"))
    with pytest.raises(SystemExit, match="stale"):
        poster.main(["--check"])

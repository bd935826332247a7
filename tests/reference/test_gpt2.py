"""The page: the model of the package beside it, and the poster.

The model computes what PyTorch does, as tests/model/test_parity.py shows.
"""

import numpy as np
import pytest

import llmnb
from llmnb.book import poster
from llmnb.model.tensors import parameter_shapes
from llmnb.reference import gpt2 as page

SHAPES = {
    "two blocks": (6, 7, 2, 2, 4),
    "odd": (9, 130, 2, 3, 51),
    "one of all": (1, 1, 1, 1, 1),
    "deep": (5, 20, 5, 1, 8),
    "wide": (32, 300, 1, 4, 64),
}


def drawn(shape, B=3):
    """A configuration, wide random parameters, tokens and targets."""
    cfg, rng = llmnb.GPT2Config(*shape), np.random.default_rng(0)
    params = {
        name: rng.normal(scale=0.5, size=size)
        for name, size in parameter_shapes(cfg).items()
    }
    batch = rng.integers(0, cfg.vocab_size, (2, B, cfg.max_seq_len))
    return cfg, params, batch[0], batch[1]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_models_bits_are_the_pages(shape):
    """The same operations on the same numbers in the same order."""
    cfg, p, tokens, targets = drawn(shape)
    NH, V = cfg.num_heads, cfg.vocab_size
    loss, kept = page.forward(p, tokens, targets, NH, V)
    grads = page.backward(p, tokens, targets, NH, kept)
    model = llmnb.GPT2(cfg, *tokens.shape, "reference", "fp64", seed=None)
    for name, values in p.items():
        model.params[name][...] = values
    assert model.forward(tokens, targets) == loss
    assert np.array_equal(model.logits, kept["logits"])
    model.backward()
    for name, want in grads.items():
        assert np.array_equal(model.grads[name], want), name


def test_the_page_stays_a_page():
    """What the poster prints: at most 120 lines of at most 72 letters."""
    lines = poster.page_code(poster.PAGE.read_text("utf-8"))
    assert len(lines) <= 120
    assert max(map(len, lines)) <= 72
    imported = [x for x in lines if x.startswith(("import", "from "))]
    assert imported == ["import math", "import numpy as np"]


def test_a_changed_page_makes_the_poster_stale(tmp_path, monkeypatch):
    poster.main(["--check"])  # what is kept prints the page as it is
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

"""Attention on a GPU: simulated, and its machine code."""

import gpu
import numpy as np
import pytest
from gpu import check_machine_code, check_row, launched, unwatched
from layers import NAMED, problem


def test_forward_over_several_tiles():
    check_row("attention", 1, 70, 1, 1, 4)


@pytest.mark.parametrize("hs", (64, 66, 128, 130, 256))
@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("attention", {"add": False}),
        ("local_attention", {"window": 5, "softcap": 9.0}),
    ],
)
def test_wide_heads(name, how, hs):
    """More than 64 channels take smaller tiles, and so do more than 128."""
    found = unwatched(name, 1, 17 if hs > 64 else 33, 1, 1, hs, **how)
    for got, want in zip(*found, strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=5e-5)


def check_machine(found, fours):
    """Shared memory takes four floats at once, global where rows fit."""
    for name, made in found.items():
        if not name.startswith("_"):
            assert made.vector_loads >= 16, name
            for way in ("ld", "st"):
                assert (f"{way}.global.v4" in made.ptx) == fours, name
                assert f"{way}.shared.v4" in made.ptx, name


def test_machine_code_of_gpt2s_heads():
    """No float64, spills or stack; what the chapter says of the rest."""
    found = check_machine_code(launched("attention", 1, 2, 1, 1, 64))
    assert len(found) == 4
    check_machine(found, True)
    forward, keys, queries = (
        found[f"attention_{k}"]
        for k in ("forward_tiles", "backward_keys", "backward_queries")
    )
    for made, nbytes in ((forward, 45056), (keys, 39936), (queries, 39936)):
        assert made.shared in (nbytes, nbytes + 1024)  # 1 KB: the system's
    assert forward.registers > 255 // 2
    assert queries.registers <= 65536 // (5 * 64)


RULE = {"window": 1, "softcap": 50.0}


@pytest.mark.parametrize(
    ("name", "hs", "cc", "how"),
    [
        ("attention", 5, (8, 0), {"ways": "f"}),
        ("attention", 128, (9, 0), {"ways": "b"}),
        ("attention", 256, (8, 0), {}),
        ("local_attention", 6, (8, 0), RULE),
        ("local_attention", 256, (9, 0), RULE),
    ],
)
def test_machine_code_of_other_heads(monkeypatch, name, hs, cc, how):
    monkeypatch.setattr(gpu, "GENERATIONS", [cc])
    seen = launched(name, 1, 2, 1, 1, hs, **how)
    found = check_machine_code(seen)
    assert "ways" in how or len(found) == 4
    check_machine(found, hs % 4 == 0)


def test_large_scores_and_scores_that_grow():
    layer = NAMED["attention"]
    p = problem(layer, np.float32, layer.sized(1, 40, 1, 1, 4))
    p["inp"][..., :4] = 20
    p["inp"][..., 4:8] = np.linspace(-50, 50, 40)[:, None]
    gpu.check_problem(layer, p, 1e-3)


@pytest.mark.parametrize("way", "fb")
def test_a_head_too_wide(way):
    with pytest.raises(ValueError, match="260 channels is too wide"):
        launched("attention", 1, 2, 1, 1, 260, ways=way)

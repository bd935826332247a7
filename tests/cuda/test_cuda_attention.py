"""Attention on a GPU: simulated, and its machine code."""

import numpy as np
import pytest
from gpu import check_machine_code, check_row, single, there

from llmnb import cuda as gpu
from llmnb.gpu.launch import simulated, to_host
from llmnb.gpu.simulator import watch
from llmnb.reference import attention as reference

TOLERANCE = 1e-5  # exp is approximate on a GPU


def arrays(B, T, NH, hs):
    """The backward pass's, from a forward pass in NumPy; it adds to ones."""
    inp = single(B, T, 3 * NH * hs, seed=0)
    dout = single(B, T, NH * hs, seed=1)
    out, lse = np.empty_like(dout), np.empty((B, NH, T), np.float32)
    reference.attention_forward(out, lse, inp)
    ones = np.ones_like(inp)
    return {"dinp": ones, "dout": dout, "inp": inp, "out": out, "lse": lse}


def test_forward_over_several_tiles():
    check_row("attention", 1, 70, 1, 1, 4)


def run(back, shape):
    """dinp, or out and lse, unwatched, and what is right."""
    dinp, dout, inp, out, lse = arrays(*shape).values()
    given = [simulated(x) for x in (dinp, dout, inp, out, lse)]
    if back:
        reference.attention_backward(dinp, dout, inp, out, lse, False)
        gpu.attention_backward(*given, add=False)
        return [to_host(given[0])], [dinp]
    new = [simulated(np.full_like(x, np.nan)) for x in (out, lse)]
    gpu.attention_forward(*new, given[2])
    return [to_host(x) for x in new], [out, lse]


@pytest.mark.parametrize("hs", (64, 128, 256))
@pytest.mark.parametrize("back", (False, True))
def test_wide_heads(back, hs):
    """More than 64 channels take smaller tiles: 17 positions are several."""
    got, want = run(back, (1, 17 if hs > 64 else 33, 1, hs))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE * 5)


def check_machine(found, fours):
    """Shared memory takes four floats at once, global where rows fit."""
    for name, made in found.items():
        if not name.startswith("_"):
            assert made.vector_loads >= 16, name
            for way in ("ld", "st"):
                assert (f"{way}.global.v4" in made.ptx) == fours, name
                assert f"{way}.shared.v4" in made.ptx, name


@pytest.fixture
def launches(monkeypatch):
    """What a call launches, by name of the kernel, with nothing run."""
    monkeypatch.setattr("llmnb.gpu.launch.simulate", lambda *args: None)

    def launched(hs, ways="fb"):
        a = there(arrays(1, 2, 1, hs))
        with watch() as seen:
            if "f" in ways:
                gpu.attention_forward(a["out"], a["lse"], a["inp"])
            if "b" in ways:
                gpu.attention_backward(*a.values())
        return seen

    return launched


def test_machine_code_of_gpt2s_heads(launches):
    """No float64, spills or stack; what the chapter says of the rest."""
    found = check_machine_code(launches(64))
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


@pytest.mark.parametrize(
    "hs, cc, ways",
    ((5, (8, 0), "f"), (128, (9, 0), "b"), (256, (8, 0), "fb")),
)
def test_machine_code_of_other_heads(monkeypatch, launches, hs, cc, ways):
    monkeypatch.setattr("gpu.GENERATIONS", [cc])
    check_machine(check_machine_code(launches(hs, ways)), hs % 4 == 0)


def test_large_scores_and_scores_that_grow():
    B, T, NH, hs = 1, 40, 1, 4
    a = arrays(B, T, NH, hs)
    inp = a["inp"]
    inp[..., :hs] = 20
    inp[..., hs : 2 * hs] = np.linspace(-50, 50, T)[:, None]
    want, lse = np.empty((B, T, hs)), np.empty((B, NH, T))
    reference.attention_forward(want, lse, inp.astype(np.float64))
    given = there(a)
    gpu.attention_forward(given["out"], given["lse"], given["inp"])
    np.testing.assert_allclose(to_host(given["out"]), want, rtol=0, atol=2e-3)


def test_a_head_too_wide():
    a = there(arrays(1, 2, 1, 260))
    with pytest.raises(ValueError, match="260 channels is too wide"):
        gpu.attention_forward(a["out"], a["lse"], a["inp"])
    with pytest.raises(ValueError, match="260 channels is too wide"):
        gpu.attention_backward(*a.values())


def test_no_positions():
    empty = [simulated(np.zeros(s, "f4")) for s in ((0, 3, 4), (0, 1, 3))]
    with pytest.raises(ValueError, match="lse must not be empty"):
        gpu.attention_forward(*empty, simulated(np.zeros((0, 3, 12), "f4")))

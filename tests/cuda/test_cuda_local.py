"""Attention by other rules on a GPU: right, and short where it may be."""

import numpy as np
import pytest
from gpu import PLACES, between, check_layer, check_machine_code, there
from hypothesis import given, settings
from hypothesis import strategies as st

from llmnb import cuda, reference
from llmnb.gpu.launch import simulated, to_host
from llmnb.gpu.simulator import watch

TOLERANCE = 1e-5  # exp is approximate on a GPU
drawn = settings(max_examples=8, deadline=None, derandomize=True)
RULES = st.fixed_dictionaries(
    {
        "window": st.sampled_from((None, 1, 2, 5, 33, 99)),
        "scale": st.sampled_from((None, 0.3)),
        "softcap": st.sampled_from((None, 1.5)),
    }
)
# B, T, heads of queries that share a key, heads of keys, channels of a head
SHAPES = st.tuples(
    st.integers(1, 2), st.integers(1, 40), st.integers(1, 2),
    st.integers(1, 2), st.sampled_from((2, 5, 8, 12)),
)  # fmt: skip


def draw(B, T, group, NKV, hs, add=True, **rule):
    """The arguments of both directions; what is only written is NaN."""
    rng, NH = np.random.default_rng(0), group * NKV
    inp = rng.normal(size=(B, T, (NH + 2 * NKV) * hs)).astype(np.float32)
    dout = rng.normal(size=(B, T, NH * hs)).astype(np.float32)
    out, lse = np.empty_like(dout), np.empty((B, NH, T), np.float32)
    reference.local_attention_forward(out, lse, inp, **rule)
    none = [np.full_like(x, np.nan) for x in (out, lse)]
    forward = {"out": none[0], "lse": none[1], "inp": inp} | rule
    dinp = np.ones_like(inp) if add else np.full_like(inp, np.nan)
    backward = {"dinp": dinp, "dout": dout, "inp": inp, "out": out}
    return forward, backward | {"lse": lse, "add": add} | rule


def rules(window=None, scale=None, softcap=None):
    return {"window": window, "scale": scale, "softcap": softcap}


def check(*shape, add=True, **rule):
    found, writes = [], (["out", "lse"], ["dinp"])
    both = draw(*shape, add=add, **rules(**rule))
    for way, arrays, names in zip(
        ("forward", "backward"), both, writes, strict=True
    ):
        name = f"local_attention_{way}"
        layers = getattr(cuda, name), getattr(reference, name)
        found.append(check_layer(*layers, arrays, names, TOLERANCE))
    return found


@drawn
@given(SHAPES, RULES, st.booleans())
def test_attention_equals_the_reference(shape, rule, add):
    check(*shape, add=add, **rule)


@pytest.mark.parametrize("window", [1, 20, 65])
def test_windows_over_several_tiles(window):
    """Rows that meet tiles of unseen keys before their first one."""
    check(1, 70, 1, 1, 4, window=window, softcap=2.0)


@pytest.mark.parametrize("hs", [64, 66, 128, 130, 256])
def test_wide_heads(hs):
    """More than 64 channels take smaller tiles, and so do more than 128."""
    T = 33 if hs <= 64 else 17
    forward, backward = draw(1, T, 1, 1, hs, **rules(window=5, softcap=9.0))
    given = there(forward)
    cuda.local_attention_forward(*given.values())
    want = backward["out"], backward["lse"]
    for name, x in zip(("out", "lse"), want, strict=True):
        got = to_host(given[name])
        np.testing.assert_allclose(got, x, rtol=0, atol=5 * TOLERANCE)
    given = there(backward)
    cuda.local_attention_backward(*given.values())
    reference.local_attention_backward(*backward.values())
    got, want = to_host(given["dinp"]), backward["dinp"]
    np.testing.assert_allclose(got, want, rtol=0, atol=5 * TOLERANCE)


def results(place=simulated, shift=(), **rule):
    both = draw(1, 20, 2, 1, 8, **rules(**rule))
    ways = (cuda.local_attention_forward, cuda.local_attention_backward)
    found = []
    for layer, arrays in zip(ways, both, strict=True):
        moved = {name: lambda x: between(x, place) for name in shift}
        given = there(arrays, place, **moved)
        with watch():
            layer(*given.values())
        found += [to_host(given[k]) for k in ("out", "dinp") if k in given]
    return found


def test_without_a_rule_it_is_gpt2s_attention():
    """To the last bit, and with a window that all positions fit in."""
    want = results()
    for got in (results(window=20), results(scale=8**-0.5)):
        for a, b in zip(got, want, strict=True):
            np.testing.assert_array_equal(a, b)
    forward, backward = draw(1, 20, 2, 1, 8)
    given = there(forward)
    cuda.attention_forward(*given.values())
    np.testing.assert_array_equal(to_host(given["out"]), want[0])
    given = there(backward)
    cuda.attention_backward(*given.values())
    np.testing.assert_array_equal(to_host(given["dinp"]), want[-1])


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", ["inp", "out", "dinp", "dout", "lse"])
def test_an_array_may_begin_between_vectors(name, place):
    rule = {"window": 7, "softcap": 3.0}
    pairs = zip(results(place, (name,), **rule), results(**rule), strict=True)
    for got, want in pairs:
        np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE)


def test_the_order_of_blocks_changes_no_bit(monkeypatch):
    rule, straight = {"window": 5, "softcap": 3.0}, np.ndindex
    want = results(**rule)
    monkeypatch.setattr(
        "llmnb.gpu.simulator.np.ndindex",
        lambda size: reversed([*straight(size)]),
    )
    for got, x in zip(results(**rule), want, strict=True):
        np.testing.assert_array_equal(got, x)


def test_what_lies_before_the_window_is_not_read():
    """Not a number there, in whole tiles, and none in the last outputs."""
    forward, _ = draw(1, 100, 1, 1, 4, **rules(window=4))
    given = there(forward)
    cuda.local_attention_forward(*given.values())
    want = to_host(given["out"])
    forward["inp"][:, :32] = np.nan
    given = there(forward)
    cuda.local_attention_forward(*given.values())
    got = to_host(given["out"])
    np.testing.assert_array_equal(got[:, 96:], want[:, 96:])


def barriers(T, window):
    return [seen.barriers for seen in check(1, T, 1, 1, 4, window=window)]


def test_tiles_outside_the_window_are_left_out():
    """Two barriers a tile of all threads: those of a block, 128 or 64."""
    everything, near = barriers(130, None), barriers(130, 32)
    forward, backward = (2 + 4 + 5) - (2 + 3 + 2), 2 * (15 - 9)
    left_out = [x - y for x, y in zip(everything, near, strict=True)]
    assert left_out == [2 * 128 * forward, 2 * 64 * backward]


@pytest.mark.parametrize(("hs", "cc"), [(6, (8, 0)), (256, (9, 0))])
def test_machine_code_of_attention(monkeypatch, hs, cc):
    monkeypatch.setattr("gpu.GENERATIONS", [cc])
    monkeypatch.setattr("llmnb.gpu.launch.simulate", lambda *args: None)
    both = draw(1, 2, 1, 1, hs, **rules(window=1, softcap=50.0))
    with watch() as seen:
        cuda.local_attention_forward(*there(both[0]).values())
        cuda.local_attention_backward(*there(both[1]).values())
    found = check_machine_code(seen)
    assert len(found) == 4
    for name, made in found.items():
        assert "tanh.approx" not in made.ptx, name
        if not name.startswith("_"):
            assert ("ld.global.v4" in made.ptx) == (hs % 4 == 0), name


@pytest.mark.parametrize("window", [0, -1])
def test_a_window_of_nothing(window):
    both = draw(1, 3, 1, 1, 4, **rules(window=1))
    for arrays in both:
        given = there(arrays) | {"window": window}
        layer = "backward" if "dinp" in arrays else "forward"
        with pytest.raises(ValueError, match="window must be None or a pos"):
            getattr(cuda, f"local_attention_{layer}")(**given)


@pytest.mark.parametrize("place", PLACES)
def test_scratch_of_ones_own(place):
    """Exactly as many floats as are asked for do; one less is refused."""
    arrays, size = draw(3, 7, 2, 1, 5)[1], cuda.attention_scratch(3, 7, 2)
    work, given = place(np.full(size + 1, np.nan, "f4")), there(arrays, place)
    cuda.local_attention_backward(*given.values(), work=work[:size])
    written = np.isfinite(to_host(work))
    assert written[:size].all() and not written[size]
    with pytest.raises(ValueError, match="backward: work must hold 42 floats"):
        cuda.local_attention_backward(*given.values(), work=work[: size - 1])

"""Attention on a GPU: simulated, and its machine code."""

import numpy as np
import pytest
from gpu import PLACES, check_layer, check_machine_code

from llmnb import cuda as gpu
from llmnb.gpu.launch import simulated, to_host
from llmnb.gpu.simulator import watch
from llmnb.reference import attention as reference

TOLERANCE = 1e-5  # exp is approximate on a GPU
# B, T, NH, hs: odd ones, a tile with one row to spare, two tiles
SHAPES = [
    (1, 1, 1, 1),
    (2, 5, 1, 1),
    (1, 17, 1, 3),
    (1, 4, 2, 5),
    (1, 33, 1, 8),
]


def problem(B, T, NH, hs, seed=0):
    rng = np.random.default_rng(seed)
    inp = rng.normal(size=(B, T, 3 * NH * hs)).astype(np.float32)
    dout = rng.normal(size=(B, T, NH * hs)).astype(np.float32)
    return inp, dout


def forward(shape):
    B, T, NH, _ = shape
    inp, dout = problem(*shape)
    arrays = {
        "out": np.full_like(dout, np.nan),
        "lse": np.full((B, NH, T), np.nan, np.float32),
        "inp": inp,
    }
    return check_layer(
        gpu.attention_forward,
        reference.attention_forward,
        arrays,
        ("out", "lse"),
        TOLERANCE,
    )


def backward_arrays(shape, add):
    B, T, NH, _ = shape
    inp, dout = problem(*shape)
    out, lse = np.empty_like(dout), np.empty((B, NH, T), np.float32)
    reference.attention_forward(out, lse, inp)
    return {
        "dinp": np.full_like(inp, 1 if add else np.nan),
        "dout": dout,
        "inp": inp,
        "out": out,
        "lse": lse,
        "add": add,
    }


def backward(shape, add=True):
    return check_layer(
        gpu.attention_backward,
        reference.attention_backward,
        backward_arrays(shape, add),
        ("dinp",),
        TOLERANCE,
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_forward(shape):
    forward(shape)


@pytest.mark.parametrize("shape", SHAPES)
def test_backward(shape):
    backward(shape, add=shape[1] % 2 == 1)


def test_forward_over_several_tiles():
    forward((1, 70, 1, 4))


def run(back, shape):
    """dinp, or out and lse, unwatched, and what is right."""
    dinp, dout, inp, out, lse, _ = backward_arrays(shape, False).values()
    there = [simulated(x) for x in (dinp, dout, inp, out, lse)]
    if back:
        reference.attention_backward(dinp, dout, inp, out, lse, False)
        gpu.attention_backward(*there, add=False)
        return [to_host(there[0])], [dinp]
    new = [simulated(np.full_like(x, np.nan)) for x in (out, lse)]
    gpu.attention_forward(*new, there[2])
    return [to_host(x) for x in new], [out, lse]


@pytest.mark.parametrize("hs", (64, 128))
@pytest.mark.parametrize("back", (False, True))
def test_wide_heads(back, hs):
    """More than 64 channels take smaller tiles: 17 positions are two."""
    got, want = run(back, (1, 17 if hs > 64 else 33, 1, hs))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE * 5)


def test_a_wide_head_under_watch():
    forward((1, 2, 1, 66))
    backward((1, 2, 1, 66))


def test_backward_overwrites_vectors():
    backward((1, 3, 1, 4), add=False)


@pytest.mark.parametrize("place", PLACES)
def test_arrays_that_begin_between_vectors(place):
    """Heads of 4 channels, but no vector may begin where a view begins."""
    want = backward_arrays((1, 5, 1, 4), True)
    lse = place(want["lse"])

    def view(name):
        x = want[name]
        flat = np.concatenate(([0], x.ravel())).astype(np.float32)
        return place(flat)[1:].reshape(*x.shape)

    dinp, dout, inp, out = (view(k) for k in ("dinp", "dout", "inp", "out"))
    with watch():  # which refuses vectors there
        gpu.attention_forward(out, lse, inp)
        gpu.attention_backward(dinp, dout, inp, out, lse)
    reference.attention_backward(*want.values())
    for name, got in (("out", out), ("lse", lse), ("dinp", dinp)):
        np.testing.assert_allclose(
            to_host(got), want[name], rtol=0, atol=TOLERANCE, err_msg=name
        )


def check_machine(found, fours):
    for name, made in found.items():
        if not name.startswith("_"):
            # shared memory takes four floats at once, and where rows are
            # aligned global memory does
            assert made.vector_loads >= 16, name
            assert ("ld.global.v4" in made.ptx) == fours, name
            assert ("st.global.v4" in made.ptx) == fours, name
            assert "ld.shared.v4" in made.ptx, name
            assert "st.shared.v4" in made.ptx, name


@pytest.fixture
def launches(monkeypatch):
    """What a call launches, by name of the kernel, with nothing run."""
    monkeypatch.setattr("llmnb.gpu.launch.simulate", lambda *args: None)

    def launched(hs, forward=True, backward=True):
        a = bad("add", bool, (1, 2, 1, hs))
        with watch() as seen:
            if forward:
                gpu.attention_forward(a["out"], a["lse"], a["inp"])
            if backward:
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
    "hs, cc, forward, backward",
    ((5, (8, 0), True, False), (128, (9, 0), False, True)),
)
def test_machine_code_of_other_heads(
    monkeypatch, launches, hs, cc, forward, backward
):
    monkeypatch.setattr("gpu.GENERATIONS", [cc])
    found = check_machine_code(launches(hs, forward, backward))
    check_machine(found, hs % 4 == 0)


def test_shared_memory_has_few_conflicts():
    """A request of four floats a lane takes four passes and no more."""
    for seen in (forward((1, 2, 1, 4)), backward((1, 2, 1, 4))):
        assert seen.shared_passes <= 4 * seen.shared_requests


def test_same_bits_on_every_run():
    shape = (1, 33, 1, 4)
    arrays = list(backward_arrays(shape, True).values())[:-1]
    results = []
    for _ in range(2):
        there = [simulated(x) for x in arrays]
        gpu.attention_backward(*there)
        results.append(to_host(there[0]))
    assert np.array_equal(*results)


def test_large_scores_and_scores_that_grow():
    B, T, NH, hs = 1, 40, 1, 4
    inp, dout = problem(B, T, NH, hs)
    inp[..., :hs] = 20
    inp[..., hs : 2 * hs] = np.linspace(-50, 50, T)[:, None]
    want, lse = np.empty((B, T, hs)), np.empty((B, NH, T))
    reference.attention_forward(want, lse, inp.astype(np.float64))
    there = [simulated(np.full_like(dout, np.nan))]
    there += [simulated(np.zeros((B, NH, T), np.float32))]
    gpu.attention_forward(*there, simulated(inp))
    np.testing.assert_allclose(to_host(there[0]), want, rtol=0, atol=2e-3)


def test_the_past_does_not_depend_on_the_future():
    inp, dout = problem(1, 40, 1, 4)
    outs = []
    for shift in (0, 1):
        inp[:, 30:] += shift
        out, lse = simulated(dout), simulated(np.zeros((1, 1, 40), "f4"))
        gpu.attention_forward(out, lse, simulated(inp))
        outs.append(to_host(out))
    assert np.array_equal(outs[0][:, :30], outs[1][:, :30])
    assert not np.array_equal(outs[0][:, 30:], outs[1][:, 30:])


@pytest.mark.parametrize("place", PLACES)
def test_scratch_of_ones_own(place):
    """Exactly attention_scratch() floats do; one less is refused."""
    there = [
        place(x) if isinstance(x, np.ndarray) else x
        for x in backward_arrays((1, 5, 2, 4), True).values()
    ]
    assert gpu.attention_scratch(1, 5, 2) == 10
    work = place(np.full(10, np.nan, np.float32))
    gpu.attention_backward(*there, work=work)
    assert np.isfinite(to_host(there[0])).all()
    with pytest.raises(ValueError, match="work must hold 10 floats, got 9"):
        gpu.attention_backward(*there, work=work[1:])


def bad(name, x, shape=(2, 5, 3, 4)):
    arrays = backward_arrays(shape, True)
    there = {
        k: simulated(v) if isinstance(v, np.ndarray) else v
        for k, v in arrays.items()
    }
    there[name] = x(arrays[name])
    return there


BAD = [
    ("inp", lambda x: x, TypeError, "inp must be a device's array"),
    ("inp", lambda x: simulated(x[0]), ValueError, r"inp must have shape \(B"),
    ("inp", lambda x: simulated(x[..., 1:]), ValueError, "inp must have sh"),
    ("inp", lambda x: simulated(x[:0]), ValueError, "inp must have shape"),
    ("inp", lambda x: simulated(x.astype("f8")), TypeError, "inp must be fl"),
    ("out", lambda x: simulated(x[:, :4]), ValueError, "out must have shape"),
    ("out", lambda x: x, TypeError, "out must be a device's array"),
    ("lse", lambda x: simulated(x[0]), ValueError, r"shape \(B, NH, T\)"),
    ("lse", lambda x: None, TypeError, "lse must be a device's array"),
    ("lse", lambda x: simulated(x[:, :0]), ValueError, "divides C = 12"),
    ("lse", lambda x: simulated(x[..., :4]), ValueError, "lse must have"),
    ("lse", lambda x: simulated(x.astype("f8")), TypeError, "lse must be fl"),
]
BAD_BACKWARD = [
    ("dinp", lambda x: simulated(x[:1]), ValueError, "dinp must have shape"),
    ("dinp", lambda x: x, TypeError, "dinp must be a device's array"),
    ("dout", lambda x: simulated(x[1:]), ValueError, "dout must have shape"),
    ("dout", lambda x: simulated(x.astype("f8")), TypeError, "dout must be f"),
]


@pytest.mark.parametrize("name, spoil, error, message", BAD)
def test_forward_refuses(name, spoil, error, message):
    a = bad(name, spoil)
    with pytest.raises(error, match=f"attention_forward: .*{message}"):
        gpu.attention_forward(a["out"], a["lse"], a["inp"])


@pytest.mark.parametrize("name, spoil, error, message", BAD + BAD_BACKWARD)
def test_backward_refuses(name, spoil, error, message):
    with pytest.raises(error, match=f"attention_backward: .*{message}"):
        gpu.attention_backward(*bad(name, spoil).values())


def test_a_head_too_wide():
    there = list(bad("add", bool, (1, 2, 1, 132)).values())
    _, _, inp, out, lse, _ = there
    with pytest.raises(ValueError, match="132 channels is too wide"):
        gpu.attention_forward(out, lse, inp)
    with pytest.raises(ValueError, match="132 channels is too wide"):
        gpu.attention_backward(*there)


@pytest.mark.parametrize("work", (np.zeros(99, "f4"), "none"))
def test_work_must_be_on_the_device(work):
    a = bad("add", bool)
    with pytest.raises(TypeError, match="work must be a device's array"):
        gpu.attention_backward(*a.values(), work=work)


def test_work_must_be_float32_and_flat():
    a = bad("add", bool)
    with pytest.raises(TypeError, match="work must be float32"):
        work = simulated(np.zeros(99))
        gpu.attention_backward(*a.values(), work=work)
    with pytest.raises(ValueError, match="work must have shape"):
        work = simulated(np.zeros((9, 11), np.float32))
        gpu.attention_backward(*a.values(), work=work)


@pytest.mark.parametrize("NH, NKV, hs", ((4, 2, 5), (3, 1, 4)))
def test_heads_that_share_keys(NH, NKV, hs):
    rng = np.random.default_rng(0)
    inp = rng.normal(size=(1, 33, (NH + 2 * NKV) * hs)).astype(np.float32)
    dout = rng.normal(size=(1, 33, NH * hs)).astype(np.float32)
    out, lse = np.empty_like(dout), np.empty((1, NH, 33), np.float32)
    want = np.ones_like(inp)
    reference.attention_forward(out, lse, inp)
    reference.attention_backward(want, dout, inp, out, lse)
    got = [simulated(np.ones_like(inp)), simulated(dout), simulated(inp)]
    got += [simulated(np.full_like(x, np.nan)) for x in (out, lse)]
    with watch():
        gpu.attention_forward(got[3], got[4], got[2])
        gpu.attention_backward(*got)
    for x, y in zip((got[0], *got[3:]), (want, out, lse), strict=True):
        np.testing.assert_allclose(to_host(x), y, rtol=0, atol=TOLERANCE)

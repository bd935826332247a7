"""Every layer with a backward pass: NumPy, kernels, gradients, threads."""

import inspect
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import (
    IN_PLACE,
    LAYERS,
    NAMED,
    arguments,
    assert_near,
    copied,
    in_place,
    passed,
    problem,
    problems,
    results,
)
from problems import assert_threads_change_no_bit

from llmnb import cpu, reference
from llmnb.backend import recorded
from llmnb.book.verify import numerical_gradient
from llmnb.cpu.panels import work_shape

drawn = settings(max_examples=15, deadline=None, derandomize=True)
EACH = pytest.mark.parametrize("layer", LAYERS, ids=lambda x: x.name)
EDGES = pytest.mark.parametrize(
    "layer", [x for x in LAYERS if x.edges], ids=lambda x: x.name
)
BACKENDS = pytest.mark.parametrize(
    "backend", (reference, cpu), ids=("reference", "cpu")
)


def taking(word):
    """The layers of the CPU that take an argument of this name."""
    return [
        x.name
        for x in LAYERS
        if word in inspect.signature(getattr(cpu, x.ways[1])).parameters
    ]


def check_kernels(layer, p, dtype, own=False):
    """Against NumPy in float64; own: with scratch memory of one's own."""
    how = {}
    if own and layer.name in taking("work"):
        how = {"work": np.full(work_shape(), np.nan, dtype)}
    got = results(layer, passed(layer, cpu, p, **how))
    want = results(layer, passed(layer, reference, copied(p, np.float64)))
    assert all(x.dtype == dtype for x in got.values())
    assert_near(got, want, layer.tol[dtype == np.float64])


@EACH
@pytest.mark.parametrize("add", (True, False))
def test_what_is_noted_is_all_that_a_layer_does(layer, add):
    """Its noted calls alone compute the same again, from the same arrays."""
    sizes = {k: n if isinstance(n, int) else 3 for k, n in layer.most.items()}
    flags = {k: add for k in layer.options if k.startswith("add")}
    p = problem(layer, np.float32, sizes, **flags)
    before = copied(p)

    def passes():
        for way in layer.ways:
            getattr(cpu, way)(**arguments(way, p))

    calls = recorded(passes)
    want = results(layer, copied(p))
    for name, x in before.items():
        if isinstance(x, np.ndarray):
            p[name][...] = x
    for function, given_to in calls:
        function(*given_to)
    for name, x in results(layer, p).items():
        np.testing.assert_array_equal(x, want[name], name)


@EACH
def test_a_batch_of_no_rows_adds_nothing(layer):
    sizes = {k: n if isinstance(n, int) else 3 for k, n in layer.most.items()}
    p = problem(layer, np.float32, sizes)
    for way in layer.ways:
        rows = getattr(cpu, way).arguments.arrays
        batched = {a.name for a in rows if "B" in a.names or a.open}
        given_to = arguments(way, copied(p))
        for name in batched & set(given_to):
            given_to[name] = given_to[name][:0]
        getattr(cpu, way)(**given_to)
        for name in {a.name for a in rows} & set(given_to) - batched:
            np.testing.assert_array_equal(given_to[name], p[name], name)


@pytest.mark.parametrize(
    "layer", [x for x in LAYERS if "T" in x.most], ids=lambda x: x.name
)
@BACKENDS
def test_texts_of_no_tokens_add_nothing(layer, backend):
    sizes = {k: n if isinstance(n, int) else 3 for k, n in layer.most.items()}
    p = problem(layer, np.float32, sizes | {"T": 0})
    for name, x in results(layer, passed(layer, backend, p)).items():
        np.testing.assert_array_equal(x, p[name], name)


@EACH
@pytest.mark.parametrize("dtype", (np.float32, np.float64))
@drawn
@given(data=st.data(), own=st.booleans())
def test_cpu_equals_reference(layer, dtype, data, own):
    check_kernels(layer, data.draw(problems(layer.name, dtype)), dtype, own)


@EDGES
def test_at_the_edges(layer):
    """About the sizes of blocks, and far beyond them."""
    for sizes, options in layer.edges:
        p = problem(layer, np.float64, layer.sized(*sizes), **options)
        check_kernels(layer, p, np.float64)


@EACH
@drawn
@given(data=st.data())
def test_gradients(layer, data):
    """NumPy's, which the kernels' equal, by central differences.

    What is added to does not begin at zero.
    """
    p = data.draw(problems(layer.name, np.float64, cap=4))
    out, upstream = layer.written(layer.ways[0])[0], layer.turns
    upstream = upstream or ("dlosses" if out == "losses" else "dout")

    def loss():
        forward = passed(layer, reference, p, layer.ways[:1])
        return (p[upstream] * forward[out]).sum()

    got, want = passed(layer, reference, p), {}
    for name in layer.written(layer.ways[1]):
        if p[name] is not None:
            want[name] = numerical_gradient(loss, p[name[1:]])
            if layer.kept(name, p) and name != layer.turns:
                want[name] += p[name]
    assert_near({name: got[name] for name in want}, want, 2e-8)


@EACH
def test_threads_change_no_bit(layer):
    """In float32, and in bfloat16 where a layer takes it."""
    rule = {"window": 50, "softcap": 5.0} if "local" in layer.name else {}
    for sizes in layer.large:
        p = problem(layer, np.float32, layer.sized(*sizes), **rule)
        for how in ({}, {"bf16": True})[: 1 + (layer.name in taking("bf16"))]:
            work = partial(passed, layer, cpu, p, **how)
            assert_threads_change_no_bit(
                lambda work=work: results(layer, work()).values()
            )


@pytest.mark.parametrize("layer, way, other", IN_PLACE)
@BACKENDS
@pytest.mark.parametrize("dtype", (np.float32, np.float64))
def test_in_place(layer, way, other, backend, dtype):
    """The bits of apart; a view of the array is the array."""
    p = in_place(layer, way, dtype)
    first = next(iter(arguments(way, p)))
    want = passed(layer, backend, p, [way])[first]
    for view in (False, True):
        same = arguments(way, copied(p))
        same[first] = same[other][:] if view else same[other]
        getattr(backend, way)(**same)
        np.testing.assert_array_equal(same[other], want)


@pytest.mark.parametrize(
    "name, options",
    (
        ("embedding", {"scale": 7.3}),
        ("rmsnorm", {"eps": 1e-3, "offset": 0.1}),
        ("headnorm", {"eps": 1e-3, "offset": 0.1}),
        ("local_attention", {"scale": 0.1, "softcap": 2.1}),
    ),
)
@BACKENDS
def test_numbers_of_numpy_change_no_bit(name, options, backend):
    layer = NAMED[name]
    sizes = {k: n if isinstance(n, int) else 3 for k, n in layer.most.items()}
    p = problem(layer, np.float32, sizes, **options)
    want = results(layer, passed(layer, backend, p))
    p |= {k: np.float64(x) for k, x in options.items()}
    for name, x in results(layer, passed(layer, backend, p)).items():
        np.testing.assert_array_equal(x, want[name], name)


@BACKENDS
def test_caps_that_are_numbers_of_numpy_change_no_bit(backend):
    found = []
    for cap in 2.1, np.float64(2.1):
        x = np.linspace(-4, 4, 88, dtype=np.float32).reshape(2, 4, 11)
        targets, ones = np.ones((2, 4), np.int32), np.ones((2, 4), np.float32)
        backend.softcap_forward(x, cap)
        found.append(x.copy())
        arrays = x, ones, x, ones, targets
        backend.capped_crossentropy_backward(*arrays, 11, cap)
        found.append(x)
    np.testing.assert_array_equal(found[:2], found[2:])


@BACKENDS
@pytest.mark.parametrize("name, value", (("layernorm", 3), ("rmsnorm", 0)))
def test_a_row_that_a_norm_cannot_stretch_is_finite(name, value, backend):
    layer = NAMED[name]
    p = problem(layer, np.float32, layer.sized(1, 2, 16))
    p["inp"][...] = value
    p = passed(layer, backend, p)
    assert np.abs(p["out"] - p.get("bias", 0)).max() < 1e-5
    assert np.isfinite(p["dinp"]).all()


@pytest.mark.parametrize("name", taking("bf16"))
def test_bf16_wants_float32(name):
    layer = NAMED[name]
    p = problem(layer, np.float64, dict.fromkeys(layer.most, 3))
    p = passed(layer, cpu, p)
    for way in layer.ways:
        wanted = f"{way}: bf16 wants float32 arrays, got float64"
        with pytest.raises(TypeError, match=wanted):
            passed(layer, cpu, p, [way], bf16=True)


@pytest.mark.parametrize("name", ("gelu", "swiglu", "geglu"))
def test_an_element_gets_the_same_bits_wherever_it_stands(name):
    """In a vector, in the rest after the vectors, or alone."""
    layer, n = NAMED[name], 100
    p = problem(layer, np.float32, layer.sized(1, 1, n))

    def cut(p, n):
        parts = {k: np.split(x, x.shape[-1] // 100, -1) for k, x in p.items()}
        return {
            k: np.concatenate([x[..., :n] for x in part], -1)
            for k, part in parts.items()
        }

    whole = results(layer, passed(layer, cpu, p))
    for n in range(1, 70):
        got = results(layer, passed(layer, cpu, cut(p, n)))
        for k, want in cut(whole, n).items():
            np.testing.assert_array_equal(got[k], want)

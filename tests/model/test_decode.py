"""The cache: every number equals full recomputation, to the last bit."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import assert_threads_change_no_bit

from llmnb import cpu
from llmnb.config import GPT2Config
from llmnb.model import decode
from llmnb.model.architectures import PRESETS
from llmnb.model.decode import Decoder
from llmnb.model.gpt2 import GPT2

few = settings(max_examples=40, deadline=None, derandomize=True)
V, T = 131, 40
CFG = GPT2Config(64, V, 3, 3, 30)
TOKENS = st.integers(0, V - 1)


def small(name, window=40):
    """A preset's shape with small numbers; what makes it itself remains."""
    cfg = PRESETS[name]
    kv = {1: 1, cfg.num_heads: 4}.get(cfg.num_kv_heads, 2)
    sizes = {"max_seq_len": 150, "vocab_size": V, "num_layers": 3}
    sizes |= {"num_heads": 4, "num_kv_heads": kv, "channels": 24}
    sizes |= {"head_size": 8, "hidden": 40}
    if cfg.window:
        sizes["window"] = window
    if cfg.global_every:
        sizes["global_every"] = 3 if cfg.global_every == 6 else 2
    return replace(cfg, **sizes)


def model_of(cfg=CFG, seq_len=T, batch_size=1, precision="fp32"):
    """A model that is far from uniform, no norm or bias of which is idle."""
    model = GPT2(cfg, batch_size, seq_len, "cpu", precision)
    rng = np.random.RandomState(1)
    for name, p in model.params.items():
        p *= 4 if p.ndim > 1 and name != "wte" else 1
        p += rng.normal(0, 0.1, p.shape)
        if name in ("wte", "head"):
            p[V:] = 0
    return model


def draws(*shape, seed=0, dtype=np.float32):
    return np.random.RandomState(seed).normal(0, 1, shape).astype(dtype)


# kernels


@few
@given(
    st.integers(1, 3),
    st.integers(1, 15),
    st.integers(1, 60) | st.sampled_from([383, 384, 385, 800]),
    st.integers(1, 60) | st.sampled_from([96, 100]),
    st.sampled_from([np.float32, np.float64]),
    st.booleans(),
    st.booleans(),
)
def test_product_has_the_bits_of_matmul(B, N, C, OC, dtype, shift, added):
    inp, weight = draws(B, N, C, dtype=dtype), draws(OC, C, seed=1)
    weight = weight.astype(dtype)
    bias = draws(OC, seed=2).astype(dtype) if shift else None
    residual = draws(B, N, OC, seed=3).astype(dtype) if added else None
    panels = np.full(cpu.panels_shape(OC, C), np.nan, dtype)
    cpu.pack_weight(panels, weight, bias)
    got, want = np.full((2, B, N, OC), np.nan, dtype)
    cpu.panels_forward(got, inp, panels, residual)
    cpu.matmul_forward(want, inp, weight, bias, residual)
    assert np.array_equal(got, want)
    if added:  # in place
        cpu.panels_forward(residual, inp, panels, residual)
        assert np.array_equal(residual, want)


@few
@given(
    st.sampled_from([1, 5, 96, 97, 210, 400]),
    st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    st.sampled_from([2, 10, 16, 64, 256]),
    st.none() | st.integers(1, 12) | st.sampled_from([95, 96, 97, 150, 999]),
    st.sampled_from([{}, {"scale": 0.2}, {"softcap": 3.0}]),
    st.sampled_from([np.float32, np.float64]),
    st.data(),
)
def test_a_window_has_the_bits_of_the_whole(
    T, heads, hs, window, rule, dtype, data
):
    """Also where the cache is a ring, and shorter than the text."""
    (NH, NKV), rule = heads, {"window": window, **rule}
    qkv = draws(2, T, (NH + 2 * NKV) * hs, dtype=dtype)
    want, lse = np.empty((2, T, NH * hs), dtype), np.empty((2, NH, T), dtype)
    cpu.local_attention_forward(want, lse, qkv, **rule)
    shapes = cpu.cache_shapes(2, NKV, T + 3, hs, window)
    cache = [np.full(shape, np.nan, dtype) for shape in shapes.values()]
    if window and data.draw(st.booleans()):
        rule["window"] = np.int32(window)  # the kernels read 64 bits
    first = 0
    while first < T:
        new = data.draw(st.integers(1, T - first))
        part = np.ascontiguousarray(qkv[:, first : first + new])
        got = np.empty((2, new, NH * hs), dtype)
        cpu.cache_attention(got, *cache, part, first, **rule)
        assert np.array_equal(got, want[:, first : first + new])
        first += new


def test_threads_change_no_bit():
    model, text = model_of(), [3, 1, 4, 1, 5]
    assert_threads_change_no_bit(lambda: Decoder.of(model).following([text]))


# the decoder


@pytest.mark.parametrize("name", [None, "mistral-7b-v0.1", "gemma-3-1b"])
@few
@given(st.data(), st.sampled_from(["fp32", "fp64"]))
def test_logits_have_the_bits_of_the_model(name, data, precision):
    """Whatever texts are asked for, in whatever order.

    They part within a window, before it and before the ring that holds it;
    some are computed in parts.
    """
    cfg, most = (small(name, window=30), 150) if name else (CFG, T)
    model = model_of(cfg, most, 3, precision)
    decoder, text = Decoder.of(model, 3), []
    for _ in range(6):
        kept = data.draw(st.integers(0, len(text)))
        new, more = data.draw(st.tuples(TOKENS, st.integers(0, most)))
        tail = (new + np.arange(more) ** 2) % V
        text = [*text[:kept], *tail.tolist()][:most] or [1]
        rows = [[*text[:-1], x] for x in (text[-1], 0, 77)]
        rows = rows[: data.draw(st.integers(1, 3))]
        got = decoder.following(rows)
        window = np.zeros((3, most), np.int32)
        window[: len(rows), : len(text)] = rows
        model.forward(window)
        assert np.array_equal(got, model.logits[: len(rows), len(text) - 1])


def test_texts_that_begin_alike_are_computed_once():
    model = model_of()
    decoder, seen = Decoder.of(model, 3), []
    whole = decoder._extend
    decoder._extend = lambda t, first: (seen.append(t.shape), whole(t, first))
    decoder.following([[1, 2, 3]] * 3)
    decoder.following([[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 3, 4]])
    decoder.following([[1, 2, 3, 4], [1, 2, 3, 5]])
    decoder.following([[1, 2, 9, 9], [1, 2, 3, 5]])
    decoder.following([[1, 2, 9, 9, 9]])
    assert seen == [(1, 3), (3, 1), (2, 1), (2, 2), (1, 1)]


def test_an_interrupted_call_leaves_nothing_wrong(monkeypatch):
    decoder, text = Decoder.of(model_of()), [5, 6, 7, 8, 9]
    want = decoder.following([text]).copy()
    decoder.following([[1, 2, 3]])
    whole = decode.block_forward

    def interrupted(*args, **how):
        whole(*args, **how)
        raise KeyboardInterrupt

    monkeypatch.setattr(decode, "block_forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        decoder.following([text])
    monkeypatch.undo()
    assert np.array_equal(decoder.following([text]), want)


def test_an_interrupted_loading_leaves_no_stale_keys(monkeypatch):
    model, text = model_of(), [1, 2, 3, 4]
    decoder = Decoder.of(model)
    decoder.following([text])
    for array in model.params.values():
        array *= 2
    pack, count = cpu.pack_weight, iter(range(100))

    def interrupted(*args):
        if next(count) == 5:
            raise KeyboardInterrupt
        pack(*args)

    monkeypatch.setattr(cpu, "pack_weight", interrupted)
    with pytest.raises(KeyboardInterrupt):
        decoder.adopt(model.params)
    got = decoder.following([text])
    decoder.following([[9]])  # another text: nothing is kept
    assert np.array_equal(got, decoder.following([text]))


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_from_checkpoint(tmp_path, suffix):
    model = model_of()
    path = tmp_path / f"model.{suffix}"
    model.save_checkpoint(path)
    decoder = Decoder.from_checkpoint(path, 2, 20)
    assert (decoder.batch_size, decoder.seq_len) == (2, 20)
    got = decoder.following([[9, 8, 7]])
    want = Decoder.of(model).following([[9, 8, 7]])
    assert np.array_equal(got, want)
    # for a tokenizer of fewer tokens the rows beyond are padding
    few = Decoder.from_checkpoint(path, 2, 20, tokens=V - 2)
    assert np.array_equal(few.following([[9, 8, 7]]), want[:, : V - 2])
    with pytest.raises(ValueError, match=rf"must lie in \[0, {V - 2}\)"):
        few.following([[V - 2]])


@pytest.mark.parametrize(
    ("texts", "error", "message"),
    [
        ([], ValueError, r"shape \(N, T\), N at most 2 and T at most 40"),
        ([[]], ValueError, r"got \(1, 0\)"),
        ([[1]] * 3, ValueError, r"got \(3, 1\)"),
        ([[1] * 41], ValueError, r"got \(1, 41\)"),
        ([[V]], ValueError, rf"must lie in \[0, {V}\), got {V}"),
        ([[-1]], ValueError, r"got -1"),
        ([[0.5]], TypeError, "must hold integers"),
    ],
)
def test_bad_texts(texts, error, message):
    with pytest.raises(error, match=message):
        Decoder.of(model_of(), 2).following(texts)


@pytest.mark.parametrize(
    ("name", "change", "error", "says"),
    [
        ("wpe", lambda x: x[:1], ValueError, r"must have shape \(\d+, "),
        ("lnfb", lambda x: x.astype(int), TypeError, "must be float32 or flo"),
        ("fcprojb", lambda x: x.tolist(), TypeError, "must be .* got list"),
        ("qkvw", lambda x: None, TypeError, "must be .* got NoneType"),
    ],
)
def test_weights_that_do_not_fit_are_not_loaded(name, change, error, says):
    """One row of positions would fill all of them, were it not refused."""
    model = model_of()
    decoder = Decoder.of(model, 2)
    before = decoder.memory.flat("vectors").copy()
    params = {n: x + 1 for n, x in model.params.items()}
    params[name] = change(params[name])
    with pytest.raises(error, match=f"Decoder.adopt: {name} {says}"):
        decoder.adopt(params)
    assert np.array_equal(decoder.memory.flat("vectors"), before)


@pytest.mark.parametrize("sizes", [(0, 8), (1, 0), (1, 65)])
def test_bad_sizes(sizes):
    with pytest.raises(ValueError, match="seq_len 1 to 64, got"):
        Decoder(CFG, *sizes)


@pytest.mark.parametrize("first", [-1, 4])
def test_positions_beyond_the_cache(first):
    keys, values = (
        np.zeros(s, np.float32) for s in cpu.cache_shapes(1, 1, 16, 8).values()
    )
    out, inp = draws(1, 13, 8), draws(1, 13, 24)
    with pytest.raises(ValueError, match="where the cache has 16"):
        cpu.cache_attention(out, keys, values, inp, first)


# Part 5


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_the_bits_of_its_model(name, precision):
    length = 150
    model = model_of(small(name), length, 2, precision)
    texts = np.random.RandomState(0).randint(0, V, (2, length))
    model.forward(texts)
    decoder = Decoder.of(model, 2)
    for end in [*range(1, 12), 40, 41, 96, 97, 98, 137, 138, 150]:
        got = decoder.following(texts[:, :end])
        assert np.array_equal(got, model.logits[:, end - 1]), end


def test_texts_that_part_before_the_ring_are_computed_anew():
    model = model_of(small("mistral-7b-v0.1"), 150)
    decoder, seen = Decoder.of(model), []
    whole = decoder._extend
    decoder._extend = lambda t, first: (seen.append(first), whole(t, first))
    text = list(range(120))
    decoder.following([text])
    decoder.following([text[:100]])  # position 99 sees 60, and 24 is kept
    decoder.following([text[:100] + [7]])
    decoder.following([text[:70] + [7]])  # 70 sees 31
    decoder.following([text[:63] + [7]])  # 63 sees 24
    decoder.following([text[:62] + [7]])  # 62 sees 23, which is overwritten
    assert seen == [0, 99, 100, 70, 63, 0]


@pytest.mark.parametrize("length", [100, 32768])
@pytest.mark.parametrize("name", PRESETS)
def test_a_cache_holds_kv_heads_and_no_more_than_a_window(name, length):
    cfg = replace(PRESETS[name], max_seq_len=length)
    layout = decode.decoder_layout(cfg, 3, length)["cache"][1]
    for i in range(cfg.num_layers):
        seen = min(length, cfg.window) if cfg.is_local(i) else length
        keys, values = layout[f"keys{i}"], layout[f"values{i}"]
        assert keys[:2] == values[:2] == (3, cfg.num_kv_heads)
        assert seen <= values[2] <= min(length, seen + 95)
        assert 0 <= keys[2] * keys[4] - values[2] < keys[4]

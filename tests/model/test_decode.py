"""The cache: every number equals full recomputation, to the last bit."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmnb import cpu
from llmnb.config import GPT2Config
from llmnb.cpu.attention import block_size
from llmnb.model import decode
from llmnb.model.architectures import PRESETS
from llmnb.model.decode import POSITIONS, Decoder
from llmnb.model.generate import generate, generate_samples
from llmnb.model.gpt2 import GPT2

few = settings(max_examples=40, deadline=None, derandomize=True)
V, T = 131, 40
CFG = GPT2Config(64, V, 3, 3, 30)


def model_of(seq_len=T, batch_size=1, precision="fp32", cfg=CFG):
    model = GPT2(cfg, batch_size, seq_len, "cpu", precision)
    rng = np.random.RandomState(1)
    scales = {"wte": 6, "wpe": 1}
    for name, p in model.params.items():  # far from uniform
        if name[-1] == "b":
            p += rng.normal(0, 0.05, p.shape)
        elif "ln" not in name:
            p *= scales.get(name, 15)
    model.params["wte"][V:] = 0
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
    first = 0
    while first < T:
        new = data.draw(st.integers(1, T - first))
        part = np.ascontiguousarray(qkv[:, first : first + new])
        got = np.empty((2, new, NH * hs), dtype)
        cpu.cache_attention(got, *cache, part, first, **rule)
        assert np.array_equal(got, want[:, first : first + new])
        first += new


def test_embedding_has_the_bits_of_the_encoder():
    wte, wpe = draws(V, 30), draws(9, 30, seed=1)
    panels = np.empty(cpu.panels_shape(V, 30), np.float32)
    cpu.pack_weight(panels, wte)
    tokens = np.array([[0, 130, 5, 6], [7, 7, 129, 64]], np.int32)
    got, want = np.empty((2, 2, 4, 30), np.float32)
    cpu.embed_forward(got, tokens, panels, wpe, 0)
    cpu.encoder_forward(want, tokens, wte, wpe)
    assert np.array_equal(got, want)
    cpu.embed_forward(got, tokens, panels, wpe, 5)
    cpu.encoder_forward(want, tokens, wte, wpe[5:].copy())
    assert np.array_equal(got, want)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_change_no_bit(threads):
    import numba

    if threads > numba.config.NUMBA_NUM_THREADS:
        pytest.skip("this machine has one thread")
    before = numba.get_num_threads()
    numba.set_num_threads(threads)
    try:
        model, text = model_of(), [3, 1, 4, 1, 5]
        got = Decoder.of(model).following([text])
    finally:
        numba.set_num_threads(before)
    model.forward(np.array([text + [0] * (T - 5)]))
    assert np.array_equal(got[0], model.logits[0, 4])


# the decoder


@few
@given(st.data(), st.sampled_from(["fp32", "fp64"]))
def test_logits_have_the_bits_of_the_model(data, precision):
    """Whatever texts are asked for, in whatever order."""
    model = model_of(T, 3, precision)
    decoder, text = Decoder.of(model, 3), []
    for _ in range(6):
        change = st.lists(st.integers(0, V - 1), max_size=6)
        kept = data.draw(st.integers(0, len(text)))
        text = (text[:kept] + data.draw(change))[:T] or [1]
        rows = [[*text[:-1], x] for x in (text[-1], 0, 77)]
        rows = rows[: data.draw(st.integers(1, 3))]
        got = decoder.following(rows)
        window = np.zeros((3, T), np.int32)
        window[: len(rows), : len(text)] = rows
        model.forward(window)
        assert np.array_equal(got, model.logits[: len(rows), len(text) - 1])


def test_long_prompts_are_taken_in_parts():
    length = POSITIONS + 50
    cfg = GPT2Config(length, V, 2, 2, 16)
    model = model_of(length, 2, cfg=cfg)
    texts = np.random.RandomState(0).randint(0, V, (2, length))
    model.forward(texts)
    for rows in (1, 2):
        got = Decoder.of(model, 2).following(texts[:rows])
        assert np.array_equal(got, model.logits[:rows, -1])


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
    layers = decode.LAYERS

    class Interrupted:
        calls = 0

        def __getattr__(self, name):
            self.calls += 1
            if self.calls == 12:
                raise KeyboardInterrupt
            return getattr(layers, name)

    monkeypatch.setattr(decode, "LAYERS", Interrupted())
    with pytest.raises(KeyboardInterrupt):
        decoder.following([text])
    monkeypatch.setattr(decode, "LAYERS", layers)
    assert np.array_equal(decoder.following([text]), want)


def test_loading_forgets_the_cache():
    model = model_of()
    decoder = Decoder.of(model)
    before = decoder.following([[1, 2, 3]]).copy()
    for p in model.params.values():
        p *= 1.1
    assert np.array_equal(decoder.following([[1, 2, 3]]), before)
    decoder.adopt(model.params)
    model.forward(np.array([[1, 2, 3] + [0] * (T - 3)]))
    assert np.array_equal(
        decoder.following([[1, 2, 3]])[0], model.logits[0, 2]
    )


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


def modern(name, seq_len, batch_size=1, precision="fp32", window=40):
    cfg = small(name, window)
    model = GPT2(cfg, batch_size, seq_len, "cpu", precision)
    rng = np.random.RandomState(1)
    for key, p in model.params.items():
        p *= 4 if p.ndim > 1 and key != "wte" else 1
        p += rng.normal(0, 0.1, p.shape)
        if key in ("wte", "head"):
            p[V:] = 0
    return model


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_the_bits_of_its_model(name, precision):
    length = 150
    model = modern(name, length, 2, precision)
    texts = np.random.RandomState(0).randint(0, V, (2, length))
    model.forward(texts)
    decoder = Decoder.of(model, 2)
    for end in [*range(1, 12), 40, 41, 96, 97, 98, 137, 138, 150]:
        got = decoder.following(texts[:, :end])
        assert np.array_equal(got, model.logits[:, end - 1]), end


@few
@given(st.data(), st.sampled_from(["mistral-7b-v0.1", "gemma-3-1b"]))
def test_a_ring_gives_the_bits_whatever_is_asked(data, name):
    """Texts part within the window, before it, and before the ring."""
    model = modern(name, 150, 2, window=30)
    decoder, text = Decoder.of(model, 2), []
    for _ in range(6):
        kept = data.draw(st.integers(0, len(text)))
        more = data.draw(st.integers(0, 120))
        new = data.draw(st.integers(0, V - 1))
        tail = (new + np.arange(more) ** 2) % V
        text = [*text[:kept], *tail.tolist()][:150] or [1]
        rows = [[*text[:-1], x] for x in (text[-1], 5)]
        rows = rows[: data.draw(st.integers(1, 2))]
        got = decoder.following(rows)
        window = np.zeros((2, 150), np.int32)
        window[: len(rows), : len(text)] = rows
        model.forward(window)
        assert np.array_equal(got, model.logits[: len(rows), len(text) - 1])


def test_texts_that_part_before_the_ring_are_computed_anew():
    model = modern("mistral-7b-v0.1", 150)
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


@pytest.mark.parametrize("name", PRESETS)
def test_a_cache_holds_kv_heads_and_no_more_than_a_window(name):
    cfg = small(name, window=100)
    layout = decode.decoder_layout(cfg, 3, 150)["cache"][1]
    whole = replace(PRESETS[name], max_seq_len=32768)
    far = decode.decoder_layout(whole, 1, 32768)["cache"][1]
    for i in range(cfg.num_layers):
        values, kept = layout[f"values{i}"], 150
        if cfg.is_local(i):
            kept = 100 + -100 % block_size(8)
        kept = min(150, kept)
        assert values[:3] == (3, cfg.num_kv_heads, kept)
        keys = layout[f"keys{i}"]
        assert keys[:2] == (3, cfg.num_kv_heads)
        assert 0 <= keys[2] * keys[4] - kept < keys[4]
    for i in range(whole.num_layers):
        kept = far[f"values{i}"][2]
        if whole.is_local(i):
            assert whole.window <= kept < whole.window + 96
        else:
            assert kept == 32768


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_writes_the_same_texts(name):
    """Beyond max_seq_len too, where the window slides."""
    model = modern(name, 40)
    for how in ({"temperature": 0}, {"top_k": 9}):
        want = list(generate(model, [1, 2, 3], 60, seed=4, **how))
        got = list(generate(Decoder.of(model), [1, 2, 3], 60, seed=4, **how))
        assert got == want


@pytest.mark.parametrize("name", ["llama-2-7b", "gemma-2-2b"])
def test_samples_of_a_modern_model(name):
    model = modern(name, 40)
    ask = {"tokens": [1], "count": 50, "samples": 3, "seed": 3}
    got = list(generate_samples(Decoder.of(model, 3), **ask))
    assert got == list(generate_samples(model, **ask))


# texts


@settings(few, max_examples=12)
@given(
    st.lists(st.integers(0, V - 1), min_size=1, max_size=60),
    st.integers(0, 2**32 - 1),
    st.sampled_from([0, 0.5, 1, 2]),
    st.none() | st.integers(1, 50),
    st.none() | st.floats(0.1, 1),
)
def test_the_same_texts_with_and_without(prompt, seed, heat, top_k, top_p):
    """Beyond the window too: 60 tokens are drawn, 40 fit."""
    model = model_of()
    draw = {"temperature": heat, "top_k": top_k, "top_p": top_p, "seed": seed}
    want = list(generate(model, prompt, 60, **draw))
    assert list(generate(Decoder.of(model), prompt, 60, **draw)) == want


def test_the_same_samples_with_and_without():
    model = model_of()
    free = list(generate(model, [1], 60, seed=4))
    ask = {"tokens": [1], "count": 60, "samples": 5, "seed": 3}
    for stop in (None, free[20]):
        want = list(generate_samples(model, **ask, stop=stop))
        got = list(generate_samples(Decoder.of(model, 5), **ask, stop=stop))
        assert got == want

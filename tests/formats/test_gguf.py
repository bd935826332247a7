"""GGUF files, which the tests write with the library gguf."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fuzz import altered, answer, fuzzed, mangled, put_number, refused
from llamas import write_gguf

import llmnb
from llmnb.formats import gguf as ours
from llmnb.formats.checkpoint import open_model
from llmnb.formats.published import pieces
from llmnb.model.tensors import full_shape, parameter_shapes, tensor_table
from llmnb.reference.rotary import rope_frequencies

gguf = pytest.importorskip("gguf")
FAMILIES = Path(__file__).parents[1] / "data" / "families"
KINDS = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2"}
KINDS |= {"qwen3": "qwen3", "gemma": "gemma", "gemma2": "gemma2"}
KINDS |= {"gemma3_text": "gemma3"}
WIDE = llmnb.LlamaConfig(
    16, 61, 2, 4, 64, num_kv_heads=2, hidden=96, tied=True
)


# the keys there -> what they say of a configuration
SAID = {
    "context_length": "max_seq_len", "block_count": "num_layers",
    "embedding_length": "channels", "feed_forward_length": "hidden",
    "attention.head_count": "num_heads",
    "attention.head_count_kv": "num_kv_heads",
    "attention.key_length": "head_size",
    "attention.value_length": "head_size",
    "attention.layer_norm_rms_epsilon": "norm_eps",
    "rope.freq_base": "rope_theta", "attention.sliding_window": "window",
    "attn_logit_softcapping": "attention_softcap",
    "final_logit_softcapping": "final_softcap",
}  # fmt: skip


def random_params(cfg):
    """Weights, by our names; the padding is 0."""
    rng = np.random.default_rng(0)
    params = {}
    for x in tensor_table(cfg):
        shape = full_shape(x, cfg)
        params[x.name] = rng.normal(size=shape).astype(np.float32)
        if x.used:
            params[x.name][x.used :] = 0
    return params


def metadata(cfg):
    """What a file says of a configuration."""
    found = {key: getattr(cfg, name) for key, name in SAID.items()}
    return {key: x for key, x in found.items() if x is not None}


def tensors(cfg, params):
    """Name there -> array, in llama.cpp's order of rows."""
    found = {}
    for published, place in pieces(cfg).items():
        x, name = place.of(params), ours.gguf_name(published, cfg)
        if KINDS[cfg.family] == "llama" and ".attn_" in name:
            turned = name.endswith(("attn_q.weight", "attn_k.weight"))
            x = ours.interleaved(x, cfg.head_size) if turned else x
        if name.endswith("norm.weight"):
            x = x + np.float32(cfg.offset)
        found[name] = np.ascontiguousarray(x)
    return found


def packed_as(x, kind):
    """Bytes and type; vectors stay float32, as in published files."""
    if type(x) is tuple:
        return x
    if kind is None or x.ndim == 1:
        return x, None
    kind = gguf.GGMLQuantizationType[kind]
    return gguf.quantize(x, kind), kind


def write_model(path, cfg, params, pack=None, keys=(), arrays=()):
    """As llama.cpp's converter writes it; keys, arrays: what is otherwise.

    An array may be a tuple: its bytes and type, as they lie there.
    """
    kind, said = KINDS[cfg.family], altered(metadata(cfg), dict(keys))
    said = {f"{kind}.{key}": x for key, x in said.items()}
    held = altered(tensors(cfg, params), dict(arrays))
    rows = [(name, *packed_as(x, pack)) for name, x in held.items()]
    return write_gguf(path, said, kind, rows)


def read(path):
    """Configuration and weights of a file."""
    found = open_model(path)
    shapes = parameter_shapes(found.cfg).items()
    params = {name: np.full(x, np.nan, np.float32) for name, x in shapes}
    found.read(params)
    return found.cfg, params


def fixture(name):
    model = llmnb.load(FAMILIES / name, 2, 17, "reference", "fp32")
    return model, np.load(FAMILIES / name / "expected.npz")


@pytest.mark.parametrize(
    "name", ["llama2", "mistral", "mistral3", "qwen2", "qwen3", "gemma"]
)
def test_a_family_written_as_llama_cpp_does_is_read_back(name, tmp_path):
    model, want = fixture(name)
    path = write_model(tmp_path / "a.gguf", model.cfg, model.params)
    again = llmnb.load(path, 2, 17, "reference", "fp64")
    assert vars(again.cfg) == vars(model.cfg)
    for key, x in model.params.items():
        # 1 + w of float32 numbers loses their last bits
        error = np.abs(again.params[key] - x).max()
        assert error <= (2.0**-23 if model.cfg.offset else 0), key
    again.forward(want["tokens"][:, :-1])
    assert np.abs(again.logits - want["fp64.logits"]).max() < 1e-5
    if name == "llama2":  # rows in another order would show
        for x in again.params["qkvw"]:
            x[:24] = ours.interleaved(x[:24], 6)
        again.forward(want["tokens"][:, :-1])
        assert np.abs(again.logits - want["fp64.logits"]).max() > 0.1


@pytest.mark.parametrize(("kind", "most"), [("gemma2", 46), ("gemma3", 62)])
def test_gemmas_settings_are_read(kind, most, tmp_path):
    """Windows, caps, both kinds of frequency; the file says no scale, and
    that of the model with the most layers is another."""
    model, _ = fixture(kind)
    cfg = replace(model.cfg, attention_scale=None)
    path = write_model(tmp_path / "a.gguf", cfg, model.params)
    assert ours.gguf_config(ours.GGUFFile(path)) == cfg
    cfg = replace(cfg, num_layers=most)
    path = write_model(tmp_path / "b.gguf", cfg, random_params(cfg))
    found = ours.gguf_config(ours.GGUFFile(path))
    assert found.attention_scale == (cfg.channels / cfg.num_heads) ** -0.5


# the largest error of a block, in parts of its largest number
PACKED = {
    "F32": 0, "F16": 2**-11, "BF16": 2**-8, "Q8_0": 0.5 / 127,
    "Q5_0": 1 / 16, "Q5_1": 1 / 31, "Q4_0": 1 / 8, "Q4_1": 1 / 15,
}  # fmt: skip


@pytest.mark.parametrize("kind", PACKED)
def test_packed_numbers_come_back_nearly(kind, tmp_path):
    params = random_params(WIDE)
    path = write_model(tmp_path / "a.gguf", WIDE, params, kind)
    cfg, found = read(path)
    assert cfg == WIDE
    for name, x in params.items():
        error, most = np.abs(found[name] - x), np.abs(x).max()
        exact = kind == "F32" or name.startswith("ln")
        assert error.max() <= (0 if exact else 1.01 * PACKED[kind] * most)
        assert exact or error.max() > 0


def q6_k(rows, d):
    """Blocks of 256 numbers, all d: 6 bits 33, less 32, times scale 1."""
    low, high = np.full(128, 0x11, np.uint8), np.full(64, 0xAA, np.uint8)
    ones = np.ones(16, np.uint8)
    scale = np.array([d], np.float16).view(np.uint8)
    return np.tile(np.concatenate([low, high, ones, scale]), (rows, 1))


def test_k_quants_are_unpacked(tmp_path):
    cfg = llmnb.LlamaConfig(16, 61, 1, 4, 256, hidden=256, tied=True)
    params, kind = random_params(cfg), gguf.GGMLQuantizationType.Q6_K
    up = {"blk.0.ffn_up.weight": (q6_k(256, 0.5), kind)}
    path = write_model(tmp_path / "a.gguf", cfg, params, arrays=up)
    _, found = read(path)
    assert (found["fcw"][0, 256:] == 0.5).all()
    assert np.array_equal(found["fcw"][0, :256], params["fcw"][0, :256])


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_scaled_rotations_are_recognised(factor, tmp_path):
    scaling = "llama3", factor, 1.0, 4.0, 8192
    cfg = replace(WIDE, rope_theta=500000.0)
    plain = rope_frequencies(cfg.head_size, cfg.rope_theta)
    scaled = rope_frequencies(cfg.head_size, cfg.rope_theta, scaling)
    factors = {"rope_freqs.weight": (plain / scaled).astype(np.float32)}
    params = random_params(cfg)
    path = write_model(tmp_path / "a.gguf", cfg, params, arrays=factors)
    assert ours.open_gguf(path)[0].rope_scaling == scaling


def test_a_linear_scaling_is_read(tmp_path):
    """3.3 as it was meant; and a factor alone is one, as in llama.cpp."""
    said = {"rope.scaling.type": "linear", "rope.scaling.factor": 3.3}
    params = random_params(WIDE)
    for keys, want in (
        (said, ("linear", 3.3)),
        ({"rope.scaling.factor": 4.0}, ("linear", 4.0)),
        (said | {"rope.scaling.type": "none"}, None),
    ):
        path = write_model(tmp_path / "a.gguf", WIDE, params, keys=keys)
        assert ours.open_gguf(path)[0].rope_scaling == want


# keys and tensors that are gone (None) or others
BAD = [
    ("block_count", None, "lacks llama.block_count"),
    ("attention.layer_norm_rms_epsilon", None, "lacks llama.attention"),
    ("attention.head_count", 0, "num_heads must be"),
    ("block_count", "two", "num_layers must be"),
    ("attention.head_count_kv", [2, 2], "num_kv_heads must be"),
    ("block_count", 2**30, "block_count is"),
    ("block_count", 2**31, "num_layers must be"),
    ("block_count", 3, "has no tensor blk.2."),
    ("block_count", 1, "a llama has no tensor blk"),
    ("rope.dimension_count", 8, "the head size"),
    ("attention.value_length", 8, "the head size"),
    ("attention.head_count_kv", 3, "num_kv_heads"),
    ("feed_forward_length", 97,
     r"ffn_gate.weight must be \(97, 64\), got \(96, 64\)"),
    ("embedding_length", 32, r"must be \(61, 32\)"),
    ("rope.scaling.type", "yarn", "scaling 'yarn' is not known"),
    ("rope.scaling.type", "linear", "rope_scaling must be"),
    ("rope_freqs.weight", np.full(8, 2, "f4"),
     "factors of rope_freqs.weight are not known"),
    ("rope_freqs.weight", np.full(3, 2, "f4"),
     "factors of rope_freqs.weight are not known"),
    ("blk.0.attn_q.bias", np.zeros(64, "f4"),
     "a llama has no tensor blk.0.attn_q.bias"),
    ("token_embd.weight", None, "has no table token_embd.weight"),
    ("token_embd.weight", np.zeros(64, "f4"), "no table token_embd.weight"),
    ("blk.1.ffn_up.weight", None, "has no tensor blk.1.ffn_up.weight"),
    ("output_norm.weight", np.ones(64, "i4"),
     "output_norm.weight is I32, which gguf cannot unpack"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value", "says"), BAD)
def test_what_contradicts_itself_is_refused(name, value, says, tmp_path):
    which = "arrays" if name.endswith((".weight", ".bias")) else "keys"
    params, how = random_params(WIDE), {which: {name: value}}
    refused(says, read, write_model(tmp_path / "a.gguf", WIDE, params, **how))


def test_what_is_no_gguf_is_said_to_be_what_it_is(tmp_path):
    path = tmp_path / "a.gguf"
    with pytest.raises(FileNotFoundError):
        ours.open_gguf(path)
    for raw, says in (
        (b"", "empty file"),
        (b"<!doctype html>", "a web page"),
        (b"something else", "does not begin with GGUF"),
        (b"GGUF", "not a whole GGUF file"),
        (b"GGUF\x09\0\0\0", "not a whole GGUF file"),
    ):
        path.write_bytes(raw)
        refused(says, ours.open_gguf, path)
    write_gguf(path, {"mamba.block_count": 1}, "mamba")
    refused("one of llama, .*got 'mamba'", ours.open_gguf, path)


def test_the_other_order_of_bytes_is_refused(tmp_path):
    path, order = tmp_path / "a.gguf", gguf.GGUFEndian.BIG
    writer = gguf.GGUFWriter(path, "llama", endianess=order)
    writer.add_tensor("x", np.ones((2, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refused("begin with their other byte", ours.GGUFFile, path)


def test_a_file_in_the_place_of_another_is_read_anew(tmp_path):
    """Though its time and its size are the same."""
    one, two = tmp_path / "a.gguf", tmp_path / "b.gguf"
    params = random_params(TINY)
    write_model(one, TINY, params)
    write_model(two, TINY, {name: 2 * x for name, x in params.items()})
    read(one)
    now = one.stat().st_mtime_ns
    os.utime(two, ns=(now, now))
    two = two.rename(tmp_path / "c.gguf")
    one.rename(tmp_path / "b.gguf")
    two.rename(one)
    assert np.array_equal(read(one)[1]["wte"], 2 * params["wte"])


def test_a_length_that_lies_is_found_at_once(tmp_path):
    """The library alone would count to it."""
    path = write_gguf(tmp_path / "a.gguf", {"llama.list": [1, 2, 3]})
    raw = path.read_bytes()
    at = raw.index(b"llama.list") + len(b"llama.list") + 8
    assert raw[at : at + 8] == (3).to_bytes(8, "little")
    put_number(path, at, 2**60, 8)
    refused("not a whole GGUF file", ours.GGUFFile, path)


TINY = llmnb.LlamaConfig(8, 9, 1, 2, 8, hidden=8, tied=True)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "good.gguf"
    return write_model(path, TINY, random_params(TINY))


@fuzzed(300)
def test_a_damaged_file_gives_one_error(data, good):
    raw = data.draw(mangled(good.read_bytes()))
    found = answer(read, good.with_name("a.gguf"), raw)
    if not isinstance(found, Exception):
        assert all(np.isfinite(x).all() for x in found[1].values())

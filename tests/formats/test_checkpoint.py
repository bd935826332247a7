"""Models on disk: written, read back, and refused when they are bad."""

import importlib.util
import json
import os
import sys
import zlib
from functools import partial

import numpy as np
import pytest
from fuzz import cut_in_two, describe, put_number, refused, tensors_of
from measure import peak

from llmnb import GPT2, GPT2Config
from llmnb.formats import checkpoint, llmc, published
from llmnb.formats.checkpoint import open_model, read_config, write_folder
from llmnb.formats.llmc import write_checkpoint
from llmnb.formats.safetensors import write_tensors
from llmnb.model.decode import Decoder
from llmnb.reference.bfloat16 import from_bfloat16, to_bfloat16

CFG = GPT2Config(
    max_seq_len=9, vocab_size=131, num_layers=2, num_heads=3, channels=15
)


@pytest.fixture
def model():
    return GPT2(CFG, batch_size=1, seq_len=5, backend="reference")


@pytest.fixture
def saved(model, tmp_path):
    """The file that it was saved in."""
    model.save_checkpoint(tmp_path / "model.bin")
    return tmp_path / "model.bin"


def test_the_bytes_are_llm_cs(model, saved):
    raw = saved.read_bytes()
    header = np.frombuffer(raw[:1024], "<i4")
    assert header[:8].tolist() == [20240326, 3, 9, 131, 2, 3, 15, 256]
    assert not header[8:254].any()
    assert header[254] == 1  # the header's own sum follows
    sums = zlib.crc32(raw[:1020] + bytes(4), zlib.crc32(raw[1024:]))
    assert header[255:].view("<u4") == sums
    body = np.frombuffer(raw[1024:], "<f4")
    assert body.size == 256 * 15 + 9 * 15 + 2 * (12 * 225 + 13 * 15) + 30
    wte = model.params["wte"]
    np.testing.assert_array_equal(body[: wte.size], wte.ravel())
    np.testing.assert_array_equal(body[-15:], model.params["lnfb"])


@pytest.mark.parametrize("name", ("a.bin", "a.safetensors"))
def test_a_gpt2_of_other_parts_is_not_written_as_one(tmp_path, name):
    """Which would compute something else when it is read back."""

    class Unbiased(GPT2Config):
        bias = False

    other = GPT2(Unbiased(9, 131, 1, 1, 8), 1, 5, "reference")
    with pytest.raises(ValueError, match="as a GPT-2's, and this is a Unbias"):
        other.save_checkpoint(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_safetensors_are_hugging_faces(model, tmp_path):
    from safetensors.numpy import load_file

    model.save_checkpoint(tmp_path / "model.safetensors")
    tensors = load_file(tmp_path / "model.safetensors")
    assert len(tensors) == 4 + 2 * 12
    p = model.params
    for got, want in (
        (tensors["wte.weight"], p["wte"][:131]),
        (tensors["wpe.weight"], p["wpe"]),
        (tensors["ln_f.bias"], p["lnfb"]),
        (tensors["h.1.ln_2.weight"], p["ln2w"][1]),
        (tensors["h.0.attn.c_attn.weight"], p["qkvw"][0].T),
        (tensors["h.1.attn.c_proj.weight"], p["attprojw"][1].T),
        (tensors["h.1.mlp.c_fc.bias"], p["fcb"][1]),
        (tensors["h.1.mlp.c_proj.weight"], p["fcprojw"][1].T),
    ):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(("index", "value", "says"), [
    (0, 1, "magic number must be 20240326, got 1"),
    (1, 4, "version must be 3 or 5, got 4"),
    (2, 0, "max_seq_len must be a positive integer, got 0"),
    (4, 3, "size for this model must be"),
    (5, 4, "multiple of num_heads"),
    (7, 131, "padded vocabulary must be 256, got 131"),
    (4, 2**31 - 1, "size for this model must be"),
])  # fmt: skip
def test_a_bad_header_is_refused(saved, index, value, says):
    put_number(saved, 4 * index, value)
    refused(f"model.bin: .*{says}", GPT2.from_checkpoint, saved, 1, 5)


@pytest.mark.parametrize("size", [0, 1023, 1024, 5000, 1 << 20])
def test_a_file_of_another_length_is_refused(saved, size):
    os.truncate(saved, size)
    refused("bytes", read_config, saved)


def test_float64_is_stored_as_float32(tmp_path):
    model = GPT2(CFG, 1, 5, "reference", "fp64")
    model.params["fcw"][...] = 1 / 3
    model.save_checkpoint(tmp_path / "double.bin")
    how = 1, 5, "reference", "fp64"
    again = GPT2.from_checkpoint(tmp_path / "double.bin", *how)
    assert again.params["fcw"].dtype == np.float64
    assert (again.params["fcw"] == np.float32(1 / 3)).all()


def test_a_file_that_shrinks_while_it_is_read(model, saved, monkeypatch):
    half = saved.read_bytes()[:9000]
    fill = checkpoint.read_bin

    def shrink(path, *rest):
        path.write_bytes(half)
        fill(path, *rest)

    monkeypatch.setattr(checkpoint, "read_bin", shrink)
    with pytest.raises(ValueError, match="model.bin: ends within wte"):
        open_model(saved, 131).read(model.params)


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
def test_version_5_is_half_as_long(model, saved, tmp_path, precision):
    model.save_checkpoint(tmp_path / "half.bin", precision="bf16")
    raw = (tmp_path / "half.bin").read_bytes()
    assert len(raw) - 1024 == (saved.stat().st_size - 1024) // 2
    header = np.frombuffer(raw[:1024], "<i4")
    assert header[:8].tolist() == [20240326, 5, 9, 131, 2, 3, 15, 256]
    how = 1, 5, "reference", precision
    again = GPT2.from_checkpoint(tmp_path / "half.bin", *how)
    for name, array in model.params.items():
        want = from_bfloat16(to_bfloat16(array))
        np.testing.assert_array_equal(again.params[name], want)


def test_a_precision_that_a_format_lacks(model, tmp_path):
    with pytest.raises(ValueError, match="precision must be one of 'fp32'"):
        model.save_checkpoint(tmp_path / "a.safetensors", precision="bf16")
    with pytest.raises(ValueError, match="'fp32', 'bf16', got 'fp16'"):
        model.save_checkpoint(tmp_path / "a.bin", precision="fp16")
    with pytest.raises(ValueError, match="version must be 3 .* got 4"):
        write_checkpoint(tmp_path / "a", CFG, model.params["wte"][0], 4)
    assert not list(tmp_path.glob("a*"))


@pytest.mark.parametrize("name", ["model.bin", "model.safetensors"])
def test_another_models_arrays_are_not_written(model, saved, name):
    model.save_checkpoint(saved.with_name(name))
    before = saved.with_name(name).read_bytes()
    params = dict(model.params) | {"wpe": np.zeros((10, 15), np.float32)}
    with pytest.raises(ValueError, match=r"wpe must have shape \(9, 15\), g"):
        checkpoint.write_model(saved.with_name(name), CFG, params)
    assert saved.with_name(name).read_bytes() == before


@pytest.mark.parametrize("name", ["model.gguf", "model.json"])
def test_a_name_of_another_format_is_not_written(model, tmp_path, name):
    with pytest.raises(ValueError, match=f"{name}: .* in .safetensors or"):
        model.save_checkpoint(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_every_second_number_of_an_array_is_written(model, saved):
    wide = np.repeat(model.params["lnfw"], 2)
    before = saved.read_bytes()
    write_checkpoint(saved, CFG, dict(model.params) | {"lnfw": wide[::2]})
    assert saved.read_bytes() == before


def test_long_tensors_are_read_in_pieces(model, saved, monkeypatch):
    monkeypatch.setattr(llmc, "_PORTION", 7)
    again = GPT2.from_checkpoint(saved, 1, 5, "reference")
    again.save_checkpoint(saved.with_name("again.bin"))
    assert saved.with_name("again.bin").read_bytes() == saved.read_bytes()


# Hugging Face's layout


def same(model, path):
    """Whether a path holds a model's weights, to the last bit."""
    again = GPT2.from_checkpoint(path, 2, 3, "reference")
    assert again.cfg == model.cfg
    for name, array in model.params.items():
        np.testing.assert_array_equal(again.params[name], array)


@pytest.fixture
def folder(model, tmp_path):
    """Its model folder."""
    write_folder(tmp_path / "folder", CFG, model.params)
    return tmp_path / "folder"


def rewrite(folder, tensors, metadata=None):
    write_tensors(folder / "model.safetensors", tensors, metadata)


def test_a_model_comes_back_from_any_path(model, folder, saved):
    """A model folder, a run's folder, a file of either."""
    weights = folder / "model.safetensors"
    for path in (folder, weights, saved.parent, saved):
        same(model, path)
    (folder / "config.json").unlink()  # our metadata has the heads
    same(model, folder)


@pytest.mark.parametrize("prefix", ["", "transformer."])
@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_the_variants_of_the_layout(model, folder, prefix, indexed, tied):
    """tied: one name of two, and a note, as safetensors' save_model has it."""
    tensors = {prefix + n: x for n, x in tensors_of(folder).items()}
    mask = np.tril(np.ones((1, 1, 9, 9), np.uint8))
    for layer in range(2):
        tensors[f"{prefix}h.{layer}.attn.bias"] = mask
        tensors[f"{prefix}h.{layer}.attn.masked_bias"] = np.float32([-1e4])
    tensors["lm_head.weight"] = tensors[prefix + "wte.weight"].copy()
    note = {"format": "pt", f"{prefix}wte.weight": "lm_head.weight"}
    if tied:
        del tensors[prefix + "wte.weight"]
    if indexed:
        same(model, cut_in_two(folder, tensors))
    else:
        rewrite(folder, tensors, note if tied else None)
    same(model, folder)


def test_half_precision_is_read(model, folder):
    halves = {n: x.astype(np.float16) for n, x in tensors_of(folder).items()}
    rewrite(folder, halves)
    again = GPT2.from_checkpoint(folder, 1, 5, "reference")
    want = model.params["fcw"].astype(np.float16)
    np.testing.assert_array_equal(again.params["fcw"], want)


def bare(folder, cfg):
    """A model in a folder that does not say how many heads it has."""
    model = GPT2(cfg, 1, 5, "reference")
    write_folder(folder, cfg, model.params)
    rewrite(folder, tensors_of(folder))
    (folder / "config.json").unlink()
    return model


@pytest.mark.parametrize("channels", [64, 128])  # one head, or two, or four
def test_heads_without_a_config_are_asked_for(tmp_path, channels):
    model = bare(tmp_path, GPT2Config(5, 9, 1, 2, channels))
    refused("how many heads.*config.json", read_config, tmp_path)
    (tmp_path / "config.json").write_text('{"n_head": 2}')
    same(model, tmp_path)


def test_heads_of_the_published_shapes_are_known(tmp_path, monkeypatch):
    """GPT-2's 124M has 12 blocks of 768 channels; the same with less."""
    assert published.PUBLISHED[12, 768] == 12
    monkeypatch.setitem(published.PUBLISHED, (1, 18), 6)
    same(bare(tmp_path, GPT2Config(5, 9, 1, 6, 18)), tmp_path)
    bare(tmp_path, GPT2Config(5, 9, 2, 6, 18))  # as wide, but not as deep
    refused("how many heads", read_config, tmp_path)


@pytest.mark.parametrize("kind", ["folder", "fp32", "bf16"])
@pytest.mark.parametrize("rows", [132, 256])
def test_rows_beyond_the_tokenizers_are_padding(model, folder, kind, rows):
    tensors, more = tensors_of(folder), np.full((rows - 131, 15), 9, "f4")
    tensors["wte.weight"] = np.concatenate([tensors["wte.weight"], more])
    rewrite(folder, tensors)
    describe(folder, vocab_size=rows)
    path = folder
    wide = GPT2.from_checkpoint(folder, 1, 5, "reference")
    assert wide.cfg.vocab_size == rows
    if kind != "folder":
        path = folder / f"{kind}.bin"
        wide.save_checkpoint(path, kind)
    narrow = GPT2.from_checkpoint(path, 1, 5, "reference", tokens=131)
    assert narrow.cfg == CFG
    assert not narrow.params["wte"][131:].any()
    tokens = np.array([[1, 2, 3, 4, 5]])
    loss = model.forward(tokens, tokens)
    assert wide.forward(tokens, tokens) > loss  # the others take a share
    if kind != "bf16":
        assert narrow.forward(tokens, tokens) == loss
        np.testing.assert_array_equal(narrow.logits, model.logits)


def test_rows_that_are_no_padding(folder):
    """More tokens than rows, or so few that the tokenizer is another."""
    for tokens in (132, 128, 1, 0):
        says = "has 131 tokens|positive integer"
        with pytest.raises(ValueError, match=says):
            read_config(folder, tokens)


def test_params_that_do_not_fit_stay_as_they_are(model, folder):
    before = model.params["wte"].copy()
    before[0] += 1
    params = dict(model.params, wte=before.copy(), lnfb=np.zeros(14, "f4"))
    with pytest.raises(ValueError, match="lnfb must have shape"):
        open_model(folder, 131).read(params)
    params["lnfb"] = np.zeros(15, "i4")
    with pytest.raises(TypeError, match="lnfb must be float32 or float64"):
        open_model(folder, 131).read(params)
    np.testing.assert_array_equal(params["wte"], before)


@pytest.mark.parametrize(("name", "x", "says"), [
    ("wte.weight", None, "no GPT-2, it has no tensor wte.weight"),
    ("h.1.attn.c_attn.bias", None, "no tensor h.1.attn.c_attn.bias"),
    ("h.0.ln_1.weight", None, "num_layers must be a positive integer"),
    ("wpe.weight", np.ones(4, "f4"), r"must be a matrix, got \(4,\)"),
    ("h.1.mlp.c_fc.weight", np.ones((60, 15), "f4"),
     r"must be \(15, 60\), got \(60, 15\)"),
    ("ln_f.bias", np.ones(15, "i4"), "must be a float, got I32"),
    ("score.weight", np.ones(3, "f4"), "no tensor score.weight"),
    ("transformer.ln_f.bias", np.ones(15, "f4"), "ln_f.bias comes twice"),
    ("lm_head.weight", np.ones((131, 15), "f4"), "must equal wte.weigh"),
])  # fmt: skip
def test_tensors_that_make_no_gpt2(folder, name, x, says):
    rewrite(folder, tensors_of(folder, **{name: x}))
    refused(f"model.safetensors: .*{says}", GPT2.from_checkpoint, folder, 1, 5)


@pytest.mark.parametrize(("name", "value", "says"), [
    ("n_head", 4, "channels must be a multiple of num_heads"),
    ("n_head", "3", "num_heads must be a positive integer, got '3'"),
    ("n_layer", 3, "n_layer is 3, where model.safetensors has 2"),
    ("vocab_size", 256, "vocab_size is 256, where .* has 131"),
    ("model_type", "mamba", "model_type is 'mamba', where known are gpt2"),
    ("model_type", "llama", "config.json: lacks max_position_embeddings"),
    ("layer_norm_epsilon", 1e-6, "layer_norm_epsilon is 1e-06"),
    ("scale_attn_by_inverse_layer_idx", True, "is True, where"),
    ("activation_function", ["relu"], "is .'relu'., where"),
    ("model_type", "x" * 500_000, "model_type is 'xxx"),
    ("vocab_size", "x" * 500_000, "vocab_size is 'xxx"),
], ids=range(11))  # fmt: skip
def test_a_config_that_does_not_fit(folder, name, value, says):
    rewrite(folder, tensors_of(folder))  # without our metadata
    describe(folder, **{name: value})
    refused(says, read_config, folder)


def test_a_config_that_is_no_json(folder):
    for raw in (b"{", b"[]", b"\xff\xfe", b"[" * 100_000):
        (folder / "config.json").write_bytes(raw)
        refused("config.json: .*JSON", read_config, folder)


ELSEWHERE = ["../model.safetensors", "/etc/passwd", "..", "", "a/b", "..\\x"]
ELSEWHERE += ["C:x", "a\0b", 3, None, ["x"]]


@pytest.mark.parametrize(
    ("name", "error", "says"),
    [(x, ValueError, "index.json: ") for x in ELSEWHERE]
    + [
        ("model-1.safetensors", ValueError, "has no tensor wpe.weight"),
        ("gone.safetensors", FileNotFoundError, "gone.safetensors"),
    ],
)
def test_an_index_stays_in_its_folder_and_is_true(folder, name, error, says):
    index = cut_in_two(folder, tensors_of(folder))
    table = json.loads(index.read_text())
    table["weight_map"]["wpe.weight"] = name
    index.write_text(json.dumps(table))
    with pytest.raises(error, match=says):
        read_config(folder)
    index.write_text(json.dumps({"weight_map": ["wte.weight"]}))
    refused("must map tensors to files", read_config, index)


def test_another_folders_config_is_left_alone(model, folder):
    (folder / "config.json").write_text('{"config": {"steps": 3}}')
    before = (folder / "model.safetensors").stat().st_mtime_ns
    refused("describes no gpt2", write_folder, folder, CFG, model.params)
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    assert (folder / "config.json").read_text() == '{"config": {"steps": 3}}'


def test_transformers_loads_the_folder(model, folder):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
    tokens = np.random.default_rng(0).integers(0, 131, (1, 5))
    model.forward(tokens)
    with torch.no_grad():
        logits = theirs(torch.from_numpy(tokens)).logits.numpy()
    np.testing.assert_allclose(model.logits, logits, rtol=0, atol=2e-6)


# flipped bits


def test_a_bin_without_a_checksum_is_read(model, saved):
    put_number(saved, 4 * 254, 0, 8)
    same(model, saved)


def test_a_flipped_bit_of_the_heads_is_seen(tmp_path):
    """Of arrays, tests/formats/test_tensors.py shows it."""
    cfg = GPT2Config(5, 9, 1, 2, 24)
    write_folder(tmp_path, cfg, GPT2(cfg, 1, 5, "reference").params)
    (tmp_path / "config.json").unlink()
    path = tmp_path / "model.safetensors"
    raw = path.read_bytes()
    assert b'"n_head": "2"' in raw
    path.write_bytes(raw.replace(b'"n_head": "2"', b'"n_head": "3"'))
    says = "model.safetensors: .* is damaged"
    refused(says, GPT2.from_checkpoint, path, 1, 5)


# folders of something else


@pytest.mark.parametrize(("name", "write", "what"), [
    ("pytorch_model.bin", b"PK\x03\x04", "zip archive, as PyTorch"),
    ("tf_model.h5", b"\x89HDF\r\n", "HDF5"),
    ("ckpt.pt", b"\x80\x02\x8a\nl", "a pickle"),
    ("train.bin", (20240520).to_bytes(4, "little"), "a shard of tokens"),
])  # fmt: skip
def test_a_folder_of_another_kind_says_so(tmp_path, name, write, what):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="holds none of"):
        read_config(tmp_path)
    (tmp_path / name).write_bytes(write)
    refused(f"{name}: this is .*{what}", read_config, tmp_path)


def test_a_folder_in_a_folder_is_no_model(tmp_path):
    (tmp_path / "model.ckpt").mkdir()
    with pytest.raises(FileNotFoundError, match="holds none of"):
        read_config(tmp_path)


def test_of_two_ggufs_none_is_chosen(tmp_path):
    for name in ("a.Q4_0.gguf", "a.Q8_0.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    refused(f"{tmp_path.name}: holds 2 GGUF files", read_config, tmp_path)


def test_a_folder_with_a_gguf_is_read_as_one(tmp_path, monkeypatch):
    """Or the library that it needs is named."""
    (tmp_path / "gpt2.Q8_0.gguf").write_bytes(b"GGUF")
    if importlib.util.find_spec("gguf"):
        refused("gpt2.Q8_0.gguf: not a whole GGUF file", read_config, tmp_path)
    monkeypatch.setitem(sys.modules, "gguf", None)
    says = r"gpt2.Q8_0.gguf needs .*llmnb\[modern\]"
    with pytest.raises(ImportError, match=says):
        read_config(tmp_path)


# memory


def test_files_are_read_and_written_a_tensor_at_a_time(tmp_path, monkeypatch):
    cfg = GPT2Config(64, 1000, 6, 4, 128)
    model = GPT2(cfg, 1, 4, "reference", seed=None)
    whole = model.memory.flat("params").nbytes
    largest = model.params["wte"].nbytes
    limit = 2 * largest
    assert whole > 3 * limit
    monkeypatch.setattr(llmc, "_PORTION", largest // 32)
    folder = tmp_path / "folder"
    assert peak(partial(write_folder, folder, cfg, model.params)) < limit
    for name, precision in (("a.bin", "fp32"), ("b.bin", "bf16")):
        save = partial(model.save_checkpoint, tmp_path / name, precision)
        assert peak(save) < limit
    for path in (folder, tmp_path / "a.bin", tmp_path / "b.bin"):
        assert peak(lambda x=path: open_model(x).read(model.params)) < limit


@pytest.mark.parametrize(("name", "raw"), [
    ("config.json", b"[" + b"[]," * 700_000 + b"[]]"),
    ("config.json", b'{"n_head": ' + b" " * (1 << 20) + b"3}"),
    (published.INDEX, b'{"weight_map": {' + b'"a":"b",' * 300_000),
])  # fmt: skip
def test_what_describes_a_model_is_small(folder, name, raw):
    (folder / name).write_bytes(raw)
    which = folder if name == "config.json" else folder / name

    def read():
        refused(f"{name}: must have at most", read_config, which)

    assert peak(read) < 1 << 20


# numbers that are none


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["a.bin", "b.bin", "model.safetensors", ""])
@pytest.mark.parametrize("reader", [GPT2, Decoder])
def test_weights_that_are_no_numbers(model, tmp_path, name, value, reader):
    model.params["wte"][65] = value
    model.save_checkpoint(tmp_path / "a.bin")
    model.save_checkpoint(tmp_path / "b.bin", "bf16")
    write_folder(tmp_path, CFG, model.params)
    says = rf"{name}.*: wte is {value} at \(65, 0\), where weights must"
    refused(says, reader.from_checkpoint, tmp_path / name, 1, 5)


def test_numbers_whose_squares_are_too_large_are_read(model, tmp_path):
    model.params["wte"][65] = 3e38
    model.save_checkpoint(tmp_path / "a.bin")
    again = GPT2.from_checkpoint(tmp_path / "a.bin", 1, 5, "reference")
    assert np.array_equal(again.params["wte"], model.params["wte"])

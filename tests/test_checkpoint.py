"""llm.c's .bin files: written, read back, and refused when they are bad."""

import numpy as np
import pytest

from llmnb import GPT2, GPT2Config
from llmnb.checkpoint import read_checkpoint, read_config
from llmnb.files import replacing

CFG = GPT2Config(
    max_seq_len=9, vocab_size=131, num_layers=2, num_heads=3, channels=15
)


@pytest.fixture
def saved(tmp_path):
    """A small model and the file it was saved in."""
    model = GPT2(CFG, batch_size=1, seq_len=5, backend="reference")
    model.save_checkpoint(tmp_path / "model.bin")
    return model, tmp_path / "model.bin"


def test_a_model_comes_back(saved):
    model, path = saved
    again = GPT2.from_checkpoint(path, 2, 3, backend="reference")
    assert again.cfg == CFG
    for name, array in model.params.items():
        np.testing.assert_array_equal(again.params[name], array)


def test_the_bytes_are_llm_cs(saved):
    model, path = saved
    raw = path.read_bytes()
    header = np.frombuffer(raw[:1024], "<i4")
    assert header[:8].tolist() == [20240326, 3, 9, 131, 2, 3, 15, 256]
    assert not header[8:].any()
    body = np.frombuffer(raw[1024:], "<f4")
    assert body.size == 256 * 15 + 9 * 15 + 2 * (12 * 225 + 13 * 15) + 30
    wte = model.params["wte"]
    np.testing.assert_array_equal(body[: wte.size], wte.ravel())
    np.testing.assert_array_equal(body[-15:], model.params["lnfb"])


def test_safetensors_are_hugging_faces(saved, tmp_path):
    from safetensors.numpy import load_file

    model, _ = saved
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


def header(path, index, value):
    """Overwrite one number of a file's header."""
    raw = bytearray(path.read_bytes())
    raw[4 * index : 4 * index + 4] = int(value).to_bytes(4, "little")
    path.write_bytes(bytes(raw))


@pytest.mark.parametrize(
    ("index", "value", "says"),
    [
        (0, 1, "magic 1 and version 3"),
        (1, 5, "version 5"),
        (2, 0, "max_seq_len must be a positive integer, got 0"),
        (4, 3, "where the header's model takes"),
        (5, 4, "multiple of num_heads"),
        (7, 131, "padded vocabulary 131"),
        (4, 2**31 - 1, "where the header's model takes"),
    ],
)
def test_a_bad_header_is_refused(saved, index, value, says):
    _, path = saved
    header(path, index, value)
    with pytest.raises(ValueError, match="model.bin: .*") as error:
        GPT2.from_checkpoint(path, 1, 5)
    assert says in str(error.value)


@pytest.mark.parametrize("size", [0, 1023, 1024, 5000])
def test_a_truncated_file_is_refused(saved, size):
    _, path = saved
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match="bytes"):
        read_config(path)


def test_a_file_that_is_too_long_is_refused(saved):
    _, path = saved
    path.write_bytes(path.read_bytes() + b"\0\0\0\0")
    with pytest.raises(ValueError, match="where the header's model takes"):
        read_config(path)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.bin"):
        GPT2.from_checkpoint(tmp_path / "none.bin", 1, 5)


def test_float64_is_stored_as_float32(tmp_path):
    model = GPT2(CFG, 1, 5, "reference", "fp64")
    model.params["fcw"][...] = 1 / 3
    model.save_checkpoint(tmp_path / "double.bin")
    again = GPT2.from_checkpoint(
        tmp_path / "double.bin", 1, 5, "reference", "fp64"
    )
    assert again.params["fcw"].dtype == np.float64
    assert (again.params["fcw"] == np.float32(1 / 3)).all()


def test_a_body_that_is_too_short_is_refused(saved):
    model, path = saved
    flat = model.memory.flat("params")
    longer = np.zeros(flat.size + 1, np.float32)
    with pytest.raises(ValueError, match="ends after"):
        read_checkpoint(path, longer)


def test_a_write_that_fails_leaves_the_old_file(saved):
    _, path = saved
    before = path.read_bytes()
    with (
        pytest.raises(OSError, match="No space left"),
        replacing(path) as file,
    ):
        file.write(b"half")
        raise OSError(28, "No space left on device")
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["model.bin"]

"""Llama, Mistral, Qwen 3 and Gemma against transformers' own models.

The fixtures are folders in tests/data/families, written by
record_families.py: a model as the library saves it, and what it computes.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from problems import relative

import llmnb
from llmnb.formats.checkpoint import open_model, read_config, write_folder
from llmnb.formats.published import pieces
from llmnb.model.architectures import (
    PRESETS,
    Gemma3Config,
    LlamaConfig,
    architecture_from,
    architecture_record,
)
from llmnb.model.tensors import flops_per_token, parameter_count
from llmnb.reference.rotary import rope_table

FAMILIES = Path(__file__).parents[1] / "data" / "families"
CASES = sorted(x.name for x in FAMILIES.iterdir() if x.is_dir())
# the largest error allowed, relative to the size of what is compared
TOLERANCES = {"fp64": 1e-12, "fp32": 5e-6}


def expected(name):
    with np.load(FAMILIES / name / "expected.npz") as file:
        return dict(file)


def opened(name, backend="reference", precision="fp64"):
    return llmnb.load(FAMILIES / name, 2, 17, backend, precision)


@pytest.mark.parametrize("precision", ["fp64", "fp32"])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", CASES)
def test_ten_steps_are_the_librarys(name, backend, precision):
    want, limit = expected(name), TOLERANCES[precision]
    model, tokens = opened(name, backend, precision), want["tokens"]
    batch = tokens[:, :-1], tokens[:, 1:]
    model.forward(*batch)
    assert relative(model.logits, want[f"{precision}.logits"]) < limit
    model.backward()
    for there, place in pieces(model.cfg).items():
        got, key = place.of(model.grads), f"fp64.grads.{there}"
        error = relative(got, want[key])
        # a gradient is a sum that may almost cancel
        assert error < (limit if precision == "fp64" else 10 * limit), there
    model = opened(name, backend, precision)
    rules = {"learning_rate": 1e-3, "beta1": 0.9, "beta2": 0.95}
    rules |= {"weight_decay": 0.1, "eps": 1e-8}  # as record_families.py has
    losses = [model.step(*batch, step=i, **rules)[0] for i in range(1, 11)]
    error = np.abs(losses / want[f"{precision}.losses"] - 1).max()
    assert error < limit


@pytest.mark.parametrize("name", CASES)
def test_a_folder_written_is_read_back(name, tmp_path):
    """Described as version 4 of the library does, where theirs is 5."""
    model = opened(name)
    write_folder(tmp_path, model.cfg, model.params)
    ours, theirs = (x / "config.json" for x in (tmp_path, FAMILIES / name))
    assert "rope_theta" in json.loads(ours.read_text())
    assert "rope_parameters" in json.loads(theirs.read_text())
    copy = llmnb.load(tmp_path, 2, 17, "reference", "fp64")
    assert copy.cfg == model.cfg
    for key, x in model.params.items():
        assert np.array_equal(copy.params[key], x), key
    ours.unlink()  # the record says it too
    file = tmp_path / "model.safetensors"
    assert llmnb.load(file, 1, 4, "reference").cfg == model.cfg


@pytest.mark.parametrize("name", CASES)
def test_the_library_reads_what_we_write(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    model, want = opened(name), expected(name)
    write_folder(tmp_path, model.cfg, model.params)
    kinds = transformers.AutoModelForCausalLM
    theirs = kinds.from_pretrained(tmp_path, attn_implementation="eager")
    logits = theirs(torch.from_numpy(want["tokens"][:, :-1])).logits
    got = logits.detach().numpy()
    assert relative(got, want["fp32.logits"]) < 1e-6


@pytest.mark.parametrize("tied", (True, False))
def test_what_a_table_of_tokens_counts_for(tied):
    """Its padding; and for nothing where it is only read, by (1.4.2)."""
    C, H, V, T = 16, 64, 300, 4
    cfg = LlamaConfig(8, V, 1, 2, C, tied=tied)  # 384 rows a table
    weights = 4 * C * C + 3 * C * H + 3 * C + V * C  # with three norms
    assert cfg.hidden == H
    assert flops_per_token(cfg, T) == 6 * weights + 6 * C * T
    padding = parameter_count(cfg) - parameter_count(cfg, padded=False)
    assert padding == (1 if tied else 2) * 84 * C


@pytest.mark.parametrize("tied", (True, False))
def test_the_padding_is_cleared(tied, tmp_path):
    """Of each table of tokens, whatever was in the arrays."""
    cfg = LlamaConfig(8, 300, 1, 2, 16, tied=tied)
    model = llmnb.Model(cfg, 1, 4, "reference")
    write_folder(tmp_path, cfg, model.params)
    found = {name: np.full_like(x, 9) for name, x in model.params.items()}
    open_model(tmp_path).read(found)
    for name, x in model.params.items():
        assert np.array_equal(found[name], x), name


def test_gemma_3s_tokenizer_has_a_token_without_a_row(tmp_path):
    """The one that stands for a picture; another family's may not."""
    for kind, more in ((Gemma3Config, 1), (LlamaConfig, 0)):
        cfg = kind(8, 300, 1, 2, 16)
        model = llmnb.Model(cfg, 1, 4, "reference")
        write_folder(tmp_path / cfg.family, cfg, model.params)
        assert read_config(tmp_path / cfg.family, 300 + more) == cfg
        with pytest.raises(ValueError, match="has 300 tokens, the tokenizer"):
            read_config(tmp_path / cfg.family, 301 + more)


def test_only_the_long_looks_of_a_gemma_3_are_stretched():
    """As the larger ones are published: by 8, but not in their windows."""
    stretched = "linear", 8.0
    cfg = Gemma3Config(8, 300, 6, 2, 16, rope_scaling=stretched)
    tables = llmnb.Model(cfg, 1, 4, "reference", "fp64").memory["tables"]
    whole = rope_table(4, cfg.head_size, cfg.rope_theta, stretched)
    assert np.array_equal(tables["rope"], whole)
    local = rope_table(4, cfg.head_size, cfg.local_theta)
    assert np.array_equal(tables["rope_local"], local)


@pytest.mark.parametrize("name", PRESETS)
def test_a_record_gives_the_configuration_back(name):
    record = json.loads(json.dumps(architecture_record(PRESETS[name])))
    assert architecture_from(record) == PRESETS[name]

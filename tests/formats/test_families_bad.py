"""Folders of other families that are damaged, or contradict themselves."""

import json
from dataclasses import replace

import numpy as np
import pytest
from fuzz import answer, describe, fuzzed, refused, tensors_of
from hypothesis import strategies as st
from llamas import FAMILIES, cfg_of, write_both
from measure import peak

import llmnb
from llmnb.formats.checkpoint import open_model, write_folder
from llmnb.formats.families import described_config, family_description
from llmnb.formats.published import RECORD
from llmnb.formats.safetensors import TensorFile, write_tensors
from llmnb.model.gpt2 import GPT2

# bytes that are damaged: tests/formats/test_damage.py


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Models of every family."""
    place = tmp_path_factory.mktemp("families")
    for family in FAMILIES:
        write_both(place, family)
    return place


def load(path):
    """The model of a file, or that of the folder for its config.json."""
    whole = path.parent if path.name == "config.json" else path
    return llmnb.load(whole, 1, 1, "reference")


JUNK = [
    None, True, False, -1, 0, 1, 3, 2**31 - 1, 2**31, 2**63, 10**30, 1.5,
    float("nan"), float("inf"), 1e308, 1e-320, "x", "", "llama", "linear",
    [], [1], ["full_attention"], {}, {"factor": 2.0}, {"rope_theta": "x"},
    {"full_attention": 5}, {"full_attention": {"rope_type": [1]}},
    {"rope_type": "llama3", "factor": 2.0}, [[]] * 3, {"x": [None]},
    {"type": "linear", "factor": "x"}, {"sliding_attention": []},
]  # fmt: skip
KEYS = [
    "rope_parameters", "rope_scaling", "sliding_window_pattern", "model_type",
    "use_sliding_window", "head_dim", "query_pre_attn_scalar", "layer_types",
    "sliding_window", "rope_local_base_freq", "attn_logit_softcapping",
    "tie_word_embeddings", "mlp_bias", "num_local_experts",
]  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@fuzzed(250)
def test_a_config_json_of_junk_is_read_or_one_error(folders, family, data):
    """Values of every kind in the place of every setting."""
    path = folders / f"{family}-cut" / "config.json"
    raw = path.read_bytes()
    said = json.loads(raw)
    for _ in range(data.draw(st.integers(1, 3))):
        key = data.draw(st.sampled_from([*said, *KEYS]))
        if data.draw(st.booleans()):
            said[key] = data.draw(st.sampled_from(JUNK))
        else:
            said.pop(key, None)
    try:
        found = answer(load, path, json.dumps(said).encode())
        assert not isinstance(found, Exception) or len(str(found)) < 900
    finally:
        path.write_bytes(raw)


@fuzzed(250)
def test_a_record_of_junk_is_read_or_one_error(folders, data):
    path = folders / "gemma3_text" / "junk.safetensors"
    file = TensorFile(path.with_name("model.safetensors"))
    record = json.loads(file.metadata[RECORD])
    for _ in range(data.draw(st.integers(1, 3))):
        key = data.draw(st.sampled_from([*record, "family", "other"]))
        record[key] = data.draw(st.sampled_from(JUNK))
    arrays = {name: file[name] for name in file.names}
    text = data.draw(st.sampled_from(["[]", "5", "{}", "x", "[" * 9000]))
    kept = data.draw(st.integers(0, 9))
    note = {RECORD: json.dumps(record) if kept else text}
    write_tensors(path, arrays, file.metadata | note)
    found = answer(load, path, path.read_bytes())
    assert not isinstance(found, Exception) or len(str(found)) < 900


def changed(folder, family="llama", **changes):
    """A folder as another program writes it; settings and tensors changed."""
    cfg = cfg_of(family, 21)
    write_folder(folder, cfg, GPT2(cfg, 1, 2, "reference").params)
    tensors = {k: x for k, x in changes.items() if "." in k}
    settings = {k: x for k, x in changes.items() if "." not in k}
    arrays = tensors_of(folder, **tensors)
    write_tensors(folder / "model.safetensors", arrays)
    describe(folder, **settings)
    return folder


NORM, BIAS = "model.norm.weight", "model.layers.0.self_attn.q_proj.bias"
LLAMA3 = {"rope_type": "llama3", "factor": 2.0}
LINEAR = {"rope_type": "linear", "factor": 2.0}
BAD = [
    ({"hidden_size": 32}, "q_proj.weight must be|embed_t"),
    ({"vocab_size": 22}, r"must be \(22, 16\), got \(21, 16\)"),
    ({"num_hidden_layers": 3}, "no tensor model.layers.2"),
    ({"num_hidden_layers": 1}, "a llama has no tensor model.layers.1"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers must be"),
    ({"num_key_value_heads": 2}, r"k_proj.weight must be \(16, 16\)"),
    ({"num_key_value_heads": 3}, "num_kv_heads must be a divisor"),
    ({"head_dim": 7}, "head_size must be even"),
    ({"head_dim": None, "num_attention_heads": 3, "num_key_value_heads": 3},
     "channels must be a multiple of num_heads = 3"),
    ({"intermediate_size": 65}, "gate_proj.weight must be"),
    ({"hidden_activation": "relu"}, "the activation must be"),
    ({"attention_bias": True}, "attention_bias must be"),
    ({"rope_scaling": LLAMA3 | {"rope_type": "yarn"}},
     "rope_type must be default, linear or llama3, got 'yarn'"),
    ({"rope_scaling": LLAMA3}, "rope scaling lacks low_freq_factor"),
    ({"rms_norm_eps": 0}, "norm_eps must be a positive number"),
    ({"rms_norm_eps": None}, "config.json: lacks rms_norm_eps"),
    ({"num_attention_heads": None}, "config.json: lacks num_attention_heads"),
    ({"num_key_value_heads": 0}, "num_kv_heads must be a positive integer"),
    ({"intermediate_size": 0}, "hidden must be a positive integer"),
    ({"rope_parameters": {"rope_theta": 6.0}},
     "rope_theta must be as in rope_parameters, 6.0, got 10000.0"),
    ({"rope_scaling": LINEAR,
      "rope_parameters": LINEAR | {"factor": 3.0, "rope_theta": 1e4}},
     "rope_scaling must be as in rope_parameters"),
    ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
     "partial_rotary_factor must be 1.0"),
    ({"family": "qwen3", "rope_theta": None}, "rope_theta must be there"),
    ({NORM: None}, "has no tensor model.norm.weight"),
    ({BIAS: np.zeros(16, "f4")},
     "a llama has no tensor model.layers.0.self_attn.q_proj.bias"),
    ({NORM: np.ones(15, "f4")}, r"must be \(16,\), got \(15,\)"),
    ({NORM: np.ones(16, "i4")}, "must be a float, got I32"),
    ({"family": "gemma", "lm_head.weight": np.ones((21, 16))},
     "lm_head.weight must equal the token table"),
    ({"family": "gemma2", "layer_types": ["sliding_attention"]},
     "layer_types must be a regular pattern, one for each layer"),
    ({"model_type": "mamba"}, "'mamba', where known are gpt2, llama, mistral"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "says"), BAD)
def test_what_contradicts_itself_is_one_error(tmp_path, change, says):
    refused(says, load, changed(tmp_path, **change))


@pytest.mark.parametrize(
    "name", ["lm_head.weight", "model.layers.1.self_attn.rotary_emb.inv_freq"]
)
def test_what_a_tied_model_does_not_need_is_left(tmp_path, name):
    arrays = tensors_of(changed(tmp_path, "gemma"))
    arrays[name] = arrays["model.embed_tokens.weight"].copy()
    write_tensors(tmp_path / "model.safetensors", arrays)
    assert load(tmp_path).cfg.tied


def test_a_stretching_counts_beside_the_newer_style(tmp_path):
    folder = changed(
        tmp_path, rope_parameters={"rope_theta": 1e4}, rope_scaling=LINEAR
    )
    assert load(folder).cfg.rope_scaling == ("linear", 2.0)


def test_what_is_left_out_is_what_transformers_takes(tmp_path):
    """A window of 4,096, and scores over the root of 256."""
    for family in "mistral", "gemma2", "gemma3_text":
        gone = {"sliding_window": None, "query_pre_attn_scalar": None}
        folder = changed(tmp_path / family, family, layer_types=None, **gone)
        cfg = load(folder).cfg
        assert cfg.window == 4096
        assert cfg.attention_scale == (None if family == "mistral" else 1 / 16)
    # and where a family has no such setting, nothing follows from one
    more = {"sliding_window": 7, "query_pre_attn_scalar": 9}
    more |= {"attn_logit_softcapping": 5.0, "use_sliding_window": None}
    for family in "llama", "qwen2", "qwen3":
        cfg = load(changed(tmp_path / family, family, **more)).cfg
        assert cfg == cfg_of(family, 21)
    folder = changed(tmp_path / "asked", "mistral", use_sliding_window=False)
    assert load(folder).cfg.window == 5  # which Qwens alone are asked


def test_numbers_are_written_as_version_5_of_transformers_takes_them():
    cfg = replace(cfg_of("gemma2"), attention_scale=168**-0.5, norm_eps=1)
    said = family_description(replace(cfg, final_softcap=30))
    numbers = "query_pre_attn_scalar", "final_logit_softcapping"
    found = [said[name] for name in (*numbers, "rms_norm_eps")]
    assert repr(found) == "[168, 30.0, 1.0]"
    # else nn.Embedding of a Gemma has no gradient for token 0
    assert said["pad_token_id"] is None


def test_a_mistral_of_blocks_that_are_alike_is_no_ministral():
    cfg = cfg_of("mistral")
    for every, window in (0, 5), (1, None), (3, 5), (2, 5):
        said = family_description(replace(cfg, global_every=every))
        assert said["sliding_window"] == window
        assert ("layer_types" in said) == (every == 2)


def test_what_others_would_pass_over_is_not_described(tmp_path):
    for name, cfg in ("window", cfg_of("llama", window=5)), (
        "attention_scale", cfg_of("qwen3", attention_scale=0.5)
    ):  # fmt: skip
        params = GPT2(cfg, 1, 2, "reference").params
        with pytest.raises(ValueError, match=f"{name} must be None to"):
            write_folder(tmp_path / name, cfg, params)
        assert not (tmp_path / name).exists()


@pytest.mark.parametrize(
    ("family", "none"),
    [("gemma2", {"attention_softcap": None, "final_softcap": None}),
     ("mistral", {"window": None}), ("gemma2", {"window": None})],
)  # fmt: skip
def test_what_is_none_is_none_for_its_reader(tmp_path, family, none):
    """Who reads a description takes another value for what is absent."""
    cfg = replace(cfg_of(family), **none)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(family_description(cfg)))
    found = described_config(path)
    assert {name: getattr(found, name) for name in none} == none


def test_a_whole_number_is_written_as_one():
    """transformers 5 refuses 6.0, and what it divides by may be no int."""
    for scalar in (6, 6.5):
        cfg = cfg_of("gemma2", attention_scale=scalar**-0.5)
        found = family_description(cfg)["query_pre_attn_scalar"]
        assert repr(found) == repr(scalar)


def test_one_base_for_all_blocks_is_written_for_both(tmp_path):
    cfg = cfg_of("gemma3_text", local_theta=None)
    assert family_description(cfg)["rope_local_base_freq"] == cfg.rope_theta


def test_no_tensors_are_one_error(tmp_path):
    path = changed(tmp_path) / "model.safetensors"
    for note in {}, {RECORD: "{}"}:
        write_tensors(path, {}, note)
        refused("holds no tensors", load, path)
    path.unlink()
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {}}')
    refused("holds no tensors", load, index)


def test_a_tied_table_of_float64_may_be_there_twice(tmp_path):
    arrays = tensors_of(changed(tmp_path, "gemma"))
    arrays = {name: x + np.float64(np.pi) for name, x in arrays.items()}
    arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"].copy()
    write_tensors(tmp_path / "model.safetensors", arrays)
    assert load(tmp_path).cfg.tied


def test_zero_is_not_the_usual_number():
    """And what is no scaling is refused as such, whatever it is."""
    for name in "num_kv_heads", "head_size", "hidden":
        with pytest.raises(ValueError, match=f"{name} must be a positive"):
            llmnb.LlamaConfig(8, 21, 1, 2, 16, **{name: 0})
    for scaling in 5, ([], 1.0), "linear":
        with pytest.raises(ValueError, match="rope_scaling must be"):
            llmnb.LlamaConfig(8, 21, 1, 2, 16, rope_scaling=scaling)


def test_a_damaged_large_model_takes_no_memory(tmp_path):
    """One tensor is wrong, and a gigabyte is not allocated first."""
    small = llmnb.LlamaConfig(8, 21, 1, 1, 256, hidden=64)
    write_folder(tmp_path, small, GPT2(small, 1, 2, "reference").params)
    describe(tmp_path, vocab_size=2**20)
    write_tensors(tmp_path / "model.safetensors", tensors_of(tmp_path))

    def read():
        for opened in (open_model, llmnb.load):
            refused("embed_tokens.weight must", opened, tmp_path)

    assert peak(read) < 1 << 22

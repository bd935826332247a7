"""Record what transformers computes, for test_families.py to compare with.

    python tests/record_families.py [CASE ...]

needs torch and transformers 5, and writes a folder for each case into
tests/data/families: config.json as `save_pretrained` writes it,
model.safetensors in float32, and expected.npz: logits, loss, every gradient
and the losses of ten AdamW steps, in float64 and in float32. The library
casts to float32 inside norms, rotation and softmax; for the float64 numbers
these casts are to float64 instead.
"""

import sys
from contextlib import contextmanager

import numpy as np
import torch
import transformers
from record_parity import provenance
from recorded import DATA, write_json
from torch.nn import functional as F

FOLDER = DATA / "families"
STEPS = 10
SMALL = {
    "vocab_size": 61, "hidden_size": 24, "intermediate_size": 40,
    "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 32,
    "attn_implementation": "eager", "pad_token_id": None,
    "initializer_range": 0.2,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0,
    "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
# by name: the library's configuration, and what is not as in SMALL
CASES = {
    "llama2": ("Llama", {"num_key_value_heads": 4, "head_dim": 6}),
    "llama3": ("Llama", {"rope_parameters": LLAMA3,
                         "tie_word_embeddings": True}),
    "mistral": ("Mistral", {"sliding_window": 5}),
    "mistral3": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"tie_word_embeddings": True}),
    "gemma": ("Gemma", {"num_key_value_heads": 1}),
    "gemma2": ("Gemma2", {"sliding_window": 5, "query_pre_attn_scalar": 6,
                          "attn_logit_softcapping": 5.0,
                          "final_logit_softcapping": 3.0,
                          "num_hidden_layers": 3}),
    "gemma3": ("Gemma3", {"sliding_window": 5, "num_hidden_layers": 7,
                          "query_pre_attn_scalar": 8}),
}  # fmt: skip


@contextmanager
def uncast(dtype):
    """Casts to float32 become casts to dtype."""
    kept = torch.float32, torch.Tensor.float
    if dtype == torch.float64:
        torch.float32, torch.float = dtype, dtype
        torch.Tensor.float = torch.Tensor.double
    yield
    torch.float32, torch.Tensor.float = kept
    torch.float = kept[0]


def new_model(kind, others):
    torch.manual_seed(1)
    names = "Gemma3Text" if kind == "Gemma3" else kind
    config = getattr(transformers, f"{names}Config")(**SMALL | others)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        for name, x in model.named_parameters():
            if "norm" in name or "bias" in name:
                x.add_(torch.randn(x.shape) * 0.3)
    return model.eval()


def exact_numbers(model, dtype):
    """Frequencies and scales in dtype, for the library keeps float32's."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    for module in model.modules():
        if hasattr(module, "embed_scale"):
            scale = torch.tensor(module.embedding_dim, dtype=dtype).sqrt()
            module.embed_scale = scale
        if not hasattr(module, "rope_type"):
            continue
        kinds = module.rope_type
        layered = isinstance(kinds, dict)
        for layer in kinds if layered else [None]:
            kind = kinds[layer] if layered else kinds
            prefix = f"{layer}_" if layered else ""
            first = module.compute_default_rope_parameters
            make = first if kind == "default" else ROPE_INIT_FUNCTIONS[kind]
            how = {"layer_type": layer} if layered else {}
            found, _ = make(module.config, device=None, **how)
            module.register_buffer(f"{prefix}inv_freq", found.to(dtype))


def run(kind, others, tokens, dtype):
    """Ten steps on one batch: a dict of what is compared."""
    model = new_model(kind, others).to(dtype)
    found = {}
    with uncast(dtype):
        exact_numbers(model, dtype)
        rules = {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}
        optimizer = torch.optim.AdamW(model.parameters(), eps=1e-8, **rules)
        batch, losses = torch.from_numpy(tokens), []
        for step in range(STEPS):
            logits = model(batch[:, :-1], use_cache=False).logits
            wanted = batch[:, 1:].flatten()
            loss = F.cross_entropy(logits.flatten(0, 1), wanted)
            optimizer.zero_grad()
            loss.backward()
            losses.append(loss.item())
            if step == 0:
                found["logits"] = logits.detach().numpy().copy()
                for name, x in model.named_parameters():
                    found[f"grads.{name}"] = x.grad.numpy().copy()
            optimizer.step()
    return found | {"losses": np.array(losses)}


def record(name, kind, others):
    model, folder = new_model(kind, others), FOLDER / name
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    rng = np.random.default_rng(sum(map(ord, name)))
    tokens = rng.integers(0, SMALL["vocab_size"], (2, 18))
    arrays = {"tokens": tokens}
    for precision, dtype in (("fp64", torch.float64), ("fp32", torch.float32)):
        for key, x in run(kind, others, tokens, dtype).items():
            if precision == "fp64" or not key.startswith("grads"):
                arrays[f"{precision}.{key}"] = x
    np.savez_compressed(folder / "expected.npz", **arrays)
    print(name, arrays["fp64.losses"][[0, -1]], arrays["fp32.losses"][-1])


def main(names):
    for name in names or CASES:
        record(name, *CASES[name])
    facts = provenance() | {"transformers": transformers.__version__}
    write_json(FOLDER / "provenance.json", facts)


if __name__ == "__main__":
    main(sys.argv[1:])

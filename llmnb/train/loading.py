# Written by `make export` from notebooks/5_modern/07_gguf.py: edit that file.

"""One door for every model: `llmnb.load`."""

__all__ = ["load"]


# one door
from llmnb.model.gpt2 import GPT2


def load(
    path, batch_size=1, seq_len=None, backend="cpu", precision="fp32",
    tokens=None,
):  # fmt: skip
    """A model from disk, whatever it is: `llmnb.load`.

    path: llm.c's .bin; a .safetensors file, or the index of several; a .gguf
    file; a Hugging Face folder of GPT-2, Llama, Mistral, Qwen or Gemma; a
    run's folder or state. seq_len: None is what the model knows, at most
    1,024. Other arguments, and what is raised: as GPT2.from_checkpoint.

    Derived in chapter 5.7.
    """
    from llmnb.formats.checkpoint import read_config
    from llmnb.train.folder import weights_path

    path = weights_path(path)
    if seq_len is None:
        seq_len = min(1024, read_config(path, tokens).max_seq_len)
    how = batch_size, seq_len, backend, precision, tokens
    return GPT2.from_checkpoint(path, *how)

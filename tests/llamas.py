"""Tiny models of other families, each with a tokenizer made here."""

import io
import json
import shutil

import pytest
from fuzz import cut_in_two, tensors_of

from llmnb.formats.checkpoint import write_folder
from llmnb.model.architectures import ARCHITECTURES
from llmnb.model.gpt2 import GPT2

TEXT = (
    "the low tower, the lower one and the lowest: the newest of the new "
    "towers has 12 windows, the wider ones 99. It isn't a wide window.\n"
)
# what tokenizers cut and merge in ways of their own
PROBE = (
    "It's 1,234.5 naïve  cafés:\n\n\tdef f(x):\r\n    return 'x'  # ok\n"
    "東京 ½ ① é \u00a0 \U0001f600 \x00\x7f I'LL we've don't__ end  "
)
MARKUP = ["<s>", "</s>", "<|im_start|>"]
CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
FAMILIES = {
    "llama": {"num_kv_heads": 1},
    "mistral": {"num_kv_heads": 2, "window": 5},
    "qwen2": {"num_kv_heads": 1},
    "qwen3": {"num_kv_heads": 2, "head_size": 6},
    "gemma": {"num_kv_heads": 1, "head_size": 8},
    "gemma2": {"num_kv_heads": 2, "window": 5},
    "gemma3_text": {"num_kv_heads": 2, "window": 5, "global_every": 2},
}


def write_gguf(path, keys, kind="llama", arrays=()):
    """A GGUF file; arrays: names, bytes, and their types or None."""
    writer = pytest.importorskip("gguf").GGUFWriter(path, kind)
    add = {bool: writer.add_bool, float: writer.add_float32}
    add |= {int: writer.add_uint32, str: writer.add_string}
    for key, x in keys.items():
        add.get(type(x), writer.add_array)(key, x)
    for name, raw, how in arrays:
        writer.add_tensor(name, raw, raw_dtype=how)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    if arrays:
        writer.write_tensors_to_file()
    writer.close()
    return path


def cfg_of(family, vocab_size=300, **others):
    """A configuration of two layers and 16 channels."""
    sizes = 32, vocab_size, 2, 2, 16
    return ARCHITECTURES[family](*sizes, **FAMILIES[family], **others)


def write_both(folder, family):
    """A small model in a folder of its family's name; and one as another
    program writes it, without our record and in two files."""
    cfg = cfg_of(family, 21)
    whole, cut = folder / family, folder / f"{family}-cut"
    write_folder(whole, cfg, GPT2(cfg, 1, 2, "reference").params)
    shutil.copytree(whole, cut)
    cut_in_two(cut, tensors_of(cut))


def byte_level(text=TEXT, markup=MARKUP, size=300, digits=False):
    """The library's byte-level BPE of a text; digits: each stands alone."""
    library = pytest.importorskip("tokenizers")
    before = library.pre_tokenizers
    theirs = library.Tokenizer(library.models.BPE())
    steps = [before.Digits(individual_digits=True)] * digits
    steps.append(before.ByteLevel(add_prefix_space=False))
    theirs.pre_tokenizer = before.Sequence(steps)
    theirs.decoder = library.decoders.ByteLevel()
    how = {"vocab_size": size, "special_tokens": markup}
    how |= {"initial_alphabet": before.ByteLevel.alphabet()}
    trainer = library.trainers.BpeTrainer(show_progress=False, **how)
    theirs.train_from_iterator([text] * 4, trainer)
    return theirs


def sentencepiece(lines=(TEXT,), **how):
    """The bytes of SentencePiece's BPE of some lines."""
    library, file = pytest.importorskip("sentencepiece"), io.BytesIO()
    library.SentencePieceTrainer.train(
        sentence_iterator=iter([*lines] * 4), model_writer=file,
        model_type="bpe", minloglevel=2, **how,
    )  # fmt: skip
    return file.getvalue()


def begin_with(theirs, text, number):
    """Have the library's tokenizer put a token before each text."""
    library = pytest.importorskip("tokenizers")
    theirs.post_processor = library.processors.TemplateProcessing(
        single=f"{text} $A", special_tokens=[(text, number)]
    )


def write_json(folder, begins=True):
    """A byte-level tokenizer.json, and what says how a text begins."""
    theirs = byte_level()
    if begins:
        begin_with(theirs, "<s>", 0)
    theirs.save(str(folder / "tokenizer.json"))
    said = {"bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))


def write_sentencepiece(folder):
    """A tokenizer.model of SentencePiece's BPE, of 300 pieces."""
    how = {"byte_fallback": True, "hard_vocab_limit": False}
    raw = sentencepiece(vocab_size=300, **how)
    (folder / "tokenizer.model").write_bytes(raw)


def write_llama(folder, family="llama", tokenizer=write_json, **how):
    """A folder with a model of a family and a tokenizer; returns it."""
    cfg = cfg_of(family)
    params = GPT2(cfg, 1, 8, "reference", seed=3).params
    write_folder(folder, cfg, params)
    tokenizer(folder, **how)
    return folder

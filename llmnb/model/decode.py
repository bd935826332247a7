# Written by `make export` from notebooks/4_practice/20_decoder.py: edit that file.

"""GPT-2 for writing, with its keys and values kept."""

__all__ = [
    "CHUNK",
    "Decoder",
    "FEWER",
    "LIGHT",
    "decoder_layout",
]


# imports of the decoder
from functools import partial
from types import SimpleNamespace

import numpy as np
from numba import get_num_threads, set_num_threads

from llmnb import cpu

from llmnb.arena import Arena, footprint
from llmnb.cpu.decode import cache_shapes, panels_shape
from llmnb.formats.checkpoint import open_model
from llmnb.checks import FLOATS, check_fit, check_tokens
from llmnb.model.layout import block_activations, block_shapes
from llmnb.model.parts import block_forward, block_of
from llmnb.model.tensors import parameter_shapes, tensor_table
from llmnb.checks import check_room


# its memory
CHUNK = 128  # positions, of all texts, that are computed at once
FEWER = "fewer or shorter texts, or a smaller model, take less"
LIGHT = 1 << 14  # numbers that one thread finishes before a second wakes


def decoder_layout(cfg, batch_size, seq_len, dtype=np.float32):
    """The groups of the arena in which a Decoder works.

    vectors: parameters as they are; panels: weights, packed with their
    biases; cache: keys and values of every block; acts: what one block
    computes for at most max(batch_size, CHUNK) positions, and the logits of
    the last.

    Derived in chapter 4.20.
    """
    L, C, Vp = cfg.num_layers, cfg.channels, cfg.padded_vocab_size
    B, R, shapes = batch_size, max(batch_size, CHUNK), parameter_shapes(cfg)
    panels = {x.name: (L, *panels_shape(*x.shape)) for x in _packed(cfg)}
    panels["wte"] = panels_shape(Vp, C)
    vectors = {n: shape for n, shape in shapes.items() if n not in panels}
    cache = cache_shapes(B, cfg.num_heads, seq_len, cfg.head_size)
    kept = block_activations(cfg, 1, R) | block_shapes(cfg, 1, R)
    rows = [x for x in kept if x[0] != "d" and x not in _UNUSED]
    last = {"last": (1, B, C), "lnf": (1, B, C), "logits": (1, B, Vp)}
    last |= block_of(cfg).norm.keeps(cfg, 1, B, "lnf")
    acts = {"x": (R, C)} | {name: kept[name][1:] for name in rows}
    acts |= {name: shape[1:] for name, shape in last.items()}
    return {
        "vectors": (dtype, vectors),
        "panels": (dtype, panels),
        "cache": (dtype, {k: (L, *s) for k, s in cache.items()}),
        "acts": (dtype, acts),
        "batch": (np.int32, {"tokens": (B, seq_len)}),
    }


# which weights are packed
# what training keeps and writing has no use for
_UNUSED = ("att_lse", "residual3")


def _packed(cfg):
    """The linear layers' weights, rows of the table of tensors."""
    return [x for x in tensor_table(cfg) if x.turned]


# the layers of writing
def _light(function, out, *args):
    """Call a layer with one thread, where out is only a few rows."""
    threads = get_num_threads()
    set_num_threads(1 if out.size < LIGHT else threads)
    try:
        function(out, *args)
    finally:
        set_num_threads(threads)


def _attend(out, lse, qkv, keys, values, first):
    """Attention, by way of the cache; nobody asks for lse."""
    cpu.cache_attention(out, keys, values, qkv, first)


def _multiply(out, inp, panels, bias, residual=None, **cache):
    """A linear layer; its bias is packed with its weights."""
    cpu.panels_forward(out, inp, panels, residual)


LAYERS = SimpleNamespace(
    layernorm_forward=partial(_light, cpu.layernorm_forward),
    gelu_forward=partial(_light, cpu.gelu_forward),
    matmul_forward=_multiply,
    attention_forward=_attend,
)


# the decoder
class Decoder:
    """GPT-2 for writing: no gradients, and keys and values are kept.

    cfg: a GPT2Config. batch_size: the most texts at once. seq_len: the
    longest text, by default cfg.max_seq_len. dtype: float32 or float64.
    Its weights are zero until `load`. Raises ValueError for a value out of
    range and MemoryError when its block of memory cannot be had.

    Derived in chapter 4.20.
    """

    def __init__(self, cfg, batch_size=1, seq_len=None, dtype=np.float32):
        seq_len = cfg.max_seq_len if seq_len is None else seq_len
        if batch_size < 1 or not 1 <= seq_len <= cfg.max_seq_len:
            raise ValueError(
                f"Decoder: batch_size must be at least 1 and seq_len 1 to "
                f"{cfg.max_seq_len}, got {batch_size} and {seq_len}"
            )
        self.cfg, self.batch_size, self.seq_len = cfg, batch_size, seq_len
        layout = decoder_layout(cfg, batch_size, seq_len, dtype)
        check_room(sum(footprint(layout).values()), FEWER)
        self.memory = Arena(layout)
        self._acts, self._tokens = self.memory["acts"], self.memory["batch"]
        self._block = block_of(cfg)
        self._layers = [self._layer(i) for i in range(cfg.num_layers)]
        self._held = 0, 0  # rows and positions whose keys are kept

    def _layer(self, i):
        """Block i: its weights, and its part of the cache."""
        arrays = self.memory["vectors"] | self.memory["panels"]
        own = [x.name for x in tensor_table(self.cfg) if x.stacked]
        cache = {name: x[i] for name, x in self.memory["cache"].items()}
        return {name: arrays[name][i] for name in own if name in arrays}, cache

    def load(self, params):
        """Take the weights of a mapping such as `GPT2.params`.

        They are copied, from a GPU too: after another step of training,
        load them again. Raises TypeError or ValueError before it copies any,
        where one does not fit.
        """
        for name, shape in parameter_shapes(self.cfg).items():
            check_fit(f"Decoder.load: {name}", params[name], shape, FLOATS)
        panels = self.memory["panels"]
        for name, array in self.memory["vectors"].items():
            array[...] = params[name]
        cpu.pack_weight(panels["wte"], np.asarray(params["wte"]))
        for x in _packed(self.cfg):
            weight, bias = np.asarray(params[x.name]), x.name[:-1] + "b"
            for i, panel in enumerate(panels[x.name]):
                own = np.asarray(params[bias])[i] if self.cfg.bias else None
                cpu.pack_weight(panel, weight[i], own)
        self._held = 0, 0
        return self

    @classmethod
    def of(cls, model, batch_size=1, seq_len=None):
        """A Decoder with the weights of a GPT2, as they are now."""
        seq_len = model.seq_len if seq_len is None else seq_len
        dtype = model.params["wte"].dtype
        return cls(model.cfg, batch_size, seq_len, dtype).load(model.params)

    @classmethod
    def from_checkpoint(cls, path, batch_size=1, seq_len=None, tokens=None):
        """A Decoder with weights from disk; path, tokens: see open_model.

        For a while it holds them twice: as they are read, and packed.
        """
        found = open_model(path, tokens)
        cfg = found.cfg
        layout = {"params": (np.float32, parameter_shapes(cfg))}
        check_room(2 * sum(footprint(layout).values()), FEWER)
        decoder, arena = cls(cfg, batch_size, seq_len), Arena(layout)
        found.read(arena["params"])
        return decoder.load(arena["params"])

    def following(self, texts):
        """The logits (N, V) of the token that follows each of N texts.

        texts: N lists of tokens, of one length from 1 to seq_len; N is at
        most batch_size. What the texts share with those of the last call,
        from the first token on, is not computed again; the logits are the
        same to the last bit. Raises TypeError or ValueError before it
        computes anything.
        """
        texts = self._checked(texts)
        rows, length = texts.shape
        first = self._shared(texts)
        alone = first == 0 and (texts == texts[0]).all()
        self._held = 0, 0
        self._tokens["tokens"][:rows, :length] = texts
        some = texts[:1] if alone else texts
        size = max(1, CHUNK // len(some))
        for start in range(first, length, size):
            self._extend(some[:, start : start + size], start)
        if alone:
            self._copy_first_row(rows, length)
        self._held = rows, length
        return self._logits(rows)

    def _checked(self, texts):
        """The texts as an array, if they can be one."""
        texts = np.asarray(texts)
        rows, length = texts.shape if texts.ndim == 2 else (0, 0)
        if not (1 <= rows <= self.batch_size and 1 <= length <= self.seq_len):
            raise ValueError(
                f"Decoder.following: texts must have shape (N, T), N at most "
                f"{self.batch_size} and T at most {self.seq_len}, got "
                f"{texts.shape}"
            )
        name = "Decoder.following: texts"
        check_tokens(name, texts, self.cfg.vocab_size)
        return texts.astype(np.int32)

    def _shared(self, texts):
        """How many positions are kept already; never the last."""
        rows, length = self._held
        if len(texts) > rows:
            return 0
        length = min(length, texts.shape[1] - 1)
        held = self._tokens["tokens"][: len(texts), :length]
        differs = (held != texts[:, :length]).any(axis=0)
        return int(differs.argmax()) if differs.any() else length

    def _extend(self, tokens, first):
        """Run some positions (B, T) through all blocks."""
        tokens = np.ascontiguousarray(tokens)
        rows, new = tokens.shape
        a = {
            name: x[: tokens.size].reshape(rows, new, *x.shape[1:])
            for name, x in self._acts.items()
            if len(x) >= tokens.size
        }
        embedding = self.memory["panels"]["wte"], self.memory["vectors"]["wpe"]
        cpu.embed_forward(a["x"], tokens, *embedding, first)
        a["att_lse"] = None
        for w, cache in self._layers:
            kept = {name: x[:rows] for name, x in cache.items()}
            how = self._block, LAYERS, a["x"], a["x"], w, a
            block_forward(*how, first=first, **kept)
        self._acts["last"][:rows] = a["x"][:, -1]

    def _copy_first_row(self, rows, length):
        """Texts that are the same share what the first has computed."""
        keys, values = self.memory["cache"].values()
        panels = -(-length // keys.shape[-1])
        keys[:, 1:rows, :, :panels] = keys[:, :1, :, :panels]
        values[:, 1:rows, :, :length] = values[:, :1, :, :length]
        self._acts["last"][1:rows] = self._acts["last"][:1]

    def _logits(self, rows):
        """The head of the model, for the last position of each text."""
        names = "last", "lnf", "lnf_mean", "lnf_rstd", "logits"
        a = {x: self._acts[x][:rows, None] for x in names}
        how = a["lnf"], a["last"], self.memory["vectors"], a
        self._block.norm.forward(LAYERS, "lnf", *how)
        wte = self.memory["panels"]["wte"]
        cpu.panels_forward(a["logits"], a["lnf"], wte)
        return a["logits"][:, 0, : self.cfg.vocab_size].copy()

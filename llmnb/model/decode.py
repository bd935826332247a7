# Written by `make export` from notebooks/4_practice/20_decoder.py: edit that file.

"""GPT-2 for writing, with its keys and values kept."""

__all__ = ["Decoder", "FEWER", "LIGHT", "POSITIONS", "decoder_layout"]


# imports of the decoder
from functools import partial
from types import SimpleNamespace

import numpy as np
from numba import get_num_threads, set_num_threads

from llmnb import cpu

from llmnb.arena import Arena, footprint
from llmnb.cpu.decode import cache_shapes, panels_shape, ring_size
from llmnb.formats.checkpoint import open_model
from llmnb.checks import FLOATS, check_fit, check_tokens
from llmnb.model.layout import block_activations, block_shapes
from llmnb.model.parts import block_forward, block_of
from llmnb.model.tensors import parameter_shapes, tensor_table
from llmnb.checks import check_room


# its memory
POSITIONS = 256  # positions, of all texts, that are computed at once
FEWER = "fewer or shorter texts, or a smaller model, take less"
LIGHT = 1 << 14  # numbers that one thread finishes before a second wakes


def decoder_layout(cfg, batch_size, seq_len, dtype=np.float32):
    """The groups of the arena in which a Decoder works.

    vectors: parameters as they are; panels: weights, packed with their
    biases; cache: keys and values of every block; acts: what one block
    computes for at most max(batch_size, POSITIONS) positions, and the logits
    of the last; tables: what the parts of a block look up.

    Derived in chapter 4.20.
    """
    L, shapes = cfg.num_layers, parameter_shapes(cfg)
    panels = {x.name: (L, *panels_shape(*x.shape)) for x in _packed(cfg)}
    panels[_head(cfg)] = panels_shape(cfg.padded_vocab_size, cfg.channels)
    vectors = {n: shape for n, shape in shapes.items() if n not in panels}
    tables = block_of(cfg).tables(cfg, seq_len)
    return {
        "vectors": (dtype, vectors),
        "panels": (dtype, panels),
        "cache": (dtype, _caches(cfg, batch_size, seq_len)),
        "acts": (dtype, _activations(cfg, batch_size)),
        "tables": (dtype, {n: x.shape for n, x in tables.items()}),
        "batch": (np.int32, {"tokens": (batch_size, seq_len)}),
    }


# which weights are packed
def _packed(cfg):
    """The linear layers' weights, rows of the table of tensors."""
    return [x for x in tensor_table(cfg) if x.stacked and x.decays]


def _head(cfg):
    """The name of the table that makes the logits."""
    return "head" if "head" in parameter_shapes(cfg) else "wte"


# caches and activations
# what training keeps and writing has no use for
_UNUSED = ("att_lse", "residual3")


def _window(cfg, i):
    """How many positions a query of block i sees; None for all."""
    return cfg.window if cfg.family != "gpt2" and cfg.is_local(i) else None


def _caches(cfg, B, T):
    """The shapes of the keys and values of all blocks, by name and block."""
    heads, hs, found = cfg.num_kv_heads, cfg.head_size, {}
    for i in range(cfg.num_layers):
        own = cache_shapes(B, heads, T, hs, _window(cfg, i))
        found |= {f"{name}{i}": shape for name, shape in own.items()}
    return found


def _activations(cfg, batch_size):
    B, C, R = batch_size, cfg.channels, max(batch_size, POSITIONS)
    kept = block_activations(cfg, 1, R) | block_shapes(cfg, 1, R)
    rows = [x for x in kept if x[0] != "d" and x not in _UNUSED]
    last = dict.fromkeys(("last", "lnf"), (1, B, C))
    last |= {"logits": (1, B, cfg.padded_vocab_size)}
    last |= block_of(cfg).norm.keeps(cfg, 1, B, "lnf")
    acts = {"x": (R, C)} | {name: kept[name][1:] for name in rows}
    return acts | {name: shape[1:] for name, shape in last.items()}


# the layers of writing
def _light(function, out, *args):
    """Call a layer with one thread, where out is only a few rows."""
    threads = get_num_threads()
    set_num_threads(1 if out.size < LIGHT else threads)
    try:
        function(out, *args)
    finally:
        set_num_threads(threads)


def _attend(out, lse, qkv, keys, values, first, **rule):
    """Attention, by way of the cache; nobody asks for lse."""
    cpu.cache_attention(out, keys, values, qkv, first, **rule)


def _multiply(out, inp, panels, bias, residual=None, **cache):
    """A linear layer; its bias is packed with its weights."""
    cpu.panels_forward(out, inp, panels, residual)


def _embed(out, tokens, wte, scale):
    """Token vectors without positions, from a table or its panels."""
    if wte.ndim == 2:
        cpu.embedding_forward(out, tokens, wte, scale)
    else:
        cpu.embed_forward(out, tokens, wte, scale=scale)


_NAMES = [name for name in cpu.__all__ if name.endswith("_forward")]
_OWN = {
    "encoder_forward": cpu.embed_forward,
    "embedding_forward": _embed,
    "matmul_forward": _multiply,
    "attention_forward": _attend,
    "local_attention_forward": _attend,
}
_ROWS = {name: partial(_light, getattr(cpu, name)) for name in _NAMES}
LAYERS = SimpleNamespace(**_ROWS | _OWN)


# the decoder
class Decoder:
    """A model for writing: no gradients, and keys and values are kept.

    cfg: a GPT2Config or a relative. batch_size: the most texts at once.
    seq_len: the longest text, by default cfg.max_seq_len. dtype: float32 or
    float64.
    Its weights are zero until `adopt`. Raises ValueError for a value out of
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
        self._weights = self.memory["vectors"] | self.memory["panels"]
        self._ends = block_of(cfg)
        for name, values in self._ends.tables(cfg, seq_len).items():
            self.memory["tables"][name][...] = values
        self._layers = [self._layer(i) for i in range(cfg.num_layers)]
        self._held = 0, 0  # rows and positions whose keys are kept
        self._longest = 0  # how far the keys went since position 0 was new

    def _layer(self, i):
        """Block i: its parts, its weights, and its part of the cache."""
        own = [x.name for x in tensor_table(self.cfg) if x.stacked]
        weights = {name: self._weights[name][i] for name in own}
        cache = self.memory["cache"]
        cache = {name: cache[f"{name}{i}"] for name in ("keys", "values")}
        return block_of(self.cfg, i), weights, cache

    def adopt(self, params):
        """Take the weights of a mapping such as `GPT2.params`.

        They are copied, from a GPU too: after another step of training,
        set them again. Raises TypeError or ValueError before it copies any,
        where one does not fit.
        """
        for name, shape in parameter_shapes(self.cfg).items():
            check_fit(f"Decoder.adopt: {name}", params[name], shape, FLOATS)
        self._held = 0, 0  # first: half of what follows makes keys stale too
        panels, head = self.memory["panels"], _head(self.cfg)
        for name, array in self.memory["vectors"].items():
            array[...] = params[name]
        cpu.pack_weight(panels[head], np.asarray(params[head]))
        for x in _packed(self.cfg):
            weight, bias = np.asarray(params[x.name]), x.name[:-1] + "b"
            for i, panel in enumerate(panels[x.name]):
                own = np.asarray(params[bias])[i] if bias in params else None
                cpu.pack_weight(panel, weight[i], own)
        return self

    @classmethod
    def of(cls, model, batch_size=1, seq_len=None):
        """A Decoder with the weights of a GPT2, as they are now."""
        seq_len = model.seq_len if seq_len is None else seq_len
        dtype = model.params["wte"].dtype
        return cls(model.cfg, batch_size, seq_len, dtype).adopt(model.params)

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
        return decoder.adopt(arena["params"])

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
        size = max(1, POSITIONS // len(some))
        for start in range(first, length, size):
            self._extend(some[:, start : start + size], start)
        if alone:
            self._copy_first_row(rows, length)
        self._held = rows, length
        self._longest = max(length, self._longest if first else 0)
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
        shared = int(differs.argmax()) if differs.any() else length
        return shared if self._still_sees(shared) else 0

    def _still_sees(self, position):
        """Whether all that a position sees is kept, in every block."""
        blocks, hs = range(self.cfg.num_layers), self.cfg.head_size
        windows = {_window(self.cfg, i) for i in blocks} - {None}
        return all(
            max(0, position + 1 - x) >= self._longest - ring_size(hs, x)
            for x in windows
        )

    def _extend(self, tokens, first):
        """Run some positions (B, T) through all blocks."""
        tokens = np.ascontiguousarray(tokens)
        rows, new = tokens.shape
        a = {
            name: x[: tokens.size].reshape(rows, new, *x.shape[1:])
            for name, x in self._acts.items()
            if len(x) >= tokens.size
        }
        w = dict(self._weights)
        if "wpe" in w:
            w["wpe"] = w["wpe"][first:]
        self._ends.encoder.forward(LAYERS, a["x"], tokens, w)
        a |= {"att_lse": None} | self.memory["tables"]
        for block, w, cache in self._layers:
            kept = {name: x[:rows] for name, x in cache.items()}
            how = block, LAYERS, a["x"], a["x"], w, a
            block_forward(*how, first=first, **kept)
        self._acts["last"][:rows] = a["x"][:, -1]

    def _copy_first_row(self, rows, length):
        """Texts that are the same share what the first has computed."""
        for _, _, cache in self._layers:
            keys, values = cache["keys"], cache["values"]
            panels = -(-length // keys.shape[-1])
            keys[1:rows, :, :panels] = keys[:1, :, :panels]
            values[1:rows, :, :length] = values[:1, :, :length]
        self._acts["last"][1:rows] = self._acts["last"][:1]

    def _logits(self, rows):
        """The head of the model, for the last position of each text."""
        w, ends = self._weights, self._ends
        names = ends.norm.keeps(self.cfg, 1, rows, "lnf")
        names = "last", "lnf", "logits", *names
        a = {x: self._acts[x][:rows, None] for x in names}
        ends.norm.forward(LAYERS, "lnf", a["lnf"], a["last"], w, a)
        ends.head.forward(LAYERS, a["logits"], a["lnf"], w, {})
        return a["logits"][:, 0, : self.cfg.vocab_size].copy()

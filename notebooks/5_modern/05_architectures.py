# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       reference.embedding: "Token vectors in NumPy, without positions."
#       cpu.embedding: "Token vectors, compiled for the processor's cores."
#       cuda.embedding: "Token vectors on a GPU, without positions."
#       model.modern: "The parts of Llama's block and its relatives'."
# ---

# %% [markdown]
# # The architectures: Llama, Mistral, Gemma, Qwen from the same parts
#
# > One block with other parts, a table of tensors, and a configuration a family.
#
# *Reading time: 30 minutes. You need: the block ([chapter
# 1.13](../1_by_hand/13_block.ipynb)) and the parts of chapters 5.1 to 5.4.*
#
# ## Where we are
#
# Four chapters have changed one box each. Now they go into one block, and seven
# families of models come out: they differ in numbers and in a few words. At the end
# you can
#
# - say what separates GPT-2 from Llama, and Llama from each of the others;
# - read the parts of a block, and say which array each hands to the next;
# - count a published model's parameters, and hit the published number.
#
# ## Three blocks

# %% setup
import matplotlib.pyplot as plt
import numpy as np

from llmnb.book.diagram import PALETTE, draw_arrow, draw_rounded
from llmnb.book.verify import compare, numerical_gradient, verdict
from llmnb.config import GPT2Config
from llmnb.model.architectures import ARCHITECTURES, PRESETS

COLUMNS = {
    "GPT-2": "LayerNorm|attention|+|LayerNorm|up, GELU, down|+",
    "Llama": "RMSNorm|turn q and k\nattention|+|RMSNorm"
    "|gate, up\nSwiGLU, down|+",
    "Gemma 2": "RMSNorm|turn q and k\nattention, capped|RMSNorm|+|RMSNorm"
    "|gate, up\nGeGLU, down|RMSNorm|+",
}

# %% draw them tags=["hide-input"]
fig, ax = plt.subplots(figsize=(8, 4.8), dpi=100)
old = set(COLUMNS["GPT-2"].split("|"))
for n, (name, labels) in enumerate(COLUMNS.items()):
    x, labels = 2.7 * n, labels.split("|")
    ax.text(x, 0.75, name, ha="center", color=PALETTE["grey"], weight="bold")
    step, begin = 7 / len(labels), 0.2
    for i, label in enumerate(labels):
        y = -(i + 0.5) * step
        lit = "grey" if label in old else "orange"
        if label == "+":
            by = [(x, begin), (x - 1.15, begin), (x - 1.15, y), (x - 0.2, y)]
            draw_arrow(ax, by, color=PALETTE["grey"])
            begin = y - 0.28
        half = (0.2, 0.2) if label == "+" else (0.85, min(0.36, step * 0.42))
        corner, size = (x - half[0], y - half[1]), [2 * a for a in half]
        look = {"facecolor": PALETTE[lit], "edgecolor": "none"}
        draw_rounded(ax, corner, *size, 0.1, **look)
        middle = {"ha": "center", "va": "center", "size": 8.5}
        ax.text(x, y, label, color="white", **middle)
        top = y + step - (0.2 if i and labels[i - 1] == "+" else 0.36)
        down = [(x, top), (x, y + half[1])]
        draw_arrow(ax, down, color=PALETTE["grey"])
ax.set(xlim=(-1.3, 6.5), ylim=(-7.1, 1.1))
ax.axis("off")
plt.show()

# %% [markdown]
# *Figure 5.5.1. A block of three models; orange is what GPT-2 has not. The plan
# stays, two halves that each add to the stream, and Gemma 2 norms what a half
# has computed before it is added.*
#
# Both ends changed too. Positions are gone from the first, for rotation does their
# work in every block; Gemma multiplies the token vectors by $\sqrt C$. And
# at the last the logits come from the table of tokens again (*tied*), or
# from a matrix of their own. So the first end is a copy of rows. Backward, the
# gradient of a place is added to the row of its token, and a token that
# comes twice gets both:

# %% imports of the embedding tags=["export"] module="reference.embedding"
import numpy as np

from llmnb.shapes import shapes


# %% token vectors tags=["export"] module="reference.embedding"
@shapes("B T C!, B T of Vp, Vp C", scale="above 0")
def embedding_forward(out, inp, wte, scale=1.0):
    """Write the vector of each token, times scale.

    out: (B, T, C), overwritten. inp: (B, T) integers, each in [0, Vp). wte:
    (Vp, C). out and wte of one float dtype.
    """
    out[...] = wte[inp] * wte.dtype.type(scale)


@shapes("Vp C!, B T C, B T of Vp", scale="above 0")
def embedding_backward(dwte, dout, inp, scale=1.0):
    """Add dout's rows, times scale, to the rows that they came from.

    dwte: (Vp, C), added to. dout: (B, T, C). inp: (B, T) integers.
    """
    np.add.at(dwte, inp, dout * dwte.dtype.type(scale))


# %% [markdown]
# ## The whole difference
#
# A family is a configuration class, which
# [chapter 5.6](06_files.ipynb) writes beside the files that it comes from. What a
# user sets is a field: sizes, the base of rotation, a window. What makes the
# family itself is an attribute of the class, so that no file can change it.
# Read from the configurations, this is all that separates six models:


# %% the families, a column each
def facts(cfg):
    old, norm = cfg.family == "gpt2", {"rmsnorm": "rms"}.get(cfg.norm, "layer")
    has = {x: getattr(cfg, x, None) for x in dir(cfg)}
    get, yes = has.get, ("-", "yes")
    shared = get("num_kv_heads") or cfg.num_heads
    caps = [f"{get(f'{x}_softcap') or '-'}" for x in ("attention", "final")]
    return {
        "norm": norm + (", 1+w" if get("offset") else ""),
        "norms a block": 4 if get("post_norms") else 2,
        "q, k normed": yes[bool(get("qk_norm"))],
        "positions": "learned" if old else "turned",
        "feed-forward": cfg.feedforward,
        "its channels": get("hidden") or 4 * cfg.channels,
        "heads, of k": f"{cfg.num_heads}, {shared}",
        "size of head": cfg.head_size,
        "window": get("window") or "-",
        "1 whole in": get("global_every") or "-",
        "soft caps": " ".join(caps),
        "tied": yes[old or cfg.tied],
        "biases": "q, k, v" if get("qkv_bias") else yes[cfg.bias],
    }


# %% printed tags=["fold-input"]
shown = "llama-3-8b", "mistral-7b-v0.1", "qwen3-0.6b", "gemma-2-2b"
columns = [GPT2Config()]
columns += [PRESETS[name] for name in (*shown, "gemma-3-1b")]
names = [x.family.removesuffix("_text") for x in columns]
print(" " * 13, *[f"{name:>10}" for name in names])
for row in facts(columns[0]):
    print(f"{row:<13}", *[f"{facts(x)[row]!s:>10}" for x in columns])

# %% [markdown]
# Read it column by column. From GPT-2 to Llama almost every row changes: the
# norm, the positions, the feed-forward layer, keys that heads share; and the
# biases are gone. The first Mistral is a Llama with a window, and the later
# ones are Llamas. Qwen 2 and 2.5 are Llamas whose queries, keys and values have
# biases. Qwen 3 norms queries and keys in their place, and its heads together are
# wider than the stream: 16 of 128 channels, where $C$ is 1,024. The Gemmas have
# GeGLU, norms by $1 + w$, heads of 256 channels and a tied table. Gemma 2 has a norm
# after each half too, both caps, and a window in every other block. Gemma 3 has no
# caps any more, norms queries and keys in their place, and sees the whole text
# in one block of six only. How many heads, and how many channels, is a matter
# of size and not of family.
#
# ## The parts
#
# A model asks its configuration two things: `cfg.tensors()`, what there is to
# learn, and `cfg.block(i)`, the parts of block $i$. `tensor_table` and `block_of` of
# [chapter 1.13](../1_by_hand/13_block.ipynb) pass the questions on, so `GPT2`,
# which trains all of them, names no family.
#
# The table first: a row for each kind of tensor, with its shape, its first values,
# and its name in published files. `modern_table` lists the rows in the order in
# which a block uses them, and leaves out those that a family has not, such as
# the norms of heads. Published files keep queries, keys and values apart, and gate and
# up too; we keep each group as one matrix, one product, and note the `pieces`.
# A norm's weights begin where it does nothing: at 1, or with Gemma's $1 + w$ at 0.

# %% imports of the parts tags=["export"] module="model.modern"
import math

from llmnb.model.parts import (
    ATTENTION, STD, Block, End, Part, Tensor, product, product_backward,
)  # fmt: skip
from llmnb.reference.rotary import rope_table


# %% the table of tensors tags=["export", "fold-input"] module="model.modern"
def modern_table(cfg):
    """All tensors of a Llama or a relative, a list of `Tensor`."""
    C, hs, H = cfg.channels, cfg.head_size, cfg.hidden
    NH, NKV = cfg.num_heads * hs, cfg.num_kv_heads * hs
    attention, mlp = "self_attn.{}_proj", "mlp.{}_proj"
    qkv = [("q", NH), ("k", NKV), ("v", NKV)]
    short = STD / math.sqrt(2 * cfg.num_layers)  # into the stream
    after, normed = cfg.post_norms, "qk" if cfg.qk_norm else ""
    second = "pre_feedforward" if after else "post_attention"
    return [
        *_token_tables(cfg),
        _gain(cfg, "ln1w", "input_layernorm", C),
        _linear("qkvw", attention, qkv, C),
        *[_linear("qkvb", attention, qkv)] * cfg.qkv_bias,
        *[_gain(cfg, f"{x}normw", f"self_attn.{x}_norm", hs) for x in normed],
        _linear("attprojw", attention, [("o", C)], NH, short),
        *[_gain(cfg, "post1w", "post_attention_layernorm", C)] * after,
        _gain(cfg, "ln2w", f"{second}_layernorm", C),
        _linear("fcw", mlp, [("gate", H), ("up", H)], C),
        _linear("fcprojw", mlp, [("down", C)], H, short),
        *[_gain(cfg, "post2w", "post_feedforward_layernorm", C)] * after,
        _gain(cfg, "lnfw", None, C),
    ]


def _token_tables(cfg):
    """The table of tokens, and of what makes the logits if that is another."""
    shape = cfg.padded_vocab_size, cfg.channels
    how = {"stacked": False, "decays": True, "std": STD}
    how["used"] = cfg.vocab_size
    wte = Tensor("wte", shape, "model.embed_tokens.weight", **how)
    if cfg.tied:
        return [wte]
    head = Tensor("head", shape, "lm_head.weight", **how)
    return [wte._replace(added=True), head]


def _gain(cfg, name, there, size):
    """The weights of a norm; they begin where the norm does nothing."""
    there = f"layers.{{}}.{there}" if there else "norm"
    start, stacked = 1.0 - cfg.offset, name != "lnfw"
    how = {"stacked": stacked, "added": True, "start": start}
    return Tensor(name, (size,), f"model.{there}.weight", **how)


def _linear(name, there, pieces, ins=None, std=STD):
    """A linear layer's weights; its biases where ins is None.

    pieces: pairs of a word, which names a published array, and its rows.
    """
    kind = "bias" if ins is None else "weight"
    words, rows = zip(*pieces, strict=True)
    names = [f"model.layers.{{}}.{there.format(x)}.{kind}" for x in words]
    several = tuple(zip(names, rows, strict=True)) if len(rows) > 1 else ()
    if ins is None:
        return Tensor(name, (sum(rows),), names[0], pieces=several)
    how = {"decays": True, "std": std, "pieces": several}
    return Tensor(name, (sum(rows), ins), names[0], **how)


# %% the matrices of a block tags=["hide-input"]
from llmnb.model.tensors import parameter_count, tensor_table

fig, ax = plt.subplots(figsize=(8, 2.0), dpi=100)
kinds = {"q": "blue", "k": "orange", "v": "green"}
small = ARCHITECTURES["llama"](64, 100, 2, 4, 32, num_kv_heads=2, hidden=48)
x = 0
for tensor in tensor_table(small):
    if not tensor.stacked or not tensor.decays:
        continue
    ax.text(x, 1.1, tensor.name, color=PALETTE["grey"])
    for name, rows in tensor.pieces or [(tensor.there, tensor.shape[0])]:
        label = name.split(".")[4]
        colour = PALETTE[kinds.get(label[0], "purple")]
        look = {"fc": colour, "ec": "white", "lw": 2}
        ax.add_patch(plt.Rectangle((x, 0), rows, 1, **look))
        middle = {"ha": "center", "va": "center", "size": 8, "rotation": 90}
        ax.text(x + rows / 2, 0.5, label, color="white", **middle)
        x += rows
    x += 18
ax.set(xlim=(-2, x), ylim=(-0.1, 1.4))
ax.axis("off")
plt.show()

# %% [markdown]
# *Figure 5.5.2. The rows of a block's four matrices, and the published tensors that
# fill them: three are one of ours, two another, and none is transposed.*
#
# Now what a block computes. A `Part` names the arrays that it *keeps* for the way
# back and those with which the blocks *take turns*, since nobody reads them once
# a block is done; and it has a forward and a backward function. Here a function of
# the configuration makes the part, and what differs between families, an offset,
# a window, a bend, is a constant within it.

# %% [markdown]
# The norm hands its function the two numbers that differ, $\epsilon$ and the
# offset, and keeps one number a row (chapter 5.1).


# %% the norm tags=["export"] module="model.modern"
def _rmsnorm(cfg):
    eps, offset = cfg.norm_eps, cfg.offset

    def forward(ops, name, out, inp, w, a):
        rstd, weight = a[f"{name}_rstd"], w[f"{name}w"]
        ops.rmsnorm_forward(out, rstd, inp, weight, eps, offset)

    def backward(ops, name, dinp, dout, inp, w, a, dw, add=True):
        rstd, weight = a[f"{name}_rstd"], w[f"{name}w"]
        grads = dinp, dw[f"{name}w"], dout
        ops.rmsnorm_backward(*grads, inp, weight, rstd, offset, add)

    def keeps(cfg, B, T, name):
        return {f"{name}_rstd": (B, T)}

    return Part(None, keeps, None, forward, backward)


# %% [markdown]
# Attention reads queries and keys that have been normed, if the family does, and
# turned. `ready` makes them in the forward pass. Without norms it turns in place,
# and backward finds them turned. With norms it writes into `qkvn`, which all
# blocks share, and backward makes them once more: cheaper than keeping them for
# each block. The angles come from a table, or two: Gemma 3 turns by the base
# 10,000 in blocks with a window, and by 1,000,000 in the others. A family without
# window, scale and cap takes GPT-2's own attention.
#
# So the arrays go from hand to hand like this. The first product writes `qkv`.
# Attention reads it, normed and turned, writes `atty`, and keeps `att_lse`. The
# second product adds `atty` times `attprojw` to the stream. Backward the second
# product makes `datty`, and attention makes `dqkv` of it, the gradient of what it
# has read. `back` turns that back, (5.2.7) and (5.2.8), and takes it through the
# norms by (5.4.9). From `dqkv` as it is then, the first product makes the gradient
# of what the block's norm has written.


# %% attention tags=["export"] module="model.modern"
def _queries_and_keys(cfg, i):
    """Functions that take the products' output to what attention reads."""
    table = "rope_local" if cfg.is_local(i) and cfg.local_theta else "rope"
    turning = cfg.num_heads + cfg.num_kv_heads
    eps, offset = cfg.norm_eps, cfg.offset

    def ready(ops, w, a, first=0, turned=False):
        """qkv, normed and turned; turned: whether it is, from forward."""
        qkv = a["qkv"]
        if cfg.qk_norm:
            weights = w["qnormw"], w["knormw"]
            qkv, turned = a["qkvn"], False
            arrays = qkv, a["qk_rstd"], a["qkv"]
            ops.headnorm_forward(*arrays, *weights, eps, offset)
        if not turned:
            ops.rotary_forward(qkv, a[table], turning, first)
        return qkv

    def back(ops, w, a, dqkv, dw):
        ops.rotary_backward(dqkv, a[table], turning)
        if cfg.qk_norm:
            grads = dqkv, dw["qnormw"], dw["knormw"]
            kept = a["qkv"], w["qnormw"], w["knormw"], a["qk_rstd"]
            ops.headnorm_backward(*grads, *kept, offset)

    return ready, back


def _attention(cfg, i):
    ready, back = _queries_and_keys(cfg, i)
    window = cfg.window if cfg.is_local(i) else None
    rule = {"window": window, "scale": cfg.attention_scale}
    rule["softcap"] = cfg.attention_softcap
    rule = {name: x for name, x in rule.items() if x is not None}
    layer = "local_attention" if rule else "attention"

    def forward(ops, out, inp, residual, w, a, how):
        product(ops, a["qkv"], inp, w, "qkv", **how)
        qkv = ready(ops, w, a, how.get("first", 0))
        attend = getattr(ops, f"{layer}_forward")
        attend(a["atty"], a["att_lse"], qkv, **rule, **how)
        product(ops, out, a["atty"], w, "attproj", residual, **how)

    def backward(ops, dinp, dout, inp, w, a, dw, d, add, how):
        datty, dqkv, y = d["datty"], d["dqkv"], a["atty"]
        product_backward(ops, datty, dout, y, w, dw, "attproj", add, **how)
        kept = ready(ops, w, a, turned=True), y, a["att_lse"]
        attend = getattr(ops, f"{layer}_backward")
        attend(dqkv, datty, *kept, add=False, **rule, **how)
        back(ops, w, a, dqkv, dw)
        product_backward(ops, dinp, dqkv, inp, w, dw, "qkv", add, **how)

    return Part(None, _attention_keeps, _attention_turns, forward, backward)


def _attention_keeps(cfg, B, T):
    kept, normed = ATTENTION.keeps(cfg, B, T), cfg.num_heads + cfg.num_kv_heads
    return kept | ({"qk_rstd": (B, T, normed)} if cfg.qk_norm else {})


def _attention_turns(cfg, B, T):
    turns = ATTENTION.turns(cfg, B, T)
    return turns | ({"qkvn": turns["dqkv"]} if cfg.qk_norm else {})


# %% [markdown]
# The gated half is shorter: a product writes `fch`, gates and values; the gate
# makes `fcg` of them; a second product adds it to the stream. It keeps `fch` and
# computes `fcg` again on the way back (chapter 5.3), where `dfcg` and `dfch` are
# their gradients.


# %% feed-forward tags=["export"] module="model.modern"
def _gated(cfg):
    kind = cfg.feedforward

    def keeps(cfg, B, T):
        return {"fch": (B, T, 2 * cfg.hidden)}

    def turns(cfg, B, T):
        narrow, wide = (B, T, cfg.hidden), (B, T, 2 * cfg.hidden)
        return {"fcg": narrow, "dfcg": narrow, "dfch": wide}

    def forward(ops, out, inp, residual, w, a, how):
        product(ops, a["fch"], inp, w, "fc", **how)
        getattr(ops, f"{kind}_forward")(a["fcg"], a["fch"])
        product(ops, out, a["fcg"], w, "fcproj", residual, **how)

    def backward(ops, dinp, dout, inp, w, a, dw, d, add, how):
        dfch, dfcg, bent = d["dfch"], d["dfcg"], a["fcg"]
        getattr(ops, f"{kind}_forward")(bent, a["fch"])
        product_backward(ops, dfcg, dout, bent, w, dw, "fcproj", add, **how)
        getattr(ops, f"{kind}_backward")(dfch, dfcg, a["fch"])
        product_backward(ops, dinp, dfch, inp, w, dw, "fc", add, **how)

    return Part(None, keeps, turns, forward, backward)


# %% [markdown]
# Gemma 2 and 3 wrap both halves: the same part, with no stream to add, then a norm,
# then the sum. `half` is kept, for the norm's gradient reads its input.


# %% a norm after a half tags=["export"] module="model.modern"
def _then_norm(part, norm, name):
    """A part whose output is normed before the stream's is added."""

    def keeps(cfg, B, T):
        kept = part.keeps(cfg, B, T) | norm.keeps(cfg, B, T, name)
        return kept | {f"{name}_inp": (B, T, cfg.channels)}

    def turns(cfg, B, T):
        own = dict.fromkeys(("normed", "dnormed"), (B, T, cfg.channels))
        return part.turns(cfg, B, T) | own

    def forward(ops, out, inp, residual, w, a, how):
        half = a[f"{name}_inp"]
        part.forward(ops, half, inp, None, w, a, how)
        norm.forward(ops, name, a["normed"], half, w, a)
        ops.residual_forward(out, residual, a["normed"])

    def backward(ops, dinp, dout, inp, w, a, dw, d, add, how):
        dhalf, half = d["dnormed"], a[f"{name}_inp"]
        norm.backward(ops, name, dhalf, dout, half, w, a, dw, add=False)
        part.backward(ops, dinp, dhalf, inp, w, a, dw, d, add, how)

    return Part(None, keeps, turns, forward, backward)


# %% [markdown]
# The ends. A tied table gets two gradients, so the token vectors' is added to what
# the logits left there; with a cap the loss goes back through its slope.


# %% both ends tags=["export"] module="model.modern"
def _ends(cfg):
    scale = math.sqrt(cfg.channels) if cfg.embedding_scaled else 1.0
    cap, head = cfg.final_softcap, "wte" if cfg.tied else "head"

    def embed(ops, out, tokens, w):
        ops.embedding_forward(out, tokens, w["wte"], scale)

    def embed_backward(ops, dout, tokens, dw):
        ops.embedding_backward(dw["wte"], dout, tokens, scale)

    def logits(ops, out, inp, w, how):
        ops.matmul_forward(out, inp, w[head], None, **how)
        if cap is not None:
            ops.softcap_forward(out, cap)

    def logits_backward(ops, dinp, a, batch, w, dw, add, how):
        dlogits, V = a["logits"], batch["V"]
        arrays = dlogits, a["dlosses"], a["logits"], a["lse"]
        if cap is None:
            ops.crossentropy_softmax_backward(*arrays, batch["targets"], V)
        else:
            arrays = *arrays, batch["targets"]
            ops.capped_crossentropy_backward(*arrays, V, cap)
        options = {"add_dinp": False, "add_dweight": add} | how
        arrays = dw[head], None, dlogits, a["lnf"], w[head]
        ops.matmul_backward(dinp, *arrays, **options)

    return End(embed, embed_backward), End(logits, logits_backward)


# %% the block tags=["export"] module="model.modern"
def _tables(cfg, T):
    tables = {
        "rope": rope_table(T, cfg.head_size, cfg.rope_theta, cfg.rope_scaling)
    }
    if cfg.local_theta:
        local = rope_table(T, cfg.head_size, cfg.local_theta)
        tables["rope_local"] = local
    return tables


def modern_block(cfg, i=0):
    """The parts of block i of a Llama or a relative, and the ends."""
    norm, attention = _rmsnorm(cfg), _attention(cfg, i)
    feedforward = _gated(cfg)
    if cfg.post_norms:
        attention = _then_norm(attention, norm, "post1")
        feedforward = _then_norm(feedforward, norm, "post2")
    return Block(norm, attention, feedforward, *_ends(cfg), _tables)


# %% [markdown]
# ## Every gradient of every family
#
# Layers that are right can be connected wrongly. So the proof again, for whole
# models: every parameter of a tiny one of each family, in float64; after its
# name stands how many they are. The step is
# $10^{-6}$, smaller than elsewhere, because a norm of four channels bends much, and
# the error of central differences grows with the square of the step. Last a
# mistake: the gradients of a model whose blocks look one position too far back.

# %% a whole gradient, by central differences
from llmnb.model.gpt2 import GPT2

TINY = {"num_kv_heads": 1, "head_size": 4, "hidden": 3, "window": 2}
tokens = np.array([[3, 1, 4, 1, 5, 2]])


def tiny(family, **others):
    how = {} if family == "gpt2" else TINY | {"global_every": 2} | others
    cfg = ARCHITECTURES[family](8, 7, 2, 2, 4, **how)
    model = GPT2(cfg, 1, 5, "reference", "fp64")
    draw = np.random.default_rng(5)
    for x in tensor_table(cfg):
        w = model.params[x.name][: x.used]
        w += draw.normal(size=w.shape) * 0.5
    return model


def both_gradients(model, other=None):
    """Of all parameters: by central differences, and by `other`'s backward."""
    batch, pairs = (tokens[:, :-1], tokens[:, 1:]), []
    other = other or model
    other.forward(*batch)
    other.backward()
    for x in tensor_table(model.cfg):
        w, grad = (y[x.name][: x.used] for y in (model.params, other.grads))
        want = numerical_gradient(lambda: model.forward(*batch), w, 1e-6)
        pairs.append((want.ravel(), grad.ravel().copy()))
    return [np.concatenate(y) for y in zip(*pairs, strict=True)]


for family in ARCHITECTURES:
    want, got = both_gradients(tiny(family))
    compare(f"{family}, {want.size}", got, want, tol=1e-7)
want, wrong = both_gradients(tiny("gemma2"), tiny("gemma2", window=3))
verdict("window of 3", np.abs(want - wrong).max() > 1e-3, "caught")

# %% [markdown]
# ## Counted
#
# The number of parameters of a published model is known to the last digit:
# 8,030,261,248 are Llama 3 8B's. If the table gives the same number, it has
# forgotten no tensor and has none too many. Twelve models of all seven families,
# from 135 million parameters to 8 billion:

# %% against the published numbers
published = {
    "llama-2-7b": 6_738_415_616, "llama-3-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400, "smollm2-135m": 134_515_008,
    "mistral-7b-v0.1": 7_241_732_096, "mistral-7b-v0.3": 7_248_023_552,
    "gemma-2b": 2_506_172_416, "gemma-2-2b": 2_614_341_888,
    "gemma-3-270m": 268_098_176, "gemma-3-1b": 999_885_952,
    "qwen2.5-0.5b": 494_032_768, "qwen3-0.6b": 596_049_920,
}  # fmt: skip
ours = {x: parameter_count(PRESETS[x], padded=False) for x in published}
verdict(f"{len(published)} models", ours == published, "to the last digit")

# %% [markdown]
# ## What each change buys
#
# The model of [chapter 1.18](../1_by_hand/18_training.ipynb) again: its text, its
# 3,000 steps, its learning rates, two seeds. First GPT-2 as it was; then without
# biases, and that one with a single part replaced by Llama's; then whole families.
# Compare a difference with the distance of a row's two dots before you believe it.
# (`tests/record_changes.py` has recorded the runs.)

# %% recorded runs, and their spread tags=["hide-input"]
import csv
from pathlib import Path

table = Path("../../tests/data/families.csv").read_text("utf-8")
found = {}
for row in csv.DictReader(table.splitlines()):
    found.setdefault(row["family"], []).append(row)
losses = {x: [float(r["val"]) for r in rows] for x, rows in found.items()}
fig, ax = plt.subplots(figsize=(7.8, 3.9), dpi=100)
beside = {"transform": ax.get_yaxis_transform(), "va": "center", "size": 9}
ax.text(1.02, -1, "parameters, and both losses", **beside)
for y, (name, vals) in enumerate(losses.items()):
    ax.plot(vals, [y] * len(vals), "o", color=PALETTE["orange"])
    count = f"{int(found[name][0]['parameters']):,}"
    said = "   ".join([count, *[f"{x:.3f}" for x in vals]])
    ax.text(1.02, y, said, **beside)
ax.set_yticks(range(len(found)), list(found))
ax.invert_yaxis()
ax.set_xlabel("validation loss, nats a token")
ax.spines[["top", "right"]].set_visible(False)
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 5.5.3. Validation loss at the end of each run, a dot a seed, and the same in
# numbers. Of the single changes only rotary positions stand apart from GPT-2 on the
# better side; the whole families all have them, and lie there too.*

# %% what stands apart
old, plain = losses["GPT-2"], losses["GPT-2 without biases"]
alone = {x: losses[f"GPT-2 without biases + {x}"] for x in ("norm", "rotary")}
gated = losses["GPT-2 without biases + gated"]
verdict("rotary", max(alone["rotary"]) < min(old), "better on both seeds")
verdict("RMSNorm", min(alone["norm"]) < max(plain), "no gain, no clear loss")
verdict("the gate alone", min(gated) > min(old), "no gain at this size")
whole = (
    "Llama",
    "Mistral, window 16",
    "Qwen 3",
    "Gemma",
    "Gemma 2",
    "Gemma 3",
)
verdict("families", all(max(losses[x]) < min(old) for x in whole), "better")
fewer = losses["Llama, 1 kv head"]
verdict("1 kv head", min(fewer) > max(losses["Llama"]), "costs a little")

# %% [markdown]
# At this size, two layers and 170,000 parameters, positions are what buys: a turn
# costs no parameter, and the model need not learn 64 vectors to know who stands next
# to whom. RMSNorm was never meant to lower a loss; it is cheaper. The gate gains
# nothing here by itself. The two seeds of either lie far apart: at the high rate of
# this run some starts go badly. That large models gain from gates is what others have
# measured; these runs cannot show it. One head of keys and values in place of four
# costs a few hundredths of a nat, and saves three quarters of the cache.

# %% [markdown]
# ## Add a family
#
# Qwen 2 shows the way: a Llama whose queries, keys and values have biases.
#
# 1. In [chapter 5.6](06_files.ipynb) it has a class, with the attribute
#    `qkv_bias` that no other family sets, and a place in `ARCHITECTURES`; in
#    `_CONFIGS` of [chapter A.10](../appendix/10_book.ipynb) its class becomes
#    `llmnb.Qwen2Config`.
# 2. Here `modern_table` has a row `qkvb`, with the published names as its pieces.
#    No part changed, for `product` adds a bias where there is one; a family with
#    a new layer would call it in a part. Training, the decoder, LoRA and the files
#    read the table and the parts, and follow.
# 3. Where its config.json is read and written as no other's, chapter 5.6 names the
#    family; [chapter 5.7](07_gguf.ipynb) does so for the names in GGUF files.
# 4. The tests run over every family in `tests/llamas.py`, and over each case that
#    `tests/record_families.py` records: `python tests/record_families.py qwen2` asks
#    `transformers` for its logits, its gradients and ten steps.
#
# ## Token vectors on a CPU and a GPU
#
# It is the encoder of chapter 1.5 without the positions. Forward a row is copied
# and scaled; on a GPU a thread does that for one number. Backward several
# places may add to one row, and a sum of floats depends on its order. On a CPU
# one thread adds all rows in the order of the text, which is little beside the
# products of a step. On a GPU the places are sorted into buckets by their token, as in
# [chapter 3.3](../3_gpu/03_encoder.ipynb), and each place has blocks of threads with
# a channel to a thread. They first look for their token among the earlier places of
# the bucket. If it stands there, they leave; if not, they add the rows of all places
# that have it, in the order of the text. So no atomic operation is
# needed, and the bits are the same at each run.

# %% imports of the CPU's embedding tags=["export"] module="cpu.embedding"
from llmnb.backend import noted
from llmnb.cpu.jit import inner
from llmnb.shapes import COMPILED, shapes


# %% the embedding's loops tags=["exporti", "fold-input"] module="cpu.embedding"
@inner
def _embedding_forward(out, inp, wte, scale):
    rows, C = out.shape
    for n in range(rows):
        y, token = out[n], wte[inp[n]]
        for c in range(C):
            y[c] = token[c] * scale


@inner
def _embedding_backward(dwte, dout, inp, scale):
    rows, C = dout.shape
    for n in range(rows):
        dtoken, dy = dwte[inp[n]], dout[n]
        for c in range(C):
            dtoken[c] += dy[c] * scale


# %% token vectors, compiled tags=["export", "fold-input"] module="cpu.embedding"
@shapes("B T C!, B T of Vp, Vp C", COMPILED, scale="above 0")
def embedding_forward(out, inp, wte, scale=1.0):
    """Write the vector of each token, times scale.

    out: (B, T, C), overwritten. inp: (B, T) int32, each in [0, Vp). wte:
    (Vp, C). out and wte both float32 or both float64 and C-contiguous.
    Raises TypeError or ValueError before it computes anything.
    """
    rows = out.reshape(inp.size, out.shape[2])
    number = wte.dtype.type(scale)
    noted(_embedding_forward, rows, inp.reshape(-1), wte, number)


@shapes("Vp C!, B T C, B T of Vp", COMPILED, scale="above 0")
def embedding_backward(dwte, dout, inp, scale=1.0):
    """Add dout's rows, times scale, to the rows that they came from.

    dwte: (Vp, C), added to; rows of absent tokens stay. dout: (B, T, C).
    inp: (B, T) int32, each in [0, Vp). One thread adds all rows in the
    order of the text. Raises as `embedding_forward` does.
    """
    rows = dout.reshape(inp.size, dout.shape[2])
    number = dwte.dtype.type(scale)
    noted(_embedding_backward, dwte, rows, inp.reshape(-1), number)


# %% imports of the GPU's embedding tags=["export"] module="cuda.embedding"
import numpy as np

from llmnb.cuda.encoder import (
    THREADS,
    _where,
    encoder_scratch,
    into_buckets,
)
from llmnb.gpu.launch import DEVICE, given_work, kernel
from llmnb.gpu.simulator import cuda
from llmnb.shapes import shapes


# %% the embedding's kernels tags=["exporti", "fold-input"] module="cuda.embedding"
@kernel
def _embedding_forward(out, inp, wte, scale):
    i = cuda.grid(1)
    rows, C = out.shape
    if i < rows * C:
        n, c = i // C, i % C
        out[n, c] = wte[inp[n], c] * scale


@kernel
def _embedding_backward(dwte, dout, inp, scale, order, starts, K):
    at, c = cuda.blockIdx.x, cuda.blockIdx.y * THREADS + cuda.threadIdx.x
    C = dout.shape[1]
    if c - cuda.laneid >= C:
        return  # nothing is left for this warp
    token, mine, total = int(inp[order[at]]), c < C, np.float32(0)
    begin, end = starts[token % K], starts[token % K + 1]
    for first in range(begin, at, 32):
        if _where(inp, order, first, at, token) != 0:
            return  # the block of an earlier entry does it all
    if mine:
        total = dwte[token, c]
    for first in range(at, end, 32):
        bits = _where(inp, order, first, end, token)
        if mine and bits != 0:
            for k in range(32):
                if (bits >> k) & 1:
                    total += dout[order[first + k], c] * scale
    if mine:
        dwte[token, c] = total


# %% token vectors on a GPU tags=["export", "fold-input"] module="cuda.embedding"
@shapes("B T C!, B T of Vp, Vp C", DEVICE, scale="above 0")
def embedding_forward(out, inp, wte, scale=1.0):
    """Write the vector of each token, times scale.

    out: (B, T, C), overwritten. inp: (B, T) int32, each in [0, Vp): the
    caller sees to that. wte: (Vp, C). On a device, out and wte float32.
    Raises TypeError or ValueError before it launches anything.
    """
    rows, places = out.reshape(inp.size, out.shape[2]), inp.reshape(inp.size)
    grid = -(-out.size // THREADS)
    _embedding_forward[grid, THREADS](rows, places, wte, np.float32(scale))


@shapes("Vp C!, B T C, B T of Vp", DEVICE, scale="above 0", work="W!?")
def embedding_backward(dwte, dout, inp, scale=1.0, work=None):
    """Add dout's rows, times scale, to the rows that they came from.

    dwte: (Vp, C), added to; rows of absent tokens stay. dout: (B, T, C).
    inp: (B, T) int32. On a device, dwte and dout float32. work: float32 of
    `encoder_scratch(B * T)` elements, allocated when None. The places are
    sorted into buckets as in `encoder_backward`, a block for each: the first
    of each token adds all rows in the order of the text. Raises as
    `embedding_forward` does, and ValueError where work is too small.
    """
    n, C = inp.size, dout.shape[2]
    work = given_work("embedding_backward", work, encoder_scratch(n), dout)
    rows, places = dout.reshape(n, C), inp.reshape(n)
    grid, number = (n, -(-C // THREADS)), np.float32(scale)
    found = into_buckets(places, work)
    _embedding_backward[grid, THREADS](dwte, rows, places, number, *found)


# %% token vectors in three rooms tags=["fold-input"]
from llmnb import cpu, reference
from llmnb import cuda as on_gpu
from llmnb.gpu.launch import simulated, to_host
from llmnb.gpu.simulator import watch

draw = np.random.default_rng(55)
ids = draw.integers(0, 12, (2, 40), dtype=np.int32)
arrays = draw.normal(size=(2, 40, 150)), *draw.normal(size=(2, 12, 150))
dout, wte, dwte = (x.astype(np.float32) for x in arrays)


def both_ways(layer, place):
    """What a room makes of copies, by a scale of 2."""
    out, dw, inp, dy = map(place, (np.zeros_like(dout), dwte, ids, dout))
    layer.embedding_forward(out, inp, place(wte), 2.0)
    layer.embedding_backward(dw, dy, inp, 2.0)
    return out, dw


want, on_cpu = both_ways(reference, np.copy), both_ways(cpu, np.copy)
with watch():
    there = [to_host(x) for x in both_ways(on_gpu, simulated)]
compare("out", want[0], 2 * wte[ids], tol=1e-6)
for name, got in ("CPU", on_cpu), ("GPU", there):
    compare(f"{name}, out", got[0], want[0], tol=1e-6)
    compare(f"{name}, dwte", got[1], want[1], tol=1e-6)

# %% [markdown]
# ## Exercises
#
# **1** (★). How many parameters would Llama 3 8B have with a head of keys for each of
# its 32 heads of queries, and how many if it were tied?
#
# **2** (★★). Which blocks of Gemma 3 1B see the whole text?
#
# :::{admonition} Solutions to exercises 1 and 2
# :class: dropdown
# 1: 24 more heads of keys and of values, $2 \cdot 24 \cdot 128 \cdot 4096$ in each of
# 32 blocks; tied, $128{,}256 \cdot 4096$ fewer. 2: of each six the last.
# :::

# %% exercises 1 and 2, checked tags=["hide-cell"]
from dataclasses import replace

llama = PRESETS["llama-3-8b"]
count = parameter_count(llama)
more = parameter_count(replace(llama, num_kv_heads=32)) - count
verdict("1: all heads", more == 2 * 24 * 128 * 4096 * 32, f"{more:,} more")
less = count - parameter_count(replace(llama, tied=True))
verdict("1: tied", less == 128256 * 4096, f"{less:,} fewer")
gemma = PRESETS["gemma-3-1b"]
whole = [i for i in range(gemma.num_layers) if not gemma.is_local(i)]
verdict("2: the whole", whole == [5, 11, 17, 23], "in 5, 11, 17 and 23")

# %% [markdown]
# ## Take away
#
# - Seven families are one block: norm, attention, feed-forward, two ends.
# - A model asks for a table and for parts, and knows no family.
# - A count to the last digit and central differences prove table and wiring.
#
# **Design note.** Hugging Face's library has a file for each family, copies that
# may drift and that nobody's change breaks. Here a family is a handful of
# attributes, so that what differs can be printed as a table; the price is that a
# family with a new idea has to give it a name in all parts that it touches.
#
# ## Further reading
#
# - Touvron et al. (2023), [Llama](https://arxiv.org/abs/2302.13971), section 2.2, and
#   Grattafiori et al. (2024), [Llama 3](https://arxiv.org/abs/2407.21783), section 3.2.
# - Gemma Team (2025), [Gemma 3](https://arxiv.org/abs/2503.19786), section 2, and Yang et
#   al. (2025), [Qwen3](https://arxiv.org/abs/2505.09388), section 2: a page each.
#
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("5.5")

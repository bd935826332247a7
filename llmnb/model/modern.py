# Written by `make export` from notebooks/5_modern/05_architectures.py: edit that file.

"""The parts of Llama's block and its relatives'."""

__all__ = ["modern_block", "modern_table"]


# imports of the parts
import math

from llmnb.model.parts import (
    ATTENTION, STD, Block, End, Part, Tensor, product, product_backward,
)
from llmnb.reference.rotary import rope_table


# the table of tensors
def modern_table(cfg):
    """All tensors of a Llama or a relative, a list of `Tensor`.

    Derived in chapter 5.5.
    """
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


# the norm
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


# attention
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


# feed-forward
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


# a norm after a half
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


# both ends
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


# the block
def _tables(cfg, T):
    tables = {
        "rope": rope_table(T, cfg.head_size, cfg.rope_theta, cfg.rope_scaling)
    }
    if cfg.local_theta:
        local = rope_table(T, cfg.head_size, cfg.local_theta)
        tables["rope_local"] = local
    return tables


def modern_block(cfg, i=0):
    """The parts of block i of a Llama or a relative, and the ends.

    Derived in chapter 5.5.
    """
    norm, attention = _rmsnorm(cfg), _attention(cfg, i)
    feedforward = _gated(cfg)
    if cfg.post_norms:
        attention = _then_norm(attention, norm, "post1")
        feedforward = _then_norm(feedforward, norm, "post2")
    return Block(norm, attention, feedforward, *_ends(cfg), _tables)

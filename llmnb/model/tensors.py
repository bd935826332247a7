# Written by `make export` from notebooks/1_by_hand/13_block.py: edit that file.

"""Every parameter tensor of a model: one table, one truth."""

__all__ = [
    "decaying", "flops_per_token", "full_shape", "parameter_count",
    "parameter_shapes", "tensor_table",
]


# imports of the table
import math

from llmnb.model.parts import STD, Tensor, block_of


# the table of tensors
def tensor_table(cfg):
    """All tensors of a model, a list of `Tensor`, in llm.c's order.

    Derived in chapter 1.13.
    """
    if hasattr(cfg, "tensors"):  # of another family
        return cfg.tensors()
    C, Vp = cfg.channels, cfg.padded_vocab_size
    norm, attention, feedforward, *_ = block_of(cfg)
    tables = {"stacked": False, "decays": True, "std": STD}
    return [
        Tensor("wte", (Vp, C), "wte.weight", used=cfg.vocab_size, **tables),
        Tensor(
            "wpe", (cfg.max_seq_len, C), "wpe.weight", added=True, **tables
        ),
        *norm.tensors(cfg, "ln1", "h.{}.ln_1"),
        *[_of_block(x) for x in attention.tensors(cfg)],
        *norm.tensors(cfg, "ln2", "h.{}.ln_2"),
        *[_of_block(x) for x in feedforward.tensors(cfg)],
        *norm.tensors(cfg, "lnf", "ln_f", stacked=False),
    ]


def _of_block(tensor):
    return tensor._replace(there=f"h.{{}}.{tensor.there}")


# its shapes
def full_shape(tensor, cfg):
    """The shape of a tensor with all its blocks.

    Derived in chapter 1.13.
    """
    return (cfg.num_layers,) * tensor.stacked + tensor.shape


def parameter_shapes(cfg):
    """Shapes of all parameter tensors by llm.c's names, in its order.

    Derived in chapter 1.13.
    """
    return {x.name: full_shape(x, cfg) for x in tensor_table(cfg)}


def decaying(cfg):
    """The names of the tensors that weight decay applies to: a list.

    Derived in chapter 1.13.
    """
    return [x.name for x in tensor_table(cfg) if x.decays]


# counts
def parameter_count(cfg, padded=True):
    """How many parameters a configuration has, with or without padding.

    Derived in chapter 1.13.
    """
    count = 0
    for x in tensor_table(cfg):
        rows, *columns = full_shape(x, cfg)
        if x.used is not None and not padded:
            rows = x.used
        count += rows * math.prod(columns)
    return count


def flops_per_token(cfg, seq_len):
    """Floating-point operations to train on one token: 6 N + 6 L C T.

    N counts the parameters without padding. Six is two (multiply and add)
    for each of three products: one forward, two backward. The second term
    is attention's, with a causal mask. See (1.4.2).

    Derived in chapter 1.13.
    """
    weights = parameter_count(cfg, padded=False)
    if not getattr(cfg, "tied", True):  # reading a table multiplies nothing
        weights -= cfg.vocab_size * cfg.channels
    width = cfg.num_heads * cfg.head_size
    return 6 * weights + 6 * cfg.num_layers * width * seq_len

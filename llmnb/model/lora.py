# Written by `make export` from notebooks/5_modern/10_lora.py: edit that file.

"""Small matrices that learn beside frozen weights."""

__all__ = [
    "ADAPTERS", "Adapter", "HOSTS", "LoRA", "TARGETS", "adapter_backward",
    "adapter_forward", "adapter_settings", "adapter_shapes", "load_adapters",
    "merge", "save_adapters",
]


# imports
import json
import math
from typing import NamedTuple

import numpy as np

from llmnb.backend import choose
from llmnb.checks import FLOATS, check_fit
from llmnb.formats.checkpoint import first_not_finite
from llmnb.formats.safetensors import TensorFile, write_tensors
from llmnb.model.architectures import architecture_record
from llmnb.model.gpt2 import GPT2
from llmnb.model.random import Generator
from llmnb.model.tensors import full_shape, tensor_table
from llmnb.shapes import check_number


# an adapter
class Adapter(NamedTuple):
    """A frozen weight, and the two matrices that learn beside it.

    weight: (OC, C). down: (r, C) and up: (OC, r), with their gradients.
    mid, dmid: (B, T, r), what is between the two, and its gradient. The
    layer computes with weight + scale * up @ down.

    Derived in chapter 5.10.
    """

    weight: object
    down: object
    up: object
    ddown: object
    dup: object
    mid: object
    dmid: object
    scale: float


# the small road
def adapter_forward(ops, out, inp, x, **how):
    """Add what an Adapter x makes of inp to out; x.mid is overwritten.

    ops: the layers of a backend of the host. out: (B, T, OC). inp: (B, T,
    C). how: what else its products take.

    Derived in chapter 5.10.
    """
    ops.matmul_forward(x.mid, inp, x.down, None, **how)
    np.multiply(x.mid, x.scale, out=x.mid)
    ops.matmul_forward(out, x.mid, x.up, None, residual=out, **how)


def adapter_backward(ops, dinp, dout, inp, x, add=False, **how):
    """Add the small road's gradient to dinp; overwrite those of x.

    x: an Adapter, as adapter_forward left it. add: whether to add to
    x.ddown and x.dup instead. The other arguments: as there.

    Derived in chapter 5.10.
    """
    how["add_dweight"] = add
    arrays = x.dmid, x.dup, None, dout, x.mid, x.up
    ops.matmul_backward(*arrays, add_dinp=False, **how)
    np.multiply(x.dmid, x.scale, out=x.dmid)
    ops.matmul_backward(dinp, x.ddown, None, x.dmid, inp, x.down, **how)


# the layers, frozen
class _Frozen:
    """A backend's layers for a model whose own weights do not learn.

    Where a weight is an Adapter, its small road is taken too.
    """

    def __init__(self, ops):
        self._ops = ops

    def __getattr__(self, name):
        return getattr(self._ops, name)

    def matmul_forward(self, out, inp, weight, bias, residual=None, **how):
        """As the backend's."""
        x = weight if isinstance(weight, Adapter) else None
        arrays = out, inp, x.weight if x else weight, bias
        self._ops.matmul_forward(*arrays, residual=residual, **how)
        if x:
            adapter_forward(self._ops, out, inp, x, **how)

    def matmul_backward(
        self, dinp, dweight, dbias, dout, inp, weight,
        add_dinp=True, add_dweight=True, **how,
    ):  # fmt: skip
        """As the backend's, without the gradients of weight and bias."""
        x = weight if isinstance(weight, Adapter) else None
        arrays = dinp, None, None, dout, inp, x.weight if x else weight
        self._ops.matmul_backward(*arrays, add_dinp=add_dinp, **how)
        if x:
            how["add"] = add_dweight
            adapter_backward(self._ops, dinp, dout, inp, x, **how)

    def encoder_backward(self, *arrays):
        """Nothing: the tables of tokens and positions do not learn."""

    def embedding_backward(self, *arrays):
        """Nothing: the table of tokens does not learn."""


class _NoGradient:
    """What stands where a frozen weight's gradient would; it has no size."""

    def __getitem__(self, i):
        return self

    def fill(self, value):
        """Nothing."""


# which weights
TARGETS = "qkvw", "attprojw", "fcw", "fcprojw"


def adapter_shapes(cfg, rank=8, targets=TARGETS):
    """Shapes of the matrices that learn, by name.

    cfg: a model's configuration. rank: the least side of each, 1 to the
    least side of a target. targets: names of matrices that every block has.
    NAME.down is (L, rank, C), NAME.up (L, OC, rank). Raises ValueError.

    Derived in chapter 5.10.
    """
    matrices = {
        x.name: x.shape
        for x in tensor_table(cfg)
        if x.stacked and len(x.shape) == 2
    }
    targets = tuple(targets or ())
    if not targets:
        raise ValueError("LoRA: targets must name at least one weight")
    for name in targets:
        choose("LoRA: a name in targets", name, matrices)
    most = min(min(matrices[name]) for name in targets)
    if type(rank) is not int or not 1 <= rank <= most:
        raise ValueError(f"LoRA: rank must be 1 to {most}, got {rank!r}")
    found = {}
    for name in targets:
        OC, C = matrices[name]
        found[f"{name}.down"] = cfg.num_layers, rank, C
        found[f"{name}.up"] = cfg.num_layers, OC, rank
    return found


# the model's memory
class _Adapted(GPT2):
    """Its arena: gradients and averages are those of the adapters."""

    def _allocate(self, layout):
        dtype, _ = layout["params"]
        B, T, r = self.batch_size, self.seq_len, self.rank
        layout |= dict.fromkeys(("grads", "m", "v"), (dtype, self._shapes))
        kept = dict.fromkeys(self.targets, (self.cfg.num_layers, B, T, r))
        rows = [x for x in tensor_table(self.cfg) if not x.decays]
        vectors = {x.name: full_shape(x, self.cfg) for x in rows}
        layout |= {
            "adapters": (dtype, self._shapes),
            "mids": (dtype, kept | {"dmid": (B, T, r)}),
            "unused": (dtype, vectors),
        }
        super()._allocate(layout)
        grads, unused = self.memory["grads"], self.memory["unused"]
        for x in tensor_table(self.cfg):
            grads[x.name] = unused.get(x.name, _NoGradient())

    def _layer(self, i):
        w, acts, dw = super()._layer(i)
        for name in self.targets:
            w[name] = self._adapter(name, i, w[name])
        return w, acts, dw

    def _adapter(self, name, i, weight):
        keys, mids = (f"{name}.down", f"{name}.up"), self.memory["mids"]
        learns = [self.memory["adapters"][x][i] for x in keys]
        grads = [self.memory["grads"][x][i] for x in keys]
        middle = mids[name][i], mids["dmid"]
        return Adapter(weight, *learns, *grads, *middle, self.scale)


# the model
HOSTS = "cpu", "reference"  # backends whose arrays are the host's


class LoRA(_Adapted):
    """A frozen model, of any architecture, with small matrices that learn.

    cfg, batch_size, seq_len, backend, precision, seed: as for GPT2, on the
    host. rank, targets: see `adapter_shapes`; alpha: alpha / rank is the
    scale of what they add. adapters and grads map the names of these
    matrices to arrays; params holds the weights, which no step changes. The
    other methods are GPT2's: from_checkpoint takes rank, alpha and targets
    too, and a name in decay means the matrices beside that weight. Raises
    ValueError for a value out of range.

    Derived in chapter 5.10.
    """

    backends = HOSTS

    def __init__(
        self, cfg, batch_size, seq_len, backend="cpu", precision="fp32",
        seed=42, *, rank=8, alpha=16.0, targets=TARGETS,
    ):  # fmt: skip
        check_number("LoRA: alpha", alpha, "above 0")
        # one road for a name that stands twice
        self.rank, self.targets = rank, tuple(dict.fromkeys(targets or ()))
        self._shapes = adapter_shapes(cfg, rank, self.targets)
        self.scale = float(alpha) / rank
        super().__init__(cfg, batch_size, seq_len, backend, precision, seed)
        self.ops = _Frozen(self.ops)
        self.adapters = self.memory["adapters"]
        self.begin(42 if seed is None else seed)

    def begin(self, seed=42):
        """Draw new adapters, which change nothing yet: up is zero."""
        generator = Generator(seed)
        for name, x in self.adapters.items():
            x.fill(0)
            if name.endswith(".down"):
                generator.normal_(x, std=1 / math.sqrt(x.shape[-1]))
        self._forget()

    def _forget(self):
        """Let the averages be those of no step."""
        self.memory.flat("m").fill(0)
        self.memory.flat("v").fill(0)

    def _apply(self, decay):
        """AdamW on the adapters alone."""
        update = getattr(self.ops, self._machine.update)
        groups = [self.memory[x] for x in ("adapters", "grads", "m", "v")]
        for name in self._shapes:
            target = name.partition(".")[0]
            row = self._settings[decay is not None and target not in decay]
            update(*[x[name].reshape(-1) for x in groups], row)


# on the disk
ADAPTERS = "llmnb adapters 1"


def _record(model):
    return {
        "rank": model.rank,
        "alpha": model.scale * model.rank,
        "targets": list(model.targets),
        "model": architecture_record(model.cfg),
    }


def save_adapters(path, model):
    """Write a LoRA's adapters as a safetensors file of their own.

    Derived in chapter 5.10.
    """
    note = {"format": ADAPTERS, "record": json.dumps(_record(model))}
    write_tensors(path, model.adapters, note)


def adapter_settings(path):
    """What a file of adapters was trained with: rank, alpha and targets.

    Raises ValueError, naming the file, when it is no such file.

    Derived in chapter 5.10.
    """
    record = _read_record(path, TensorFile(path))
    del record["model"]
    return record


def _read_record(path, file):
    note = file.metadata
    try:
        if note.get("format") != ADAPTERS:
            raise ValueError(f"its format must be {ADAPTERS!r}")
        found = json.loads(note["record"])
        return {x: found[x] for x in ("rank", "alpha", "targets", "model")}
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: holds no adapters: {error}") from None


def load_adapters(path, model):
    """Read adapters into a LoRA that they fit; its averages become zero.

    Raises ValueError, naming the file, when they were trained on a model of
    another shape, with another rank, alpha or targets, or are damaged.

    Derived in chapter 5.10.
    """
    file = TensorFile(path)
    record, want = _read_record(path, file), _record(model)
    # as JSON has them
    for name, x in json.loads(json.dumps(want)).items():
        if record[name] != x:
            raise ValueError(
                f"{path}: {name} is {record[name]!r:.200}, the model's is "
                f"{x!r:.200}"
            )
    found = {}
    for name, x in model.adapters.items():
        if name not in file.names:
            raise ValueError(f"{path}: has no {name}")
        own = file[name]
        check_fit(f"{path}: {name}", own, x.shape, FLOATS)
        with np.errstate(over="ignore"):
            found[name] = own.astype(x.dtype)
    if wrong := first_not_finite(found):
        raise ValueError(f"{path}: {wrong}")
    for name, x in model.adapters.items():
        x[...] = found[name]
    model._forget()


# merge
def merge(model):
    """Add a LoRA's adapters to its weights, and begin with up = 0 again.

    The model computes what it did, up to rounding, and its params are those
    of an ordinary model: save_checkpoint, write_folder and Decoder.of take
    them.

    Derived in chapter 5.10.
    """
    for name in model.targets:
        down, up = (model.adapters[f"{name}.{x}"] for x in ("down", "up"))
        for weight, d, u in zip(model.params[name], down, up, strict=True):
            weight += model.scale * u @ d
            u.fill(0)  # at once: stopped half-way it can go on
    model._forget()

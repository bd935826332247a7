# Written by `make export` from notebooks/3_gpu/11_step.py: edit that file.

"""What a whole model needs of a GPU besides its layers."""

__all__ = [
    "Backend", "Classifier", "fill", "gpu", "model_layers", "model_layout",
    "no_gpu", "products", "zeros",
]


# imports of the model's GPU side
import os
import warnings
from functools import partial
from inspect import signature
from types import SimpleNamespace

import numpy as np

from llmnb import backend
from llmnb.arena import Arena, put
from llmnb.cuda import adamw, attention, encoder, layernorm, matmul
from llmnb.cuda.cublas import cublas_backward, cublas_forward
from llmnb.cuda.cublas import cublas_scratch, no_cublas
from llmnb.gpu.graph import Graph
from llmnb.gpu.launch import kernel, missing, simulated, to_host
from llmnb.gpu.simulator import cuda
from llmnb.gpu.toolkit import gpus, numba_cuda


# fill an array
@kernel
def _fill_flat(array, value):
    i = cuda.grid(1)
    if i < array.size:
        array[i] = value


def fill(array, value):
    """Write one number into all elements of a device's array.

    Derived in chapter 3.11.
    """
    flat = array.reshape(-1)
    _fill_flat[-(-flat.size // 256), 256](flat, flat.dtype.type(value))


# a block of zeros
def zeros(nbytes):
    """Zeroed bytes on the GPU, or else on the simulated one; for an Arena.

    Raises MemoryError when the GPU has not as many.

    Derived in chapter 3.11.
    """
    if missing():
        return simulated(np.zeros(nbytes, np.uint8))
    real = numba_cuda()
    try:
        block = real.device_array(nbytes, np.uint8)
    except real.cudadrv.driver.CudaAPIError as error:
        if "OUT_OF_MEMORY" in str(error):
            raise MemoryError(f"{nbytes:,} bytes on the GPU") from None
        raise
    fill(block, 0)
    return block


# is a GPU wanted in vain
def no_gpu():
    """Why there is none where one is wanted; else empty.

    Empty, too, where LLMNB_CUDA=simulator asks for the simulator.

    Derived in chapter 3.11.
    """
    return "" if os.environ.get("LLMNB_CUDA") == "simulator" else missing()


# the GPU in words
def gpu():
    """The name of the GPU and whose products it takes, or why not.

    Derived in chapter 3.11.
    """
    if missing():
        return f"none: {missing()}"
    name = numba_cuda().get_current_device().name
    name = name.decode() if isinstance(name, bytes) else name
    return f"{name}, products by {products()}"


# which products
def products():
    """Whose products a GPT2 takes on a GPU: "cublas" or "llmnb".

    cuBLASLt's where it can be had, else those of chapter 3.6. The variable
    LLMNB_MATMUL chooses: ValueError when it asks for what there is not.

    Derived in chapter 3.11.
    """
    asked = os.environ.get("LLMNB_MATMUL", "")
    if asked not in ("", "cublas", "llmnb"):
        raise ValueError(
            f"LLMNB_MATMUL must be 'cublas' or 'llmnb', got {asked!r}"
        )
    if asked == "cublas" and no_cublas():
        raise ValueError(f"LLMNB_MATMUL asks for cuBLASLt: {no_cublas()}")
    return asked or ("llmnb" if no_cublas() else "cublas")


# what a model wants besides its tensors
def model_layout(cfg, batch_size, seq_len, precision="fp32"):
    """Groups of the arena that a GPT2 on a GPU has besides those of others.

    work: scratch memory that the layers take turns with. settings: AdamW's
    numbers for tensors that decay, and for those that do not. Raises
    ValueError for a precision of "tf32" where it cannot be had.

    Derived in chapter 3.11.
    """
    if precision == "tf32" and products() != "cublas":
        why = no_cublas() or "LLMNB_MATMUL asks for other products"
        raise ValueError(f"GPT2: precision 'tf32' needs cuBLASLt: {why}")
    B, T, C, NH = batch_size, seq_len, cfg.channels, cfg.num_heads
    qkv = (NH + 2 * cfg.num_kv_heads) * cfg.head_size
    wanted = [
        layernorm.layernorm_scratch(B * T, C),  # RMSNorm wants half of it
        matmul.matmul_scratch(B * T, max(qkv, 4 * C)),  # for biases
        attention.attention_scratch(B, T, NH),
        adamw.clip_scratch(),
        encoder.encoder_scratch(B * T),
    ]
    if cfg.family != "gpt2" and cfg.qk_norm:
        from llmnb.cuda.headnorm import headnorm_scratch  # Part 5

        wanted.append(headnorm_scratch(B * T, cfg.head_size))
    if products() == "cublas":
        wanted.append(cublas_scratch())
    rows = dict.fromkeys(("decays", "stays"), (adamw.adamw_scratch(),))
    return {
        "work": (np.float32, {"floats": (max(wanted),)}),
        "settings": (np.float32, rows),
    }


# the layers of a model
def model_layers(room, work, precision="fp32"):
    """The layers as a GPT2 calls them: none of them allocates.

    room: the module with all layers. work: as `model_layout` says. precision:
    "fp32" or "tf32". Returns an object with the functions of the layers.

    Derived in chapter 3.11.
    """
    found = {k: x for k, x in vars(room).items() if hasattr(x, "arguments")}
    if products() == "cublas":
        tf32 = {"tf32": precision == "tf32"}
        found["matmul_forward"] = partial(cublas_forward, **tf32)
        found["matmul_backward"] = partial(cublas_backward, **tf32)
    for name, function in found.items():
        if "work" in signature(function).parameters:
            found[name] = partial(function, work=work)
    return SimpleNamespace(**found)


class Classifier:
    """The classifier's two functions; within a step, both in one launch.

    While `whole` is set, backward is sure to follow forward, so forward waits
    for it, and the fused function does the work of both. ops: the layers, in
    which it takes the place of the two.

    Derived in chapter 3.11.
    """

    whole = False

    def __init__(self, ops):
        self._forward = ops.crossentropy_softmax_forward
        self._backward = ops.crossentropy_softmax_backward
        self._fused = ops.fused_classifier
        ops.crossentropy_softmax_forward = self.forward
        ops.crossentropy_softmax_backward = self.backward

    def forward(self, losses, lse, logits, targets, V):
        """As crossentropy_softmax_forward."""
        self._losses = losses
        if not self.whole:
            self._forward(losses, lse, logits, targets, V)

    def backward(self, dlogits, dlosses, logits, lse, targets, V):
        """As crossentropy_softmax_backward."""
        if self.whole:
            self._fused(self._losses, lse, dlogits, dlosses, targets, V)
        else:
            self._backward(dlogits, dlosses, logits, lse, targets, V)


# the backend
class Backend(backend.Backend):
    """A GPU, or the simulated one: its memory, its layers, a step as a graph.

    Where there is no GPU, though one is wanted, a warning says why. Raises
    RuntimeError where there is one that cannot be used.

    Derived in chapter 3.11.
    """

    update = "adamw_apply"

    def __init__(self, layers, precision):
        if no_gpu() and gpus():
            raise RuntimeError(
                f"GPT2: there is a GPU, but {no_gpu()}; LLMNB_CUDA=simulator "
                "asks for the simulator"
            )
        if no_gpu():
            warnings.warn(
                f"GPT2: {no_gpu()}; the kernels run on the simulator, which "
                "is for tests of small models",
                stacklevel=4,
            )
        super().__init__(layers, precision)
        self._graphs = {}

    def groups(self, cfg, batch_size, seq_len):
        """Scratch memory for the layers, and a place for AdamW's settings."""
        # a cap on the logits has a backward function of its own (Part 5)
        self._fuses = not getattr(cfg, "final_softcap", None)
        return model_layout(cfg, batch_size, seq_len, self.precision)

    def allocate(self, layout, needed):
        """An Arena on the GPU, and the layers that work in it."""
        memory = Arena(layout, zeros)
        self._work = memory["work"]["floats"]
        self.ops = model_layers(self.ops, self._work, self.precision)
        self._classifier = Classifier(self.ops)
        return memory

    def fill(self, array, value):
        """Write one number into all elements of an array."""
        fill(array, value)

    def write(self, params, function):
        """Let a function write arrays of the host's, and copy them up."""
        host = {n: np.zeros(x.shape, x.dtype) for n, x in params.items()}
        function(host)
        for name, x in host.items():
            put(params[name], x)

    def settings(self, memory, rows):
        """Copy the settings up: a recorded step reads them from there."""
        places = [memory["settings"][x] for x in ("decays", "stays")]
        for place, row in zip(places, rows, strict=True):
            put(place, self.ops.adamw_settings(row))
        return places

    def clip(self, ops, grads, max_norm):
        """Launch the clipping; nothing waits for the norm."""
        ops.clip_apply(grads, max_norm)

    def norm(self):
        """The norm that `clip` has left behind, a float."""
        return float(to_host(self._work[:1])[0])

    def run(self, key, whole, params):
        """Launch a whole step, as the graph of an earlier one with its key."""
        if key not in self._graphs:
            self._graphs[key] = Graph(whole, params["wte"])
        self._classifier.whole = self._fuses
        try:
            self._graphs[key]()
        finally:
            self._classifier.whole = False

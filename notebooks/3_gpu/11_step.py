# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       cuda.model: "What a whole model needs of a GPU besides its layers."
#       gpu.graph: "Launches recorded once and replayed as one."
# ---

# %% [markdown]
# # The step as a graph: one launch
#
# > Everything stays where the kernels are, and what is launched is the same in
# > every step: so it is recorded once, and launched as one.
#
# *Reading time: 22 minutes. You need: [chapter 1.17](../1_by_hand/17_model.ipynb)
# and the kernels of this part.*

# %% [markdown]
# ## Where we are
#
# The layers have their kernels; now the whole model runs on them. At the end of
# this chapter you can
#
# - say what of a step crosses the bus between the host and the GPU;
# - say what is launched in a step, and why it is the same in the next;
# - say what a recorded graph of launches may not do.
#
# No GPU has run this chapter's code yet; it has been simulated, and its kernels
# have been compiled.

# %% [markdown]
# ## Setup

# %% setup
import matplotlib.pyplot as plt

from llmnb.arena import footprint
from llmnb.book.diagram import PALETTE
from llmnb.book.verify import compare, verdict
from llmnb.config import GPT2Config
from llmnb.model.gpt2 import GPT2
from llmnb.model.layout import gpt2_layout
from llmnb.model.tensors import parameter_count

# %% [markdown]
# ## What crosses the bus
#
# This part has written all layers a third time. The model's calls of them need
# no change: `ops` is `llmnb.cuda`. What does change is where the memory is, and
# who waits for whom.
#
# A GPU has memory of its own. Our kernels reach nothing else, and the processor
# that runs Python, called the *host*, reaches it only by copies over a bus. By
# its data sheet an H100's moves 64 GB/s each way, a fiftieth of what its memory
# does. A model that copied its activations back and forth would do little else.
# So everything stays on the device: parameters, gradients, AdamW's averages,
# activations.
# In a step two small things go up, the batch and AdamW's numbers, and two
# come down, the loss of each token and the norm of the gradient.
#
# A launch does not wait. It puts a kernel into a queue and returns, and the
# GPU works the queue off in order. A copy to the host must wait until what it
# copies is there. A copy from an ordinary array of the host's waits too: by
# NVIDIA's manual of the driver, for what was queued before it. Between two
# copies the host may run ahead.

# %% what crosses the bus in a step of GPT-2
B, T, settings = 4, 1024, 2 * 8
up = 4 * (2 * B * T + settings)
down = 4 * (B * T + 1)
stays = sum(footprint(gpt2_layout(GPT2Config(), B, T)).values())
print(f"up    {up:>14,} bytes\ndown  {down:>14,} bytes")
print(f"stays {stays:>14,} bytes")

# %% [markdown]
# ## The arena on the device
#
# The arena of [chapter 1.16](../1_by_hand/16_memory.ipynb) is a block of bytes with a table
# of names. For a GPU it gets its block from another function, and the rest
# is as it was: a slice of a device's array is a view, and so are `.view` and
# `.reshape`. Where NumPy wrote into an array, two small tools take over.
# `put`, of chapter 1.16, copies an array of the host's to the device, and
# `fill` is a kernel.

# %% imports of the model's GPU side tags=["export"] module="cuda.model"
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


# %% fill an array tags=["export"] module="cuda.model"
@kernel
def _fill_flat(array, value):
    i = cuda.grid(1)
    if i < array.size:
        array[i] = value


def fill(array, value):
    """Write one number into all elements of a device's array."""
    flat = array.reshape(-1)
    _fill_flat[-(-flat.size // 256), 256](flat, flat.dtype.type(value))


# %% a block of zeros tags=["export"] module="cuda.model"
def zeros(nbytes):
    """Zeroed bytes on the GPU, or else on the simulated one; for an Arena.

    Raises MemoryError when the GPU has not as many.
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


# %% [markdown]
# A vector of four needs an address that is a multiple of 16 bytes. That is
# why chapter 1.16 puts the tensors with rows of $C$ first in their group: if 4
# divides $C$, each of them begins at such an address, and so does each
# block's part of it.
#
# Two groups come on top. Some layers need scratch memory, for sums that
# blocks of threads pass on; none needs it for longer than its own call, and the
# norm, which has to stay, is the last to be written there. So all share one
# array, as long as the longest wish. And AdamW reads its numbers from memory
# ([chapter 3.10](10_adamw.ipynb) says why), one row of them for tensors that
# decay and one for the others.
#
# Whose products? [Chapter 3.6](06_matmul.ipynb) has its own, and
# [chapter 3.7](07_cublas.ipynb) hands plans to NVIDIA's cuBLASLt where that is
# installed. The model takes the library's if it can, and the variable `LLMNB_MATMUL` chooses otherwise. Only the
# library has products in TF32 (`precision="tf32"`).
#
# In a step the classifier's backward pass follows its forward pass, and nobody
# wants the logits in between; there one launch does the work of both
# ([chapter 3.8](08_classifier.ipynb)).
#
# The models of Part 5 have layers that these chapters do not know yet. So a model
# looks its layers up in the room `llmnb.cuda` when it is made: all functions there
# that declare the shapes of their arrays. The linear layers of those models have
# no biases, whose gradients are what our products want scratch memory for.


# %% is a GPU wanted in vain tags=["export"] module="cuda.model"
def no_gpu():
    """Why there is none where one is wanted; else empty.

    Empty, too, where LLMNB_CUDA=simulator asks for the simulator.
    """
    return "" if os.environ.get("LLMNB_CUDA") == "simulator" else missing()


# %% the GPU in words tags=["export"] module="cuda.model"
def gpu():
    """The name of the GPU and whose products it takes, or why not."""
    if missing():
        return f"none: {missing()}"
    name = numba_cuda().get_current_device().name
    name = name.decode() if isinstance(name, bytes) else name
    return f"{name}, products by {products()}"


# %% which products tags=["export"] module="cuda.model"
def products():
    """Whose products a GPT2 takes on a GPU: "cublas" or "llmnb".

    cuBLASLt's where it can be had, else those of chapter 3.6. The variable
    LLMNB_MATMUL chooses: ValueError when it asks for what there is not.
    """
    asked = os.environ.get("LLMNB_MATMUL", "")
    if asked not in ("", "cublas", "llmnb"):
        raise ValueError(
            f"LLMNB_MATMUL must be 'cublas' or 'llmnb', got {asked!r}"
        )
    if asked == "cublas" and no_cublas():
        raise ValueError(f"LLMNB_MATMUL asks for cuBLASLt: {no_cublas()}")
    return asked or ("llmnb" if no_cublas() else "cublas")


# %% what a model wants besides its tensors tags=["export"] module="cuda.model"
def model_layout(cfg, batch_size, seq_len, precision="fp32"):
    """Groups of the arena that a GPT2 on a GPU has besides those of others.

    work: scratch memory that the layers take turns with. settings: AdamW's
    numbers for tensors that decay, and for those that do not. Raises
    ValueError for a precision of "tf32" where it cannot be had.
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


# %% the layers of a model tags=["export"] module="cuda.model"
def model_layers(room, work, precision="fp32"):
    """The layers as a GPT2 calls them: none of them allocates.

    room: the module with all layers. work: as `model_layout` says. precision:
    "fp32" or "tf32". Returns an object with the functions of the layers.
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


# %% the backend tags=["export"] module="cuda.model"
class Backend(backend.Backend):
    """A GPU, or the simulated one: its memory, its layers, a step as a graph.

    Where there is no GPU, though one is wanted, a warning says why. Raises
    RuntimeError where there is one that cannot be used.
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


# %% [markdown]
# Here is a GPT-2 of two blocks on the device. Where there is no GPU, a
# warning says so, once, and the kernels run on the simulator of
# [chapter 3.1](01_threads.ipynb); we keep it quiet, so that this page reads the
# same everywhere. We also ask for our own products, because their launches
# are to be counted.

# %% a model on the device
import os


def on_gpu(cfg, batch_size, seq_len, **how):
    """A GPT2 on a GPU, or without a word on the simulated one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return GPT2(cfg, batch_size, seq_len, "cuda", **how)


os.environ["LLMNB_MATMUL"] = "llmnb"
tiny = GPT2Config(8, 61, 2, 2, 16)
gpu = on_gpu(tiny, 2, 8)
for group, size in gpu.memory.sizes().items():
    print(f"{group:<9} {size:>7,} bytes")
verdict("parameters", hasattr(gpu.params["wte"], "copy_to_host"), "on it")

# %% [markdown]
# ## The step as one graph
#
# How many launches is a step? The forward pass has a handful for each block,
# the backward pass more, and AdamW one for each run of tensors that decay alike.
# Every launch costs the host some microseconds of Python and driver, whatever
# its size. As long as the kernels take longer than that, the queue never runs
# dry and nobody notices. For a small model they do not, and the GPU waits for
# Python.
#
# But the list of launches is the same in every step: the same kernels on the
# same addresses, because nothing in the arena ever moves. So let the driver
# write the list down once, while the functions run, and then launch the
# whole list with one call. That is a *CUDA graph*. It sets three
# conditions. Nothing in it may wait for the GPU or allocate; so the batch and
# the settings are copied before the launch, and the results after it.
# Numbers among the arguments are recorded with their values; so what changes
# from step to step lies in arrays. And no decision of the host's can stand
# between two kernels.

# %% imports of the graph tags=["export"] module="gpu.graph"
import functools
import gc
import weakref

from llmnb.gpu.launch import DeviceArray, stream
from llmnb.gpu.toolkit import numba_cuda


# %% a graph tags=["export"] module="gpu.graph"
class Graph:
    """What a function launches, as one launch.

    function: called with nothing, it launches kernels on a device's arrays
    and does nothing else: it must not allocate, copy or wait. like: one of
    those arrays. A call runs the function as it is on the simulated GPU,
    and so does the first call on a real one, which compiles what is not
    compiled yet; if an error ends it, the next call does so again. The second
    call there records what is launched, as a CUDA graph, and from then on a
    call launches the record. A record holds
    addresses and numbers: what is to change between two calls must lie in
    the arrays. Raises RuntimeError when the driver refuses.
    """

    def __init__(self, function, like):
        self.function, self._compiled, self._made = function, False, None
        self._simulated = isinstance(like, DeviceArray)

    def __call__(self):
        if self._simulated or not self._compiled:
            self.function()
            self._compiled = True
            return
        from cuda.bindings import driver

        if self._made is None:
            self._made = _recorded(self.function)
            weakref.finalize(self, driver.cuGraphExecDestroy, self._made)
        _asked(driver.cuGraphLaunch(self._made, _stream().handle))


# %% a stream to record on tags=["exporti"] module="gpu.graph"
@functools.cache
def _stream():
    """A stream of our own: the default one cannot be recorded.

    It waits for what was put on the default stream before, and that for it.
    """
    return numba_cuda().stream()


def _asked(answer):
    """What the driver answers: raise its error, or return its values."""
    code, *values = answer
    if int(code):
        raise RuntimeError(f"CUDA driver: {code.name}")
    return values[0] if len(values) == 1 else values


# %% record tags=["exporti"] module="gpu.graph"
def _recorded(function):
    """An executable graph of what a function launches; nothing runs yet."""
    from cuda.bindings import driver

    real = numba_cuda()
    place = _stream()
    mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
    place.synchronize()
    gc.collect()  # what dies now is not freed while we record
    with real.defer_cleanup(), stream(place):
        _asked(driver.cuStreamBeginCapture(place.handle, mode))
        try:
            function()
        finally:  # leave the mode whatever happened
            answer = driver.cuStreamEndCapture(place.handle)
    graph = _asked(answer)
    try:
        return _asked(driver.cuGraphInstantiate(graph, 0))
    finally:
        driver.cuGraphDestroy(graph)


# %% [markdown]
# `GPT2.step` does with it what `forward`, `backward`, `clip_gradients` and
# `update` do one by one. On the host it calls the four. On a GPU it calls
# what is inside them, without the copies to the host in between, and that is
# what the graph records:
#
# ```text
# host   tokens, targets, settings       one launch      losses, norm
#           | copied up                     |                ^ copied down
# GPU       v       forward, losses, backward, norm and clip, AdamW
# ```
#
# The first call runs the functions as they are, so that every kernel is
# compiled and cuBLASLt has chosen its own; the second records; from then on a
# step is one launch. The stream that is recorded is not the one on which
# copies run. CUDA keeps the two in order: what is put on the default stream
# waits for the other streams, and they for it.
#
# On the simulator a call of the graph calls the functions, in the same
# order, so all but the recording itself is tested anywhere. The recording
# has not run on hardware yet. When it has, `llmnb bench --backend cuda` says
# what it is worth, and the results page shows it.
#
# ## Proof
#
# First the gradient of every tensor, against the reference in float64, with
# weights drawn wide. `watch` checks each access of the simulated
# GPU as it goes.

# %% every tensor, on the device
from llmnb.gpu.simulator import watch

draw = np.random.default_rng(13)
exact = GPT2(tiny, 2, 8, "reference", "fp64")
weights = draw.normal(scale=0.5, size=parameter_count(tiny))
for each in (exact, gpu):
    put(each.memory.flat("params"), weights)
batch = draw.integers(0, 61, (2, 2, 8))
with watch() as seen:
    loss, norm = gpu.step(*batch, decay=["wte", "wpe"])
compare("loss", loss, exact.forward(*batch), tol=1e-5)
exact.backward()
for name, want in exact.grads.items():
    apart = np.linalg.norm(np.asarray(gpu.grads[name]) - want)
    close = apart < 5e-6 * np.linalg.norm(want)
    verdict(f"d{name}", close, "within 5e-06 of float64")

# %% [markdown]
# `seen.launches` holds what this model of two blocks launched, so we can count:
# by the layer that a kernel belongs to, and, beside a model of one block, what
# one of any depth $L$ launches in a step.

# %% launches, counted
from collections import Counter

small = on_gpu(GPT2Config(5, 29, 1, 2, 8), 2, 5, seed=3)
data = draw.integers(0, 29, (2, 2, 5))
with watch() as one:
    small.step(*data, decay=["wte", "wpe"])
where = Counter(k.__module__.split(".")[-1] for k, *_ in seen.launches)
for name, count in sorted(where.items()):
    print(f"{name:<13} {count:>4}")
each = len(seen.launches) - len(one.launches)
rest = len(one.launches) - each
print(f"a step: {rest} + {each} L, for GPT-2 124M {rest + 12 * each}")

# %% [markdown]
# Then ten steps of training, with the losses and the norms of the CPU
# backend from the same seed. AdamW starts each run with clean averages.


# %% ten steps, on the device
def ten(model):
    how = {"learning_rate": 1e-2, "decay": ["wte", "fcw"]}
    return np.array(
        [model.step(*data, 1.0, step=k, **how) for k in range(1, 11)]
    )


got = ten(on_gpu(GPT2Config(5, 29, 1, 2, 8), 2, 5, seed=3))
want = ten(GPT2(GPT2Config(5, 29, 1, 2, 8), 2, 5, "cpu", seed=3))
compare("ten losses", got[:, 0], want[:, 0], tol=1e-5)
compare("ten norms", got[:, 1], want[:, 1], tol=1e-4)
verdict("training", got[-1, 0] < got[0, 0] - 0.5, "lowers the loss")


# %% draw a step
def lane(ax, y, boxes, colour):
    for start, width in boxes:
        ax.add_patch(
            plt.Rectangle((start, y), width, 0.7, fc=colour, ec="white")
        )


fig, axes = plt.subplots(2, 1, figsize=(7.5, 2.6), dpi=100, sharex=True)
calls = [(2 + 2 * k, 2) for k in range(12)]
kernels = [(3.7 + 2 * k, 0.9) for k in range(12)]
queue = [(4 + 0.95 * k, 0.9) for k in range(12)]
plans = ("launch by launch", calls, kernels), ("a graph", [(2, 2)], queue)
for ax, (title, host, device) in zip(axes, plans, strict=True):
    end = device[-1][0] + 0.9
    lane(ax, 1, [(0, 2), (max(end, host[-1][0] + 2), 2)], PALETTE["grey"])
    lane(ax, 1, host, PALETTE["orange"])
    lane(ax, 0, device, PALETTE["blue"])
    ax.set(xlim=(0, 31), ylim=(-0.2, 2), xticks=[], yticks=[0.35, 1.35])
    ax.set_yticklabels(["GPU", "host"])
    ax.set_title(title, loc="left", size=10)
    ax.spines[["top", "right", "bottom"]].set_visible(False)
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 3.11.1. A step of small kernels, drawn and not measured. Grey: copies
# of the batch and of the results; orange: launches; blue: kernels. Launched
# one by one, a kernel that takes less time than a launch leaves the GPU
# waiting for the host. As a graph the kernels follow each other.*
#
# A training run has decisions, too. It may leave out an update whose loss
# stands out, or add up the gradients of several batches
# ([chapter 4.13](../4_practice/13_loop.ipynb)). There the four methods are called one by
# one, as on the host.

# %% [markdown]
# ## Take away
#
# - On a GPU everything stays where the kernels are. A batch and sixteen
#   numbers go up, losses and a norm come down.
# - What is launched in between is the same in every step, so it can be
#   recorded; what changes from step to step must lie in arrays.

# %% [markdown]
# ## Exercises
#
# **1** (★★). On a GPU, `step` leaves out what waits between its parts. Show
# that it computes what `forward`, `backward`, `clip_gradients` and `update`
# do one by one, to the last bit. Which of these four wait for the GPU?
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# `forward`, which copies the batch up and the losses down, and
# `clip_gradients`, which copies the norm. `backward` only launches. `update`
# copies its numbers up, and that waits for the kernel that clips. The kernels
# and their order are the same either way, and each of them adds in an order of
# its own that never changes, so the bits are the same.
# :::


# %% exercise 1 tags=["hide-cell"]
def after_a_step(one_by_one):
    model = on_gpu(GPT2Config(5, 29, 1, 2, 8), 2, 5, seed=4)
    if one_by_one:
        model.forward(*data)
        model.backward()
        model.clip_gradients(0.5)
        model.update(1e-2)
    else:
        model.step(*data, 0.5, learning_rate=1e-2)
    return np.asarray(model.memory.flat("params"))


# %% exercise 1, checked
same = np.array_equal(after_a_step(True), after_a_step(False))
verdict("one by one", same, "or in one: the same bits")

# %% [markdown]
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("3.11")

# Written by `make export` from notebooks/appendix/08_racing.py: edit that file.

"""What a contestant's process runs: llmnb, PyTorch, transformers."""

__all__ = [
    "CONTESTANTS",
    "decoder_contestant",
    "llmnb_contestant",
    "main",
    "missing",
    "peak_memory",
    "random_batch",
    "serve",
    "torch_contestant",
    "transformers_contestant",
]


# imports of the peers
import json
import os
import sys
import time
from statistics import median


# peak memory
def peak_memory(pid="self"):
    """The most bytes a process has held in memory; None if unknown.

    pid: a process's number; only Linux knows about others. It counts
    everything: Python, NumPy, the compiler, the model.

    Derived in chapter A.8.
    """
    try:
        with open(f"/proc/{pid}/status") as file:
            rows = dict(line.split(":", 1) for line in file)
        return int(rows["VmHWM"].split()[0]) * 1024
    except (OSError, KeyError):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    if pid != "self":
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


# take orders
def serve(step, facts, commands, reply):
    """Train one step for each line "step" of a file, until another line.

    step: a function that returns a dict, which is answered with the
    seconds it took. facts: a function that returns what to answer at the
    end. commands: a text file. reply: takes each answer, a dict.

    Derived in chapter A.8.
    """
    waits = []
    while True:
        start = time.process_time()
        command = commands.readline().strip()
        waits.append(time.process_time() - start)
        if command != "step":
            break
        start = time.perf_counter()
        found = step()
        reply({"seconds": time.perf_counter() - start, **found})
    waited = {"cpu_seconds_a_wait": median(waits)}
    reply({"peak_bytes": peak_memory(), **waited, **facts()})


# the batch
def random_batch(spec):
    """Tokens and targets for a spec: the same for every contestant.

    spec: a dict with model, batch_size and seq_len. Returns an int64 array
    (2, B, T).

    Derived in chapter A.8.
    """
    import numpy as np

    shape = 2, spec["batch_size"], spec["seq_len"]
    draw = np.random.RandomState(0)
    return draw.randint(0, spec["model"]["vocab_size"], shape, np.int64)


# why a precision is missing
def missing(precision, backend="cpu"):
    """Why a backend cannot train with a precision here; None if it can.

    Derived in chapter A.8.
    """
    home = {"bf16": "cpu", "tf32": "cuda"}.get(precision, backend)
    if backend != home:
        return f"not available in the {backend} backend"
    if precision != "bf16":
        return None
    from llmnb.cpu.bfloat16 import has_bf16

    return None if has_bf16() else "not available on this CPU"


# our contestant
def llmnb_contestant(spec):
    """A step of a GPT2 and its facts: two functions for `serve`.

    spec: a dict with model, batch_size, seq_len, backend and precision.
    Raises NotImplementedError, saying why, when the precision is missing.

    Derived in chapter A.8.
    """
    from itertools import count

    from llmnb.bench.stopwatch import Stopwatch, timed_step
    from llmnb.config import GPT2Config
    from llmnb.model.gpt2 import GPT2

    backend, precision = spec["backend"], spec["precision"]
    if missing(precision, backend):
        raise NotImplementedError(missing(precision, backend))
    if backend == "cuda":
        return _cuda_contestant(spec)
    cfg = GPT2Config(**spec["model"])
    sizes = spec["batch_size"], spec["seq_len"]
    model = GPT2(cfg, *sizes, backend=backend, precision=precision)
    model.ops = Stopwatch(model.ops)
    batch, numbers = random_batch(spec), count(1)
    return (
        lambda: timed_step(model, *batch, next(numbers)),
        lambda: {"arena_bytes": model.memory.nbytes, **_our_facts(backend)},
    )


# our contestant on a GPU
def _cuda_contestant(spec):
    """As llmnb_contestant, for the cuda backend; spec: also graph."""
    from itertools import count

    from llmnb.config import GPT2Config
    from llmnb.bench.clock import no_times
    from llmnb.model.gpt2 import GPT2

    if no_times():
        raise NotImplementedError(no_times())
    from numba import cuda as real

    cfg = GPT2Config(**spec["model"])
    sizes = spec["batch_size"], spec["seq_len"]
    how = {name: spec[name] for name in ("backend", "precision")}
    model = GPT2(cfg, *sizes, **how)
    batch, numbers = random_batch(spec), count(1)

    def step():
        if spec["graph"]:
            loss, _ = model.step(*batch, step=next(numbers))
        else:
            loss = model.forward(*batch)
            model.backward()
            model.clip_gradients(float("inf"))
            model.update(step=next(numbers))
        real.synchronize()
        return {"loss": loss}

    return step, lambda: _cuda_facts(model, batch, numbers, spec["graph"])


def _cuda_facts(model, batch, numbers, graph):
    """Memory, versions, limits, and without a graph where the time goes."""
    from numba import cuda as real

    from llmnb.bench.stopwatch import Stopwatch, timed_step
    from llmnb.bench.clock import Clock, limits

    facts = {"arena_bytes": model.memory.nbytes, **_our_facts("cuda")}
    facts |= {"device_bytes": model.memory.nbytes, **limits(Clock())}
    if not graph:
        model.ops = Stopwatch(model.ops, real.synchronize)
        steps = [timed_step(model, *batch, next(numbers)) for _ in range(3)]
        facts["apart"] = steps
    return facts


# our facts
def _our_facts(backend):
    """Threads, versions, and for the cpu backend the peak of FMAs."""
    from importlib.metadata import version

    import numba

    names = ["llmnb", "numpy", "numba"]
    names += ["numba-cuda"] * (backend == "cuda")
    facts = {"threads": numba.get_num_threads()}
    facts["versions"] = {name: version(name) for name in names}
    if backend == "cpu":
        from llmnb.bench.peak import fma_peak

        facts["fma_peak"] = float(fma_peak())
    return facts


# a block in PyTorch
def _torch_block(C, NH):
    from torch import nn
    from torch.nn import functional as F

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.ln1, self.ln2 = nn.LayerNorm(C), nn.LayerNorm(C)
            self.qkv, self.attproj = nn.Linear(C, 3 * C), nn.Linear(C, C)
            self.fc, self.fcproj = nn.Linear(C, 4 * C), nn.Linear(4 * C, C)

        def attention(self, x):
            B, T, _ = x.shape
            qkv = self.qkv(x).view(B, T, 3, NH, C // NH)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            return self.attproj(y.transpose(1, 2).reshape(B, T, C))

        def forward(self, x):
            x = x + self.attention(self.ln1(x))
            h = F.gelu(self.fc(self.ln2(x)), approximate="tanh")
            return x + self.fcproj(h)

    return Block()


# GPT-2 in PyTorch
def _torch_gpt2(max_seq_len, vocab_size, num_layers, num_heads, channels):
    import torch
    from torch import nn
    from torch.nn import functional as F

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.wte = nn.Embedding(-(-vocab_size // 128) * 128, channels)
            self.wpe = nn.Embedding(max_seq_len, channels)
            blocks = [_torch_block(channels, num_heads)]
            for _ in range(num_layers - 1):
                blocks.append(_torch_block(channels, num_heads))
            self.blocks = nn.Sequential(*blocks)
            self.lnf = nn.LayerNorm(channels)

        def forward(self, tokens, targets):
            x = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]
            x = self.lnf(self.blocks(x))
            logits = F.linear(x, self.wte.weight)
            return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    model = Model()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(0.0, 0.02)
    return model


# PyTorch's contestant
def torch_contestant(spec):
    """A step of PyTorch's GPT-2 and its facts: two functions for `serve`.

    spec: a dict with model, batch_size, seq_len, compile and bf16, and for
    a GPU device ("cuda") and tf32. Raises ImportError where there is no
    torch, NotImplementedError where it finds no GPU.

    Derived in chapter A.8.
    """
    import torch

    device = _torch_device(torch, spec)
    torch.manual_seed(0)
    model = _torch_gpt2(**spec["model"]).to(device)
    run = torch.compile(model) if spec["compile"] else model
    rules = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, fused=True, **rules
    )
    batch = torch.from_numpy(random_batch(spec)).to(device)
    half = {"dtype": torch.bfloat16, "enabled": spec["bf16"]}

    def step():
        with torch.autocast(device, **half):
            loss = run(*batch)
        loss.backward()
        if device == "cuda":
            grads = [p.grad for p in model.parameters()]
            torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        return {"loss": loss.item()}

    return step, lambda: _torch_facts(torch, device)


# PyTorch on a GPU
def _torch_device(torch, spec):
    """Where a spec trains; on a GPU with or without TF32, as it says."""
    device = spec.get("device", "cpu")
    if device == "cuda":
        if not torch.cuda.is_available():
            raise NotImplementedError("torch finds no GPU")
        torch.backends.cuda.matmul.allow_tf32 = spec["tf32"]
        torch.backends.cudnn.allow_tf32 = spec["tf32"]
    return device


def _torch_facts(torch, device):
    """Threads and versions; on a GPU the most memory that torch held."""
    versions = {"torch": torch.__version__}
    facts = {"threads": torch.get_num_threads(), "versions": versions}
    if device == "cuda":
        facts["device_bytes"] = torch.cuda.max_memory_reserved()
        facts["used_bytes"] = torch.cuda.max_memory_allocated()
    return facts


# one text with a clock
def _prompts(spec):
    """Lists of random tokens without end, the same for every writer."""
    import numpy as np

    draw = np.random.RandomState(0)
    while True:
        yield draw.randint(0, spec["vocab_size"], spec["prompt"]).tolist()


def _pace(times, tokens):
    """The answer to a step, from the clock at the start and each token."""
    spent = [b - a for a, b in zip(times, times[1:], strict=False)]
    pace = {"first_seconds": spent[0], "token_seconds": median(spent[1:])}
    return {**pace, "tokens": tokens}


# our writer
def decoder_contestant(spec):
    """A text from a Decoder and its facts: two functions for `serve`.

    spec: a dict with folder (of a model), vocab_size, prompt and count:
    tokens to read and to write, at least 2.

    Derived in chapter A.8.
    """
    from llmnb.model.decode import Decoder
    from llmnb.model.generate import generate

    length = spec["prompt"] + spec["count"]
    decoder = Decoder.from_checkpoint(spec["folder"], 1, length)
    prompts = _prompts(spec)

    def step():
        prompt, tokens = next(prompts), []
        times = [time.perf_counter()]
        for token in generate(decoder, prompt, spec["count"], temperature=0):
            tokens.append(token)
            times.append(time.perf_counter())
        return _pace(times, tokens)

    return step, lambda: _our_facts("reference")


# their writer
def transformers_contestant(spec):
    """A text from transformers' generate, and its facts, for `serve`.

    spec: as for decoder_contestant; the folder must be one that
    transformers reads. Raises ImportError where it is not installed.

    Derived in chapter A.8.
    """
    import torch
    import transformers

    model = transformers.GPT2LMHeadModel.from_pretrained(spec["folder"])
    model.eval()
    how = {"max_new_tokens": spec["count"], "do_sample": False}
    how |= {"eos_token_id": None, "pad_token_id": 0}
    prompts, times = _prompts(spec), []

    class Clock:
        def put(self, value):
            times.append(time.perf_counter())

        def end(self):
            pass

    def step():
        prompt = torch.tensor([next(prompts)])
        mask = torch.ones_like(prompt)
        times[:] = []  # the clock is given the prompt first
        out = model.generate(
            prompt, attention_mask=mask, streamer=Clock(), **how
        )
        return _pace(times, out[0, prompt.shape[1] :].tolist())

    versions = {x.__name__: x.__version__ for x in (torch, transformers)}
    facts = {"threads": torch.get_num_threads(), "versions": versions}
    return step, lambda: facts


# the contestant's program
CONTESTANTS = {
    "llmnb": llmnb_contestant,
    "torch": torch_contestant,
    "llmnb-decoder": decoder_contestant,
    "transformers": transformers_contestant,
}


def main(argv=None):
    """Be a contestant: build what a spec says, then `serve` standard input.

    argv: one argument, the spec as JSON; its kind is a name in
    `CONTESTANTS`. The first answer says {"ready": true}, or why not. What
    libraries print goes to standard error.

    Derived in chapter A.8.
    """
    spec = json.loads((sys.argv[1:] if argv is None else argv)[0])
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)

        def reply(answer):
            print(json.dumps(answer), file=out, flush=True)

        try:
            contestant = CONTESTANTS[spec["kind"]](spec)
        except NotImplementedError as why:
            return reply({"unmeasured": str(why)})
        except Exception as error:
            return reply({"error": str(error) or type(error).__name__})
        reply({"ready": True})
        return serve(*contestant, sys.stdin, reply)


if __name__ == "__main__":
    main()

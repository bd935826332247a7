"""Record what PyTorch computes, for test_parity.py to compare with.

    python tests/record_parity.py

needs torch (`pip install -e .[parity]`) and writes tests/data/parity_*.npz,
one file a configuration, and parity_draws.json, PyTorch's normal numbers.
The model below is GPT-2 in plain torch modules.
"""

import json
import math
import platform
import sys
from datetime import date
from pathlib import Path

import numpy as np
import torch
from recorded import DATA, write_json
from torch import nn
from torch.nn import functional as F

from llmnb.model.random import Generator

STEPS = 10

USUAL = {"learning_rate": 1e-3, "betas": [0.9, 0.999], "weight_decay": 0.01,
         "decay": "all", "max_norm": None}  # fmt: skip
CLIPPED = {"betas": [0.9, 0.95], "weight_decay": 0.1, "decay": "2-D",
           "max_norm": 1.0}  # fmt: skip
SIZES = "max_seq_len", "vocab_size", "num_layers", "num_heads", "channels"
# four configurations, by name: the model's sizes, B, T, a seed and what is
# not usual; the last decays matrices only and clips the gradient
CASES = {
    name: {
        "model": dict(zip(SIZES, sizes, strict=True)),
        "batch_size": B, "seq_len": T, "seed": seed, **USUAL, **others,
    }
    for name, sizes, B, T, seed, others in (
        ("ordinary", (32, 256, 2, 4, 64), 4, 32, 42, {}),
        ("odd", (41, 331, 2, 3, 51), 3, 37, 137, {}),
        ("narrow", (19, 67, 3, 7, 21), 1, 19, 4294967295,
         {"learning_rate": 1e-4}),
        ("clipped", (24, 128, 4, 2, 32), 2, 24, 0, CLIPPED),
    )
}  # fmt: skip

# a tensor of llm.c's and the torch parameter, one a block, that it stacks
STACKED = {
    f"{part}{kind[0]}": f"{part}.{kind}"
    for part in ("ln1", "qkv", "attproj", "ln2", "fc", "fcproj")
    for kind in ("weight", "bias")
}


class Block(nn.Module):
    def __init__(self, channels, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.ln1 = nn.LayerNorm(channels, eps=1e-5)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.attproj = nn.Linear(channels, channels)
        self.ln2 = nn.LayerNorm(channels, eps=1e-5)
        self.fc = nn.Linear(channels, 4 * channels)
        self.fcproj = nn.Linear(4 * channels, channels)

    def attention(self, x):
        B, T, C = x.shape
        heads = (B, T, self.num_heads, C // self.num_heads)
        q, k, v = (
            part.view(heads).transpose(1, 2)
            for part in self.qkv(x).split(C, dim=2)
        )
        scores = q @ k.transpose(2, 3) / math.sqrt(heads[3])
        future = torch.ones(T, T, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(future, -math.inf).softmax(dim=3)
        return self.attproj((weights @ v).transpose(1, 2).reshape(B, T, C))

    def forward(self, x):
        x = x + self.attention(self.ln1(x))
        hidden = F.gelu(self.fc(self.ln2(x)), approximate="tanh")
        return x + self.fcproj(hidden)


class TorchGPT2(nn.Module):
    def __init__(
        self, max_seq_len, vocab_size, num_layers, num_heads, channels
    ):
        super().__init__()
        self.wte = nn.Embedding(vocab_size, channels)
        self.wpe = nn.Embedding(max_seq_len, channels)
        self.blocks = nn.ModuleList(
            Block(channels, num_heads) for _ in range(num_layers)
        )
        self.lnf = nn.LayerNorm(channels, eps=1e-5)

    def forward(self, tokens):
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.lnf(x) @ self.wte.weight.T

    def loss(self, logits, targets):
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def initialise(self, seed):
        """PyTorch's own draws, in the order the book fixes."""
        generator = torch.Generator().manual_seed(seed)
        small = 0.02 / math.sqrt(2 * len(self.blocks))

        def draw(weight, std):
            weight.normal_(0.0, std, generator=generator)

        for name, p in self.named_parameters():
            p.fill_(float("ln" in name and name.endswith("weight")))
        draw(self.wte.weight, 0.02)
        draw(self.wpe.weight, 0.02)
        for block in self.blocks:
            for layer in (block.qkv, block.attproj, block.fc, block.fcproj):
                back = layer is block.attproj or layer is block.fcproj
                draw(layer.weight, small if back else 0.02)

    def tensors(self, of=lambda p: p):
        """The 16 tensors under llm.c's names, as NumPy arrays.

        `of` picks what is taken of a parameter, such as its gradient.
        """

        def array(p):
            return of(p).detach().numpy().copy()

        wte, wpe = array(self.wte.weight), array(self.wpe.weight)
        out = {"wte": np.pad(wte, [(0, -len(wte) % 128), (0, 0)]), "wpe": wpe}
        for name, path in STACKED.items():
            layers = [array(b.get_parameter(path)) for b in self.blocks]
            out[name] = np.stack(layers)
        out["lnfw"] = array(self.lnf.weight)
        out["lnfb"] = array(self.lnf.bias)
        return out

    def optimizer(self, learning_rate, betas, weight_decay, decay="all"):
        """AdamW; decay "2-D" leaves biases and layernorms undecayed."""
        groups = {weight_decay: [], 0.0: []}
        for p in self.parameters():
            decays = decay == "all" or p.ndim == 2
            groups[weight_decay if decays else 0.0].append(p)
        groups = [
            {"params": group, "weight_decay": rate}
            for rate, group in groups.items()
            if group
        ]
        rules = {"betas": tuple(betas), "eps": 1e-8}
        return torch.optim.AdamW(groups, lr=learning_rate, **rules)


def random_tokens(case):
    """The (B, T + 1) tokens a case trains on."""
    rng = np.random.default_rng(case["seed"])
    shape = case["batch_size"], case["seq_len"] + 1
    return rng.integers(0, case["model"]["vocab_size"], shape, np.int32)


def ten_steps(model, optimizer, tokens, max_norm=None):
    """Losses and norms of ten steps on one batch; logits, grads of the first.

    tokens: (B, T + 1). max_norm: None clips nothing.
    """
    batch = torch.from_numpy(tokens.astype(np.int64))
    losses, norms, first = [], [], {}
    for step in range(STEPS):
        logits = model(batch[:, :-1])
        loss = model.loss(logits, batch[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        if step == 0:
            first["logits"] = logits.detach().numpy().copy()
            first["grads"] = model.tensors(lambda p: p.grad)
        if max_norm is not None:
            clip = nn.utils.clip_grad_norm_
            norms.append(clip(model.parameters(), max_norm).item())
        optimizer.step()
    return first | {"losses": np.array(losses), "norms": np.array(norms)}


def run(case, tokens, dtype):
    """Ten steps of a case: a dict of what is compared."""
    torch.manual_seed(0)  # nn.Module draws weights, which are replaced
    model = TorchGPT2(**case["model"])
    model.initialise(case["seed"])
    found = {"initial": model.tensors()}
    model.to(dtype)
    rules = "learning_rate", "betas", "weight_decay", "decay"
    optimizer = model.optimizer(**{name: case[name] for name in rules})
    found |= ten_steps(model, optimizer, tokens, case["max_norm"])
    return found | {"final": model.tensors()}


def provenance():
    facts = {"torch": torch.__version__, "python": platform.python_version()}
    facts["machine"] = platform.machine()
    facts["capability"] = torch.backends.cpu.get_cpu_capability()
    facts["command"] = "python tests/" + Path(sys.argv[0]).name
    return facts | {"date": date.today().isoformat()}


def measure(case):
    """Run a case in both precisions; what its file holds, name by name."""
    tokens = random_tokens(case)
    arrays = {"tokens": tokens}
    for suffix, dtype in (("fp64", torch.float64), ("fp32", torch.float32)):
        result = run(case, tokens, dtype)
        for key in ("losses", "norms", "logits"):
            arrays[f"{key}.{suffix}"] = result[key]
        for tensor, grad in result["grads"].items():
            arrays[f"grads.{suffix}.{tensor}"] = grad
        for tensor, value in result["final"].items():
            # enough to tell ten right updates from ten wrong ones
            arrays[f"final.{suffix}.{tensor}"] = value.ravel()[:8]
    for tensor, value in result["initial"].items():
        arrays[f"initial.{tensor}"] = value
    arrays["meta"] = np.array(json.dumps({**provenance(), "case": case}))
    return arrays


def measure_draws(seed=137, count=1 << 24):
    """PyTorch's draws in small, and how far ours are from many of them."""
    generator = torch.Generator().manual_seed(seed)
    # 3 leaves a number in store, which 5 takes; 21 redraws its last 16
    golden = {}
    for n in (3, 16, 21, 5):
        draws = torch.empty(n).normal_(generator=generator)
        golden[str(n)] = draws.double().tolist()
    theirs = torch.empty(count).normal_(generator=generator).numpy()
    ours = Generator(seed)
    for n in (3, 16, 21, 5):
        ours.normal_(np.empty(n, np.float32))
    mine = np.empty(count, np.float32)
    ours.normal_(mine)
    return {
        **provenance(),
        "numpy": np.__version__,
        "seed": seed,
        "golden": golden,
        "compared": count,
        "largest_difference": float(np.abs(mine - theirs).max()),
        "equal_to_the_bit": float((mine == theirs).mean()),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    draws = measure_draws()
    write_json(DATA / "parity_draws.json", draws)
    print(json.dumps(draws, indent=1))
    for name, case in CASES.items():
        path = DATA / f"parity_{name}.npz"
        arrays = measure(case)
        np.savez_compressed(path, **arrays)
        first, last = arrays["losses.fp64"][[0, -1]]
        print(f"{path.name}: {path.stat().st_size} bytes, {first} -> {last}")

"""Record what each change from GPT-2 to Llama and Gemma is worth.

    python tests/record_changes.py

trains chapter 1.18's model on its text and budget, once for each change and
seed: GPT-2 as it is; with one part replaced; with one after the other; the
families; and writes parameters and validation losses to data/families.csv.
It takes the cpu backend: half a minute a run on two quiet cores.
"""

import sys
from dataclasses import dataclass
from typing import ClassVar

from record_ablations import DEFAULT, SHAPE, STEPS, losses, texts
from recorded import DATA

from llmnb.config import GPT2Config
from llmnb.model import parts
from llmnb.model.architectures import ARCHITECTURES, LlamaConfig
from llmnb.model.tensors import parameter_count, tensor_table

SEEDS = (42, 43)


class Unbiased(GPT2Config):
    bias: ClassVar[bool] = False


@dataclass(frozen=True)
class Between(LlamaConfig):
    """GPT-2 without biases, some of its parts replaced by Llama's."""

    family: ClassVar[str] = "between"
    replaced: tuple = ()

    def block(self, i=0):
        plain, llama = parts.block_of(Unbiased(*SHAPE)), super().block(i)
        new = {"norm": llama.norm} if "norm" in self.replaced else {}
        if "rotary" in self.replaced:
            new |= {x: getattr(llama, x) for x in plain._fields[3:]}
            new["attention"] = llama.attention
        if "gated" in self.replaced:
            new["feedforward"] = llama.feedforward
        return plain._replace(**new)

    def tensors(self):
        rows = {x.name: x for x in tensor_table(Unbiased(*SHAPE))}
        llama = {x.name: x for x in super().tensors()}
        if "norm" in self.replaced:
            rows = {n: x for n, x in rows.items() if n[:2] != "ln"}
            rows |= {n: x for n, x in llama.items() if n[:2] == "ln"}
        if "rotary" in self.replaced:
            del rows["wpe"]
        if "gated" in self.replaced:
            rows |= {n: llama[n] for n in ("fcw", "fcprojw")}
        # in Llama's order, in which the record was made
        return [*({n: rows[n] for n in llama if n in rows} | rows).values()]


def families():
    """Pairs of a name and a configuration."""
    yield "GPT-2", GPT2Config(*SHAPE)
    for new in ((), ("norm",), ("rotary",), ("gated",)):
        name = " ".join(["GPT-2 without biases", *("+ " + x for x in new)])
        yield name, Between(*SHAPE, tied=True, replaced=new)
    yield "Llama", LlamaConfig(*SHAPE, tied=True)
    yield "Llama, 2 kv heads", LlamaConfig(*SHAPE, tied=True, num_kv_heads=2)
    yield "Llama, 1 kv head", LlamaConfig(*SHAPE, tied=True, num_kv_heads=1)
    mistral = ARCHITECTURES["mistral"]
    yield "Mistral, window 16", mistral(*SHAPE, tied=True, window=16)
    yield "Qwen 3", ARCHITECTURES["qwen3"](*SHAPE, tied=True)
    yield "Gemma", ARCHITECTURES["gemma"](*SHAPE)
    yield "Gemma 2", ARCHITECTURES["gemma2"](*SHAPE, window=16)
    yield (
        "Gemma 3",
        ARCHITECTURES["gemma3_text"](*SHAPE, window=16, global_every=2),
    )


def main():
    learnt, held_out = texts()
    rows = ["family,steps,seed,parameters,val"]
    for name, cfg in families():
        for seed in SEEDS:
            *_, loss = losses(cfg, learnt, held_out, seed, **DEFAULT)
            size = parameter_count(cfg, padded=False)
            rows.append(f'"{name}",{STEPS},{seed},{size},{loss:.4f}')
            print(rows[-1], file=sys.stderr, flush=True)
    (DATA / "families.csv").write_text("\n".join(rows) + "\n")


if __name__ == "__main__":
    main()

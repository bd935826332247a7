# Written by `make export` from notebooks/*/*.py: edit that file.

"""The layers as kernels for a GPU, or for the simulator."""

import types

from llmnb.cuda.adamw import *
from llmnb.cuda.attention import *
from llmnb.cuda.bf16_attention import *
from llmnb.cuda.bf16_layers import *
from llmnb.cuda.bf16_matmul import *
from llmnb.cuda.bf16_model import *
from llmnb.cuda.bf16_modern import *
from llmnb.cuda.crossentropy import *
from llmnb.cuda.cublas import *
from llmnb.cuda.elementwise import *
from llmnb.cuda.embedding import *
from llmnb.cuda.encoder import *
from llmnb.cuda.gated import *
from llmnb.cuda.gelu import *
from llmnb.cuda.headnorm import *
from llmnb.cuda.layernorm import *
from llmnb.cuda.local import *
from llmnb.cuda.matmul import *
from llmnb.cuda.model import *
from llmnb.cuda.residual import *
from llmnb.cuda.rmsnorm import *
from llmnb.cuda.rotary import *
from llmnb.cuda.softcap import *
from llmnb.cuda.sums import *
from llmnb.gpu.fragments import *
from llmnb.gpu.graph import *
from llmnb.gpu.launch import *
from llmnb.gpu.nccl import *
from llmnb.gpu.ptx import *
from llmnb.gpu.simulator import *
from llmnb.gpu.toolkit import *
from llmnb.gpu.warp import *

__all__ = [
    name
    for name, thing in vars().items()
    if name[0] != "_" and type(thing) is not types.ModuleType
]

# Written by `make export` from notebooks/*/*.py: edit that file.

"""The layers compiled by numba for the processor's cores."""

import types

from llmnb.cpu.adamw import *
from llmnb.cpu.attention import *
from llmnb.cpu.backend import *
from llmnb.cpu.bfloat16 import *
from llmnb.cpu.compiled import *
from llmnb.cpu.crossentropy import *
from llmnb.cpu.decode import *
from llmnb.cpu.embedding import *
from llmnb.cpu.encoder import *
from llmnb.cpu.gated import *
from llmnb.cpu.gelu import *
from llmnb.cpu.headnorm import *
from llmnb.cpu.jit import *
from llmnb.cpu.layernorm import *
from llmnb.cpu.learning import *
from llmnb.cpu.local import *
from llmnb.cpu.math import *
from llmnb.cpu.matmul import *
from llmnb.cpu.panels import *
from llmnb.cpu.residual import *
from llmnb.cpu.rmsnorm import *
from llmnb.cpu.rotary import *
from llmnb.cpu.softcap import *
from llmnb.cpu.tile import *

__all__ = [
    name
    for name, thing in vars().items()
    if name[0] != "_" and type(thing) is not types.ModuleType
]

# Written by `make export` from notebooks/*/*.py: edit that file.

"""The layers in NumPy, forward and backward."""

import types

from llmnb.reference.adamw import *
from llmnb.reference.attention import *
from llmnb.reference.bfloat16 import *
from llmnb.reference.crossentropy import *
from llmnb.reference.embedding import *
from llmnb.reference.encoder import *
from llmnb.reference.gated import *
from llmnb.reference.gelu import *
from llmnb.reference.gpt2 import *
from llmnb.reference.layernorm import *
from llmnb.reference.learning import *
from llmnb.reference.local import *
from llmnb.reference.matmul import *
from llmnb.reference.residual import *
from llmnb.reference.rmsnorm import *
from llmnb.reference.rotary import *
from llmnb.reference.softcap import *

__all__ = [
    name
    for name, thing in vars().items()
    if name[0] != "_" and type(thing) is not types.ModuleType
]

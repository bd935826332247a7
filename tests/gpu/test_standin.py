"""What a step asks of the driver, and what a wrong step is told."""

import json
import os

import pytest
from standin import check_steps


def test_a_step_is_recorded_once_and_replayed(on_standin):
    """At GPT-2's size: the block is reserved and hardly touched."""
    launches, nbytes = check_steps(on_standin, (), 16, 1024)
    assert launches > 20 * 12 and 11e9 < nbytes < 12e9


ADD_ONE = """
from llmnb.gpu.graph import Graph
from llmnb.gpu.launch import empty, kernel, stream, stream_address
from llmnb.gpu.launch import to_device, to_host
from llmnb.gpu.simulator import cuda

@kernel
def add_one(x):
    i = cuda.grid(1)
    if i < x.size:
        x[i] = x[i] + np.float32(1)

x = to_device(np.zeros(40, np.float32))
"""
WRONG = """
def allocates(): add_one[2, 32](empty(40))
def copies(): to_host(x)
def waits():
    from numba import cuda as real
    real.synchronize()
def elsewhere():
    with stream(0): add_one[2, 32](x)
def good(): add_one[2, 32](x)

for wrong in (allocates, copies, waits, elsewhere):
    graph = Graph(wrong, x)
    graph()
    driver.standin_reset()
    try:
        graph()
    except Exception as error:
        print(wrong.__name__, "|", refused())
good_one = Graph(good, x)
for _ in range(3):
    good_one()
print("good", *counts("replays", "replayed"))
"""


def test_what_a_recording_may_not_do_is_refused(on_standin):
    """So the counts of the test before it could have been others."""
    lines = on_standin(ADD_ONE + WRONG).splitlines()
    said = dict(x.split(" | ") for x in lines[:-1])
    assert said["allocates"] == "cuMemAlloc_v2 (900)"
    assert said["copies"].startswith("cuMemcpyDtoH_v2 (900)")
    assert said["waits"] == "cuCtxSynchronize (900)"
    assert "add_one" in said["elsewhere"] and "(906)" in said["elsewhere"]
    assert lines[-1] == "good 2 2"


ENDS = """
import sys
ends, recorded, said = iter(sys.argv[1]), [], []

def function():
    recorded.append(int(stream_address() > 0))
    add_one[2, 32](x)
    if next(ends) == "x":
        raise KeyError

graph = Graph(function, x)
for _ in sys.argv[1]:
    driver.standin_reset()
    try:
        graph()
    except KeyError:
        pass
    asked = counts("launches", "recorded", "replays", "destroyed")
    said.append("".join(map(str, asked)))
print(*said, *recorded, stream_address())
"""


@pytest.mark.parametrize(
    ("ends", "said"),
    [
        ("....", "1000 0111 0010 0010 0 1 0"),
        ("x...", "1000 1000 0111 0010 0 0 1 0"),
        (".x..", "1000 0100 0111 0010 0 1 1 0"),
    ],
)
def test_what_an_error_ends_is_done_again(on_standin, ends, said):
    """The first call, which compiles, and the one that records.

    Of each call what is launched, recorded, replayed, destroyed; of each run
    of the function whether a stream records it; and the stream at the end.
    """
    assert on_standin(ADD_ONE + ENDS, ends) == said


AS_LAUNCHED = r"""
import re
import struct
from llmnb.cuda import attention_forward, gelu_forward
from llmnb.gpu.launch import to_device
from llmnb.gpu.ptx import compile_kernel
from llmnb.gpu.simulator import watch

def there(*shape):
    return to_device(np.zeros(shape, np.float32))

with watch() as seen:
    attention_forward(there(1, 64, 64), there(1, 1, 64), there(1, 64, 192))
    gelu_forward(there(1, 8, 64), there(1, 8, 64))
def machine_code(elf):
    (at,) = struct.unpack_from("<Q", elf, 40)
    size, count, names = struct.unpack_from("<3H", elf, 58)
    places = [at + i * size for i in range(count)]
    rows = [struct.unpack_from("<IIQQQQ", elf, place) for place in places]
    name = lambda row: elf[rows[names][4] + row[0] :]
    texts = (x for x in rows if name(x).startswith(b".text."))
    return [elf[start : start + length] for *_, start, length in texts]

plain = lambda text: re.sub(r"_Z\w+|_smem_\d+", "", text)
for kernel, _, _, kinds in seen.launches:
    (launched,) = kernel.compiled().overloads.values()
    made = compile_kernel(kernel, kinds, CC)
    code = launched.library.get_cubin()
    assert plain(launched.library.get_asm_str()) == plain(made.ptx)
    made_code = machine_code(bytes(made.cubin))
    assert machine_code(bytes(code.code)) == made_code and made_code[0]
    print(re.search(r"\.target (\w+)", made.ptx)[1])
"""


@pytest.mark.parametrize(
    ("generation", "target"), [(80, "sm_80"), (90, "sm_90a")]
)
def test_checks_compile_what_is_launched(on_standin, generation, target):
    """The text is the same but for the names, which numba numbers."""
    code = AS_LAUNCHED.replace("CC", str(divmod(generation, 10)))
    said = on_standin(code, STANDIN_GENERATION=str(generation))
    assert said.splitlines() == [target] * 2


MODEL = """
import warnings
from llmnb import GPT2, GPT2Config
from llmnb.cuda import gpu
from llmnb.gpu.launch import empty
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    empty(3)
    print([str(x.message) for x in seen])
try:
    GPT2(GPT2Config(8, 61, 2, 2, 16), 2, 8, "cuda", seed=None)
    print("a model")
except RuntimeError as error:
    print(error)
print(gpu())
"""
HIDE = """
from cuda import pathfinder
found = pathfinder.load_nvidia_dynamic_lib
def hidden(name):
    if name == "nvvm":
        raise pathfinder.DynamicLibNotFoundError(name)
    return found(name)
pathfinder.load_nvidia_dynamic_lib = hidden
"""
MIX = """
import llmnb.gpu.ptx as ptx
def old(text, cc):
    raise RuntimeError("ptxas fatal : Unsupported .version 9.5; current "
                       "version is '9.0'")
ptx._link = old
"""


@pytest.mark.parametrize(
    ("how", "why"),
    [
        (HIDE, "libNVVM, of NVIDIA's toolkit, is missing: "),
        (MIX, "libNVVM and nvJitLink are of different CUDA toolkits, and "),
    ],
    ids=["missing", "mixed"],
)
def test_a_gpu_that_cannot_be_used_is_no_simulator(on_standin, how, why):
    warned, refused, said = on_standin(how + MODEL).splitlines()
    assert "there is a GPU, but " + why in warned
    assert refused.startswith("GPT2: there is a GPU, but " + why)
    assert "LLMNB_CUDA=simulator asks for the simulator" in refused
    assert said.startswith("none: " + why)
    assert "a model" in on_standin(how + MODEL, LLMNB_CUDA="simulator")


def test_a_driver_without_a_gpu(on_standin):
    said = on_standin(MODEL, STANDIN_GPUS="0").splitlines()
    assert said[0] == "[]" and said[1] == "a model"
    assert said[2] == "none: numba-cuda finds no NVIDIA GPU with a driver"


ROWS = """
vars(np).pop("row_stack", None)
from llmnb.cuda import gelu_forward
from llmnb.gpu.launch import to_device
x = to_device(np.zeros((1, 8, 64), np.float32))
gelu_forward(x, x)
print(*counts("launches"))
"""


def test_numpy_without_row_stack(on_standin):
    """As NumPy 2.5 is: without its old name no kernel would compile."""
    assert on_standin(ROWS) == "1"


def test_refusals_are_counted(on_standin):
    code = """
from llmnb.gpu.toolkit import numba_cuda
cuda = numba_cuda()
@cuda.jit
def f(x): x[0] = 1
x = cuda.device_array(4, np.float32)
try:
    f[(1, 65536), 32](x)
except Exception as error:
    print(error)
print(refused(), *counts("refusals", "allocations"))
"""
    said = on_standin(code)
    assert "grid 1 65536 1" in said and said.endswith("1 1")


GROUP = """
import ctypes, json
from llmnb import GPT2Config
from llmnb.train.gpus import OnGPUs, OverNCCL
from llmnb.train.rehearsal import rehearse

library = ctypes.CDLL("libnccl.so.2")
library.standin_nccl_refused.restype = ctypes.c_char_p
names = "sends", "receives", "broadcasts", "groups", "recorded", "refusals"
asked = "allocations", "recorded", "recorded_copies", "replays", "launches"

def work(group):
    there, rows = OverNCCL(group), []
    model = OnGPUs.of(there)(GPT2Config(8, 61, 2, 2, 16), 2, 8, "cuda",
                             seed=None)
    batch = np.zeros((2, 2, 8), int)
    for k in range(1, 5):
        driver.standin_reset(), library.standin_nccl_reset()
        model.step(*batch, 1.0, step=k, decay=["wte"])
        calls = [library.standin_nccl(x.encode()) for x in names]
        more = {"driver " + x: y for x, y in zip(asked, counts(*asked))}
        rows.append(dict(zip(names, calls)) | more)
    return rows

print(json.dumps([rehearse(1, work)[0], refused(),
                  library.standin_nccl_refused().decode()]))
"""


def test_a_step_of_a_group_is_recorded_with_its_sending(on_standin, nccl_path):
    """A group of one, whose sends go to itself, on two stand-ins."""
    paths = [str(nccl_path.parent), on_standin.folder]
    where = {"LD_LIBRARY_PATH": os.pathsep.join(paths)}
    rows, refused, nccl_refused = json.loads(on_standin(GROUP, **where))
    assert refused == nccl_refused == ""
    first, second, *later = rows
    assert first["sends"] == first["receives"] == 1
    assert first["broadcasts"] == 2 and first["recorded"] == 0
    assert second["recorded"] == 4 and second["driver launches"] == 0
    assert second["driver recorded"] == first["driver launches"] > 40
    for row in rows[1:]:
        assert row["driver allocations"] == row["driver recorded_copies"] == 0
        assert row["driver replays"] == 1
    for row in later:
        assert row["sends"] == row["broadcasts"] == row["groups"] == 0

"""Run PTX, the code that a kernel is compiled into, where there is no GPU.

The simulator runs a kernel's Python; a GPU will run what numba-cuda, NVVM and
their optimisations make of it. This interprets that: every thread's registers
are NumPy arrays, an instruction is done for many threads at once, and what
would be undefined on a GPU is a Fault. It knows the instructions that this
package's kernels are compiled into, and none besides.
"""

import random
import re
from contextlib import contextmanager

import numpy as np
import pytest

from llmnb.gpu import launch
from llmnb.gpu.launch import DeviceArray, Kernel
from llmnb.gpu.ptx import compile_kernel, no_compiler
from llmnb.gpu.simulator import record
from llmnb.reference.bfloat16 import to_bfloat16

KINDS = {
    "pred": np.bool_, "f32": np.float32,
    "b16": np.uint16, "u16": np.uint16,
    "b32": np.uint32, "u32": np.uint32, "s32": np.int32,
    "b64": np.uint64, "u64": np.uint64, "s64": np.int64,
}  # fmt: skip
TOGETHER = "bar", "shfl", "vote", "mma", "ldmatrix"  # threads wait for others
POISON = np.uint32(0x7FC07FC0)  # NaN, as one float32 and as two bfloat16


class Fault(RuntimeError):
    """The code does what a GPU has no answer to, or is not known here."""


# numbers


def flushed(x):
    """Numbers too small to be normal become 0, as `ftz` says."""
    small = np.abs(x) < np.float32(2**-126)
    return np.where(small, x * np.float32(0), x) if small.any() else x


def fused(a, b, c):
    return a.astype(np.float64) * b + c  # the product is exact


def rounded_down(a, b, c):
    exact = fused(a, b, c)
    near = exact.astype(np.float32)
    below = np.nextafter(near, np.float32(-np.inf))
    return np.where(near > exact, below, near)


def high(a, b):
    """The upper half of a product of 64 bits each."""
    products = a.astype(object) * b.astype(object)
    return (products >> 64).astype(a.dtype)


def quotient(a, b):
    """Towards zero, where NumPy's goes down."""
    if (b == 0).any():
        raise Fault("a division by 0")
    down = a // b
    return down + ((a % b != 0) & ((a < 0) != (b < 0)))


def shifted(a, n, step):
    """Shift by n bits; by as many as there are, or more, nothing stays."""
    bits = 8 * a.dtype.itemsize
    kept = step(a, np.minimum(n, bits - 1).astype(a.dtype))
    gone = kept >> (bits - 1) if a.dtype.kind == "i" else kept * 0
    return np.where(n >= bits, gone, kept)


def inserted(a, b, start, length):
    """`length` bits of a, put into b from bit `start` on."""
    mask = a.dtype.type(((1 << length) - 1) << start)
    return (a << start) & mask | b & ~mask


def halves(x):
    """The two bfloat16 of 32 bits, lower first, as float32."""
    return (x << 16).view(np.float32), (x & 0xFFFF0000).view(np.float32)


SAME = {  # operands and result are of the instruction's last kind
    "cvta": lambda a: a,  # a place in global memory is its address
    "add": np.add, "sub": np.subtract, "neg": np.negative, "abs": np.abs,
    "mul": np.multiply, "mul.lo": np.multiply, "mul.hi": high,
    "div": quotient, "rem": lambda a, b: a - quotient(a, b) * b,
    "min": np.minimum, "max": np.maximum,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    "not": np.invert,
}  # fmt: skip
SINGLE = {  # the same in float32, where it is another
    "div": np.divide, "min": np.fmin, "max": np.fmax,
    "fma.rn": fused, "fma.rm": rounded_down,
    "ex2": np.exp2, "lg2": np.log2, "rcp": np.reciprocal, "sqrt": np.sqrt,
    "copysign": lambda sign, size: np.copysign(size, sign),
}  # fmt: skip
COMPARED = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less,
    "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "leu": lambda a, b: ~(a > b), "gtu": lambda a, b: ~(a <= b),
}  # fmt: skip


# the text of a kernel


class Instruction:
    """One line: the parts of its name, its operands, and its guard, if any."""

    def __init__(self, line):
        guard = re.match(r"@(%p\d+)\s+", line)
        self.guard = guard and guard[1]
        name, _, rest = line[guard.end() if guard else 0 :].partition(" ")
        self.name, *self.parts = name.split(".")
        self.kind = self.parts[-1] if self.parts else ""
        found = re.findall(r"\{[^}]*\}|\[[^]]*\]|[^,\s]+", rest)
        self.operands = [x.strip("{}").replace(" ", "") for x in found]

    def __repr__(self):
        return ".".join([self.name, *self.parts])


class Program:
    """A kernel's PTX, taken apart.

    instructions: in order. labels: by name, the number of the instruction
    behind each. shared: by name, the place of an array among `nbytes`.
    """

    def __init__(self, text):
        entry = re.search(r"\.entry \w+\((.*?)\)(.*?)\n\{(.*)\n\}", text, re.S)
        self.parameters = re.findall(r"\w+_param_\d+", entry[1])
        limit = re.search(r"\.maxntid (\d+)", entry[2])
        self.most = int(limit[1]) if limit else 1024
        self.shared, self.nbytes = {}, 0
        arrays = r"\.shared \.align (\d+) \.b8 (\w+)\[(\d+)\]"
        for align, name, size in re.findall(arrays, text):
            self.shared[name] = -(-self.nbytes // int(align)) * int(align)
            self.nbytes = self.shared[name] + int(size)
        self.registers = re.findall(r"\.reg \.(\w+)\s+(%\w+)<(\d+)>", entry[3])
        self.instructions, self.labels = [], {}
        for line in re.split("[;\n]", re.sub("//.*", "", entry[3])):
            line = " ".join(line.split())
            if line.startswith("$"):
                self.labels[line[:-1]] = len(self.instructions)
            elif line and line[0] != ".":
                self.instructions.append(Instruction(line))
        self.waits = np.array([x.name in TOGETHER for x in self.instructions])
        ends = [x.name in ("bra", "ret") for x in self.instructions]
        self.stops = np.flatnonzero(self.waits | np.roll(ends, 1))
        places = [*self.labels.values(), len(self.instructions)]
        self.stops = np.union1d(self.stops, places)


# memory


class Memory:
    """Bytes that may be used; arrays: contiguous, each at its own address."""

    def __init__(self, arrays, base=None):
        self.spans = []
        for x in arrays:
            start = x.__array_interface__["data"][0] if base is None else base
            self.spans.append((start, x.reshape(-1).view(np.uint8)))

    def places(self, addresses, kind, count):
        """For the arrays used: which addresses, elements, their numbers."""
        size = np.dtype(kind).itemsize
        if (addresses % (size * count)).any():
            raise Fault(f"an address is no multiple of {size * count}")
        left = np.ones(len(addresses), bool)
        for start, data in self.spans:
            at = addresses - start
            here = left & (at >= 0) & (at + size * count <= len(data))
            left &= ~here
            if here.any():
                elements = data[: len(data) // size * size].view(kind)
                numbers = at[here, None] // size + np.arange(count)
                yield np.flatnonzero(here), elements, numbers
        if left.any():
            raise Fault("an address is outside of all arrays")

    def load(self, addresses, kind, count=1):
        found = np.empty((len(addresses), count), kind)
        for here, elements, numbers in self.places(addresses, kind, count):
            found[here] = elements[numbers]
        return found.T

    def store(self, addresses, values):
        """values: an array (count, threads)."""
        for here, elements, numbers in self.places(
            addresses, values.dtype, len(values)
        ):
            elements[numbers] = values.T[here]


# a block of threads


class Block:
    """The threads of one block, and where each of them is in a program.

    together: how many threads run at once, each doing the same; which go on
    is drawn by `draws`, and they go on until they must wait.
    """

    def __init__(self, program, memory, values, sizes, together, draws):
        self.program, self.memory, self.values = program, memory, values
        block, grid, index = sizes
        count = int(np.prod(block))
        if count > program.most:
            raise Fault(
                f"{count} threads in a block of at most {program.most}"
            )
        threads = np.arange(count)
        self.warp, self.at = threads // 32, np.zeros(count, int)
        self.units = np.split(threads, range(together, count, together))
        self.draws = draws
        self.registers = {"%laneid": (threads % 32).astype(np.uint32)}
        x, y, z = block
        own = threads % x, threads // x % y, threads // (x * y)
        whole = [np.full((3, count), np.reshape(s, (3, 1))) for s in sizes]
        for name, three in zip(
            ("tid", "ntid", "nctaid", "ctaid"), (own, *whole), strict=True
        ):
            for axis, value in zip("xyz", three, strict=True):
                self.registers[f"%{name}.{axis}"] = value.astype(np.uint32)
        for kind, name, number in program.registers:
            for i in range(int(number)):
                self.registers[f"{name}{i}"] = np.ones(count, KINDS[kind])
        room = np.full(-(-program.nbytes // 4), POISON)
        self.shared = Memory([room], base=0)
        self.copies = {}  # by thread: groups of (place, 16 bytes) under way

    # registers

    def read(self, text, kind, who):
        """The operand's values in some threads, as numbers of a kind."""
        want = np.dtype(KINDS[kind])
        if text in self.registers:
            found = self.registers[text][who]
            same = found.itemsize == want.itemsize
            return found.view(want) if same else found.astype(want)
        if text in self.program.shared:
            bits = self.program.shared[text]
        else:
            bits = int(text[2:], 16) if text[:2] == "0f" else int(text, 0)
        bits %= 2 ** (8 * want.itemsize)
        number = np.array(bits, f"u{want.itemsize}").view(want)
        return np.full(len(who), number)

    def write(self, name, value, who):
        """Give a register values; narrower whole numbers are widened."""
        own = self.registers[name]
        if value.itemsize < own.itemsize:
            value = value.astype(f"{value.dtype.kind}{own.itemsize}")
        own[who] = value.view(own.dtype)

    def address(self, text, who):
        register, _, offset = text.strip("[]").partition("+")
        return self.read(register, "s64", who) + int(offset or 0)

    # which threads go on

    def run(self):
        while (self.at >= 0).any():
            going = [x for x in self.units if len(self.free(x))]
            if going:
                unit = self.draws.choice(going)
                while len(free := self.free(unit)):
                    first = self.at[free].min()
                    self.forward(free[self.at[free] == first], first)
            elif not sum([self.meet(w) for w in self.waiting()]):
                raise Fault("threads wait for others that never come")

    def free(self, threads):
        """Those that have not ended and need not wait."""
        live = threads[self.at[threads] >= 0]
        return live[~self.program.waits[self.at[live]]]

    def forward(self, who, start):
        """Some threads, all there, go on to where they may part."""
        stops = self.program.stops
        end = stops[np.searchsorted(stops, start, "right")]
        self.at[who] = end
        for one in self.program.instructions[start:end]:
            self.do(one, who)

    def waiting(self):
        """Groups of threads that may be all that one instruction needs."""
        live = np.flatnonzero(self.at >= 0)
        names = [self.program.instructions[x] for x in self.at[live]]
        if all(repr(x) == "bar.sync" for x in names):
            return [live] if len(set(self.at[live])) == 1 else []
        groups = {}
        for thread, one in zip(live, names, strict=True):
            key = [self.warp[thread], repr(one)]
            if one.name in ("mma", "ldmatrix"):  # the very same instruction
                key.append(self.at[thread])
            groups.setdefault(tuple(key), []).append(thread)
        return [np.array(x) for x in groups.values()]

    def meet(self, who):
        """Do what a group waits for, if all are there; whether it was."""
        numbers, one = self.at[who], self.program.instructions[self.at[who[0]]]
        if repr(one) != "bar.sync" and not self.are_all(one, numbers, who):
            return False
        self.at[who] = numbers + 1
        if one.name == "vote":
            ballot = self.each(numbers, who, lambda x: (x.operands[1], "pred"))
            bits = np.uint32(sum(1 << int(i) % 32 for i in who[ballot]))
            self.spread(numbers, who, np.full(len(who), bits))
        elif one.name == "shfl":
            self.shuffle(one, numbers, who)
        elif one.name != "bar":
            getattr(self, one.name)(one, who)
        return True

    def are_all(self, one, numbers, who):
        """Whether all lanes of a warp are there that an instruction names."""
        lanes = np.flatnonzero(self.warp == self.warp[who[0]])
        if one.name in ("mma", "ldmatrix"):
            if len(lanes) < 32:
                raise Fault(f"{one} wants a whole warp")
        else:
            last = self.each(numbers, who, lambda x: (x.operands[-1], "u32"))
            if (last != last[0]).any():
                raise Fault(f"{one}: lanes name different masks")
            lanes = lanes[last[0] >> lanes % 32 & 1 == 1]
        if (self.at[lanes] < 0).any():
            raise Fault(f"{one}: a lane has ended")
        return len(lanes) == len(who)

    # what threads of a warp do with each other: at one instruction, or at
    # several of one kind, which meet

    def each(self, numbers, who, operand):
        """Each thread's operand of its own instruction."""
        found = None
        for number in np.unique(numbers):
            here = numbers == number
            text, kind = operand(self.program.instructions[number])
            if found is None:
                found = np.empty(len(who), KINDS[kind])
            found[here] = self.read(text, kind, who[here])
        return found

    def spread(self, numbers, who, values):
        """Give each thread's own result its value."""
        for number in np.unique(numbers):
            here = numbers == number
            name = self.program.instructions[number].operands[0]
            self.write(name.partition("|")[0], values[here], who[here])

    def shuffle(self, one, numbers, who):
        if one.parts[1] != "bfly":
            raise Fault(f"{one} is not known")
        value = self.each(numbers, who, lambda x: (x.operands[1], "u32"))
        flips = self.each(numbers, who, lambda x: (x.operands[2], "u32"))
        places = {thread: i for i, thread in enumerate(who)}
        try:
            other = [places[x] for x in who ^ flips.astype(int)]
        except KeyError:
            raise Fault(f"{one}: from a lane that takes no part") from None
        self.spread(numbers, who, value[other])

    def ldmatrix(self, one, who):
        """Four matrices of 8 by 8 numbers of 16 bits, a row from each lane."""
        places = self.address(one.operands[1], who)
        rows = self.shared.load(places, np.uint64, 2)
        rows = rows.T.copy().view(np.uint16).reshape(4, 8, 8)
        if "trans" in one.parts:
            rows = rows.transpose(0, 2, 1)
        row, column = who % 32 // 4, who % 4 * 2
        for name, matrix in zip(one.operands[0].split(","), rows, strict=True):
            low = matrix[row, column].astype(np.uint32)
            above = matrix[row, column + 1].astype(np.uint32)
            self.write(name, low | above << 16, who)

    def mma(self, one, who):
        """D = A B + C, 16 x 8 from 16 x 16 and 16 x 8, by fragments."""
        d, a, b, c = (x.split(",") for x in one.operands)
        row, pair = who % 32 // 4, who % 4 * 2
        A, B, C = np.empty((16, 16)), np.empty((16, 8)), np.empty((16, 8))
        for i, name in enumerate(a):
            y, x = row + 8 * (i % 2), pair + 8 * (i // 2)
            A[y, x], A[y, x + 1] = halves(self.read(name, "u32", who))
        for i, name in enumerate(b):
            y = pair + 8 * i
            B[y, row], B[y + 1, row] = halves(self.read(name, "u32", who))
        places = [(row + 8 * (i // 2), pair + i % 2) for i in range(4)]
        for place, name in zip(places, c, strict=True):
            C[place] = self.read(name, "f32", who)
        D = (A @ B + C).astype(np.float32)
        for place, name in zip(places, d, strict=True):
            self.write(name, D[place], who)

    # what a thread does by itself

    def do(self, one, who):
        method = getattr(self, f"do_{one.name}", None)
        if one.guard and one.name != "bra":
            raise Fault(f"{one} with a guard is not known")
        if method:
            method(one, who)
        else:
            self.compute(one, who)

    def compute(self, one, who):
        """An instruction whose operands and result are of one kind."""
        kind, name = one.kind, one.name
        detail = f"{name}.{one.parts[0]}"
        table = SAME | SINGLE if kind == "f32" else SAME
        function = table.get(detail) or table.get(name)
        if function is None:
            raise Fault(f"{one} is not known")
        given = [self.read(x, kind, who) for x in one.operands[1:]]
        flush = "ftz" in one.parts
        given = [flushed(x) for x in given] if flush else given
        found = np.asarray(function(*given)).astype(KINDS[kind])
        self.write(one.operands[0], flushed(found) if flush else found, who)

    def do_mov(self, one, who):
        name, value = one.operands
        kind = {"%rd": "u64", "%rs": "u16"}.get(name[:3])
        kind = kind or {"%f": "f32", "%r": "u32", "%p": "pred"}[name[:2]]
        self.write(name, self.read(value, kind, who), who)

    def do_bra(self, one, who):
        if one.guard:
            who = who[self.read(one.guard, "pred", who)]
        self.at[who] = self.program.labels[one.operands[0]]

    def do_ret(self, one, who):
        self.at[who] = -1

    def do_setp(self, one, who):
        x, y = (self.read(x, one.kind, who) for x in one.operands[1:])
        found = COMPARED[one.parts[0]](x, y)
        if one.kind == "f32" and one.parts[0] == "ne":
            found &= ~(np.isnan(x) | np.isnan(y))
        self.write(one.operands[0], found, who)

    def do_selp(self, one, who):
        name, x, y, chosen = one.operands
        x, y = self.read(x, one.kind, who), self.read(y, one.kind, who)
        where = self.read(chosen, "pred", who)
        self.write(name, np.where(where, x, y), who)

    def do_cvt(self, one, who):
        to, kind = one.parts[-2:]
        values = [self.read(x, kind, who) for x in one.operands[1:]]
        if repr(one) == "cvt.rn.bf16x2.f32":
            above, low = (to_bfloat16(x).astype(np.uint32) for x in values)
            found = above << 16 | low
        elif repr(one) == "cvt.ftz.sat.f32.f32":
            found = np.clip(np.nan_to_num(values[0], nan=0), 0, 1)
        elif kind != "f32":
            found = values[0].astype(KINDS[to])
        else:
            raise Fault(f"{one} is not known")
        self.write(one.operands[0], found, who)

    def do_mul(self, one, who):
        if one.parts[0] != "wide":
            self.compute(one, who)
            return
        wide = np.int64 if one.kind == "s32" else np.uint64
        x, y = (self.read(x, one.kind, who) for x in one.operands[1:])
        self.write(one.operands[0], x.astype(wide) * y.astype(wide), who)

    def do_shl(self, one, who, step=np.left_shift):
        name, x, n = one.operands
        x, n = self.read(x, one.kind, who), self.read(n, "u32", who)
        self.write(name, shifted(x, n, step), who)

    def do_shr(self, one, who):
        self.do_shl(one, who, np.right_shift)

    def do_popc(self, one, who):
        values = self.read(one.operands[1], one.kind, who).tolist()
        bits = np.array([x.bit_count() for x in values], np.uint32)
        self.write(one.operands[0], bits, who)

    def do_bfi(self, one, who):
        name, a, b, start, length = one.operands
        a, b = self.read(a, one.kind, who), self.read(b, one.kind, who)
        self.write(name, inserted(a, b, int(start), int(length)), who)

    def do_ld(self, one, who):
        names = one.operands[0].split(",")
        if one.parts[0] == "param":
            name = one.operands[1].strip("[]")
            value = self.values[self.program.parameters.index(name)]
            self.write(names[0], np.full(len(who), value), who)
            return
        memory = self.shared if one.parts[0] == "shared" else self.memory
        at = self.address(one.operands[1], who)
        found = memory.load(at, KINDS[one.kind], len(names))
        for name, value in zip(names, found, strict=True):
            self.write(name, value, who)

    def do_st(self, one, who):
        memory = self.shared if one.parts[0] == "shared" else self.memory
        names = one.operands[1].split(",")
        values = np.array([self.read(x, one.kind, who) for x in names])
        memory.store(self.address(one.operands[0], who), values)

    def do_atom(self, one, who):
        if repr(one) != "atom.global.add.f32":
            raise Fault(f"{one} is not known")
        name, place, value = one.operands
        for thread in who:  # one after the other
            me = np.array([thread])
            at = self.address(place, me)
            old = self.memory.load(at, np.float32)
            self.memory.store(at, old + self.read(value, "f32", me))
            self.write(name, old[0], me)

    def do_cp(self, one, who):
        """Copies that go on beside the program, until they are waited for."""
        if one.kind in ("commit_group", "wait_group"):
            for thread in who:
                groups = self.copies.setdefault(thread, [[]])
                if one.kind == "commit_group":
                    groups.append([])
                else:
                    self.settle(groups, int(one.operands[0]))
            return
        to, source, size, given = one.operands
        to, source = self.address(to, who), self.address(source, who)
        given = self.read(given, "u32", who)
        data = np.zeros((len(who), 4), np.uint32)
        if size != "16" or not np.isin(given, (0, 16)).all():
            raise Fault(f"{one} of {size} bytes, or of a part, is not known")
        some = given > 0
        data[some] = self.memory.load(source[some], np.uint32, 4).T
        self.shared.store(to, np.full((4, len(who)), POISON))
        for thread, place, row in zip(who, to, data, strict=True):
            groups = self.copies.setdefault(thread, [[]])
            groups[-1].append((np.array([place]), row[:, None]))

    def settle(self, groups, stay):
        """Finish copies but those of the last groups, and of the open one."""
        while len(groups) > stay + 1:
            for place, data in groups.pop(0):
                self.shared.store(place, data)


# a launch


def values_of(x):
    """The parameters that one argument becomes."""
    if not np.ndim(x):
        return [np.int64(x) if isinstance(x, int) else x]
    address = x.__array_interface__["data"][0]
    return [*map(np.int64, (0, 0, x.size, x.itemsize, address)),
            *map(np.int64, (*x.shape, *x.strides))]  # fmt: skip


def interpret(program, grid, block, args, together=1024, seed=0):
    """Run a program in every thread of a grid, a block after the other.

    grid, block: three sizes each; args: NumPy arrays and numbers. Raises
    Fault where a GPU's answer would be undefined.
    """
    values = [value for x in args for value in values_of(x)]
    memory = Memory([x for x in args if np.ndim(x)])
    draws = random.Random(seed)
    with np.errstate(all="ignore"):
        for z, y, x in np.ndindex(grid[::-1]):
            sizes = block, grid, (x, y, z)
            Block(program, memory, values, sizes, together, draws).run()


PROGRAMS = {}


@contextmanager
def compiled_code(together=1024, cc=(9, 0)):
    """Launches on the simulated GPU run what their kernels compile into.

    Yields the names of the kernels that were launched.
    """
    if no_compiler():
        pytest.skip(no_compiler())
    ran = []

    def run(kernel, grid, block, *args):
        kinds = launch._kinds(args)
        key = kernel, kinds, cc
        if key not in PROGRAMS:
            PROGRAMS[key] = Program(compile_kernel(*key).ptx)
        three = [(*x, 1, 1)[:3] if isinstance(x, tuple) else (x, 1, 1)
                 for x in (grid, block)]  # fmt: skip
        plain = [x._array if isinstance(x, DeviceArray) else x for x in args]
        if 0 in (*three[0], *three[1]):
            return
        record((kernel, grid, block, kinds))
        ran.append(kernel.__name__)
        try:
            interpret(PROGRAMS[key], *three, plain, together)
        except Fault as fault:
            fault.add_note(f"in {kernel.__name__}, grid {grid}, block {block}")
            raise

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Kernel, "_launch", run)
        yield ran

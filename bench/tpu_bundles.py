"""Static cycles of a compiled TPU program: its bundles, each as often as the program's own scalar instructions run it.

The compiler's dump (`dump_flags`) has, for every kernel and fusion, the list of its VLIW bundles after register allocation, one a
cycle and the empty ones included, and the units that each keeps busy. Branches and loops of such a program are decided by scalar
instructions. Those are few, and `run` executes them and nothing else: so a grid's steps, `pl.when` on a grid index, loops in a
kernel and copies that the pipeline leaves out are counted as they will be, not guessed. Of a chip's two cores it is the first.

What only data decides is unknown to it. A branch forward that depends on such a value counts as both: with its body in `cycles`,
without in `least_cycles`; a loop that ends by such a value counts once, and is told. Waiting is not counted: neither for copies nor
for whatever the hardware stalls on. So the figure is a lower bound of the time, fit to compare programs of one compiler by.
"""

import collections
import dataclasses
import itertools
import operator
import re
from pathlib import Path

# Bytes in the unit that copies are counted in, the same on every generation here: a block of known size tells it (tests/bench).
GRANULE = 32
LISTING, UNITS, TREE = "packed-bundles-post-ra", "pre-delay_hlo-static-per-bundle-utilization", "post-delay-converter"
# The program around the kernels, and what starts and ends it.
NOT_KERNELS = ("TLP", "<late-initialization>", "<late-finalization>")

BUNDLE = re.compile(r"^ *(?:0x)?([0-9a-f]+) +(?:[A-Z]{2})? *: *[> ]*\{(.*?)\} *$", re.MULTILINE | re.DOTALL)
BRANCH = re.compile(r"sbr\.\w+ +(?:\((!?%\w+)\) *)?target bundleno = (\d+)")
ASSIGNMENT = re.compile(r"^(%[sp]\w+) = (\S+)(.*)$", re.DOTALL)
NAME = re.compile(r"%[sp]\d+_[sp]\d+")
PREDICATE = re.compile(r"\((!?%p\w+)(?:, (%\w+))?\)")


def dump_flags(folder):
    """What LIBTPU_INIT_ARGS must hold before JAX starts, for the compiler to write the listings read here to `folder`.

    Writing those of its seventy other passes takes ten times as long as compiling.
    """
    passes = "|".join(map(re.escape, (LISTING, UNITS, TREE)))
    return f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex={passes}"


@dataclasses.dataclass(frozen=True)
class Instruction:
    target: str | None  # %s12_s3, without the register in SSA form as it is
    opcode: str
    operands: tuple  # int, name, or an address [base, offset]
    predicate: str | None  # "!%p1_p0": does nothing unless it holds
    otherwise: str | None  # the value instead


@dataclasses.dataclass(frozen=True)
class Block:
    """Bundles start (inclusive) to stop (exclusive) that run together, and the branch at their end."""

    start: int
    stop: int
    instructions: tuple
    predicate: str | None
    target: int | None


@dataclasses.dataclass(frozen=True)
class Program:
    name: str
    blocks: dict  # start -> Block
    units: dict  # unit -> how many of it each bundle keeps busy, [bundles]
    capacity: dict  # unit -> how many there are
    prefetched: dict  # allocation in SMEM -> position of the operand that it holds
    core_index: list  # allocations in SMEM that say which of a chip's cores it is
    bundles: int


@dataclasses.dataclass
class Counts:
    cycles: int = 0
    least_cycles: int = 0
    mxu: float = 0.0  # share of the cycles in which the matrix units are at work, of all of them
    read: int = 0  # bytes from HBM
    written: int = 0
    unsized: int = 0  # copies of a size that only data tells, which the bytes leave out
    by_data: int = 0  # branches in the code whose way depends on data
    endless: int = 0  # loops in the code counted once, for only data tells how often they run
    units: dict = dataclasses.field(default_factory=dict)  # busy cycles of each unit


def programs(folder, delay_slots):
    """Every kernel and fusion that the dump in `folder` tells of; delay_slots as in `parse`."""
    found = []
    for listing in sorted(Path(folder).glob(f"*-{LISTING}.txt")):
        match = re.match(rf"(\d+-(.*))-\d+-{LISTING}\.txt$", listing.name)
        if match is None or match[2] in NOT_KERNELS:
            continue
        texts = [listing.read_text()]
        for kind in (UNITS, TREE):
            (path,) = listing.parent.glob(f"{_escaped(match[1])}-[0-9]*-{kind}.txt")
            texts.append(path.read_text())
        found.append(parse(match[2], *texts, delay_slots))
    return found


def _escaped(name):
    return re.sub(r"([\[\]*?])", r"[\1]", name)


def parse(name, listing, units, tree, delay_slots):
    """The three texts of one kernel: its bundles, the units they keep busy, and the tree of regions, for its allocations.

    delay_slots: bundles after a branch that still run; the chip's.
    """
    listing = re.sub(r"/\*size_in_granules=\*/", "granules:", listing)
    listing = re.sub(r"/\*.*?\*/", "", listing, flags=re.DOTALL)
    bundles = [(int(at, 16), text.split(";;")) for at, text in BUNDLE.findall(listing)]
    if [at for at, _ in bundles] != list(range(len(bundles))):
        raise ValueError(f"{name}: the listing's bundles are not numbered 0, 1, ...: its format has changed")
    names, capacity, *rows = [line for line in units.splitlines() if not line.startswith("==")]
    names = [unit.strip() for unit in names.split(",")]
    table = list(zip(*(map(int, row.split()) for row in rows), strict=True))
    if len(rows) != len(bundles):
        raise ValueError(f"{name}: {len(bundles)} bundles, but units of {len(rows)}")
    prefetched = re.findall(r"(#allocation\d+) \[.*tag = 'prefetched SMEM operand (\d+)'", tree)
    return Program(
        name=name,
        blocks=_blocks([[_instruction(text.strip()) for text in texts if text.strip()] for _, texts in bundles], delay_slots),
        units=dict(zip(names, table, strict=True)),
        capacity=dict(zip(names, map(int, capacity.split()), strict=True)),
        prefetched={allocation: int(position) for allocation, position in prefetched},
        core_index=re.findall(r"(#allocation\d+) \[.*tag = '[^']*core index'", tree),
        bundles=len(bundles),
    )


def _instruction(text):
    """An Instruction of what decides or is counted: branches, scalars, copies. None for the others."""
    if branch := BRANCH.search(text):
        return Instruction(None, "sbr", (int(branch[2]),), branch[1], None)
    if copy := re.search(r"(dma\.\w+_to_\w+)(.*?)granules:(%?\w+)", text, re.DOTALL):
        predicate = PREDICATE.search(copy[2])
        return Instruction(None, copy[1], (_operand(copy[3]),), predicate and predicate[1], None)
    if "sbr." in text:
        raise ValueError(f"a branch of unknown form: {text[:100]}")
    if store := re.search(r"= sst +\[smem:\[([^\]]*)\]\] (%\w+)(.*)", text):
        predicate = PREDICATE.search(store[3])
        return Instruction(None, "sst", (_address(store[1]), store[2]), predicate and predicate[1], None)
    if not (assignment := ASSIGNMENT.match(text)):
        return None
    target, opcode, rest = assignment.groups()
    if opcode.startswith("inlined_call_operand"):
        return Instruction(target, "operand", (int(re.search(r"index: (\d+)", rest)[1]),), None, None)
    if load := re.search(r"\[smem:\[([^\]]*)\]\]", rest):
        return Instruction(target, "sld", (_address(load[1]),), None, None)
    predicate = PREDICATE.search(rest)
    operands = PREDICATE.sub("", rest)
    operands = tuple(_operand(word) for word in re.findall(r"%\w+|#\w+|-?0x[0-9a-f]+|(?<![\w.])-?\d+", operands))
    return Instruction(target, opcode, operands, predicate and predicate[1], predicate and predicate[2])


def _operand(word):
    return word if word[0] in "%#" else _signed(int(word, 0))


def _address(text):
    """[smem:[#allocation4 + %s1_s2]] -> ("#allocation4", "%s1_s2"); either part may be absent, and then is 0."""
    parts = [part.strip().lstrip("$") for part in text.split("+")]
    return tuple(_operand(part) for part in parts)


def _blocks(bundles, delay_slots):
    branches = {
        at: instruction
        for at, instructions in enumerate(bundles)
        for instruction in instructions
        if instruction is not None and instruction.opcode == "sbr"
    }
    # The bundles in a branch's delay slots run whether or not it is taken.
    stops = {at + 1 + delay_slots: branch for at, branch in branches.items()}
    starts = sorted({0, *stops, *(branch.operands[0] for branch in branches.values())} - {len(bundles)})
    wanted = _deciding(bundles)
    blocks = {}
    for start, stop in itertools.pairwise([*starts, len(bundles)]):
        instructions = [i for bundle in bundles[start:stop] for i in bundle if i is not None and id(i) in wanted]
        # A loop's values change all at once.
        instructions.sort(key=lambda instruction: instruction.opcode != "sphi")
        branch = stops.get(stop)
        predicate, target = (branch.predicate, branch.operands[0]) if branch else (None, None)
        blocks[start] = Block(start, stop, tuple(instructions), predicate, target)
    return blocks


def _deciding(bundles):
    """ids of the instructions that branches and copies depend on, and of the copies."""
    everything = [i for bundle in bundles for i in bundle if i is not None]
    chosen = {id(i) for i in everything if i.opcode.startswith("dma.")}
    names = {name for i in everything if i.opcode == "sbr" or id(i) in chosen for name in _names(i)}
    while True:
        more = [i for i in everything if id(i) not in chosen and (i.target in names or i.opcode == "sst")]
        if not more:
            return chosen
        chosen |= {id(i) for i in more}
        names |= {name for i in more for name in _names(i)}


def _names(instruction):
    words = [instruction.predicate, instruction.otherwise]
    for operand in instruction.operands:
        words += operand if isinstance(operand, tuple) else [operand]
    return {word.lstrip("!") for word in words if isinstance(word, str) and word.lstrip("!").startswith("%")}


def run(program, prefetched=()):
    """The `Counts` of one run. prefetched: the values of the operands in SMEM, flat, by position; None where not known."""
    most, machine, by_data, endless = _walk(program, prefetched, True)
    least = _walk(program, prefetched, False)[0] if by_data else most
    counts = Counts(
        cycles=sum((stop - start) * times for (start, stop), times in most.items()),
        least_cycles=sum((stop - start) * times for (start, stop), times in least.items()),
        read=machine.read,
        written=machine.written,
        unsized=machine.unsized,
        by_data=len(by_data),
        endless=len(endless),
    )
    for unit, busy in program.units.items():
        counts.units[unit] = sum(sum(busy[start:stop]) * times for (start, stop), times in most.items())
    counts.mxu = counts.units["MATMUL"] / (program.capacity["MATMUL"] * counts.cycles)
    return counts


def _walk(program, prefetched, take_bodies):
    machine = _Machine(program, prefetched)
    times, by_data, endless, at = collections.Counter(), set(), set(), 0
    while at in program.blocks:
        block = program.blocks[at]
        times[block.start, block.stop] += 1
        for instruction in block.instructions:
            machine.execute(instruction)
        at = block.stop
        if block.target is None:
            continue
        taken = True if block.predicate is None else machine.holds(block.predicate)
        if taken is None:
            backward = block.target <= block.start
            (endless if backward else by_data).add(block.start)
            # A branch forward jumps over its body.
            taken = not backward and not take_bodies
        if taken:
            at = block.target
    return times, machine, by_data, endless


def _signed(value):
    return (value + 2**31) % 2**32 - 2**31


def _unsigned(value):
    return value % 2**32


class _Machine:
    """The scalar unit: None is a value that it does not know."""

    def __init__(self, program, prefetched):
        self.values, self.stamps, self.memory, self.clock = {}, {}, {}, 0
        self.read = self.written = self.unsized = 0
        self.memory |= {(allocation, 0): 0 for allocation in program.core_index}
        self.prefetched = [[] if values is None else values for values in prefetched]
        for allocation, position in program.prefetched.items():
            for index, value in enumerate(self.prefetched[position] if position < len(self.prefetched) else []):
                self.memory[allocation, index] = int(value)

    def execute(self, instruction):
        self.clock += 1
        opcode, operands = instruction.opcode, instruction.operands
        on = True if instruction.predicate is None else self.holds(instruction.predicate)
        if opcode.startswith("dma."):
            # What may be copied counts as copied.
            size = 0 if on is False else self.value(operands[0])
            self.unsized += size is None
            size = GRANULE * (size or 0)
            self.read += size if opcode.startswith("dma.hbm_to") else 0
            self.written += size if opcode.endswith("to_hbm") else 0
        elif opcode == "sst":
            address = self.address(operands[0])
            if address is not None and on is not False:
                self.memory[address] = self.value(operands[1]) if on else None
        elif opcode == "sld":
            self.assign(instruction.target, self.memory.get(self.address(operands[0])))
        elif opcode == "operand":
            # Of one element it comes in a register; of more, and in HBM, it is an address.
            values = self.prefetched[operands[0]] if operands[0] < len(self.prefetched) else []
            self.assign(instruction.target, int(values[0]) if len(values) == 1 else None)
        elif opcode == "sphi":
            # The way that the program came is the one whose value is newest.
            newest = max(operands, key=lambda name: self.stamps.get(name, -1))
            self.assign(instruction.target, self.value(newest))
        else:
            value = self.compute(opcode, [self.value(operand) for operand in operands])
            if on is not True and instruction.otherwise is not None:
                other = self.value(instruction.otherwise)
                value = other if on is False or value == other else None
            self.assign(instruction.target, value)

    def assign(self, name, value):
        self.values[name], self.stamps[name] = value, self.clock

    def value(self, operand):
        if isinstance(operand, str):
            return (operand, 0) if operand.startswith("#") else self.values.get(operand)
        return operand

    def holds(self, predicate):
        value = self.values.get(predicate.lstrip("!"))
        return None if value is None else bool(value) != predicate.startswith("!")

    def address(self, parts):
        total = 0
        for part in parts:
            total = _add(total, self.value(part))
        return total

    def compute(self, opcode, values):
        kind, *modifiers = opcode.split(".")
        if kind == "scmp":
            if None in values or any(isinstance(value, tuple) for value in values):
                return None
            compare = getattr(operator, modifiers[0])
            return compare(*map(_unsigned, values)) if modifiers[1] == "u32" else compare(*values)
        if kind in ("por", "pand", "pnor", "pnand"):
            absorbing = kind in ("por", "pnor")
            value = absorbing if absorbing in values else None if None in values else not absorbing
            return value if value is None or kind in ("por", "pand") else not value
        if kind == "scalar_select":
            chosen, yes, no = values
            return (yes if yes == no else None) if chosen is None else yes if chosen else no
        if kind in ("smov", "pmov", "int_to_ptr") and len(values) == 1:
            return values[0]
        if kind in ("sadd", "scalar_lea") and len(values) == 2:
            return _add(*values)
        if kind not in SCALARS or None in values or any(isinstance(value, tuple) for value in values):
            return None
        return _signed(int(SCALARS[kind](*values)))


def _add(left, right):
    """Sum of numbers, or of an allocation's address (its name, offset) and a number."""
    if left is None or right is None:
        return None
    if isinstance(right, tuple):
        left, right = right, left
    if isinstance(left, tuple):
        return None if isinstance(right, tuple) else (left[0], left[1] + right)
    return _signed(left + right)


SCALARS = {
    "ssub": operator.sub,
    "smul": operator.mul,
    "sand": operator.and_,
    "sor": operator.or_,
    "sxor": operator.xor,
    "sshll": lambda value, bits: value << bits if 0 <= bits < 32 else 0,
    "sshrl": lambda value, bits: _unsigned(value) >> bits if 0 <= bits < 32 else 0,
    "sshra": lambda value, bits: value >> min(bits, 31),
    "smin": min,
    "smax": max,
    "pneg": lambda value: not value,
    "pxor": operator.xor,
}

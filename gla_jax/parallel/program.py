"""What a compiled program will do, read from what the compiler says of it: its collectives, and its memory.

The text of an optimised program (`compiled.as_text()`) lists every computation in the order in which it will run. It
names a loop once; here what is in it counts as often as it runs. Nothing is executed or allocated, so it makes no
difference whether the devices exist.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Iterator

import jax

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One place in a program where devices exchange data."""

    kind: str
    """One of KINDS."""
    bytes: int
    """Of the whole array on one device: what all-gather returns, what the others take."""
    group_size: int
    """Devices that take part together."""
    count: int
    """How often a run of the program comes by."""
    overlapped: bool
    """Whether anything is computed between its start and its end."""
    name: str
    """Where in the model it comes from, as JAX names operations; empty if the compiler made it up."""

    @property
    def sent(self) -> float:
        """Bytes that one device sends in one go, if the group forms a ring."""
        if self.kind == "collective-permute":
            return self.bytes
        return self.bytes * (2 if self.kind == "all-reduce" else 1) * (1 - 1 / self.group_size)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device."""

    arguments: int
    temporary: int
    """What is made and given up again, results that take no argument's place included."""
    code: int
    peak: int
    """What the program needs in all, arguments included."""
    host: int
    """What it keeps in the memory of the device's host besides."""


def read_memory(compiled: jax.stages.Compiled) -> Memory:
    """Return what the compiler reserves for a program."""
    stats = compiled.memory_analysis()
    if stats is None:
        raise NotImplementedError("this backend does not say how much memory a program takes.")
    arguments, code = stats.argument_size_in_bytes, stats.generated_code_size_in_bytes
    temporary = stats.temp_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    host = stats.host_argument_size_in_bytes + stats.host_temp_size_in_bytes
    return Memory(arguments, temporary, code, arguments + temporary + code, host)


def read_collectives(text: str) -> list[Collective]:
    """Find every collective of a program.

    Args:
        text: `compiled.as_text()`, on any backend.

    Returns:
        One entry for each place, in the order of the program. Groups of one device are left out.
    """
    return [found for found in _read(text).found if found.group_size > 1]


def read_kernels(text: str) -> dict[str, int]:
    """Return how often each Pallas kernel of a program runs, by its name; `text` is `compiled.as_text()`."""
    return dict(_read(text).kernels)


def summarize(collectives: Iterable[Collective]) -> dict[str, dict[str, int]]:
    """Add up collectives by kind.

    Returns:
        For each kind that occurs: how often it runs, and the bytes that a device sends, in all and while it computes.
    """
    table: dict[str, dict[str, int]] = {}
    for kind in KINDS:
        ours = [each for each in collectives if each.kind == kind]
        if ours:
            table[kind] = {
                "count": sum(each.count for each in ours),
                "bytes_sent": round(sum(each.count * each.sent for each in ours)),
                "bytes_sent_overlapped": round(sum(each.count * each.sent for each in ours if each.overlapped)),
            }
    return table


# Reading the text ---------------------------------------------------------------------------------------------------

_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,<=]*)\]")
# What takes time on the units that compute; copies and the ends of other transfers do not.
_WORK = {"fusion", "dot", "convolution", "while", "conditional", "call", "reduce", "scatter", "sort", "custom-call"}
_NO_WORK = ("AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound", "AsyncCollective")
_PALLAS = re.compile(r'custom_call_target="(tpu_custom_call|mosaic_gpu)')
_LEAST_WORK = 4096  # bytes of result: what is smaller, a loop's counter for instance, takes no time


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    opcode: str
    rest: str
    """Operands and attributes."""

    def called(self, attribute: str) -> str | None:
        match = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.rest)
        return match[1] if match else None


def _parse(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    """Return the instructions of each computation by its name, and the name of the one that a run begins with."""
    computations: dict[str, list[_Instruction]] = {}
    entry = ""
    body: list[_Instruction] = []
    for line in text.splitlines():
        if head := _HEAD.match(line):
            body = computations[head[2]] = []
            entry = head[2] if head[1] else entry
        elif instruction := _INSTRUCTION.match(line):
            body.append(_Instruction(*instruction.groups()))
    return computations, entry


def _read(text: str) -> "_Reader":
    computations, entry = _parse(text)
    reader = _Reader(computations)
    reader.walk(entry, 1)
    return reader


class _Reader:
    """Walks a program in the order of its run."""

    def __init__(self, computations: dict[str, list[_Instruction]]):
        self.found: list[Collective] = []
        self.kernels: collections.Counter[str] = collections.Counter()
        self._computations = computations
        self._open: dict[str, int] = {}
        """Collectives on their way: what tells their end, and where in `found` they are."""

    def walk(self, computation: str, count: int) -> None:
        for instruction in self._computations[computation]:
            opcode = instruction.opcode
            kind = opcode.removesuffix("-start")
            if opcode == "while":
                self._note_work()
                body, condition = instruction.called("body"), instruction.called("condition")
                assert body is not None and condition is not None
                self.walk(body, count * self._trips(instruction, condition))
            elif opcode in ("call", "conditional"):
                self._note_work()
                for callee in self._callees(instruction):
                    self.walk(callee, count)
            elif opcode == "fusion":
                self._read_fusion(instruction, count)
            elif opcode == "async-start":
                for inner in self._inside(instruction):
                    self._begin(inner, count, instruction.name)
            elif opcode.endswith("-done"):
                for operand in re.findall(r"%([\w.\-]+)", instruction.rest.partition(")")[0]):
                    self._open.pop(operand, None)
            elif kind in KINDS:
                self._begin(instruction, count, None if kind == opcode else instruction.name)
            elif _is_work(instruction):
                self._note_work()
            if opcode == "custom-call" and _PALLAS.search(instruction.rest):
                self.kernels[re.sub(r"[.\d]+$", "", instruction.name)] += count

    def _read_fusion(self, fusion: _Instruction, count: int) -> None:
        """Read a fusion, which on TPUs may hold a collective: its start, its end, or a part of it beside other work."""
        inside = list(self._inside(fusion))
        if not inside and _is_work(fusion):
            self._note_work()
        name = fusion.called("calls") or ""
        callee = self._computations.get(name, [])
        for collective in inside:
            tag = _tag(collective)
            if name.startswith("all-reduce-scatter"):  # with the slice of the sum that the device is to have
                collective = dataclasses.replace(collective, opcode="reduce-scatter", shape=fusion.shape)
            if any("AsyncCollectiveStart" in each.rest for each in callee):
                self._begin(collective, count, tag)
            elif any("AsyncCollectiveDone" in each.rest for each in callee):
                self._open.pop(tag, None)
            elif tag in self._open:
                self._note_work()
            else:
                self._begin(collective, count, None)

    def _begin(self, instruction: _Instruction, count: int, end: str | None) -> None:
        """Add a collective; `end` is what its end will refer to, None if it ends before anything else begins."""
        kind = instruction.opcode.removesuffix("-start")
        group = _group_size(instruction.rest)
        size = _result_bytes(instruction) * (group if kind == "reduce-scatter" else 1)
        name = re.search(r'op_name="([^"]*)"', instruction.rest)
        if end is not None:
            self._open[end] = len(self.found)
        self.found.append(Collective(kind, size, group, count, False, name[1] if name else ""))

    def _note_work(self) -> None:
        for index in self._open.values():
            self.found[index] = dataclasses.replace(self.found[index], overlapped=True)

    def _inside(self, instruction: _Instruction) -> Iterator[_Instruction]:
        for callee in self._callees(instruction):
            yield from (each for each in self._computations[callee] if each.opcode in KINDS)

    def _callees(self, instruction: _Instruction) -> list[str]:
        attributes = re.findall(r"\b(?:calls|to_apply|\w+_computations?)=(\{[^}]*\}|%?[\w.\-]+)", instruction.rest)
        names = [name for names in attributes for name in re.findall(r"[\w.\-]+", names)]
        return [name for name in names if name in self._computations]

    def _trips(self, loop: _Instruction, condition: str) -> int:
        """Return how often a loop runs: as the compiler says, or else by the constant that its counter is held to."""
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
            return int(known[1])
        limits = [
            int(instruction.rest.partition(")")[0])
            for instruction in self._computations[condition]
            if instruction.opcode == "constant" and re.fullmatch(r"\d+", instruction.rest.partition(")")[0])
        ]
        return max(limits, default=1)


def _is_work(instruction: _Instruction) -> bool:
    if instruction.opcode not in _WORK or any(target in instruction.rest for target in _NO_WORK):
        return False
    return _bytes(instruction.shape) >= _LEAST_WORK


def _tag(collective: _Instruction) -> str:
    """Return what the pieces of one collective have in common when fusions hold them."""
    tag = re.search(r'chain_id="(\w+)"', collective.rest) or re.search(r"channel_id=(\d+)", collective.rest)
    return tag[0] if tag else collective.name


def _result_bytes(instruction: _Instruction) -> int:
    """Return the bytes of a collective's result on one device."""
    if not instruction.opcode.endswith("-start") or instruction.opcode == "all-reduce-start":
        return _bytes(instruction.shape)
    # (operands, results, ...), each an array or a tuple of arrays
    return _bytes(_elements(instruction.shape)[1])


def _elements(shape: str) -> list[str]:
    """Split the text of a tuple of shapes at its outermost commas."""
    parts, depth = [""], 0
    for character in shape[1:-1]:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _bytes(shape: str) -> int:
    """Return the bytes of all arrays in the text of a shape, padding by a layout not counted."""
    total = 0.0
    for dtype, dims in _ARRAY.findall(shape):
        bits = re.search(r"\d+", dtype)
        width = int(bits[0]) if bits else 8 if dtype == "pred" else 0
        total += width / 8 * math.prod(int(re.sub(r"\D", "", size)) for size in dims.split(",") if size)
    return math.ceil(total)


def _group_size(attributes: str) -> int:
    """Return how many devices take part together, from any of the ways to write groups."""
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", mesh[2]))
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", attributes):
        return int(iota[2])
    if groups := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return len(groups[1].split(","))
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", attributes):
        return len(set(re.findall(r"\d+", pairs[1])))
    return 1

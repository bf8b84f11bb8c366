"""Reads a program's communication and its largest arrays from its optimized HLO text."""

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all", "collective-broadcast")
_NO_BUFFER = ("parameter", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "constant", "call")

_CONTROL = ("while", "conditional", "call")

_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "c64": 64, "c128": 128, "token": 0}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_NAME = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
_TRIPS = re.compile(r'known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)')
_WHOLE = re.compile(r"[su]\d+\[\]")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|branch_computations|called_computations|true_computation|false_computation)=\{?(%?[\w.\-]+(?:, ?%[\w.\-]+)*)"
)


@dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    opcode: str
    rest: str  # operands and attributes


def collective_bytes(hlo: str) -> dict[str, int]:
    """Bytes per device and program execution, by kind of collective. Counts every iteration of a loop and omits kinds that do not occur.

    A collective counts the bytes of its operands or of its result, whichever is larger: the output of an all-gather, the input of a
    reduce-scatter. Over n devices a ring sends (n-1)/n of it from each device, and twice that for an all-reduce.

    Args:
      hlo: `compiled.as_text()`.
    """
    computations, entry = _parse(hlo)
    executions = _executions(computations, entry)
    found: dict[tuple[str, str, str], int] = {}
    for (name, within), times in executions.items():
        shapes = {i.name: i.shape for i in computations[name]}
        for instruction in computations[name]:
            kind = instruction.opcode.removesuffix("-start")
            if kind in KINDS:
                taken = sum(shape_bytes(shapes.get(operand, "")) for operand in _operand_names(instruction))
                channel = re.search(r"channel_id=(\d+)", instruction.rest)
                # One that runs behind several fusions stands in each of them, with one channel.
                which, often = (channel[1], executions[within, within]) if channel else (f"{name} {instruction.name}", times)
                size = often * max(taken, _result_bytes(instruction))
                found[kind, within, which] = max(size, found.get((kind, within, which), 0))
    total: Counter[str] = Counter()
    for (kind, *_), size in found.items():
        total[kind] += size
    return dict(sorted(total.items()))


def largest_arrays(hlo: str, number: int) -> list[tuple[int, str]]:
    """Largest distinct arrays produced outside fusions, as (bytes per device, "shape, operation in the model")."""
    computations, entry = _parse(hlo)
    sizes = {}
    for name, _ in _executions(computations, entry, through=_CONTROL):
        for instruction in computations[name]:
            if instruction.opcode not in _NO_BUFFER:
                where = re.search(r'op_name="([^"]*)"', instruction.rest)
                shape = " ".join(f"{kind}[{dims}]" for kind, dims in _SHAPE.findall(instruction.shape))
                sizes[f"{shape}, {where[1] if where else instruction.opcode}"] = shape_bytes(instruction.shape)
    return [(size, text) for text, size in sorted(sizes.items(), key=lambda item: -item[1])[:number]]


def shape_bytes(shape: str) -> int:
    """Bytes of an HLO shape given as text, without padding. A tuple counts all its arrays."""
    bits = 0
    for kind, dims in _SHAPE.findall(shape):
        digits = re.search(r"\d+", kind)
        width = _BITS[kind] if kind in _BITS else int(digits[0]) if digits else 0
        bits += width * math.prod(int(size) for size in dims.split(",") if size)
    return bits // 8


def _result_bytes(instruction: _Instruction) -> int:
    """Bytes of the result. An asynchronous start returns a tuple of its operands and its result; this takes the largest element."""
    if instruction.opcode.endswith("-start") and instruction.shape.startswith("("):
        return max((shape_bytes(part) for part in _elements(instruction.shape)), default=0)
    return shape_bytes(instruction.shape)


def _parse(hlo: str) -> tuple[dict[str, list[_Instruction]], str]:
    """Returns the computations by name, and the name of the entry computation."""
    computations: dict[str, list[_Instruction]] = {}
    current, entry = None, ""
    for line in _lines(hlo):
        if not line.startswith((" ", "\t")):
            found = _COMPUTATION.match(line) if not line.startswith("HloModule") else None
            current = computations.setdefault(found[2], []) if found else None
            entry = found[2] if found and found[1] else entry
        elif current is not None and (found := _NAME.match(line)):
            name, text = found.groups()
            end = _closing(text, 0) + 1 if text.startswith("(") else text.find(" ")
            opcode = re.match(r"\s*([\w\-]+)\(", text[end:])
            if opcode:
                current.append(_Instruction(name, text[:end], opcode[1], text[end + opcode.end() - 1 :]))
    return computations, entry


def _lines(hlo: str) -> Iterator[str]:
    """The lines of the text, an instruction in one: a kernel's metadata has line ends of its own."""
    inside, whole = False, ""
    for line in hlo.splitlines():
        if inside and line != "}" and not line.startswith((" ", "\t")):
            whole += line
            continue
        if whole:
            yield whole
        inside, whole = line != "}" and (inside or _COMPUTATION.match(line) is not None and not line.startswith("HloModule")), line
    yield whole


def _executions(computations: dict[str, list[_Instruction]], entry: str, through: tuple[str, ...] | None = None) -> Counter[tuple[str, str]]:
    """How often each computation runs, by (its name, the computation that it is a part of: itself unless fused). `through`: only what these opcodes call."""
    times: Counter[tuple[str, str]] = Counter()

    def visit(name: str, within: str, factor: int) -> None:
        times[name, within] += factor
        for instruction in computations.get(name, ()):
            if through is not None and instruction.opcode not in through or instruction.opcode in ("async-done", "async-update"):
                continue
            trips = _trip_count(instruction, computations) if instruction.opcode == "while" else 1
            for called in _CALLED.findall(instruction.rest):
                for child in re.split(r", ?", called):
                    child = child.removeprefix("%")
                    if child in computations:
                        visit(child, child if instruction.opcode in _CONTROL else within, factor * trips)

    visit(entry, entry, 1)
    return times


def _trip_count(instruction: _Instruction, computations: dict[str, list[_Instruction]]) -> int:
    """Trip count of a loop: the one the compiler states, or else from the only constant in the loop's condition and what a turn adds to its counter."""
    stated = _TRIPS.search(instruction.rest)
    if stated:
        return int(stated[1])
    found = (re.search(rf"{part}=%?([\w.\-]+)", instruction.rest) for part in ("condition", "body"))
    condition, body = (computations.get(name[1] if name else "", []) for name in found)
    limits = [number for i in condition if (number := _integer(i)) is not None]
    return math.ceil(limits[0] / _step(condition, body)) if len(limits) == 1 else 1


def _step(condition: list[_Instruction], body: list[_Instruction]) -> int:
    """What a turn of a loop adds to the counter that its condition reads. It is 2 where a product is windowed: a turn goes both ways around the ring."""
    read = [re.search(r"index=(\d+)", i.rest) for i in condition if i.opcode == "get-tuple-element"]
    of_body = {i.name: i for i in body}
    results = [_operand_names(i) for i in body if i.opcode == "tuple"][-1:]
    if len(read) != 1 or not read[0] or not results:
        return 1
    added = of_body.get(results[0][int(read[0][1])])
    steps = [_integer(of_body[name]) for name in (_operand_names(added) if added and added.opcode == "add" else []) if name in of_body]
    return next((step for step in steps if step), 1)


def _integer(instruction: _Instruction) -> int | None:
    """The value of a constant whole number."""
    if instruction.opcode != "constant" or not _WHOLE.match(instruction.shape):
        return None
    number = re.match(r"\((\d+)\)", instruction.rest)
    return int(number[1]) if number else None


def _closing(text: str, start: int) -> int:
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    return len(text) - 1


def _operand_names(instruction: _Instruction) -> list[str]:
    return re.findall(r"%([\w.\-]+)", instruction.rest[: _closing(instruction.rest, 0) + 1])


def _elements(shape: str) -> list[str]:
    """The elements of a tuple's shape."""
    parts, depth, start = [], 0, 1
    for i, letter in enumerate(shape):
        depth += (letter in "({[") - (letter in ")}]")
        if depth == 1 and letter == "," or depth == 0 and letter == ")":
            parts.append(shape[start:i])
            start = i + 1
    return parts

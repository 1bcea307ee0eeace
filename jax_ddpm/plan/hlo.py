"""What a program does: its operations as traced, its bytes and collectives as compiled.

XLA's own `cost_analysis` counts the body of a loop once and says nothing on CUDA; here a body
counts as often as it runs.

    print(count_flops(traced.jaxpr), collectives(compiled.as_text()))
"""

import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from jax.extend.core import ClosedJaxpr, Jaxpr

_ITEM_BITS = {"pred": 8, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|branch_computations)=\{?([^}\s]+)")
_TRIPS = re.compile(r'known_trip_count[^}]*?"n":"?(\d+)')
_COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
_CALLS = {"async-start", "call", "call-start", "conditional", "while"}
# What names, groups or awaits values, but moves none, or leaves it to what it calls.
_FREE = _CALLS | {
    "after-all",
    "bitcast",
    "constant",
    "get-tuple-element",
    "iota",
    "parameter",
    "partition-id",
    "replica-id",
    "tuple",
}


class Instruction(NamedTuple):
    """One line of a computation. `nbytes` is what its result takes in the device's memory."""

    name: str
    opcode: str
    nbytes: int
    operands: tuple[str, ...]
    called: tuple[str, ...]
    attributes: str


class Collective(NamedTuple):
    """All collectives of one kind in one run of the program, as one device sees them."""

    kind: str
    times: int
    nbytes: int
    """Bytes of the whole arrays that are reduced, gathered or exchanged."""
    sent: float
    """Bytes that each device sends if they go round in rings."""

    def scaled(self, factor: float) -> "Collective":
        """Those of so many runs of the program, or of a share of one."""
        times, nbytes = round(self.times * factor), round(self.nbytes * factor)
        return self._replace(times=times, nbytes=nbytes, sent=self.sent * factor)


def count_flops(jaxpr: Jaxpr | ClosedJaxpr) -> int:
    """Floating-point operations of one run, of convolutions and matrix products.

    A multiplication and an addition are two operations. What is multiplied by padding counts, as is
    usual in the papers; zeros that a gradient puts between pixels do not. Everything else (norms,
    activations, the optimizer) is a percent, is bound by memory, and is left out.
    """
    if isinstance(jaxpr, ClosedJaxpr):
        jaxpr = jaxpr.jaxpr
    return sum(_equation(equation) for equation in jaxpr.eqns)


def _equation(equation: Any) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracting, _), _ = params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        depth = math.prod(shape[axis] for axis in contracting)
        return 2 * depth * equation.outvars[0].aval.size
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval
        out_features = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
        products = equation.outvars[0].aval.size * kernel.size // out_features
        return 2 * products // math.prod(params["lhs_dilation"])
    inner = [count_flops(each) for value in params.values() for each in _jaxprs(value)]
    if name == "cond":
        return max(inner)
    return params.get("length", 1) * sum(inner)


def _jaxprs(value: Any) -> list[Jaxpr | ClosedJaxpr]:
    if isinstance(value, Jaxpr | ClosedJaxpr):
        return [value]
    if isinstance(value, tuple | list):
        return [each for item in value for each in _jaxprs(item)]
    return []


def parse(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """The computations of an HLO module by name, and the name of the entry."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, here = "", {}
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            here = computations[match[2]] = {}
            entry = match[2] if match[1] else entry
        elif match := _INSTRUCTION.match(line):
            here[match[1]] = _instruction(match[1], match[2])
    return computations, entry


def memory_traffic(text: str) -> int:
    """Bytes that one run reads from and writes to each device's memory.

    Every operation reads its operands and writes its result once; what stays inside a fusion,
    or in a memory of its own beside the device's main one, is free.
    """
    computations, entry = parse(text)
    total = 0
    for times, here, instruction in _walk(computations, entry, fusions=False):
        opcode = instruction.opcode
        # Of an asynchronous pair the first half counts.
        if opcode in _FREE or opcode.endswith(("-done", "-update")):
            continue
        read = sum(here[name].nbytes for name in instruction.operands if name in here)
        if opcode.endswith("-start"):  # whose result names its operands too, as a rule
            total += times * max(2 * read, instruction.nbytes)
        else:
            total += times * (read + instruction.nbytes)
    return total


def collectives(text: str) -> list[Collective]:
    """The collectives of one run, by kind."""
    computations, entry = parse(text)
    header = text.partition("\n")[0]
    everyone = math.prod(
        int(number) for number in re.findall(r"num_(?:partitions|replicas)=(\d+)", header)
    )
    found: dict[str, Collective] = {}
    for times, here, instruction in _walk(computations, entry, fusions=True):
        kind = instruction.opcode.removesuffix("-start")
        if kind not in _COLLECTIVES:
            continue
        group = _group_size(instruction.attributes, everyone)
        size = times * sum(here[name].nbytes for name in instruction.operands)
        share = (group - 1) / group
        if kind == "all-gather":
            size *= group
        elif kind == "all-reduce":
            share *= 2
        elif kind.startswith("collective"):
            share = 1
        before = found.get(kind, Collective(kind, 0, 0, 0))
        found[kind] = Collective(
            kind, before.times + times, before.nbytes + size, before.sent + size * share
        )
    return [found[kind] for kind in sorted(found)]


def _walk(
    computations: dict[str, dict[str, Instruction]], entry: str, *, fusions: bool
) -> Iterator[tuple[int, dict[str, Instruction], Instruction]]:
    """Every instruction that runs, with the number of times and the computation it is in."""

    def walk(name: str, times: int):
        here = computations[name]
        for instruction in here.values():
            yield times, here, instruction
            opcode = instruction.opcode
            if opcode in _CALLS or (fusions and opcode == "fusion"):
                trips = _trips(instruction, computations) if opcode == "while" else 1
                for called in instruction.called:
                    yield from walk(called, times * trips)

    return walk(entry, 1)


def _trips(loop: Instruction, computations: dict[str, dict[str, Instruction]]) -> int:
    """How often a loop runs: as the compiler noted, or the bound its condition compares with."""
    if match := _TRIPS.search(loop.attributes):
        return int(match[1])
    if match := re.search(r"condition=%?([\w.-]+)", loop.attributes):
        condition = computations[match[1]]
        for instruction in condition.values():
            if instruction.opcode == "compare" and "direction=LT" in instruction.attributes:
                bound = condition[instruction.operands[1]]
                if bound.opcode == "constant":
                    return int(bound.attributes.strip("()"))
    return 1


def _instruction(name: str, text: str) -> Instruction:
    shape, rest = _split(text) if text.startswith("(") else text.split(" ", 1)
    opcode, rest = rest.strip().split("(", 1)
    inside, attributes = _split("(" + rest)
    called = tuple(
        each.strip().lstrip("%")
        for group in _CALLED.findall(attributes)
        for each in group.rstrip(",").split(",")
    )
    operands = tuple(re.findall(r"%([\w.-]+)", inside))
    if opcode == "constant":
        attributes = inside
    return Instruction(name, opcode, _nbytes(shape), operands, called, attributes)


def _split(text: str) -> tuple[str, str]:
    """A parenthesis, and what follows it."""
    depth = 0
    for position, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return text[: position + 1], text[position + 1 :]
    raise ValueError(f"expected as many ) as (, got {text[:80]!r}")


def _nbytes(shape: str) -> int:
    """Bytes of an array or of a tuple's arrays, but for those in a memory space S(1), S(2), …"""
    total = 0
    for kind, dimensions, layout in _ARRAY.findall(shape):
        if re.search(r"S\([1-9]", layout):
            continue
        bits = _ITEM_BITS.get(kind)
        if bits is None:
            digits = re.search(r"\d+", kind)
            bits = int(digits[0]) if digits else 0
        total += math.prod(int(size) for size in dimensions.split(",") if size) * bits // 8
    return total


def _group_size(attributes: str, everyone: int) -> int:
    """How many devices take part in one collective."""
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return match[1].count(",") + 1
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes):
        return int(match[1])
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\] *\{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", match[1]))
        return math.prod(int(sizes[name]) for name in re.findall(r"'([^']+)'", match[2]))
    if match := re.search(r"source_target_pairs=\{(\{.*?\})\}", attributes):
        return match[1].count("{")
    return everyone

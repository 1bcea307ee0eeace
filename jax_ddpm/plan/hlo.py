"""What a program does: its operations as traced, its bytes and collectives as compiled.

XLA's own `cost_analysis` counts the body of a loop once and says nothing on CUDA; here a body
counts as often as it runs.

    print(count_flops(traced.jaxpr), collectives(compiled.as_text()))
"""

import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)$")
_ARRAY = re.compile(r"\b(?:pred|[a-z]+(\d+)\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|branch_computations)=\{?%?([\w.-]+)")
_COLLECTIVES = "all-gather all-reduce all-to-all collective-broadcast collective-permute".split()
_COLLECTIVES += ["ragged-all-to-all", "reduce-scatter"]
_CALLS = {"async-start", "call", "call-start", "conditional", "while"}
# What names, groups or awaits values, but moves none, or leaves it to what it calls.
_FREE = _CALLS | {*"after-all bitcast constant get-tuple-element iota parameter tuple".split()}
_FREE |= {"partition-id", "replica-id"}


class Instruction(NamedTuple):
    """One line of a computation. `nbytes` is what its result takes in the device's memory;
    `inside` is the text of its operands."""

    opcode: str
    nbytes: int
    inside: str
    operands: list[str]
    attributes: str


class Collective(NamedTuple):
    """All collectives of one kind in one run of the program, as one device sees them."""

    kind: str
    times: int
    nbytes: int
    """Bytes of the whole arrays that are reduced, gathered or exchanged."""
    sent: float
    """Bytes that each device sends if they go round in rings."""


def count_flops(jaxpr: Jaxpr | ClosedJaxpr) -> int:
    """Floating-point operations of one run, of convolutions and matrix products.

    A multiplication and an addition are two operations. What is multiplied by padding counts, as is
    usual in the papers; zeros that a gradient puts between pixels do not. Everything else (norms,
    activations, the optimizer) is a percent, is bound by memory, and is left out.
    """
    return flops_by_arithmetic(jaxpr).total()


_ALGORITHMS = {"bf16_bf16_f32_x3": "high", "bf16_bf16_f32_x6": "highest", "f32_f32_f32": "highest"}
"""Some of `jax.lax.DotAlgorithmPreset`, as precisions."""


def flops_by_arithmetic(jaxpr: Jaxpr | ClosedJaxpr) -> Counter[tuple[str, str]]:
    """The same by dtype and precision: `{("float32", "highest"): 12_443_713_536}`."""
    found: Counter[tuple[str, str]] = Counter()
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name, params = equation.primitive.name, equation.params
        if name in ("dot_general", "conv_general_dilated"):
            avals: Any = [each.aval for each in (*equation.invars, *equation.outvars)]
            left, right, output = avals
            products = output.size
            if name == "dot_general":
                products *= math.prod(left.shape[k] for k in params["dimension_numbers"][0][0])
            else:
                features = right.shape[params["dimension_numbers"].rhs_spec[0]]
                products *= right.size // features
                products //= math.prod(params["lhs_dilation"])
            precision = params["precision"] or "default"
            precision = precision[0] if isinstance(precision, tuple) else precision
            how = str(getattr(precision, "name", precision)).lower()
            how = _ALGORITHMS.get(how, how if how in ("high", "highest") else "default")
            found[str(jnp.promote_types(left.dtype, right.dtype)), how] += 2 * products
            continue
        values = jax.tree.leaves([*params.values()])
        inner = [flops_by_arithmetic(x) for x in values if isinstance(x, Jaxpr | ClosedJaxpr)]
        if name == "cond":
            inner = [max(inner, key=Counter.total)]
        for each in inner:
            for how, flops in each.items():
                found[how] += params.get("length", 1) * flops
    return found


def memory_traffic(text: str, runs: float = 1.0) -> float:
    """Bytes that so many runs read from and write to each device's memory.

    Every operation reads its operands and writes its result once; what stays inside a fusion,
    or in a memory of its own beside the device's main one, is free.
    """
    total = 0.0
    for times, here, instruction in _walk(text, runs, _CALLS):
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


def collectives(text: str, runs: float = 1.0) -> list[Collective]:
    """The collectives of so many runs, by kind."""
    sizes = re.findall(r"num_(?:partitions|replicas)=(\d+)", text.partition("\n")[0])
    devices = math.prod(map(int, sizes))
    found: dict[str, list[float]] = {}
    for times, here, instruction in _walk(text, runs, _CALLS | {"fusion"}):
        kind = instruction.opcode.removesuffix("-start")
        if kind not in _COLLECTIVES:
            continue
        group = _group_size(instruction.attributes, devices)
        size = times * sum(here[name].nbytes for name in instruction.operands)
        share = (group - 1) / group
        if kind == "all-gather":
            size *= group
        elif kind == "all-reduce":
            share *= 2
        elif kind.startswith("collective"):
            share = 1
        found[kind] = np.add(found.get(kind, (0, 0, 0)), (times, size, size * share)).tolist()
    return [
        Collective(kind, round(times), round(size), sent)
        for kind, (times, size, sent) in sorted(found.items())
    ]


def _walk(text: str, runs: float, calls: set[str]) -> Iterator[Any]:
    """The number of times, the computation, and the `Instruction`, of each one that runs."""
    computations, entry, here = {}, "", {}
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            here = computations[match[2]] = {}
            entry = match[2] if match[1] else entry
        elif match := _INSTRUCTION.match(line):
            name, shape, opcode, rest = match.groups()
            inside, _, attributes = rest.partition("), ")
            operands = re.findall(r"%([\w.-]+)", inside)
            here[name] = Instruction(opcode, _nbytes(shape), inside, operands, attributes)

    def walk(name: str, times: float):
        for instruction in computations[name].values():
            yield times, computations[name], instruction
            if instruction.opcode in calls:
                trips = _trips(instruction, computations) if instruction.opcode == "while" else 1
                for called in _CALLED.findall(instruction.attributes):
                    yield from walk(called, times * trips)

    return walk(entry, runs)


def _trips(loop: Instruction, computations: dict[str, dict[str, Instruction]]) -> int:
    """How often a loop runs: as the compiler noted, or the bound its condition compares with."""
    if match := re.search(r'known_trip_count[^}]*?"n":"?(\d+)', loop.attributes):
        return int(match[1])
    for condition in re.findall(r"condition=%?([\w.-]+)", loop.attributes):
        here = computations[condition]
        for instruction in here.values():
            if instruction.opcode == "compare" and "direction=LT" in instruction.attributes:
                bound = here[instruction.operands[1]]
                if bound.opcode == "constant":
                    return int(bound.inside.strip(")"))
    return 1


def _nbytes(shape: str) -> int:
    """Bytes of an array or of a tuple's arrays, but for those in a memory space S(1), S(2), …"""
    return sum(
        math.prod(int(size) for size in dimensions.split(",") if size) * int(bits or 8) // 8
        for bits, dimensions, layout in _ARRAY.findall(shape)
        if not re.search(r"S\([1-9]", layout)
    )


def _group_size(attributes: str, devices: int) -> int:
    """How many devices take part in one collective."""
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return match[1].count(",") + 1
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes):
        return int(match[1])
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\] *\{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", match[1]))
        return math.prod(int(sizes[name]) for name in re.findall(r"'([^']+)'", match[2]))
    return devices

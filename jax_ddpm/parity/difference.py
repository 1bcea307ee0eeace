"""Where two networks part: the first PyTorch module whose output the JAX program does not compute.

No names are needed. The JAX program is run equation by equation, whatever it is written in (Linen,
NNX, Equinox, a plain function), and each input and output of each PyTorch module is looked up among
the arrays that it computes, as it is and with channels last. A module differs if its output is not
found, and neither is anything that depends on this output: a right port may compute a module in
another way, but then it computes what follows. The arrays inside of `while_loop` and `cond`, and
of a `scan` of more than 100 steps, are not seen. Small inputs do: all arrays are kept.
"""

import copy
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations, permutations
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax.extend.core import Jaxpr, JaxprEqn, Literal
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from jax_ddpm.parity.pair import Pair

_AGREES = 1e-10
"""The relative error of arrays in float64 that are the same, rounding included."""
_FLOAT32 = 1e-5
"""A smaller error may be the rounding of float32."""
_CLOSE = 0.3
"""With a larger error two arrays have nothing in common."""
_UNROLLED = 100
"""The most steps of a `scan` whose arrays are recorded; those of other loops are not."""
_CALLS = ("jit", "remat2", "checkpoint", "custom_jvp_call", "custom_vjp_call")


def _shifted(by: int, forward: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """The `forward` of a convolution that pads less before and more after."""
    module = forward.__self__
    sizes = [size + sign * by for size in reversed(module.padding) for sign in (-1, 1)]
    module.padding = (0,) * len(module.padding)
    return lambda x: forward(nn.functional.pad(x, sizes))


_SETTINGS: dict[str, tuple[Any, ...]] = {
    "eps": (1e-3, 1e-5, 1e-6, 1e-12),
    "num_groups": (1, 2, 4, 8, 16, 32),
    "approximate": ("none", "tanh"),
}
# Mistakes to try in a module: the text, the attribute, and how it is changed.
_EDITS: tuple[tuple[str, str, Callable[[Any], Any]], ...] = (
    *(
        (f"its {name} were {value}", name, lambda _, value=value: value)
        for name, values in _SETTINGS.items()
        for value in values
    ),
    ("its weight were transposed", "weight", lambda weight: weight.transpose(0, 1)),
    ("its kernel were transposed", "weight", lambda weight: weight.transpose(2, 3)),
    ("its kernel were flipped", "weight", lambda weight: weight.flip(2, 3)),
    ("its weight were left out", "weight", torch.ones_like),
    ("its bias were left out", "bias", torch.zeros_like),
    ("its padding were one less before and one more after", "forward", partial(_shifted, 1)),
    ("its padding were one more before and one less after", "forward", partial(_shifted, -1)),
)
_ACTIVATIONS = (nn.SiLU(), nn.ReLU(), nn.GELU(), nn.GELU("tanh"), nn.Tanh(), nn.Identity())


@dataclass(eq=False)
class Call:
    """One call of a PyTorch module, and the calls inside it."""

    name: str
    inputs: list[torch.Tensor]
    outputs: list[torch.Tensor] = field(default_factory=list)
    children: "list[Call]" = field(default_factory=list)


def _tensors(tree: Any, least: int = 2) -> list[torch.Tensor]:
    """Copies of the floating tensors of `least` numbers or more; masks of -inf are left out."""
    tensors = [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor) and x.numel() >= least]
    return [x.clone() for x in tensors if x.is_floating_point() and not x.isinf().any()]


def record(pair: Pair, start: int = 0, *replaced: torch.Tensor) -> list[Call]:
    """The calls of modules in PyTorch's forward pass, in the order in which they begin.

    `replaced`: two tensors; from call `start` on, the second takes the place of the first wherever
    a module gets or returns it.
    """
    calls, stack = [Call("", _tensors(pair.tensors(pair.inputs)))], [0]

    def other(x: Any) -> Any:
        usual = not replaced or len(calls) < start or not isinstance(x, torch.Tensor)
        return x if usual or not x.equal(replaced[0]) else replaced[1]

    def enter(name: str, module: nn.Module, *given: Any) -> Any:
        given = tree_map(other, given)
        calls.append(Call(name, _tensors(given)))
        calls[stack[-1]].children.append(calls[-1])
        stack.append(len(calls) - 1)
        return given if replaced else None

    def leave(module: nn.Module, given: Any, output: Any) -> Any:
        output = tree_map(other, output)
        calls[stack.pop()].outputs = _tensors(output)
        return output if replaced else None

    with torch.no_grad(), ExitStack() as hooks:
        for name, module in list(pair.module.named_modules())[1:]:
            hook = partial(enter, name)
            hooks.enter_context(module.register_forward_pre_hook(hook, with_kwargs=True))
            hooks.enter_context(module.register_forward_hook(leave))
        output = pair.call(pair.module, *pair.tensors(pair.inputs))
        calls[0].outputs = _tensors(tree_map(other, output), least=1)
    return calls


class Arrays:
    """Every array that a JAX program computes, to be found by value."""

    def __init__(self, pair: Pair) -> None:
        self._equations: list[JaxprEqn | None] = []
        program = jax.make_jaxpr(pair.apply)(pair.variables, *pair.inputs)
        given = [*program.consts, *jax.tree.leaves((pair.variables, *pair.inputs))]
        outputs, arrays = jax.jit(lambda *given: self._run(program.jaxpr, given))(*given)
        arrays, self._equations = [*arrays, *outputs], [*self._equations, *[None] * len(outputs)]
        self._sizes: dict[int, list[tuple[np.ndarray, float, JaxprEqn | None]]] = {}
        for array, equation in zip(arrays, self._equations, strict=True):
            if jnp.issubdtype(array.dtype, jnp.floating):
                value = np.ravel(np.asarray(array, np.float64))
                row = value, float(np.linalg.norm(value)), equation
                self._sizes.setdefault(value.size, []).append(row)

    def _run(self, jaxpr: Jaxpr, given: Iterable[Any]) -> tuple[list[Any], list[Any]]:
        """The outputs of a program, and every array, whose equation is noted."""
        known: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], given, strict=True))
        arrays = list(known.values())
        self._equations += [None] * len(arrays)

        def values(variables: Iterable[Any]) -> list[Any]:
            return [v.val if isinstance(v, Literal) else known[v] for v in variables]

        for equation in jaxpr.eqns:
            primitive, params, inputs = equation.primitive, equation.params, values(equation.invars)
            if primitive.name in _CALLS:
                inner = params["jaxpr" if "jaxpr" in params else "call_jaxpr"]
                consts = getattr(inner, "consts", ())
                results, more = self._run(getattr(inner, "jaxpr", inner), [*consts, *inputs])
            elif primitive.name == "scan" and params["length"] <= _UNROLLED:
                results, more = self._scan(params, inputs)
            else:
                results = primitive.bind(*inputs, **params)
                results = more = results if primitive.multiple_results else [results]
                self._equations += [equation] * len(results)
            arrays += more
            known.update(zip(equation.outvars, results, strict=True))
        return values(jaxpr.outvars), arrays

    def _scan(self, params: dict[str, Any], inputs: list[Any]) -> tuple[list[Any], list[Any]]:
        """As `_run`, of a loop over layers."""
        body, fixed, carried = params["jaxpr"], params["num_consts"], params["num_carry"]
        carry, xs = inputs[fixed : fixed + carried], inputs[fixed + carried :]
        arrays, steps = [], list(range(params["length"]))[:: -1 if params["reverse"] else 1]
        outputs = {}
        for step in steps:
            given = [*body.consts, *inputs[:fixed], *carry, *(x[step] for x in xs)]
            results, more = self._run(body.jaxpr, given)
            carry, outputs[step] = results[:carried], results[carried:]
            arrays += more
        stacked = zip(*(outputs[step] for step in sorted(outputs)), strict=True)
        return [*carry, *map(jnp.stack, stacked)], arrays

    def closest(
        self, tensors: Iterable[torch.Tensor], near: bool = False, returned: bool = False
    ) -> tuple[float, str]:
        """The error of the tensor that is furthest from every array of its size, relative to its
        largest number, and the line of code of the closest array.

        `near` skips arrays whose norms rule them out. `returned`: only the program's output.
        """
        worst = 0.0, ""
        for tensor in tensors:
            value, best = tensor.double().numpy(), (np.inf, "")
            moved = np.moveaxis(value, 1, -1) if value.ndim > 2 else value
            orders = [moved if value.ndim == 4 else value] if returned else [value, moved]
            scale, norm = float(np.abs(value).max()) or 1.0, np.linalg.norm(value)
            rows = self._sizes.get(value.size, [])
            for array, other, equation in rows[-1:] if returned else rows:
                if not near or abs(other - norm) <= _AGREES * scale * value.size**0.5:
                    error = min(float(np.abs(array - x.ravel()).max()) for x in orders) / scale
                    best = min(best, (error, _line(equation)), key=lambda row: row[0])
            worst = max(worst, best, key=lambda row: row[0])
        return worst

    def begin_in_float32(self) -> str:
        """The first line of code whose result is float32 although nothing before it is."""
        for equation in filter(None, self._equations):
            if any(map(_is_narrow, equation.outvars)) and not any(map(_is_narrow, equation.invars)):
                return _line(equation)
        return ""


def _is_narrow(variable: Any) -> bool:
    dtype = variable.aval.dtype
    return jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 8


def _line(equation: JaxprEqn | None) -> str:
    """The line of code outside of libraries that computes something, and the scopes there."""
    if equation is None or (traceback := equation.source_info.traceback) is None:
        return ""
    stack = str(equation.source_info.name_stack).split("/")
    scopes = "/".join(filter(str.isidentifier, stack))
    for frame in traceback.frames:
        if not re.search("(site|dist)-packages", frame.file_name):
            return f"{Path(frame.file_name).name}:{frame.line_num}" + f" in {scopes}" * bool(scopes)
    return scopes


def first_difference(pair: Pair) -> tuple[str | None, str]:
    """PyTorch's name of the first module that differs in float64, and what was found of it."""
    search = _Search(pair)
    fault = search.fault(search.calls[0]) or search.calls[0]
    if not fault.name and not search.is_wrong:
        return None, "every module agrees in float64; equal or zero weights may hide a difference"
    return fault.name, "\n  ".join(search.explanation(fault))


class _Search:
    """PyTorch's calls beside JAX's arrays."""

    def __init__(self, pair: Pair) -> None:
        self.pair, self.calls, self.arrays = pair, record(pair), Arrays(pair)
        self.unmatched: dict[str, None] = {}
        self.is_wrong = bool(self.wrong(self.calls[0].outputs, returned=True))

    def wrong(self, tensors: Iterable[torch.Tensor], **how: bool) -> list[torch.Tensor]:
        """Those that JAX does not compute."""
        return [x for x in tensors if self.arrays.closest([x], near=True, **how)[0] > _AGREES]

    def fault(self, call: Call) -> Call | None:
        """The first call inside this one that differs, innermost unless it gets the wrong input."""
        for child in call.children:
            outputs = self.wrong(child.outputs)
            if outputs and self.is_harmless(outputs[0]):
                self.unmatched[child.name] = None
            elif inside := self.fault(child):
                lies_between = outputs and self.wrong(child.inputs) and self.wrong(inside.inputs)
                return child if lies_between else inside
            elif outputs:
                return child
        return None

    def is_harmless(self, output: torch.Tensor) -> bool:
        """Whether something agrees that depends on this output, or what is wrong does not."""
        ramp = torch.linspace(0, 1, output.numel(), dtype=torch.float64).reshape(output.shape)
        try:
            others = record(self.pair, 0, output, output + ramp)
        except Exception:  # the module refuses other numbers
            return False
        changed: list[torch.Tensor] = []
        for one, other in zip(self.calls, others, strict=False):
            pairs = zip(one.inputs + one.outputs, other.inputs + other.outputs, strict=False)
            changed += [x for x, y in pairs if not x.equal(y) and x is not output]
        reached = any(x is y for x in changed for y in self.calls[0].outputs)
        if self.is_wrong and not reached:
            return True
        return len(self.wrong(changed)) < len(changed) or not changed

    def explanation(self, fault: Call) -> Iterator[str]:
        """What is known of a call that differs, line by line."""
        yield f"first difference: {fault.name or 'the network, after its last module'}"
        error, line = self.arrays.closest(fault.inputs)
        if error <= _AGREES:
            before = error
            error, line = self.arrays.closest(fault.outputs, returned=not fault.name)
            agrees = f"JAX computes its input ({before:.1e})" if fault.name else "its modules agree"
            yield f"{agrees}, but not its output ({error:.1e})"
        else:
            parent = next(each for each in self.calls if fault in each.children)
            siblings = [f"the input of {parent.name}", *(each.name for each in parent.children)]
            previous = siblings[parent.children.index(fault)]
            yield f"JAX does not compute its input ({error:.1e}), although {previous} agrees"
        if line and error < _CLOSE:
            yield f"the closest array in JAX is made at {line}"
        # A trial succeeds if the next layer that differs, or else the network, agrees then.
        number, inside = self.calls.index(fault), f"{fault.name}."
        later = [i for i in range(number, len(self.calls)) if not self.calls[i].children]
        later = [i for i in later if not f"{self.calls[i].name}.".startswith(inside)]
        differ = (i for i in later if self.wrong(self.calls[i].outputs))
        probe = next((i for i in differ if self.calls[i].name not in self.unmatched), 0)
        for text, run in self.trials(fault) if probe or self.is_wrong else ():
            with suppress(Exception):  # it does not fit what follows
                outputs = run()[probe].outputs
                found, _ = self.arrays.closest(outputs, near=True, returned=not probe)
                if outputs and found <= _AGREES:
                    yield f"PyTorch would agree, to {found:.0e}, if {text}"
                    break
        else:
            if error < _FLOAT32:
                line = self.arrays.begin_in_float32()
                yield f"float32 begins at {line}" if line else "PyTorch may compute in float32 here"
        if self.unmatched:
            yield f"computed in another way, to the same effect: {', '.join(self.unmatched)}"

    def trials(self, fault: Call) -> Iterator[tuple[str, Callable[[], list[Call]]]]:
        """PyTorch's calls with another module, or with another tensor between modules."""
        number, wrong = self.calls.index(fault), self.wrong(fault.inputs)
        if not wrong and not fault.children:
            for text, *edit in _EDITS:
                yield text, partial(self.edited, fault, *edit)
        wrong = (wrong or self.wrong(fault.outputs, returned=not number))[:1]
        named = [("the input", self.calls[0].inputs)]
        named += [(f"the output of {each.name}", each.outputs) for each in self.calls[1:]]
        known = [(name, x) for name, outputs in named for x in outputs]
        before = [(f" of {name}", i, tensors) for i, (name, tensors) in enumerate(named[:number])]
        for where, start, tensors in [("", number, wrong), *before[-3:]]:
            for x in tensors:
                for text, other in _rearranged(x, [y for _, y in known]):
                    yield text.format(where), partial(record, self.pair, start, x, other)
        for name, x in known:
            for target in [*wrong, *fault.inputs]:
                if x.shape == target.shape[: x.ndim] and not x.equal(target):
                    added = x.reshape(*x.shape, *[1] * (target.ndim - x.ndim))
                    others = [(f"{name} were not added", target - added)]
                    for one, two in permutations(_ACTIVATIONS, 2):
                        others += [(f"{two} replaced {one}", two(x))] * one(x).equal(target)
                    for text, other in others:
                        yield text, partial(record, self.pair, number, target, other)

    def edited(self, fault: Call, name: str, change: Callable[[Any], Any]) -> list[Call]:
        """The calls with another attribute of a module."""
        pair = copy.copy(self.pair)
        pair.module = copy.deepcopy(pair.module)
        module = pair.module.get_submodule(fault.name)
        value = change(getattr(module, name))
        setattr(module, name, nn.Parameter(value) if isinstance(value, torch.Tensor) else value)
        return record(pair)


def _rearranged(
    x: torch.Tensor, known: Iterable[torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    """A tensor with axes exchanged, or the parts of one, as wide as known tensors or a third."""
    for one, two in combinations(range(1, x.ndim), 2):
        yield f"axes {one} and {two}{{}} were exchanged", x.transpose(one, two)
    for axis in {1, x.ndim - 1} if x.ndim > 1 else ():
        for size in {y.shape[axis] for y in known if y.ndim == x.ndim} | {x.shape[axis] // 2}:
            yield f"the last {size} in axis {axis}{{}} came first", x.roll(size, axis)
        parts = x.chunk(3, axis)
        for order in permutations(range(3)) if x.shape[axis] % 3 == 0 else ():
            text = f"the thirds of axis {axis}{{}} were in the order {order}"
            yield text, torch.cat([parts[i] for i in order], axis)

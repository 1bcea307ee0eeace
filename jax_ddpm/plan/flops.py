"""Floating-point operations of a traced program: those of its convolutions and matrix products.

A multiplication and an addition are two operations. What is multiplied by padding counts, as is
usual in the papers; zeros that a gradient puts between pixels do not. Everything else (norms,
activations, the optimizer) is a percent, is bound by memory, and is left out.
"""

import math
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr


def count_flops(jaxpr: Jaxpr | ClosedJaxpr) -> int:
    """Operations of one run: the body of a scan as often as it runs, of branches the longest."""
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

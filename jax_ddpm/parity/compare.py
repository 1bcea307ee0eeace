"""Is my JAX network the PyTorch one? Output, gradients, optimizer steps and a whole chain.

    report = compare(module, model.apply, from_torch, (x, t))
    print(report)
    assert report.passed

Both sides start from the same weights and see the same inputs and noise, once in float64, where
only a wrong formula is far off, and once in float32, where users compute. Errors are relative, and
each row names the array that is worst: the layer to look at.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

import jax_ddpm as ddpm
from jax_ddpm.io.arrays import flatten
from jax_ddpm.parity.harness import (
    DType,
    Report,
    Result,
    from_torch,
    images,
    schedule,
    to_torch,
    worst_error,
)
from jax_ddpm.parity.tolerances import TOLERANCES, Tolerance
from torch_reference.sampling import sample
from torch_reference.schedule import T

_RATE, _EPS = 1e-4, 1e-5
"""Adam's. With its usual ε of 1e-8 it makes a whole step of a gradient that is only rounding."""

_SMALLEST = 1e-3
"""Of the largest array's scale, the least that an array is compared with: a bias before a norm has
no gradient but rounding, and no scale of its own."""

Draw = tuple[Sequence[np.ndarray], np.ndarray]
"""What a training step sees: the inputs, and the target of the output."""


def compare(
    module: torch.nn.Module,
    apply_fn: Callable[..., Any],
    variables_from_torch: Callable[[Mapping[str, np.ndarray]], Any],
    inputs: Sequence[Any],
    *,
    torch_fn: Callable[..., torch.Tensor] | None = None,
    adam_steps: int = 10,
    chain: bool = True,
    tolerances: Mapping[str, Tolerance] | None = None,
    dtypes: Sequence[DType] = get_args(DType),
) -> Report:
    """Compare a PyTorch network with a JAX one that should be the same function.

    Args:
      module: the PyTorch network, on the CPU. A copy of it is used, in evaluation mode.
      apply_fn: `(variables, *inputs) -> output`: a Flax module's `apply`, or any function.
      variables_from_torch: `state_dict of arrays -> variables`. Gradients are converted with it
        too, so it may only move and flip axes: `interop.layers_from_torch` does this for the
        usual layers.
      inputs: images first, [batch, height, width, channel]; what has four axes is given to torch
        as NCHW. Floating inputs are cast to the dtype under test, integers stay.
      torch_fn: `(module, *inputs) -> output`, where it is not `module(*inputs)`.
      adam_steps: steps of Adam on a mean squared error; 0 leaves them out.
      chain: also run the tutorial's reverse chain, 200 steps; for networks `(x, t, …)` that predict
        ε, in the shape of `x`.
      tolerances: of "forward", "gradients", "training" and "chain", where they are not to be those
        of `parity.tolerances`, which the networks of this library meet.
      dtypes: the precisions, float64 whatever `jax_enable_x64` says.

    Returns:
      A `Report`; `report.passed` is the answer.

    Raises:
      ValueError: the variables are empty, are not of the dtype under test, or the two outputs
        differ in shape.
    """
    limits = {**TOLERANCES, **(tolerances or {})}
    optimizer = optax.adam(_RATE, eps=_EPS)
    torch_optimizer = partial(torch.optim.Adam, lr=_RATE, eps=_EPS)
    rows: list[Result] = []
    for dtype in dtypes:
        with jax.enable_x64(dtype == "float64"), jax.default_matmul_precision("highest"):
            pair = Pair(module, apply_fn, variables_from_torch, inputs, dtype, torch_fn=torch_fn)
            found = {"forward": ("output", pair.outputs())}
            found["gradients"] = "gradient of every parameter", pair.gradients()
            if adam_steps:
                draws = [(pair.inputs, pair.target)] * adam_steps
                name = f"{adam_steps} Adam steps: every weight and loss"
                found["training"] = name, pair.training(optimizer, torch_optimizer, draws)
            if chain:
                found["chain"] = f"reverse chain: each of {T} states", pair.chain()
            for kind, (name, sides) in found.items():
                error, worst = worst_error(*sides, _SMALLEST)
                rows.append(Result(kind, name, dtype, error, getattr(limits[kind], dtype), worst))
    return Report(tuple(rows))


class Pair:
    """The two networks in one precision; the arguments are those of `compare`.

    torch computes in `oracle`, from weights and inputs that were rounded to `dtype`; None: in
    `dtype` as well. Each method runs both, which stay as they are, and returns what JAX and what
    torch computed, gradients and weights as the JAX network names them.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        apply_fn: Callable[..., Any],
        variables_from_torch: Callable[[Mapping[str, np.ndarray]], Any],
        inputs: Sequence[Any],
        dtype: DType,
        *,
        torch_fn: Callable[..., torch.Tensor] | None = None,
        oracle: DType | None = None,
    ) -> None:
        self.dtype: DType = dtype
        self.oracle: DType = oracle or dtype
        self.apply, self.convert = apply_fn, variables_from_torch
        self.call = torch_fn or torch.nn.Module.__call__
        arrays = [np.asarray(each) for each in inputs]
        self.inputs = [x.astype(dtype) if x.dtype.kind == "f" else x for x in arrays]
        # Not by the module's own `to`: that of diffusers logs a warning.
        module = torch.nn.Module.to(copy.deepcopy(module).eval(), getattr(torch, dtype))
        self.variables = jax.tree.map(jnp.asarray, self.converted(module.state_dict()))
        self.module = torch.nn.Module.to(module, getattr(torch, self.oracle))
        if not (leaves := flatten(self.variables)):
            raise ValueError("variables_from_torch: expected arrays, got an empty tree")
        for name, leaf in leaves.items():
            if jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype != dtype:
                problem = f"expected {name} in {dtype}, got {leaf.dtype}"
                raise ValueError(f"variables_from_torch: {problem}")

    @cached_property
    def target(self) -> np.ndarray:
        """Noise in the shape of the output, for the mean squared error."""
        shape = jax.eval_shape(self.apply, self.variables, *self.inputs).shape
        return images(1, self.dtype, shape)

    def round_trip(self, variables_to_torch: Callable[[Any], Any]) -> tuple[Any, Any]:
        """The weights, converted there and back."""
        theirs = {name: value.numpy() for name, value in self.module.state_dict().items()}
        return variables_to_torch(self.variables), theirs

    def outputs(self) -> tuple[Any, Any]:
        """Raises `ValueError` where the two differ in shape."""
        ours = np.asarray(jax.jit(self.apply)(self.variables, *self.inputs))
        with torch.no_grad():
            theirs = from_torch(self.call(self.module, *self._tensors(self.inputs)))
        if ours.shape != theirs.shape:
            raise ValueError(f"apply_fn: expected an output of {theirs.shape}, got {ours.shape}")
        return {"output": ours}, {"output": theirs}

    def gradients(self) -> tuple[Any, Any]:
        """Of the mean squared error, by every parameter."""
        ours = jax.jit(jax.grad(self._loss))(self.variables, self.inputs, self.target)
        module = copy.deepcopy(self.module)
        self._torch_loss(module, self.inputs, self.target).backward()
        grads = {name: torch.zeros_like(each) for name, each in module.state_dict().items()}
        found = {name: each.grad for name, each in module.named_parameters()}
        grads |= {name: grad for name, grad in found.items() if grad is not None}
        return ours, self.converted(grads)

    def training(
        self,
        optimizer: optax.GradientTransformation,
        torch_optimizer: Callable[[Iterable[torch.nn.Parameter]], torch.optim.Optimizer],
        draws: Iterable[Draw],
    ) -> tuple[Any, Any]:
        """Every loss, and the weights at the end."""

        @jax.jit
        def step(variables, opt_state, inputs, target):
            loss, grads = jax.value_and_grad(self._loss)(variables, inputs, target)
            updates, opt_state = optimizer.update(grads, opt_state, variables)
            return optax.apply_updates(variables, updates), opt_state, loss

        variables, opt_state = self.variables, optimizer.init(self.variables)
        module = copy.deepcopy(self.module)
        theirs = torch_optimizer(module.parameters())
        losses, torch_losses = [], []
        for inputs, target in draws:
            variables, opt_state, loss = step(variables, opt_state, inputs, target)
            losses.append(loss)
            theirs.zero_grad()
            torch_loss = self._torch_loss(module, inputs, target)
            torch_loss.backward()
            theirs.step()
            torch_losses.append(torch_loss.item())
        trained = self.converted(module.state_dict())
        return (
            {"losses": np.stack(losses), "weights": variables},
            {"losses": np.stack(torch_losses), "weights": trained},
        )

    def chain(self) -> tuple[Any, Any]:
        """Every state of the tutorial's reverse chain, each an array with a scale of its own."""
        x_T, *rest = self.inputs[0], *self.inputs[2:]
        noise = images(2, self.dtype, (T, *x_T.shape))

        @jax.jit
        def loop(variables, noise):
            def denoise_fn(x_t, t):
                return self.apply(variables, x_t, t, *rest)

            options = {"noise_fn": lambda i: noise[i], "clip_denoised": False, "save_every": 1}
            return ddpm.p_sample_loop(None, schedule(), denoise_fn, x_T.shape, x_T=x_T, **options)

        states = np.asarray(loop(self.variables, noise)[1])
        start, *extra = self._tensors([x_T, *rest])

        def torch_fn(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return self.call(self.module, x, t, *extra)

        model: Any = torch_fn
        theirs = sample(model, start, lambda i: to_torch(noise[i], self.oracle))
        names = [f"x_{t}" for t in reversed(range(T))]
        both = (states, map(from_torch, theirs))
        ours, expected = (dict(zip(names, each, strict=True)) for each in both)
        return ours, expected

    def converted(self, tensors: Mapping[str, torch.Tensor]) -> Any:
        """Weights of the torch network, or anything in their shapes, as variables of JAX's."""
        return self.convert({name: each.numpy().copy() for name, each in tensors.items()})

    def _tensors(self, arrays: Iterable[np.ndarray]) -> list[torch.Tensor]:
        return [to_torch(each, self.oracle) for each in arrays]

    def _loss(self, variables: Any, inputs: Sequence[Any], target: Any) -> jax.Array:
        return jnp.mean((self.apply(variables, *inputs) - target) ** 2)

    def _torch_loss(self, module: torch.nn.Module, inputs: Any, target: Any) -> torch.Tensor:
        *given, expected = self._tensors([*inputs, target])
        return torch.nn.functional.mse_loss(self.call(module, *given), expected)

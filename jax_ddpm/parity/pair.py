"""One network in torch and in JAX, with the same weights and inputs: what is compared of the two.

The torch weights are converted once. Each method then runs both networks, and returns what JAX and
what torch computed, gradients and weights as the JAX network names them.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

import jax_ddpm as ddpm
from jax_ddpm.io.arrays import flatten
from jax_ddpm.parity.harness import DType, from_torch, images, schedule, to_torch
from torch_reference.sampling import sample
from torch_reference.schedule import T

Draw = tuple[Sequence[np.ndarray], np.ndarray]
"""What a training step sees: the inputs, and the target of the output."""


class Pair:
    """The two networks in one precision; the arguments are those of `compare`.

    torch computes in `oracle`, from weights and inputs that were rounded to `dtype`; None: in
    `dtype` as well.
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
        self.call = torch_fn or (lambda module, *inputs: module(*inputs))
        self.inputs = [_cast(each, dtype) for each in inputs]
        self.module = _to(copy.deepcopy(module).eval(), dtype)
        self.variables = jax.tree.map(jnp.asarray, self.converted(self.module.state_dict()))
        self.module = _to(self.module, self.oracle)
        leaves = flatten(self.variables)
        if not leaves:
            raise ValueError("variables_from_torch: expected arrays, got an empty tree")
        for name, leaf in leaves.items():
            if jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype != dtype:
                raise ValueError(
                    f"variables_from_torch: expected {name} in {dtype}, got {leaf.dtype}"
                )

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
            theirs = from_torch(self._torch_output(self.inputs))
        if ours.shape != theirs.shape:
            raise ValueError(f"apply_fn: expected an output of {theirs.shape}, got {ours.shape}")
        return {"output": ours}, {"output": theirs}

    def gradients(self) -> tuple[Any, Any]:
        """Of the mean squared error, by every parameter."""
        ours = jax.jit(jax.grad(self._loss))(self.variables, self.inputs, self.target)
        self._torch_loss(self.inputs, self.target).backward()
        grads = {name: torch.zeros_like(each) for name, each in self.module.state_dict().items()}
        for name, parameter in self.module.named_parameters():
            if parameter.grad is not None:
                grads[name] = parameter.grad
        self.module.zero_grad()
        return ours, self.converted(grads)

    def training(
        self,
        optimizer: optax.GradientTransformation,
        torch_optimizer: Callable[[Iterable[torch.nn.Parameter]], torch.optim.Optimizer],
        draws: Iterable[Draw],
    ) -> tuple[Any, Any]:
        """Every loss, and the weights at the end. The networks stay as they were."""

        @jax.jit
        def step(variables, opt_state, inputs, target):
            loss, grads = jax.value_and_grad(self._loss)(variables, inputs, target)
            updates, opt_state = optimizer.update(grads, opt_state, variables)
            return optax.apply_updates(variables, updates), opt_state, loss

        variables, opt_state = self.variables, optimizer.init(self.variables)
        before = copy.deepcopy(self.module.state_dict())
        theirs = torch_optimizer(self.module.parameters())
        losses, torch_losses = [], []
        for inputs, target in draws:
            variables, opt_state, loss = step(variables, opt_state, inputs, target)
            losses.append(loss)
            theirs.zero_grad()
            torch_loss = self._torch_loss(inputs, target)
            torch_loss.backward()
            theirs.step()
            torch_losses.append(torch_loss.item())
        trained = self.converted(self.module.state_dict())
        self.module.load_state_dict(before)
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
            return ddpm.p_sample_loop(
                None,
                schedule(),
                lambda x_t, t: self.apply(variables, x_t, t, *rest),
                x_T.shape,
                x_T=x_T,
                noise_fn=lambda i: noise[i],
                clip_denoised=False,
                save_every=1,
            )

        states = np.asarray(loop(self.variables, noise)[1])
        extra = [to_torch(each, self.oracle) for each in rest]
        theirs = sample(
            lambda x, t: self.call(self.module, x, t, *extra),  # pyright: ignore
            to_torch(x_T, self.oracle),
            lambda i: to_torch(noise[i], self.oracle),
        )
        names = [f"x_{t}" for t in reversed(range(T))]
        return (
            dict(zip(names, states, strict=True)),
            dict(zip(names, map(from_torch, theirs), strict=True)),
        )

    def converted(self, tensors: Mapping[str, torch.Tensor]) -> Any:
        """Weights of the torch network, or anything in their shapes, as variables of JAX's."""
        return self.convert({name: each.numpy().copy() for name, each in tensors.items()})

    def _loss(self, variables: Any, inputs: Sequence[Any], target: Any) -> jax.Array:
        return jnp.mean((self.apply(variables, *inputs) - target) ** 2)

    def _torch_loss(self, inputs: Sequence[np.ndarray], target: np.ndarray) -> torch.Tensor:
        return torch.nn.functional.mse_loss(
            self._torch_output(inputs), to_torch(target, self.oracle)
        )

    def _torch_output(self, inputs: Sequence[np.ndarray]) -> torch.Tensor:
        return self.call(self.module, *(to_torch(each, self.oracle) for each in inputs))


def _cast(value: Any, dtype: DType) -> np.ndarray:
    value = np.asarray(value)
    return value.astype(dtype) if np.issubdtype(value.dtype, np.floating) else value


def _to(module: torch.nn.Module, dtype: DType) -> torch.nn.Module:
    # Not by the module's own `to`: that of diffusers logs a warning.
    return torch.nn.Module.to(module, getattr(torch, dtype))

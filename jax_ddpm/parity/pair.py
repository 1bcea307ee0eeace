"""One network in PyTorch and in JAX: the same weights, inputs and noise, run in one precision."""

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
        self.apply = getattr(apply_fn, "apply", apply_fn)
        self.convert = variables_from_torch
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
        """Of the forward pass."""
        ours = np.asarray(jax.jit(self.apply)(self.variables, *self.inputs))
        with torch.no_grad():
            theirs = from_torch(self.call(self.module, *self.tensors(self.inputs)))
        return {"output": ours}, {"output": theirs}

    def gradients(self) -> tuple[Any, Any]:
        """Of the mean squared error, by every parameter."""
        _, ours = self._loss_and_gradients(self.variables, self.inputs, self.target)
        module = copy.deepcopy(self.module)
        self._torch_loss(module, self.inputs, self.target).backward()
        tensors = module.state_dict(keep_vars=True).items()
        grads = {n: torch.zeros_like(x) if x.grad is None else x.grad for n, x in tensors}
        return ours, self.converted(grads)

    def training(
        self,
        optimizer: optax.GradientTransformation,
        torch_optimizer: Callable[[Iterable[torch.nn.Parameter]], torch.optim.Optimizer],
        draws: Iterable[Draw],
    ) -> tuple[Any, Any]:
        """Every loss, and the weights at the end."""

        @jax.jit
        def update(variables, opt_state, grads):
            updates, opt_state = optimizer.update(grads, opt_state, variables)
            return optax.apply_updates(variables, updates), opt_state

        variables, opt_state = self.variables, optimizer.init(self.variables)
        module = copy.deepcopy(self.module)
        theirs = torch_optimizer(module.parameters())
        losses, torch_losses = [], []
        for inputs, target in draws:
            loss, grads = self._loss_and_gradients(variables, inputs, target)
            variables, opt_state = update(variables, opt_state, grads)
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
        start, *extra = self.tensors([x_T, *rest])

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

    def tensors(self, arrays: Iterable[np.ndarray]) -> list[torch.Tensor]:
        return [to_torch(each, self.oracle) for each in arrays]

    @cached_property
    def _loss_and_gradients(self) -> Callable[..., Any]:
        """`(variables, inputs, target) -> (loss, gradients)`, compiled once; 0 for buffers."""
        names = dict(self.module.named_parameters(remove_duplicate=False))
        tensors = self.module.state_dict().items()
        is_parameter = self.converted({n: torch.full_like(x, n in names) for n, x in tensors})

        def loss(variables, inputs, target):
            return jnp.mean((self.apply(variables, *inputs) - target) ** 2)

        def both(*args):
            value, grads = jax.value_and_grad(loss)(*args)
            return value, jax.tree.map(jnp.multiply, grads, is_parameter)

        return jax.jit(both)

    def _torch_loss(self, module: torch.nn.Module, inputs: Any, target: Any) -> torch.Tensor:
        *given, expected = self.tensors([*inputs, target])
        return torch.nn.functional.mse_loss(self.call(module, *given), expected)

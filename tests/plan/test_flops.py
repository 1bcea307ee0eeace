"""FLOPs against PyTorch's counter, which shares nothing with ours."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import jax_ddpm as ddpm
from jax_ddpm.plan.hlo import count_flops

pytestmark = pytest.mark.usefixtures("defaults")


def torch_flops(config, backward):
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from torch_reference.models.diffusers import CIFAR10, reference_unet

    network = reference_unet({**CIFAR10, **config}, "float32").to("meta")  # counted, not computed
    # Its counter knows nothing of the fused attention on CPU, 0.3 GFLOP.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        x, t = torch.zeros(1, 3, 32, 32), torch.zeros(1, dtype=torch.int64)
        output = network(x.to("meta"), t.to("meta")).sample
        if backward:
            output.sum().backward()
    return counter.get_total_flops()


@pytest.mark.usefixtures("diffusers")
@pytest.mark.parametrize("size", ["small", pytest.param("35.7 M", marks=pytest.mark.slow)])
def test_the_network_of_ho_et_al(size):
    """12.4 GFLOP an image, and twice as much again for gradients; or a small one of its kind."""
    from torch_reference.models.diffusers import CONFIGS

    config = CONFIGS["diffusers' defaults"] if size == "small" else {}
    model = ddpm.ddpm_cifar10(**config)
    x, t = jnp.zeros((1, 32, 32, 3), jnp.float32), jnp.zeros(1, jnp.int32)
    variables = jax.eval_shape(model.init, jax.random.key(0), x, t)
    forward = count_flops(jax.make_jaxpr(model.apply)(variables, x, t))
    assert forward == torch_flops(config, backward=False)
    assert size == "small" or forward == 12_443_713_536

    def with_gradient(model):
        grad = jax.grad(lambda variables, x, t: model.apply(variables, x, t).sum())
        return count_flops(jax.make_jaxpr(grad)(variables, x, t))

    expected = torch_flops(config, backward=True)
    assert with_gradient(model) == pytest.approx(expected, rel=0.001)
    # The blocks run once more, but for what no gradient needs.
    again = with_gradient(model.clone(remat=True))
    assert expected + forward / 2 < again < expected + forward


def test_loops_branches_and_calls():
    product = 2 * 3 * 4 * 5
    a, b = jnp.zeros((3, 4), jnp.float32), jnp.zeros((4, 5), jnp.float32)

    def flops(function):
        return count_flops(jax.make_jaxpr(function)(a, b))

    assert flops(lambda a, b: jax.jit(jnp.dot)(a, b)) == product
    assert flops(lambda a, b: lax.scan(lambda c, _: (c, a @ b), 0, length=7)) == 7 * product
    longer = lambda a, b: lax.cond(a[0, 0] > 0, lambda: a @ b, lambda: 2 * (a @ b) @ b.T @ b)
    assert flops(longer) == 3 * product
    assert flops(lambda a, b: a.sum() + b.sum()) == 0

"""What is read from a compiled program, against what is known of it. No compiler but the CPU's."""

import jax
import jax.numpy as jnp
import optax
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_ddpm as ddpm
from jax_ddpm.plan.hlo import collectives, memory_traffic

pytestmark = pytest.mark.usefixtures("defaults")


def test_a_data_parallel_step_sums_the_gradient_and_the_loss():
    """And nothing else goes between devices, at every step of a loop over steps."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    model, optimizer, key = ddpm.SimpleUNet(), optax.adam(1e-3), jax.random.key(0)
    images = jnp.zeros((4, 8, 8, 3), jnp.float32)
    variables = jax.jit(model.init)(key, images, jnp.zeros(4, jnp.int32))
    state = ddpm.init_train_state(key, variables, optimizer)
    state = jax.device_put(state, NamedSharding(mesh, P()))
    schedule = ddpm.make_schedule(ddpm.linear_beta_schedule(10))
    step = ddpm.make_train_step(schedule, model.apply, optimizer)

    @jax.jit
    def steps(state, images):
        return lax.scan(lambda state, _: step(state, images), state, length=3)

    images = jax.device_put(images, NamedSharding(mesh, P("data")))
    (reduced,) = collectives(steps.lower(state, images).compile().as_text())
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert (reduced.kind, reduced.nbytes) == ("all-reduce", 3 * 4 * (parameters + 1))
    assert reduced.sent == pytest.approx(reduced.nbytes * 2 * 1 / 2)


def test_traffic_is_what_is_read_and_written():
    x = jnp.zeros((1000,), jnp.float32)
    assert memory_traffic(jax.jit(lambda x: x * 2 + 1).lower(x).compile().as_text()) == 8000

    def loop(x):
        return lax.fori_loop(0, 50, lambda i, x: jnp.sin(x) * 2, x)

    # Each of fifty bodies reads and writes x; beside it, one copy and the loop's counter.
    traffic = memory_traffic(jax.jit(loop).lower(x).compile().as_text())
    assert 50 * 8000 <= traffic <= 51 * 8000 + 50 * 100


PROGRAM = """\
HloModule jit_step, is_scheduled=true, num_partitions=8

%cond (arg: (s32[], f32[64])) -> pred[] {
  %arg = (s32[]{:T(128)}, f32[64]{0:T(128)}) parameter(0)
  %n = s32[]{:T(128)} constant(12)
  %i = s32[]{:T(128)} get-tuple-element(%arg), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %n), direction=LT
}

%body (arg.1: (s32[], f32[64])) -> (s32[], f32[64]) {
  %arg.1 = (s32[]{:T(128)}, f32[64]{0:T(128)}) parameter(0)
  %x = f32[64]{0:T(128)} get-tuple-element(%arg.1), index=1
  %i.1 = s32[]{:T(128)} get-tuple-element(%arg.1), index=0
  %fast = f32[64]{0:T(128)S(1)} copy(%x)
  %reduced = f32[64]{0:T(128)} all-reduce(%x), channel_id=1, replica_groups=GROUPS, to_apply=%add
  ROOT %out = (s32[]{:T(128)}, f32[64]{0:T(128)}) tuple(%i.1, %reduced)
}

%sparse (q: f32[64]) -> f32[64] {
  %q = f32[64]{0:T(128)} parameter(0)
  ROOT %sum = f32[64]{0:T(128)} all-reduce(%q), replica_groups=GROUPS, to_apply=%add
}

ENTRY %main (p: f32[64]) -> f32[512] {
  %p = f32[64]{0:T(128)} parameter(0)
  %zero = s32[]{:T(128)} constant(0)
  %first = (s32[]{:T(128)}, f32[64]{0:T(128)}) tuple(%zero, %p)
  %loop = (s32[]{:T(128)}, f32[64]{0:T(128)}) while(%first), condition=%cond, body=%body
  %x = f32[64]{0:T(128)} get-tuple-element(%loop), index=1
  %begin = ((f32[64]{0}), f32[64]{0}, u32[]) call-start(%x), to_apply=%sparse
  %end = f32[64]{0:T(128)} call-done(%begin)
  %start = (f32[64]{0}, f32[512]{0}) all-gather-start(%end), replica_groups=[1,8]<=[8]
  ROOT %done = f32[512]{0:T(128)} all-gather-done(%start)
}
"""


def test_a_program_of_a_tpu_and_every_spelling_of_groups():
    """The loop's bound is in its condition; what lives in S(1) is not the main memory's; and an
    asynchronous pair counts once."""
    for groups, size in (
        ("{{0,1},{2,3},{4,5},{6,7}}", 2),
        ("[2,4]<=[8]", 4),
        ("[4,2]<=[2,4]T(1,0)", 2),
        ("mesh['x'=4,'y'=2] {'x'}", 4),
        ("{}", 8),
    ):
        text = PROGRAM.replace("GROUPS", groups)
        gathered, reduced = collectives(text)
        assert (reduced.kind, reduced.times, reduced.nbytes) == ("all-reduce", 12 + 1, 13 * 256)
        assert reduced.sent == pytest.approx(13 * 256 * 2 * (size - 1) / size)
        assert gathered == ("all-gather", 1, 8 * 256, 8 * 256 * 7 / 8)
    # Copied from, summed from and to, and two integers compared; then summed and gathered.
    loop = 12 * (256 + 2 * 256 + 2 * 4 + 1)
    assert memory_traffic(text) == loop + 2 * 256 + (256 + 8 * 256)

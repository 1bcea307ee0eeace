"""How many training steps one dispatch holds, where the user does not say."""


def default_steps_per_dispatch(backend: str) -> int:
    """10, so that an accelerator never waits for the host; 1 on a CPU, which is the host.

    There a step takes 10 ms or more and a dispatch 0.1 ms (jax 0.10 and 0.12), and a signal or a
    failure should not wait for nine more steps.
    """
    return 1 if backend == "cpu" else 10

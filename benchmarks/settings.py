"""What a run measures, and how often."""

from dataclasses import dataclass

__all__ = ["FULL", "SHORT", "Settings"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Sizes and repeats of one run.

    Attributes:
      sampling_batches, training_batches: batch sizes to time.
      sampling_steps: images times steps of a reverse chain: every step costs the same, so a short
        chain gives the cost of each, if it takes 0.3 s or more. What a run costs once, its memory's
        first touch, has to be small beside it, as it is in a chain of hundreds of steps.
      training_steps: likewise, of optimizer steps in one timed run; never fewer than are compared.
      rounds: timed runs of every contender, taken in turns.
      overhead_steps: length of the chain whose network does nothing.
      chain_lengths: T of the programs whose size is compared.
      cifar10_sampling_batches, cifar10_training_batches: batch sizes of the large network.
      cifar10_steps: images times steps of its chain.
      cifar10_rounds: its timed runs, each of seconds.
      scaling_steps: length of the chain in the scaling curves.
      processes: how many new processes measure memory and the start.
    """

    sampling_batches: tuple[int, ...] = (1, 4, 16)
    training_batches: tuple[int, ...] = (4, 16)
    sampling_steps: int = 120
    training_steps: int = 96
    rounds: int = 5
    overhead_steps: int = 1000
    chain_lengths: tuple[int, ...] = (10, 100, 1000)
    cifar10_sampling_batches: tuple[int, ...] = (1, 4)
    cifar10_training_batches: tuple[int, ...] = (4,)
    cifar10_steps: int = 20
    cifar10_rounds: int = 3
    scaling_steps: int = 5
    processes: int = 1


SHORT = Settings()
FULL = Settings(
    sampling_batches=(1, 4, 16, 64),
    training_batches=(4, 16, 64),
    rounds=5,
    cifar10_sampling_batches=(1, 4, 16),
    cifar10_training_batches=(4, 8),
    cifar10_rounds=4,
    processes=3,
)

"""Networks whose features images are compared by: a pure function and its weights."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
from jaxtyping import Array

from jax_ddpm._typing import Pixels


class FeatureNetwork(NamedTuple):
    """From images to features: `network(images)`."""

    apply_fn: Callable[[Any, Array], dict[str, Array]]
    """`(variables, images) -> features` by name, float [batch, n] each, of uint8 images."""
    variables: Any
    main: str
    """The features that distances are taken of."""
    description: str
    """What it is, and a digest of its weights, for the recipe of a measurement."""

    def __call__(self, images: Pixels) -> dict[str, Array]:
        """Features of uint8 images [batch, height, width, channel], by name, float [batch, n]."""
        return _features(self.apply_fn, self.variables, images)


def _features(apply_fn: Any, variables: Any, images: Pixels) -> dict[str, Array]:
    return _applied(apply_fn, variables, images)


@partial(jax.jit, static_argnums=0)
def _applied(apply_fn: Any, variables: Any, images: Array) -> dict[str, Array]:
    return apply_fn(variables, images)

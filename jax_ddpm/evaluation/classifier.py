"""Features without Inception: those of a small classifier, trained on the real images in seconds.

Inception knows photographs; digits and other grey images are foreign to it. What is measured of
these features is no FID and compares with nothing that was measured elsewhere, only with figures
of the same images, seed and version.
"""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.experimental.multihost_utils import broadcast_one_to_all

from jax_ddpm._errors import FieldError, check_whole, described
from jax_ddpm._typing import Label, Pixels
from jax_ddpm.evaluation.networks import FeatureNetwork
from jax_ddpm.models.classifier import FeatureClassifier
from jax_ddpm.noise import seed_key

_STEPS = 200
_BATCH = 128
_RATE = 2e-3


def train_classifier(
    images: Pixels, labels: Label | None = None, *, seed: int = 0
) -> FeatureNetwork:
    """Train a classifier on real images, always the same one for the same images and seed.

    It learns the labels, or without two classes of them, by how many quarters an image was turned
    (Gidaris et al. 2018; of images that are no squares, whether it was turned by half).

    Args:
      images: uint8 [image, height, width, channel].
      labels: [image].
      seed: of its weights and of the order of the images.

    Returns:
      A network of 64 features, "features".
    """
    key = seed_key(seed)
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4:
        expected = "expected uint8 [image, height, width, channel]"
        raise FieldError("images", f"{expected}, got {described(images)}")
    count, height, width, _ = images.shape
    learns, turns = "labels", (0,)
    if labels is not None:
        check_whole("labels", labels, 0)
        if np.shape(labels) != (count,):
            raise FieldError("labels", f"expected shape {(count,)}, got {np.shape(labels)}")
    _, classes = np.unique(np.zeros(count) if labels is None else labels, return_inverse=True)
    if not classes.any():
        learns, turns = "turns", (0, 1, 2, 3) if height == width else (0, 2)
    model: Any = FeatureClassifier(num_classes=max(int(classes.max()) + 1, len(turns)))
    batch = min(_BATCH, count)
    random = np.random.default_rng(seed)
    order = np.concatenate([random.permutation(count) for _ in range(-(-_STEPS * batch // count))])
    order = order[: _STEPS * batch].reshape(_STEPS, batch)
    turned = random.integers(len(turns), size=order.shape)
    optimizer = optax.adam(optax.cosine_decay_schedule(_RATE, _STEPS))

    @jax.jit
    def train(pixels: Any, targets: Any, order: Any, turned: Any) -> Any:
        def step(state: Any, chosen: Any) -> tuple[Any, None]:
            params, opt_state = state
            rows, turn = chosen
            x, target = _floats(pixels[rows]), targets[rows]
            if len(turns) > 1:
                every = jnp.stack([jnp.rot90(x, quarters, (1, 2)) for quarters in turns])
                x, target = every[turn, jnp.arange(batch)], turn

            def loss_fn(params: Any) -> Any:
                _, logits = model.apply(params, x)
                return optax.softmax_cross_entropy_with_integer_labels(logits, target).mean()

            updates, opt_state = optimizer.update(jax.grad(loss_fn)(params), opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), None

        params = model.init(key, _floats(pixels[:1]))
        (params, _), _ = lax.scan(step, (params, optimizer.init(params)), (order, turned))
        features, _ = model.apply(params, _floats(pixels[order[0]]))
        # The root mean square of features is 1, so that distances have a scale.
        return {"classifier": params, "scale": jnp.sqrt((features**2).mean())}

    # On one device: another number of them would round otherwise.
    with jax.default_device(jax.local_devices()[0]):
        numbers = (np.asarray(each, np.int32) for each in (classes, order, turned))
        variables = jax.device_get(train(images, *numbers))
    variables = broadcast_one_to_all(variables)  # hosts may round otherwise

    def apply_fn(variables: Any, images: Any) -> dict[str, Any]:
        features, _ = model.apply(variables["classifier"], _floats(images))
        return {"features": features / variables["scale"]}

    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(variables):
        digest.update(np.ascontiguousarray(leaf).data)
    learned = f"a classifier that learned the {learns} of {count:,} of the real images, seed {seed}"
    description = f"{learned}, SHA-256 {digest.hexdigest()[:8]}…"
    return FeatureNetwork(apply_fn, variables, "features", description)


def _floats(images: Any) -> Any:
    return (images.astype(jnp.float32) - 127.5) / 127.5

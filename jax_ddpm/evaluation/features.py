"""Features that images are compared by: FID's Inception or a small classifier, and what is gathered
of them in one pass: mean and covariance, and some of the rows. Memory grows by the logits alone.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice, pairwise
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.experimental.multihost_utils import broadcast_one_to_all
from jaxtyping import Array

from jax_ddpm._errors import FieldError, check_choice, described
from jax_ddpm._typing import Label, Pixels, Rows
from jax_ddpm.data.batches import load_batch
from jax_ddpm.interop.torch import read_state_dict
from jax_ddpm.io.arrays import flatten
from jax_ddpm.io.checkpoint import restore
from jax_ddpm.io.files import replacing
from jax_ddpm.models.classifier import FeatureClassifier
from jax_ddpm.models.inception import InceptionV3
from jax_ddpm.noise import seed_key
from jax_ddpm.training.hosts import gather
from jax_ddpm.training.sharding import data_sharding, device_mesh, replicated

PathLike = str | os.PathLike[str]
LOGITS = "logits_unbiased"
VARIABLE = "JAX_DDPM_INCEPTION"
WHERE = "FID's Inception is weights-inception-2015-12-05-6726825d.pth of torch-fidelity's release "
WHERE += "v0.2.0, github.com/toshas/torch-fidelity/releases"
_NORM = ("weight", "bias", "running_mean", "running_var")
_EPSILON = 1e-3  # of Inception's batch normalisation
_STEPS, _LEARNED, _RATE = 200, 128, 2e-3  # of the classifier's training
KEPT = 10_000  # images whose features themselves are kept, to compare image with image
_BATCH = 64


class FeatureNetwork(NamedTuple):
    """From images to features: `network(images)`.

    Attributes:
      apply_fn: `(variables, images) -> features` by name, float [batch, n] each, of uint8 images.
      variables: the weights.
      main: name of the features that distances are taken of.
      description: what it is, and a digest of its weights, for the recipe of a measurement.

    Examples:
      >>> colour = lambda variables, images: {"mean": images.mean((1, 2)) / 255}
      >>> network = evaluation.FeatureNetwork(colour, {}, "mean", "mean colour")
      >>> network(np.full((2, 8, 8, 3), 255, np.uint8))["mean"].shape
      (2, 3)
    """

    apply_fn: Callable[[Any, Array], dict[str, Array]]
    variables: Any
    main: str
    description: str

    def __call__(self, images: Pixels) -> dict[str, Array]:
        """Features of uint8 images [batch, height, width, channel], by name, float [batch, n]."""
        # jit keeps the program as long as somebody else keeps the function, and no longer.
        return jax.jit(self.apply_fn)(self.variables, images)


def over_devices(
    apply_fn: Callable[..., Any], variables: Any, batches: Iterable[Any], size: int
) -> Iterator[Any]:
    """`apply_fn(variables, *batch)` of batches of up to `size` rows, which all devices share."""
    size = -(-size // jax.device_count()) * jax.device_count()
    mesh = device_mesh(size)
    data = data_sharding(mesh)
    variables = jax.jit(lambda tree: tree, out_shardings=replicated(mesh))(variables)
    program = jax.jit(apply_fn, out_shardings=data)

    def begin(batch: Any) -> Any:
        count = len(batch[0])
        filled = np.resize(np.arange(count), size)
        return count, program(variables, *(load_batch(each, filled, data) for each in batch))

    # The devices have the next batch to work on while the host gathers one.
    for (count, result), _ in pairwise(chain(map(begin, batches), [(0, None)])):
        yield jax.tree.map(itemgetter(slice(count)), gather(result))


def load_inception(path: PathLike | None = None, *, dtype: Any = jnp.float32) -> FeatureNetwork:
    """Read FID's InceptionV3 (Heusel et al. 2017): TensorFlow's release of 2015, as PyTorch has it.

    Args:
      path: the `.pth` that torch-fidelity or pytorch-fid download (torch reads it), or a
        `.safetensors` of the same names. Default: the environment variable JAX_DDPM_INCEPTION.
      dtype: what it computes in, float32 or float64.

    Returns:
      A `FeatureNetwork` of uint8 images [batch, height, width, 3] of any size. Its features are
        "64", "192", "768", "2048" and "logits_unbiased", [batch, n] of `dtype`.

    Raises:
      ValueError: there is no such file, or it is not FID's Inception.
    """
    check_choice("dtype", jnp.dtype(dtype).name, ("float32", "float64"))
    given = path or os.environ.get(VARIABLE)
    if given is None or not Path(given).is_file():
        raise FieldError("path", f"expected a file, got {given or 'none'}: {WHERE}")
    path, model = Path(given), InceptionV3(dtype=dtype)
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), np.uint8)
    layers: Any = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    try:
        tensors = read_state_dict(path)
        params = {"fc": {"kernel": tensors["fc.weight"].T}}
        for name in layers.keys() - params:  # each a convolution with its batch normalisation in it
            gain, bias, mean, variance = (tensors[f"{name}.bn.{x}"].astype(float) for x in _NORM)
            scale = gain / np.sqrt(variance + _EPSILON)
            kernel = tensors[f"{name}.conv.weight"].astype(float).transpose(2, 3, 1, 0)
            params[name] = {"kernel": kernel * scale, "bias": bias - mean * scale}
        params = jax.tree.map(lambda x: np.asarray(x, layers["fc"]["kernel"].dtype), params)
        variables = {"params": restore(layers, flatten(params))}
    except (KeyError, ValueError) as error:
        raise FieldError("path", f"{path} is not FID's Inception: {error!r}") from None
    apply_fn: Any = model.apply
    description = f"InceptionV3, SHA-256 {hashlib.sha256(path.read_bytes()).hexdigest()}"
    return FeatureNetwork(apply_fn, variables, "2048", description)


def train_classifier(
    images: Pixels, labels: Label | None = None, *, seed: int = 0
) -> FeatureNetwork:
    """Train a small classifier on real images; the same images and seed give the same network.

    It learns the labels or, without two classes of them, the angle by which an image was turned
    (Gidaris et al. 2018). Its output is "features", [batch, 64]. Distances of these are no FID, and
    compare only with those of the same images, seed and version.

    Args:
      images: uint8, [image, height, width, channel]; `ValueError` for others.
      labels: [image], or None.
      seed: of the initial weights and the order.
    """
    key, images = seed_key(seed), np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4:
        got = described(images)
        raise FieldError("images", f"expected uint8 [image, height, width, channel], got {got}")
    count, height, width, _ = images.shape
    labels = np.zeros(count) if labels is None else np.asarray(labels)
    if labels.shape != (count,):
        raise FieldError("labels", f"expected shape {(count,)}, got {labels.shape}")
    _, classes = np.unique(labels, return_inverse=True)
    learns, turns = ("labels", (0,)) if classes.any() else ("turns", (0, 1, 2, 3))
    turns = turns if height == width else turns[::2]
    model: Any = FeatureClassifier(num_classes=max(int(classes.max()) + 1, len(turns)))
    batch = min(_LEARNED, count)
    random = np.random.default_rng(seed)
    order = np.concatenate([random.permutation(count) for _ in range(-(-_STEPS * batch // count))])
    order = order[: _STEPS * batch].reshape(_STEPS, batch)
    turned = random.integers(len(turns), size=order.shape)
    targets = classes[order] if learns == "labels" else turned
    optimizer = optax.adam(optax.cosine_decay_schedule(_RATE, _STEPS))

    @jax.jit
    def train(pixels: Any, *chosen: Any) -> Any:
        def step(state: Any, chosen: Any) -> tuple[Any, None]:
            (params, opt_state), (rows, turn, target) = state, chosen
            x = _floats(pixels[rows])
            x = jnp.stack([jnp.rot90(x, k, (1, 2)) for k in turns])[turn, jnp.arange(batch)]

            def loss_fn(params: Any) -> Any:
                _, logits = model.apply(params, x)
                return optax.softmax_cross_entropy_with_integer_labels(logits, target).mean()

            updates, opt_state = optimizer.update(jax.grad(loss_fn)(params), opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), None

        params = model.init(key, _floats(pixels[:1]))
        (params, _), _ = lax.scan(step, (params, optimizer.init(params)), chosen)
        features, _ = model.apply(params, _floats(pixels[chosen[0][0]]))
        # The root mean square of features is 1, so that distances have a scale.
        return {"classifier": params, "scale": jnp.sqrt((features**2).mean())}

    # On one device: another number of them would round otherwise.
    with jax.default_device(jax.local_devices()[0]):
        numbers = (np.asarray(each, np.int32) for each in (order, turned, targets))
        variables = jax.device_get(train(images, *numbers))
    variables = broadcast_one_to_all(variables)  # hosts may round otherwise

    def apply_fn(variables: Any, images: Any) -> dict[str, Any]:
        features, _ = model.apply(variables["classifier"], _floats(images))
        return {"features": features / variables["scale"]}

    content = b"".join(leaf.tobytes() for leaf in jax.tree.leaves(variables))
    description = f"a classifier that learned the {learns} of {count:,} of the real images, seed "
    description += f"{seed}, SHA-256 {hashlib.sha256(content).hexdigest()[:8]}…"
    return FeatureNetwork(apply_fn, variables, "features", description)


def _floats(images: Any) -> Any:
    return (images.astype(jnp.float32) - 127.5) / 127.5


class Statistics(NamedTuple):
    """Mean and covariance of features, as `statistics` computes them.

    Attributes:
      num: number of images; 0 where a file does not say.
      mu: mean, float64 [feature].
      sigma: covariance, float64 [feature, feature], over num - 1.

    Examples:
      >>> features = np.array([[0.0, 0], [2, 4], [4, 2]])
      >>> evaluation.statistics(features[:1]).joined(evaluation.statistics(features[1:])).mu
      array([2., 2.])
    """

    num: int
    mu: np.ndarray
    sigma: np.ndarray

    def joined(self, other: "Statistics") -> "Statistics":
        """Those of both sets together: Chan, Golub & LeVeque 1983, eq. 2.1. `num` may not be 0."""
        if not (self.num and other.num):
            raise FieldError("num", "expected the number of images of both, got 0")
        count = self.num + other.num
        shift = other.mu - self.mu
        squares = self.sigma * (self.num - 1) + other.sigma * (other.num - 1)
        squares += np.outer(shift, shift) * (self.num * other.num / count)
        return Statistics(count, self.mu + shift * (other.num / count), squares / (count - 1))


class Extracted(NamedTuple):
    """What is kept of the features of a set of images."""

    statistics: dict[str, Statistics]
    """Of all images, by the names of the features."""
    kept: np.ndarray
    """The main features of the first images, at most `KEPT`: float32 [image, feature]."""
    logits: np.ndarray | None = None
    """Of all images, if the network has them: [image, class]."""

    def joined(self, other: "Extracted") -> "Extracted":
        """Of both sets together, without logits."""
        both = {name: each.joined(other.statistics[name]) for name, each in self.statistics.items()}
        return Extracted(both, np.concatenate([self.kept, other.kept])[:KEPT])


def extract(network: FeatureNetwork, batches: Iterable[np.ndarray], most: int) -> Extracted:
    """Features of the first `most` images, uint8 in batches of any size, all of which are read."""
    gathered: dict[str, Statistics] = {}
    kept, logits, images = [], [], chain.from_iterable(batches)
    first = islice(images, most)
    groups = iter(lambda: [*islice(first, _BATCH)], [])
    stacked = ((np.stack(group),) for group in groups)
    for features in over_devices(network.apply_fn, network.variables, stacked, _BATCH):
        if LOGITS in features:
            logits.append(features.pop(LOGITS))
        if sum(map(len, kept)) < KEPT:
            kept.append(features[network.main].astype(np.float32))
        for name, rows in features.items():
            here = statistics(rows)
            gathered[name] = gathered[name].joined(here) if name in gathered else here
    for _ in images:  # a draw keeps the others too
        pass
    of_all = np.concatenate(logits) if logits else None
    return Extracted(gathered, np.concatenate(kept)[:KEPT], of_all)


def statistics(features: Rows) -> Statistics:
    """Mean and covariance of features [sample, feature]; one sample has a covariance of 0.

    Examples:
      >>> evaluation.statistics(np.array([[0.0, 0], [2, 4]])).sigma.tolist()
      [[2.0, 4.0], [4.0, 8.0]]
    """
    rows = np.asarray(features, np.float64)
    if rows.ndim != 2 or not len(rows):
        raise FieldError("features", f"expected one row or more [sample, n], got {rows.shape}")
    mu = rows.mean(0)
    centered = rows - mu
    return Statistics(len(rows), mu, centered.T @ centered / max(len(rows) - 1, 1))


def save_statistics(path: PathLike, found: Statistics) -> None:
    """Write `mu` and `sigma` as pytorch-fid does, a .npz, and `num`, whole or not at all.

    Args:
      path: the file.
      found: from `statistics`, or of your own arrays.

    Examples:
      >>> evaluation.save_statistics("real.npz", evaluation.statistics(np.array([[1.0, 2]])))
      >>> evaluation.load_statistics("real.npz").mu
      array([1., 2.])
    """
    with replacing(Path(path)) as file:
        np.savez_compressed(file, mu=found.mu, sigma=found.sigma, num=found.num)


def load_statistics(path: PathLike) -> Statistics:
    """Read `mu` and `sigma` from a .npz of `save_statistics`, pytorch-fid or guided-diffusion.

    Raises:
      ValueError: the file at `path` is missing, damaged, or has no such arrays.
    """
    try:
        with open(path, "rb") as file, np.load(file) as content:
            mu, sigma = (np.asarray(content[name], np.float64) for name in ("mu", "sigma"))
            count = int(content["num"]) if "num" in content else 0
    except Exception as error:  # NumPy's, zipfile's and zlib's errors share no nearer base
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path}: expected a .npz of arrays mu and sigma: {reason}") from None
    wrong = mu.ndim != 1 or sigma.shape != 2 * mu.shape or not np.isfinite([mu, *sigma]).all()
    if wrong or np.abs(sigma - sigma.T).max(initial=0) > 1e-6 * np.abs(sigma).max(initial=0):
        expected = "expected finite mu [feature] and symmetric sigma [feature, feature]"
        raise ValueError(f"{path}: {expected}, got {described(mu)} and {described(sigma)}")
    return Statistics(count, mu, sigma)

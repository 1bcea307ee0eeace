"""From pictures of any kind to a `Dataset`, decoded into the cache or whenever needed."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jax_ddpm._errors import FieldError
from jax_ddpm.data.cache import cached_pictures
from jax_ddpm.data.dataset import Dataset
from jax_ddpm.data.decoding import Encoded
from jax_ddpm.data.pictures import EncodedSet, Pictures, look_at, unreadable
from jax_ddpm.data.preparation import Preparation

_LARGEST = 2**34
"""Bytes of decoded pictures that are kept in the default cache."""


class Source(NamedTuple):
    """Pictures before they are decoded, and the class of each, if they have one."""

    encoded: EncodedSet
    labels: np.ndarray | None
    class_names: tuple[str, ...] | None
    notes: tuple[str, ...]


class _Rows(EncodedSet):
    """Images of an array, as pictures to be prepared."""

    def __init__(self, images: Any) -> None:
        self._images, self.names = images, [f"image {index}" for index in range(len(images))]

    def read(self, index: int) -> Encoded:
        return self._images[index]


def default_cache() -> Path | None:
    """For decoded pictures: ~/.cache/jax_ddpm/images, or in XDG_CACHE_HOME; None without a home."""
    folder = os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return None if folder.startswith("~") else Path(folder, "jax_ddpm/images")


def as_source(data: Dataset, preparation: Preparation) -> Source | None:
    """The images of an array as pictures, where they are not yet what `preparation` asks for."""
    height, width, channels = data.images.shape[1:]
    size = preparation.image_size
    if (size or height, size or width, preparation.channels or channels) == data.images.shape[1:]:
        return None
    if data.images.dtype != np.uint8 or channels == 2:
        field = "channels" if size is None else "image_size"
        got = f"{data.images.dtype} of {channels}"
        raise FieldError(field, f"expected uint8 images of 1, 3 or 4 channels, got {got}")
    return Source(_Rows(data.images), data.labels, data.class_names, data.notes)


def decoded(
    source: Source,
    preparation: Preparation,
    cache: Path | None,
    progress: Callable[[str, int, int], None] | None,
) -> Dataset:
    """The images of a source, in the cache, or decoded when they are needed where `cache` is None
    or has no room. Raises `FieldError` naming a picture that cannot be read, and `OSError`."""
    count = len(source.encoded.names)

    def tell(what: str) -> Callable[[int], None]:
        return lambda done: progress(what, done, count) if progress else None

    encoded = source.encoded
    found = look_at(encoded, preparation, tell("reading"))
    images: Any = Pictures(encoded, found, preparation)
    size = int(np.prod(images.shape))
    notes, here, why = [*source.notes, *found.notes], None, ""
    is_default = cache == default_cache()
    if cache is not None and (not is_default or size <= _LARGEST):
        try:
            here = cached_pictures(cache, images, tell("decoding"))
        except OSError as error:
            if not is_default:
                raise  # otherwise nobody asked for it
            why = f" (cannot write {error.filename or cache}: {error.strerror or error})"
    if here is not None:
        images, failed = here.images, here.failed
        if failed and not preparation.skip_unreadable:
            row = min(failed)
            raise unreadable(encoded.names[int(found.kept[row])], failed[row])
        if here.on_white:
            notes.append(f"pictures with transparency, which is white now: {here.on_white:,}")
        found = found.without(failed, encoded.names)
    else:
        encoded.read(int(found.kept[0]))  # not every archive can give one at a time
        if preparation.skip_unreadable:
            outcomes = images.stream(tell("decoding"))
            failed = {row: outcome for row, _, outcome in outcomes if isinstance(outcome, str)}
            found = found.without(failed, encoded.names)
            images = Pictures(encoded, found, preparation)
        notes.append(f"decoded whenever they are needed: {size / 2**30:.1f} GiB are not kept{why}")
    if found.unreadable:
        wrong = found.unreadable.items()
        few = "; ".join(f"{name}: {what}" for name, what in list(wrong)[:3])
        more = ", …" if len(wrong) > 3 else ""
        notes.append(f"pictures that cannot be read, left out: {len(wrong):,} ({few}{more})")
    return Dataset(
        images,
        None if source.labels is None else source.labels[found.kept],
        notes=tuple(notes),
        class_names=source.class_names,
        extents=found.extents,
        sha256=found.sha256,
    )

"""From pictures of any kind to a `Dataset`, decoded into the cache or whenever needed."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jax_ddpm._checks import FieldError
from jax_ddpm.data.cache import cached_pictures
from jax_ddpm.data.dataset import Dataset
from jax_ddpm.data.decoding import Encoded
from jax_ddpm.data.pictures import EncodedSet, Pictures, look_at
from jax_ddpm.data.preparation import Preparation

__all__ = ["Source", "as_source", "decoded", "default_cache"]

_LARGEST = 2**34
"""Bytes of decoded pictures that are kept in the default cache."""


class Source(NamedTuple):
    """Pictures before they are decoded, and the class of each, if they have one."""

    encoded: EncodedSet
    labels: np.ndarray | None
    class_names: tuple[str, ...] | None
    notes: tuple[str, ...]


class _Rows(NamedTuple):
    """Images of an array, as pictures to be prepared."""

    images: Any
    names: Any

    def read(self, index: int) -> Encoded:
        return self.images[index]

    def stream(self):
        return ((index, self.images[index]) for index in range(len(self.images)))


def default_cache() -> Path:
    """Where decoded pictures are kept: ~/.cache/jax_ddpm/images, or in XDG_CACHE_HOME."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "jax_ddpm/images"


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
    names = [f"image {index}" for index in range(len(data.images))]
    return Source(_Rows(data.images, names), data.labels, data.class_names, data.notes)


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

    found = look_at(source.encoded, preparation, tell("reading"))
    size = len(found.kept) * int(np.prod(found.shape))
    images: Any = Pictures(source.encoded, found, preparation)
    kept, unreadable, notes = found.kept, found.unreadable, [*source.notes, *found.notes]
    here = None
    if cache is not None and (cache != default_cache() or size <= _LARGEST):
        try:
            here = cached_pictures(cache, source.encoded, found, preparation, tell("decoding"))
        except PermissionError:
            if cache != default_cache():
                raise  # otherwise nobody asked for it
    if here is None:
        notes.append(f"decoded whenever they are needed: {size / 2**30:.1f} GiB are not kept")
    else:
        images, kept = here.images, here.kept
        unreadable = unreadable | here.unreadable
        if here.on_white:
            notes.append(f"pictures with transparency, which is white now: {here.on_white:,}")
    if unreadable:
        few = "; ".join(f"{name}: {what}" for name, what in list(unreadable.items())[:3])
        more = ", …" if len(unreadable) > 3 else ""
        notes.append(f"pictures that cannot be read, left out: {len(unreadable):,} ({few}{more})")
    labels, extents = source.labels, found.extents
    return Dataset(
        images,
        None if labels is None else labels[kept],
        notes=tuple(notes),
        class_names=source.class_names,
        extents=None if extents is None else extents[np.isin(found.kept, kept)],
        sha256=found.sha256,
    )

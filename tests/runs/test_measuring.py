"""What a run is judged by."""

import numpy as np

from jax_ddpm.data import Dataset
from jax_ddpm.runs.measuring import label_agreement


def test_a_rare_class_is_judged_too(monkeypatch):
    """Of 1,002 images 100 are drawn; both of the rare class are among them."""
    monkeypatch.setattr("jax_ddpm.runs.measuring._JUDGED_BY", 100)
    labels = np.repeat(np.arange(3, dtype=np.int32), [500, 500, 2])
    levels = np.asarray([0, 100, 255], np.uint8)
    images = np.broadcast_to(levels[labels, None, None, None], (1002, 2, 2, 1))
    for seed in range(5):
        samples = np.asarray([-1.0, 100 / 127.5 - 1, 1.0], np.float32)
        samples = np.broadcast_to(samples[:, None, None, None], (3, 2, 2, 1))
        agreement, held_out = label_agreement(Dataset(images, labels), samples, np.arange(3), seed)
        assert agreement == 1 and held_out == 1

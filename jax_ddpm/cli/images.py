"""Images of `--data` or `--dataset`, under a bar while they are read and decoded."""

from pathlib import Path

from jax_ddpm.cli.config import DataConfig
from jax_ddpm.cli.progress import bars
from jax_ddpm.data import Dataset, Preparation, load_dataset
from jax_ddpm.data.hub import HUB
from jax_ddpm.runs import Progress


def load_images(config: DataConfig, preparation: Preparation) -> Dataset:
    """Read them as `preparation` says."""
    with bars() as show:

        def progress(what: str, done: int, total: int) -> None:
            show(Progress(done, total, what=what))

        source: str | Path = config.dataset
        if config.data is not None:
            source = config.data if config.data.startswith(HUB) else Path(config.data)
        return load_dataset(source, preparation, cache=config.data_cache, progress=progress)

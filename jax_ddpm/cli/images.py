"""Images of `--data` or `--dataset`, under a bar while they are read and decoded."""

from contextlib import ExitStack
from pathlib import Path

from jax_ddpm.cli.config import DataConfig
from jax_ddpm.cli.progress import bar
from jax_ddpm.data import Dataset, Preparation, load_dataset
from jax_ddpm.data.parquet import HUB
from jax_ddpm.runs import Progress

__all__ = ["load_images"]


def load_images(config: DataConfig, preparation: Preparation) -> Dataset:
    """Read them as `preparation` says."""
    with ExitStack() as bars:
        shown = {}

        def progress(what: str, done: int, total: int) -> None:
            if what not in shown:
                bars.close()  # that of what was done before
                shown[what] = bars.enter_context(bar(what, "image"))
            shown[what](Progress(done, total))

        source: str | Path = config.dataset
        if config.data is not None:
            source = config.data if config.data.startswith(HUB) else Path(config.data)
        return load_dataset(source, preparation, cache=config.data_cache, progress=progress)

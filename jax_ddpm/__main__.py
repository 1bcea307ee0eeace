"""`jax-ddpm`, also `python -m jax_ddpm`."""

import sys
from io import TextIOWrapper

from jax_ddpm._errors import needed


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
        if (package := needed(error)) is None:
            raise
        print(f"jax-ddpm: this command needs {package}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()

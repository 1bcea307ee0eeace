"""What to install for an extra, wherever this package came from: it is on no index by its name."""

import re
from importlib.metadata import PackageNotFoundError, requires


def install_command(extra: str) -> str:
    """`pip install` and the packages of `extra`; from a checkout that is not installed, itself."""
    try:
        lines = requires("jax_ddpm") or []
    except PackageNotFoundError:
        lines = []
    belongs = re.compile(rf"extra == ['\"]{extra}['\"]")
    packages = [line.partition(";")[0].strip() for line in lines if belongs.search(line)]
    packages = [each for each in packages if not each.startswith("jax_ddpm")]
    if not packages:
        return f'pip install -e ".[{extra}]"'
    return "pip install " + " ".join(f'"{each}"' for each in packages)

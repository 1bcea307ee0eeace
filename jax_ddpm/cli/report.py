"""What `jax-ddpm evaluate` found, as lines to read."""

from collections.abc import Iterator
from typing import Any

_TITLES = {
    "fid": "FID",
    "fid_768": "FID of 768 features",
    "fid_192": "FID of 192 features",
    "fid_64": "FID of 64 features",
    "kid": "KID",
    "inception_score": "inception score",
    "classifier_frechet_distance": "Fréchet distance (classifier)",
    "classifier_kernel_distance": "kernel distance (classifier)",
    "precision": "precision",
    "recall": "recall",
    "nearest": "distance to the nearest real image",
    "nearer_than_1_percent": "suspiciously near to one (1 % expected)",
}
_SHARES = {"precision", "recall", "nearer_than_1_percent"}
_IN_LINES = {"agreement", "svc_held_out", "bits_per_dim", "nearest_real"}


def report(figures: dict[str, Any]) -> Iterator[str]:
    """A table of the figures, what else was found or left out, and how it was measured."""
    floor = dict(figures.get("held_out", {}))
    if "nearest_real" in figures:
        floor["nearest"] = figures["nearest_real"]
    others = [name for name, value in figures.items() if isinstance(value, float)]
    shown = [name for name in dict.fromkeys([*_TITLES, *others]) if name in figures]
    shown = [name for name in shown if name not in _IN_LINES and not name.endswith("_std")]
    rows = [(_title(name), _number(figures, name), _number(floor, name)) for name in shown]
    rows.insert(0, ("", f"{figures['num']:,} samples", "real images" if floor else ""))
    first, second, third = (max(map(len, column)) for column in zip(*rows, strict=True))
    for title, number, real in rows if shown else ():
        yield f"{title:<{first}}   {number:>{second}}   {real:>{third}}".rstrip()
    if floor:
        yield (
            "real images: some that were held out, against others; about what a perfect model "
            "scores, where there are as many samples"
        )
    if "classifier_frechet_distance" in figures:
        yield "features of a small classifier, so no FID, which needs --inception and RGB images"
    if "agreement" in figures:
        yield (
            f"{figures['agreement']:.1%} of {figures['judged']:,} samples are what was asked for, "
            f"by an SVC that is right on {figures['svc_held_out']:.1%} of real images held out "
            "from it"
        )
    if "bits_per_dim" in figures:
        yield f"{figures['bits_per_dim']:.3f} bits per dimension at most"
    yield from figures["notes"]
    for name, why in figures["left_out"].items():
        yield f"{_title(name)} is left out: {why}"
    yield "measured so:"
    recipe = figures["recipe"]
    width = max(map(len, recipe))
    for name, value in recipe.items():
        if name == "versions":
            value = ", ".join(f"{package} {number}" for package, number in value.items())
        text = f"{value:,}" if type(value) is int else value
        yield f"  {name:<{width}}  {text}"


def _title(name: str) -> str:
    return _TITLES.get(name, name.replace("_", " "))


def _number(figures: dict[str, Any], name: str) -> str:
    """A figure and its spread."""
    if name not in figures:
        return ""
    value, spread = figures[name], figures.get(f"{name}_std")
    text = f"{value:.1%}" if name in _SHARES else f"{value:.4g}"
    return text if spread is None else f"{text} ± {spread:.2g}"

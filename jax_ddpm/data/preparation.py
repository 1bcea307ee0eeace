"""What is done to images before they are learned: decided once, and kept in the run."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from jax_ddpm._checks import FieldError, check_choice

__all__ = ["Preparation"]


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """How images are read."""

    image_size: int | None = None
    """Height and width that images are brought to. Default: they stay as they are, all of one
    size."""
    crop: Literal["center", "random", "none"] = "center"
    """With an image size, the shorter side is resized to it; then the center is cut out, or a
    window that each step draws anew. "none" resizes both sides, whatever their ratio."""
    flip: bool = False
    """Mirror images left to right with probability 1/2, drawn anew in each step."""
    channels: Literal[1, 3, 4] | None = None
    """1 is grey, 3 is RGB, 4 is RGB with opacity. Default: grey if all images are, else RGB, with
    what is transparent on white."""
    labels: Literal["folders", "none"] = "folders"
    """"folders": the labels are the subfolders of pictures, or those that a file brings with it.
    "none": train without labels."""
    skip_unreadable: bool = False
    """Leave out pictures that cannot be read, and count them, instead of ending."""

    def __post_init__(self) -> None:
        """Raises `FieldError` naming the field that makes no sense."""
        size = self.image_size
        if size is not None and (type(size) is not int or size < 1):
            raise FieldError("image_size", f"expected a whole number above 0, got {size!r}")
        check_choice("crop", self.crop, ("center", "random", "none"))
        check_choice("channels", self.channels, (None, 1, 3, 4))
        check_choice("labels", self.labels, ("folders", "none"))
        for name in ("flip", "skip_unreadable"):
            if not isinstance(getattr(self, name), bool):
                raise FieldError(name, f"expected True or False, got {getattr(self, name)!r}")
        if self.crop != "center" and size is None:
            raise FieldError("crop", "expected an image size with it, got none")

    def record(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)

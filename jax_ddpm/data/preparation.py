"""What is done to images before they are learned: decided once, and kept in the run."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from jax_ddpm._errors import FieldError, check_choice


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
    range: Literal["unit", "signed"] | None = None
    """What the pixels of a float array lie in: "unit" is [0, 1], "signed" [-1, 1]. Default: [0, 1]
    if none is below 0, which is said; samples that were drawn here say it themselves."""
    labels: Literal["folders", "none"] = "folders"
    """"folders": the labels are the subfolders of pictures, or those that a file brings with it.
    "none": train without labels."""
    skip_unreadable: bool = False
    """Leave out pictures that cannot be read, and count them, instead of ending."""
    max_pixels: int | None = None
    """Read pictures of up to so many pixels. Default: Pillow's limit, 178,956,970."""

    def __post_init__(self) -> None:
        """Raises `FieldError` naming the field that makes no sense."""
        size = self.image_size
        for name, count in (("image_size", size), ("max_pixels", self.max_pixels)):
            if count is not None and (type(count) is not int or count < 1):
                raise FieldError(name, f"expected a whole number above 0, got {count!r}")
        check_choice("crop", self.crop, ("center", "random", "none"))
        check_choice("channels", self.channels, (None, 1, 3, 4))
        check_choice("range", self.range, (None, "unit", "signed"))
        check_choice("labels", self.labels, ("folders", "none"))
        for name in ("flip", "skip_unreadable"):
            if not isinstance(getattr(self, name), bool):
                raise FieldError(name, f"expected True or False, got {getattr(self, name)!r}")
        if self.crop != "center" and size is None:
            raise FieldError("crop", "expected an image size with it, got none")

    def record(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)

"""How a clip is sampled: the options that the pipeline, `tcan animate`, `tcan evaluate` and the MLflow model share."""

import dataclasses
import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, ClassVar

from tcan.errors import UserError


@dataclass
class SamplingConfig:
    """Options of the denoising loop.

    Raises:
        UserError: a value out of its range.
    """

    steps: int = 25
    """Number of denoising steps, 1 to 1000."""

    guidance_scale: float = 7.5
    """Classifier-free guidance scale of the appearance, >= 0; 1 disables guidance and halves the time."""

    window: int = 16
    """Frames that attend to each other in the temporal layers, >= 1."""

    overlap: int = 4
    """Frames that neighboring windows share, from 0 to window - 1; predictions are averaged there."""

    loop: bool = False
    """The driving poses end where they begin; makes the result a seamless loop."""

    controlnet_scale: float = 1.0
    """Weight of the ControlNet residuals, >= 0; 1 is the paper's."""

    ptm: bool = True
    """Use the pose-driven temperature map in the temporal attention of the UNet; reduces background flicker."""

    ptm_strength: float = 1.0
    """Slope of the temperature with the distance from the skeleton, >= 0; 1 is the paper's, 0 disables the map."""

    ptm_limit: int | None = None
    """Largest grid (cells of the longer side, >= 0) of the layers that use the temperature map; the grids are 64, 32, 16
    and 8 at 512 pixels. Unset: all layers."""

    start_from_reference: bool = False
    """Start from the noised latent of the reference image instead of pure noise (the paper's); prevents the brightness
    flicker of small images."""

    prefix: ClassVar[str] = ""  # of the keys in error messages

    def __post_init__(self) -> None:
        for key in ("steps", "window", "overlap", "ptm_limit"):
            value = getattr(self, key)
            if value is not None and (isinstance(value, bool) or not isinstance(value, Integral)):
                self._reject(key, "must be an integer; set e.g. 16")
        if not 1 <= self.steps <= 1000:
            self._reject("steps", "must be from 1 to 1000, the number of noise levels; set e.g. 25")
        if self.window < 1:
            self._reject("window", "must be at least 1 frame; set e.g. 16")
        if not 0 <= self.overlap < self.window:
            self._reject("overlap", f"must be from 0 to below window = {self.window}; change one of them")
        for key, example in (("guidance_scale", 7.5), ("controlnet_scale", 1), ("ptm_strength", 1)):
            value = getattr(self, key)
            if not isinstance(value, Real) or not 0 <= float(value) < math.inf:
                self._reject(
                    key, f"must be {'finite' if value == math.inf else 'at least 0'}; set e.g. {example}"
                )
        if self.ptm_limit is not None and self.ptm_limit < 0:
            self._reject("ptm_limit", "must be at least 0; set e.g. 32, or leave it unset")

    def _reject(self, key: str, reason: str) -> None:
        raise UserError(f"{self.prefix}{key} = {getattr(self, key)}: {reason}")

    def override(self, **options: Any) -> "SamplingConfig":
        """A copy with these options changed.

        Raises:
            TypeError: an unknown option.
            UserError: a value out of its range.
        """
        return dataclasses.replace(self, **options)

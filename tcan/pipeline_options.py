"""Options of `TCANPipeline` with the names of diffusers' pipelines."""

from diffusers import AutoencoderKL


class VaeOptions:
    """Options of the VAE, and the interruption of the denoising."""

    vae: AutoencoderKL
    _interrupt: bool

    @property
    def interrupt(self) -> bool:
        """Whether the denoising ends after the current step; a callback sets `pipe._interrupt = True`."""
        return self._interrupt

    def enable_vae_slicing(self) -> None:
        """Let the VAE process one frame at a time."""
        self.vae.enable_slicing()

    def disable_vae_slicing(self) -> None:
        """Undo `enable_vae_slicing`."""
        self.vae.disable_slicing()

    def enable_vae_tiling(self) -> None:
        """Let the VAE process overlapping tiles of an image: less memory for large frames; tiles are blended."""
        self.vae.enable_tiling()

    def disable_vae_tiling(self) -> None:
        """Undo `enable_vae_tiling`."""
        self.vae.disable_tiling()

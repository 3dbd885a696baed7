"""Methods of `TCANPipeline` with the names of diffusers' pipelines."""

import os

from diffusers import AutoencoderKL

from tcan.errors import UserError
from tcan.lora import LoraMerger, read_lora
from tcan.model import TCAN


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


class LoraOptions:
    """LoRAs of SD1.5, always merged into the weights of the denoising UNet. Each takes effect when it is loaded."""

    tcan: TCAN
    _lora_merger: LoraMerger | None = None

    @property
    def _loras(self) -> LoraMerger:
        if self._lora_merger is None:
            self._lora_merger = LoraMerger(self.tcan.denoiser)
        return self._lora_merger

    def load_lora_weights(
        self, source: str | os.PathLike, *, weight_name: str | None = None, adapter_name: str | None = None
    ) -> None:
        """Merge a LoRA file (see `tcan.lora.read_lora`) at scale 1.

        Raises:
            UserError: the file cannot be read or does not match the UNet; the name is in use.
        """
        name = adapter_name or f"lora_{len(self._loras.loras)}"
        self._loras.add(name, read_lora(os.fspath(source), self.tcan.denoiser, weight_name))

    def set_adapters(self, names: str | list[str], weights: float | list[float] = 1.0) -> None:
        """Set the scales of LoRAs; the others are disabled.

        Raises:
            UserError: an unknown name, or another number of weights.
        """
        names = [names] if isinstance(names, str) else list(names)
        scales = list(weights) if isinstance(weights, list | tuple) else [weights] * len(names)
        if unknown := [name for name in names if name not in self._loras.loras]:
            raise UserError(
                f"LoRA {unknown[0]}: not loaded; loaded are: {', '.join(self._loras.loras) or 'none'}"
            )
        if len(scales) != len(names):
            raise UserError(
                f"set_adapters: {len(names)} names, but {len(scales)} weights; pass one weight a name"
            )
        for name, lora in self._loras.loras.items():
            lora.scale = float(dict(zip(names, scales, strict=True)).get(name, 0))
        self._loras.merge()

    def fuse_lora(self, lora_scale: float = 1.0, adapter_names: list[str] | None = None) -> None:
        """Set the scale of the LoRAs; they are already merged."""
        names = list(self._loras.loras) if adapter_names is None else adapter_names
        self.set_adapters(names, lora_scale)

    def unfuse_lora(self) -> None:
        """Set the scale of all LoRAs back to 1, as after loading."""
        self.fuse_lora()

    def unload_lora_weights(self) -> None:
        """Restore the weights before the first LoRA exactly."""
        self._loras.remove_all()

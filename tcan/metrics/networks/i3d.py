"""I3D (Carreira and Zisserman, CVPR 2017) trained on Kinetics-400: the features of FVD (Unterthiner et al., 2018)."""

from pathlib import Path

import torch
from torch import Tensor, nn

from tcan.errors import UserError, first_line
from tcan.metrics.networks.files import check_file

FILE = "the TorchScript file i3d_torchscript.pt"
FEATURES = 400


class FVDI3D(nn.Module):
    """Features of windows of 16 frames for FVD: the 400 logits.

    The TorchScript program resizes to 224 x 224 (bilinear, without antialiasing) and scales to [-1, 1] itself.
    """

    def __init__(self, path: Path) -> None:
        """Load the program and run it on a black window.

        Raises:
            UserError: the file is not a TorchScript program, does not have the options of `i3d_torchscript.pt`, or does not
                return 400 features.
        """
        super().__init__()
        where = f"{path}: not {FILE}"
        check_file(path, where)
        try:
            self.program = torch.jit.load(path, map_location="cpu").eval()
        except Exception as error:  # any exception on a file that is not a TorchScript archive
            raise UserError(f"{where}: unreadable ({first_line(error)}); download it again") from error
        try:
            features = self(torch.zeros(1, 16, 3, 64, 64, dtype=torch.uint8))
        except Exception as error:  # another program can raise any exception
            raise UserError(
                f"{where}: a TorchScript program that failed on a black video ({first_line(error)}); give the original file"
            ) from error
        if features.shape != (1, FEATURES):
            raise UserError(
                f"{where}: its features have shape {list(features.shape)}, expected [1, {FEATURES}]; give the original file"
            )

    @torch.inference_mode()
    def forward(self, windows: Tensor) -> Tensor:
        """Return the features `[N, 400]` of uint8 RGB windows `[N, 16, 3, H, W]`."""
        frames = windows.transpose(1, 2).float()
        return self.program(frames, rescale=True, resize=True, return_features=True)

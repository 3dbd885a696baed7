"""Pose detection: OpenPose's network or a compatible one, and OpenPose's decoding, in batches of frames.

The decoding is that of Cao et al. (CVPR 2017), with the constants and the order of controlnet_aux's `Body`, and it
finds the same people. Only the computation differs: see `tcan.pose.peaks` and `tcan.pose.people`.
"""

from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import ClassVar, Protocol, runtime_checkable

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tcan.errors import UserError, first_line
from tcan.fingerprint import fingerprint
from tcan.pose.openpose_loading import (
    OPENPOSE_FILE,
    find_openpose_file,
    load_openpose_network,
    open_pose_module,
)
from tcan.pose.peaks import find_peaks, interpolation_method, resized_axes
from tcan.pose.people import assemble_people, score_limbs
from tcan.pose.skeleton import STRIDE
from tcan.transfer import HostCopy, upload

PADDING_VALUE = 128  # gray
CLOSE_UP_ZOOMS = (0.75, 0.6, 0.5)
UPPER_BODY = [*range(8), *range(14, 18)]  # nose, neck, arms, eyes, ears
PAF_MAPS, JOINT_MAPS = 38, 18


@runtime_checkable
class PoseDetector(Protocol):
    """Detector of all people in each frame."""

    @property
    def fingerprint(self) -> str:
        """16 hex digits that identify the weights and settings."""
        ...

    def to(self, device: torch.device | str) -> "PoseDetector":
        """Move the network to a device."""
        ...

    def detect(
        self, frames: NDArray[np.uint8], batch_size: int = 16, zoom: float = 1.0
    ) -> list[NDArray[np.float32]]:
        """Detect people in frames `[F, H, W, 3]` (RGB).

        Args:
            frames: uint8.
            batch_size: frames per forward pass.
            zoom: factor on the network's input size, > 1 for people who are small in the frame.

        Returns:
            Keypoints `[P, 18, 3]` of each frame, or `[P, 130, 3]` with hands and faces, in pixels; P may be 0.
        """
        ...


def body_detector(detector: PoseDetector) -> PoseDetector:
    """The detector of bodies in a detector that runs other networks for hands and faces; else the detector itself."""
    return getattr(detector, "body", detector)


def find_people(
    detector: PoseDetector, frames: Iterable[NDArray[np.uint8]], batch_size: int = 16
) -> tuple[list[NDArray[np.float32]], int, int]:
    """Detect people in a stream of frames `[H, W, 3]` of equal size, with `batch_size` frames in memory at a time.

    A single frame is an image, which can be a close-up: its joints are larger than in the images on which the network was
    trained. `OpenPose` detects it at the zooms of `CLOSE_UP_ZOOMS`, too; the people with the highest scores above the hips are
    returned.

    Returns:
        Keypoints of each frame as `PoseDetector.detect` returns them, H and W. H and W are 0 if there are no frames.
    """
    people: list[NDArray[np.float32]] = []
    batch = np.empty((0, 0, 0, 3), np.uint8)
    iterator = iter(frames)
    while upcoming := list(islice(iterator, batch_size)):
        batch = np.stack(upcoming)
        people += detector.detect(batch, batch_size)
    if len(people) == 1 and isinstance(body_detector(detector), OpenPose):
        zoomed = [detector.detect(batch, zoom=zoom)[0] for zoom in CLOSE_UP_ZOOMS]
        people = [
            max(people[0], *zoomed, key=lambda found: found[:, UPPER_BODY, 2].sum(axis=1).max(initial=0))
        ]
    return people, *batch.shape[1:3]


class OpenPose:
    """A pose network and its decoding.

    Args:
        network: maps x `[B, 3, h, w]` (BGR, value / 256 - 0.5) to paf `[B, 38, h/8, w/8]` and heatmap
            `[B, 19, h/8, w/8]`.
        input_height: height in pixels to which images are resized before the network (OpenPose: 368 * 0.5).
        blur_sigma: standard deviation of the heatmaps' Gaussian blur, in pixels of the original image.
        device: of the network.
    """

    part_fingerprints: ClassVar[dict[str, str]] = {}  # of networks for hands and face, which it has not

    def __init__(
        self,
        network: nn.Module,
        input_height: float = 184.0,
        blur_sigma: float = 3.0,
        device: torch.device | str = "cpu",
    ):
        self.network = network.eval().requires_grad_(False).to(device)
        self.input_height = float(input_height)
        self.blur_sigma = float(blur_sigma)
        self.device = torch.device(device)

    def to(self, device: torch.device | str) -> "OpenPose":
        """Move the network to a device."""
        self.network.to(device)
        self.device = torch.device(device)
        return self

    @classmethod
    def from_pretrained(cls, source: str | Path, device: torch.device | str = "cpu") -> "OpenPose":
        """Load a `BodyPoseNetwork` folder or OpenPose's `body_pose_model.pth`.

        Args:
            source: a `BodyPoseNetwork` folder, or the file `body_pose_model.pth`, a folder with it, or a Hugging Face
                Hub repository with it (`lllyasviel/Annotators[@revision]`).
            device: of the network.

        Raises:
            UserError: the source does not exist, or the weights do not match the network.
        """
        path = Path(source)
        if (path / "config.json").is_file():
            return cls._from_folder(path, device)
        if not path.is_file():
            path = find_openpose_file(source, OPENPOSE_FILE)
        network = open_pose_module("model").bodypose_model()
        return cls(load_openpose_network(network, path, OPENPOSE_FILE, in_blocks=True), device=device)

    @classmethod
    def _from_folder(cls, path: Path, device: torch.device | str) -> "OpenPose":
        from tcan.pose.network import BodyPoseNetwork  # imports diffusers, which takes 3 s

        try:
            network, report = BodyPoseNetwork.from_pretrained(path, output_loading_info=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(
                f"pose network {path}: cannot be loaded ({first_line(error)}); copy or download the folder again"
            ) from error
        if problems := {name: keys for name, keys in report.items() if keys}:
            raise UserError(
                f"pose network {path}: weights do not match BodyPoseNetwork: {problems}; give a folder that "
                "BodyPoseNetwork.save_pretrained wrote"
            )
        return cls(network, network.config.input_height, network.config.blur_sigma, device)

    def save_pretrained(self, folder: str | Path) -> None:
        """Save to a folder for `from_pretrained`: as a `BodyPoseNetwork`, or as OpenPose's file."""
        if hasattr(self.network, "save_pretrained"):
            self.network.save_pretrained(folder)
            return
        Path(folder).mkdir(parents=True, exist_ok=True)
        weights = self.network.state_dict()
        torch.save({name.split(".", 1)[1]: weights[name] for name in weights}, Path(folder) / OPENPOSE_FILE)

    @property
    def fingerprint(self) -> str:
        """16 hex digits that identify the weights and settings."""
        settings = {"input_height": self.input_height, "blur_sigma": self.blur_sigma}
        weights = {f"network.{name}": tensor for name, tensor in self.network.state_dict().items()}
        return fingerprint(weights | {name: torch.tensor(value) for name, value in settings.items()})

    @torch.inference_mode()
    def detect(
        self, frames: NDArray[np.uint8], batch_size: int = 16, zoom: float = 1.0
    ) -> list[NDArray[np.float32]]:
        """Detect people in frames `[F, H, W, 3]` (RGB), as specified by `PoseDetector`; zoom scales `input_height`.

        A joint that was not found is all 0. The score of a joint is the heatmap's value there, at most 1.

        Raises:
            UserError: the frames are less than one pixel wide or high after resizing.
        """
        batches = [
            self._preprocess(frames[i : i + batch_size], zoom) for i in range(0, len(frames), batch_size)
        ]
        # All batches are launched before the host waits for the maps of the first one.
        copies = [HostCopy(self.maps(upload(images, self.device))) for images, _ in batches]
        people: list[NDArray[np.float32]] = []
        for copy, (_, size) in zip(copies, batches, strict=True):
            people += self._decode_on_host(copy.numpy(), size, frames.shape[1:3])
        return people

    def _decode_on_host(
        self, maps: NDArray[np.float32], size: tuple[int, int], frame_size: Sequence[int]
    ) -> list[NDArray[np.float32]]:
        paf, heatmap = torch.from_numpy(maps).split([PAF_MAPS, JOINT_MAPS], dim=1)
        return self.decode(paf, heatmap, size, frame_size)

    def maps(self, images: Tensor) -> Tensor:
        """The network's maps float32 `[B, 38 + 18, h/8, w/8]`, affinity fields and joints, without a host synchronization.

        images: uint8 RGB `[B, h, w, 3]` on the network's device.
        """
        dtype = next(self.network.parameters()).dtype
        bgr = images.flip(-1).permute(0, 3, 1, 2)
        paf, heatmap = self.network((bgr.float() / 256 - 0.5).to(dtype).contiguous())
        return torch.cat([paf, heatmap[:, :JOINT_MAPS]], dim=1).float()

    def _preprocess(
        self, frames: NDArray[np.uint8], zoom: float
    ) -> tuple[NDArray[np.uint8], tuple[int, int]]:
        """Resized frames `[B, h, w, 3]`, and their height and width without the padding to multiples of 8."""
        height, width = frames.shape[1:3]
        scale = self.input_height * zoom / height
        # Like `Body`, recompute the height by a rounded-down product: it can be one pixel below input_height.
        h, w = int(height * scale), int(width * scale)
        if min(h, w) < 1:
            raise UserError(
                f"frame of {width} x {height} pixels: too narrow for pose detection; remove the video or crop it"
            )
        padded = np.full(
            (len(frames), -(-h // STRIDE) * STRIDE, -(-w // STRIDE) * STRIDE, 3),
            PADDING_VALUE,
            np.uint8,
        )
        method = interpolation_method(scale)
        for image, frame in zip(padded, frames, strict=True):
            image[:h, :w] = cv2.resize(frame, (w, h), interpolation=method)
        return padded, (h, w)

    def decode(
        self, paf: Tensor, heatmap: Tensor, size: tuple[int, int], frame_size: Sequence[int]
    ) -> list[NDArray[np.float32]]:
        """Decode the network's maps to the people `[P, 18, 3]` of each frame, on the CPU.

        The number of peaks and limbs depends on the values, so on a GPU each step would wait for the host.

        Args:
            paf: `[B, 38, h, w]`.
            heatmap: `[B, 18 or 19, h, w]`; a map of the background is ignored.
            size: height and width in pixels of the network's images, without padding.
            frame_size: height and width in pixels of the frames; keypoints are in these pixels.
        """
        rows, columns = resized_axes(heatmap.shape[-2:], size, frame_size, self.blur_sigma)
        peaks, scores = find_peaks(heatmap[:, :JOINT_MAPS], rows, columns)
        limbs = score_limbs(paf, peaks, rows.resize, columns.resize, len(heatmap), frame_size[0])
        return list(assemble_people(peaks.numpy(), scores.numpy(), limbs, len(heatmap)))

"""Faces of a video, aligned as for the training of face recognition networks, and their embeddings."""

import cv2
import numpy as np

from tcan.metrics.networks.face import SIZE, FaceEmbedding
from tcan.pose.skeleton import JOINTS

POINTS = [JOINTS.index(name) for name in ("right_eye", "left_eye", "nose")]
"""Joints of the points of `TEMPLATE`. OpenPose names the eyes from the person's view: its right eye is on the left of a frontal face."""
TEMPLATE = np.array([[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366]])
"""ArcFace's template in pixels of 112 x 112 images: the eyes on the left and on the right of the image, and the nose. InsightFace also
uses the corners of the mouth, which OpenPose's body does not have."""


def face_transform(pose: np.ndarray, height: int, width: int) -> np.ndarray | None:
    """Return the similarity transform from a frame to the aligned face that fits eyes and nose to the template (least squares).

    With complex numbers z (frame) and t (template), both centered, t ~ a z has the solution a = sum(conj(z) t) / sum(|z|²). It
    contains scale and rotation and never mirrors.

    Args:
        pose: keypoints `[18, 3]` in pixels of the frame.
        height, width: of the frame.

    Returns:
        `[2, 3]`; None if nose or an eye is not detected or is outside the frame, or all of them are at the same position.
    """
    points = pose[POINTS].astype(np.float64)
    inside = (points[:, :2] >= 0) & (points[:, :2] < (width, height))
    if not (points[:, 2] > 0).all() or not inside.all():
        return None
    z, t = points[:, 0] + 1j * points[:, 1], TEMPLATE[:, 0] + 1j * TEMPLATE[:, 1]
    centered = z - z.mean()
    spread = np.vdot(centered, centered).real
    if spread == 0:
        return None
    a = np.vdot(centered, t - t.mean()) / spread
    b = t.mean() - a * z.mean()
    return np.array([[a.real, -a.imag, b.real], [a.imag, a.real, b.imag]])


def align_face(frame: np.ndarray, pose: np.ndarray) -> np.ndarray | None:
    """Return the aligned face, uint8 RGB `[112, 112, 3]`, of a frame `[H, W, 3]`, or None: see `face_transform`.

    Bilinear interpolation, black outside the frame, as in InsightFace's `norm_crop`.
    """
    transform = face_transform(pose, *frame.shape[:2])
    return (
        None if transform is None else cv2.warpAffine(frame, transform, (SIZE, SIZE), flags=cv2.INTER_LINEAR)
    )


def face_embeddings(network: FaceEmbedding, frames: np.ndarray, poses: np.ndarray) -> np.ndarray:
    """Return the embeddings `[F, D]`, of length 1, of the faces of a person. A product is a cosine similarity.

    Args:
        frames: uint8 RGB `[F, H, W, 3]`.
        poses: keypoints `[F, 18, 3]` in pixels of the frames.

    Returns:
        NaN for frames without nose and both eyes.
    """
    embeddings = np.full((len(frames), network.dimensions), np.nan)
    for i, (frame, pose) in enumerate(zip(frames, poses, strict=True)):
        face = align_face(frame, pose)
        if face is not None:
            embeddings[i] = network(face[None])[0]
    return embeddings

"""Metrics of an evaluation that need a network: LPIPS, FID, FID-VID, FVD, similarity of images and faces; all with controls."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tcan.metrics import frechet_distance
from tcan.metrics.face import face_embeddings
from tcan.metrics.features import WINDOW, embeddings, fid_features, fid_vid_features, fvd_features, lpips
from tcan.metrics.networks import Networks

Pair = tuple[np.ndarray, np.ndarray]
"""Result and truth of a video: uint8 RGB `[F, H, W, 3]`."""

Posed = tuple[np.ndarray, np.ndarray]
"""A video and the poses in it: uint8 RGB `[F, H, W, 3]`, keypoints `[F, 18, 3]` in pixels."""

FRECHET: dict[str, tuple[str, int, Callable[[Any, np.ndarray], np.ndarray]]] = {
    "fid": ("inception", 1, fid_features),
    "fid_vid": ("resnet3d", WINDOW, fid_vid_features),
    "fvd": ("i3d", WINDOW, fvd_features),
}
"""Metric -> network, frames per sample, function of the features."""


@dataclass
class SetMetrics:
    """Metrics of a set of videos, the number of samples of each, and why others are unavailable (metric -> reason)."""

    values: dict[str, float] = field(default_factory=dict)
    samples: dict[str, int] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)


def video_metrics(pair: Pair, networks: Networks) -> dict[str, float]:
    """LPIPS of a video, and of its first frame as a still (suffix `_still`, without the first frame).

    Returns:
        lpips_alex, lpips_vgg: inputs in [-1, 1];
        lpips_vgg_disco: inputs in [0, 1], as in DisCo's scripts.
        Only those with a network.
    """
    result, truth = pair
    metrics = {}
    for key, name, unscaled in (
        ("lpips_alex", "alexnet", False),
        ("lpips_vgg", "vgg16", False),
        ("lpips_vgg_disco", "vgg16", True),
    ):
        if network := networks.loaded.get(name):
            metrics[key] = lpips(network, result, truth, unscaled=unscaled)
            if len(truth) > 1:
                still = np.broadcast_to(truth[:1], truth[1:].shape)
                metrics[f"{key}_still"] = lpips(network, still, truth[1:], unscaled=unscaled)
    return metrics


def image_similarities(pairs: Sequence[Pair], networks: Networks) -> list[dict[str, float]]:
    """Mean cosine similarity of each video's frames to its reference, the first frame of the truth.

    Controls: the true frames (`_source`, without the first), and the references of the other videos (`_other`).
    """
    network = networks.loaded.get("image")
    if network is None:
        return [{} for _ in pairs]
    references = np.concatenate([embeddings(network, truth[:1]) for _, truth in pairs])  # [N, D]
    rows = []
    for i, (result, truth) in enumerate(pairs):
        similarity = embeddings(network, result) @ references.T  # [F, N]
        row = {"image_similarity": float(similarity[:, i].mean())}
        if len(pairs) > 1:
            row["image_similarity_other"] = float(np.delete(similarity, i, axis=1).mean())
        if len(truth) > 1:
            row["image_similarity_source"] = float((embeddings(network, truth[1:]) @ references[i]).mean())
        rows.append(row)
    return rows


def face_similarities(
    results: Sequence[Posed], truths: Sequence[Posed], networks: Networks
) -> list[dict[str, float]]:
    """Mean cosine similarity of the faces in each video's result to the face in its reference, the first frame of the truth.

    Only frames whose result and truth both show nose and eyes are compared. NaN if there are none, or the reference shows none.
    Controls: the true faces of the same frames (`_source`, without the first), and the references of the other videos (`_other`).

    Returns:
        the similarity, its controls, and face_frames, the number of compared frames.
    """
    network = networks.loaded.get("face")
    if network is None:
        return [{} for _ in results]
    true = [face_embeddings(network, *truth) for truth in truths]
    references = np.stack([faces[0] for faces in true])  # [N, D]
    rows = []
    for i, result in enumerate(results):
        similarity = face_embeddings(network, *result) @ references.T  # [F, N], NaN without a face
        source = true[i] @ references[i]  # [F]
        compared = ~np.isnan(similarity[:, i]) & ~np.isnan(source)
        rows.append(
            {
                "face_similarity": _mean(similarity[compared, i]),
                "face_similarity_other": _mean(np.delete(similarity[compared], i, axis=1)),
                "face_similarity_source": _mean(source[1:][compared[1:]]),
                "face_frames": float(compared.sum()),
            }
        )
    return rows


def set_metrics(pairs: Sequence[Pair], networks: Networks) -> SetMetrics:
    """Fréchet distances between the results and the truths of all videos, and with still first frames (`_still`).

    The samples of FID are all frames, those of FID-VID and FVD all windows of 16 frames. The distance is biased: it decreases
    with the number of samples. A distance of fewer than 2 samples is unavailable.
    """
    metrics = SetMetrics(unavailable=dict(networks.unavailable))
    for key, (name, length, features) in FRECHET.items():
        network = networks.loaded.get(name)
        if network is None:
            continue
        true = [features(network, truth) for _, truth in pairs]
        count = sum(map(len, true))
        if count < 2:
            metrics.unavailable[key] = (
                f"fewer than 2 samples of {length} frame(s) in all videos; increase evaluate.frames or add videos"
            )
            continue
        found = [features(network, result) for result, _ in pairs]
        still = [
            np.repeat(features(network, np.repeat(truth[:1], length, axis=0)), len(samples), axis=0)
            for (_, truth), samples in zip(pairs, true, strict=True)
        ]
        truths = np.concatenate(true)
        metrics.samples[key] = count
        metrics.values[key] = frechet_distance(np.concatenate(found), truths)
        metrics.values[f"{key}_still"] = frechet_distance(np.concatenate(still), truths)
    return metrics


def _mean(values: np.ndarray) -> float:
    """Mean of the values that are not NaN; NaN if there are none."""
    values = values[~np.isnan(values)]
    return float(values.mean()) if values.size else float("nan")

"""The metrics of an evaluation as lines of text."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from tcan.metrics.networks import METRICS

# Rows of the printed table: label, metric, unit factor, format. The key of a control is the metric's with a suffix.
TABLE = (
    ("L1 (0 to 1)", "l1", 1, ".4f"),
    ("PSNR, dB", "psnr", 1, ".2f"),
    ("  face", "psnr_face", 1, ".2f"),
    ("  hands", "psnr_hands", 1, ".2f"),
    ("  pixels of the face", "psnr_face_true", 1, ".2f"),
    ("  pixels of the hands", "psnr_hands_true", 1, ".2f"),
    ("  pixels of hair and ears", "psnr_hair_ears_true", 1, ".2f"),
    ("SSIM", "ssim", 1, ".4f"),
    ("LPIPS (AlexNet)", "lpips_alex", 1, ".4f"),
    ("LPIPS (VGG)", "lpips_vgg", 1, ".4f"),
    ("FID", "fid", 1, ".2f"),
    ("FID-VID", "fid_vid", 1, ".2f"),
    ("FVD", "fvd", 1, ".2f"),
    ("image similarity to the reference", "image_similarity", 1, ".4f"),
    ("face similarity to the reference", "face_similarity", 1, ".4f"),
    ("  compared frames per video", "face_frames", 1, ".1f"),
    ("joints within 5 %", "pose_5", 100, ".1f"),
    ("  wrists", "pose_5_wrists", 100, ".1f"),
    ("  elbows", "pose_5_elbows", 100, ".1f"),
    ("  ankles", "pose_5_ankles", 100, ".1f"),
    ("joints within 10 %", "pose_10", 100, ".1f"),
    ("  of the true joints, within 5 %", "pose_5_true", 100, ".1f"),
    ("background flicker, grey levels", "flicker", 1, ".2f"),
    ("warping error, 1e-3", "warping_error", 1000, ".3f"),
    ("colour distance to the reference, dE", "colour_distance", 1, ".2f"),
    ("frames nearest to their own reference", "identified", 100, ".1f"),
)
CONTROLS = {
    "still": "first frame, still",
    "mean_pose": "mean pose",
    "other": "another video's",
    "source": "source",
    "chance": "chance",
}


def table(metrics: dict[str, float]) -> str:
    """Format the metrics as lines of text, each with its controls."""
    lines = [f"{'metric':<38}{'result':>8}   controls"]
    for label, key, factor, form in TABLE:
        if key not in metrics:
            continue
        controls = [
            f"{name} {format(metrics[f'{key}_{suffix}'] * factor, form)}"
            for suffix, name in CONTROLS.items()
            if np.isfinite(metrics.get(f"{key}_{suffix}", np.nan))
        ]
        lines.append(f"{label:<38}{format(metrics[key] * factor, form):>8}   {', '.join(controls)}".rstrip())
    return "\n".join(lines)


def unavailable_lines(unavailable: Mapping[str, str], files: Mapping[str, str | None]) -> str:
    """The unavailable metrics whose network is configured, one line per reason.

    Args:
        unavailable: metric -> reason.
        files: network -> configured file; None: not configured.
    """
    configured = {
        metric for network, file in files.items() if file is not None for metric in METRICS[network]
    }
    reasons: dict[str, list[str]] = {}
    for metric, reason in unavailable.items():
        if metric in configured:
            reasons.setdefault(reason, []).append(metric)
    return "\n".join(f"unavailable: {', '.join(metrics)} ({reason})" for reason, metrics in reasons.items())


def protocol_lines(protocol: Mapping[str, Any]) -> str:
    """The metrics in the conventions of the protocol."""
    lines = [f"{protocol['name']}, in the conventions of its scripts (docs/metrics.md):"]
    lines += [f"  {key:<24}{value:.6g}" for key, value in protocol["metrics"].items()]
    if protocol["videos"] != protocol["videos_of_the_protocol"]:
        lines.append(f"  not comparable: {protocol['videos']} of {protocol['videos_of_the_protocol']} videos")
    return "\n".join(lines)

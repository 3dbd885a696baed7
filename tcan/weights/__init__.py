"""Where weights come from and go to: the frozen bases, and the folder of a trained model."""

from tcan.weights.bases import (
    Bases,
    encode_empty_prompt,
    load_bases,
    load_part,
    load_pose_detector,
    portable_source,
)
from tcan.weights.common import fingerprint
from tcan.weights.model_folder import MODEL_FILE, export_model, load_model, read_model_info, save_model

__all__ = [
    "MODEL_FILE",
    "Bases",
    "encode_empty_prompt",
    "export_model",
    "fingerprint",
    "load_bases",
    "load_model",
    "load_part",
    "load_pose_detector",
    "portable_source",
    "read_model_info",
    "save_model",
]

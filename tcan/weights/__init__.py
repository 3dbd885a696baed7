"""Load the frozen pretrained models; save, load and export trained models."""

from tcan.weights.model_folder import (
    MODEL_FILE,
    export_model,
    load_model,
    read_model_info,
    read_variant,
    save_model,
)
from tcan.weights.pretrained import (
    MINI_MODEL,
    PretrainedModels,
    encode_empty_prompt,
    load_part,
    load_pose_detector,
    load_pretrained,
    portable_source,
)

__all__ = [
    "MINI_MODEL",
    "MODEL_FILE",
    "PretrainedModels",
    "encode_empty_prompt",
    "export_model",
    "load_model",
    "load_part",
    "load_pose_detector",
    "load_pretrained",
    "portable_source",
    "read_model_info",
    "read_variant",
    "save_model",
]

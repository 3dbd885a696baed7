"""Model folders as MLflow models that can be loaded on machines where TCAN Studio is not installed."""

import dataclasses
import platform
import shutil
import tempfile
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tcan
from tcan.sampling import SamplingConfig
from tcan.weights import read_model_info

if TYPE_CHECKING:
    from mlflow.models import ModelSignature

REQUIREMENTS = (
    "accelerate", "av", "controlnet-aux", "decord", "diffusers", "mlflow", "numpy", "opencv-python-headless", "peft", "pillow",
    "safetensors", "scipy", "torch", "torchvision", "transformers",
)  # fmt: skip
"""Packages that `tcan` imports to animate. Those of the jobs (Ray, DeepSpeed) are not needed."""


def save_model(model: Path, out: Path, sampling: dict[str, Any]) -> None:
    """Save a model folder in MLflow's format, for `mlflow.pyfunc.load_model` (see `tcan.pyfunc`).

    It contains the code of the package `tcan` and the exact versions of its requirements in this environment. Pretrained
    models remain references, as in every model folder; only the weights of `mini` are part of the code.

    Args:
        out: the folder to be created.
        sampling: default values of `SamplingConfig`.
    """
    import mlflow.pyfunc

    with tempfile.TemporaryDirectory() as folder:
        code = Path(folder) / "tcan"
        sources = [item["source"] for item in read_model_info(model)["pretrained"].values()]
        unused = ["__pycache__", "trained"] + ["mini"] * ("mini" not in sources)
        shutil.copytree(Path(tcan.__file__).parent, code, ignore=shutil.ignore_patterns(*unused))
        mlflow.pyfunc.save_model(
            str(out),
            loader_module="tcan.pyfunc",
            data_path=str(model),
            code_paths=[str(code)],
            signature=_signature(sampling),
            # Complete; otherwise MLflow looks for pip in this environment and warns that it is missing.
            conda_env={
                "dependencies": [f"python={platform.python_version()}", "pip", {"pip": requirements()}]
            },
        )


def requirements() -> list[str]:
    """`REQUIREMENTS` with their versions in this environment: `NAME==VERSION`."""
    # A local version such as 2.11.0+cu128 is not in every package index.
    return [f"{name}=={metadata.version(name).split('+')[0]}" for name in REQUIREMENTS]


def _signature(sampling: dict[str, Any]) -> "ModelSignature":
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

    inputs = Schema([ColSpec("string", name) for name in ("image", "driving")])
    types = {bool: "boolean", int: "long", float: "double"}
    # MLflow passes only declared params to `predict`, and a declared param needs a default of its type.
    declared = [
        ParamSpec(item.name, types[item.type], item.type(sampling[item.name]))
        for item in dataclasses.fields(SamplingConfig)
        if isinstance(item.type, type) and item.default is not None
    ]
    return ModelSignature(
        inputs,
        params=ParamSchema(
            [*declared, ParamSpec("seed", "long", 0), ParamSpec("retarget", "string", "robust")]
        ),
    )

"""Inputs and outputs of the jobs in buckets on local servers."""

from pathlib import Path

import numpy as np
import pytest

from pipelines import storage
from pipelines.config import TrackingConfig
from pipelines.staging import local_input, local_output, original_names
from pipelines.tracking import local_model
from pipelines.train.checkpoint import remove_incomplete
from pipelines.train.run_file import read_run
from tcan.errors import UserError
from tcan.video import write_image
from tests.pipelines.test_cli import error_of
from tests.training import write_dataset


def test_inputs_are_downloaded_once_and_messages_name_the_uri(any_bucket: str, tmp_path: Path) -> None:
    storage.write(f"{any_bucket}/model/tcan.json", b"{}")
    storage.write(f"{any_bucket}/model/appa/weights.bin", b"1")
    folder = local_model(f"{any_bucket}/model/", TrackingConfig())
    assert (folder / "tcan.json").read_bytes() == b"{}" and (folder / "appa/weights.bin").read_bytes() == b"1"
    storage.write(f"{any_bucket}/model/tcan.json", b"changed")
    assert local_input(f"{any_bucket}/model") == folder and (folder / "tcan.json").read_bytes() == b"{}"
    assert original_names(f"{folder}/tcan.json: damaged") == f"{any_bucket}/model/tcan.json: damaged"
    assert local_input("a/b.png") == Path("a/b.png")
    assert local_input(f"file://{tmp_path}/a%20b") == tmp_path / "a b"
    with pytest.raises(UserError, match=f"{any_bucket}/nothing: no such file or folder; check the URI"):
        local_input(f"{any_bucket}/nothing")


def test_outputs_are_uploaded_when_complete_and_the_manifest_last(any_bucket: str, monkeypatch) -> None:
    uploaded: list[str] = []
    upload = storage.upload
    monkeypatch.setattr(storage, "upload", lambda file, name: (uploaded.append(name), upload(file, name)))
    with pytest.raises(ZeroDivisionError), local_output(f"{any_bucket}/results/model") as folder:
        folder.mkdir()
        (folder / "a.json").touch()
        raise ZeroDivisionError
    assert storage.list_files(f"{any_bucket}/results", recursive=True) == []
    with local_output(f"{any_bucket}/results/model/") as folder:
        (folder / "weights").mkdir(parents=True)
        for name in ("a.json", "z.bin", "weights/b.bin"):
            (folder / name).write_text(name)
    root = f"{any_bucket}/results/model"
    assert uploaded == [f"{root}/weights/b.bin", f"{root}/z.bin", f"{root}/a.json"]
    assert storage.read_bytes(f"{root}/weights/b.bin") == b"weights/b.bin"
    nowhere = any_bucket.replace("corpus", "no-such-bucket")
    with (
        pytest.raises(UserError, match=f"{nowhere}: no such bucket"),
        local_output(f"{nowhere}/x"),
    ):
        pass


def test_checkpoints_that_were_never_registered_are_deleted_from_a_bucket(any_bucket: str) -> None:
    remove_incomplete(f"{any_bucket}/killed/stage1")  # no such folder
    for name in (
        "run.json",
        "step_000003_0123/state.json",
        "step_000003_0123/trained-00000-of-00002.safetensors",
    ):
        storage.write(f"{any_bucket}/killed/stage1/{name}", b"{}")
    remove_incomplete(f"{any_bucket}/killed/stage1")
    assert storage.list_files(f"{any_bucket}/killed", recursive=True) == [
        f"{any_bucket}/killed/stage1/run.json"
    ]


def test_pose_and_train_read_and_write_a_bucket(any_bucket: str, tmp_path: Path, capsys) -> None:
    """A frame without a person, and a dataset of another VAE: the errors name the URIs."""
    write_image(np.zeros((64, 64, 3), np.uint8), tmp_path / "black.png")
    storage.write(f"{any_bucket}/in/black.png", (tmp_path / "black.png").read_bytes())
    assert f"{any_bucket}/in/black.png" in error_of(
        capsys, "pose", f"{any_bucket}/in/black.png", "--out", f"{any_bucket}/out/black.json"
    )
    assert storage.list_files(f"{any_bucket}/out") == []
    dataset = write_dataset(tmp_path / "dataset", {"a": [(0, 20)]}, 128, 128, vae="0123456789abcdef")
    for file in dataset.rglob("*"):
        if file.is_file():
            storage.write(f"{any_bucket}/dataset/{file.relative_to(dataset)}", file.read_bytes())
    line = error_of(capsys, "train", f"{any_bucket}/dataset", "--out", str(tmp_path / "run"))
    assert line.startswith(f"{any_bucket}/dataset: encoded with another VAE")
    line = error_of(
        capsys, "train", f"{any_bucket}/dataset", "--out", f"{any_bucket}/run", "--stage", "2", "--size", "64"
    )
    assert line.startswith(f"{any_bucket}/dataset: encoded with another VAE")
    storage.write(f"{any_bucket}/run/stage1/run.json", b"{")
    with pytest.raises(
        UserError, match=f"{any_bucket}/run/stage1/run.json: cannot be read, or is not a file of"
    ):
        read_run(f"{any_bucket}/run/stage1")

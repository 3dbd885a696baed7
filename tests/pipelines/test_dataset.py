"""`tcan dataset info|rejected|verify|preview`: intact datasets pass verification, and every kind of change is detected."""

import io
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines import cli
from pipelines.config.parser import load_config
from pipelines.dataset import CLIP_SCHEMA, SCHEMA_VERSION, decode_row, file_name, read_info
from pipelines.preprocess.assembly import VideoAssembler
from pipelines.preprocess.dataset_commands import preview
from pipelines.preprocess.shards import ShardWriter, forget_rejected, read_contents, write_info, writing
from pipelines.preprocess.sources import Source
from tcan.errors import UserError
from tcan.fingerprint import fingerprint
from tcan.weights import load_part
from tests.pipelines.test_assembly import encoded_row, end_row, person

IDS = ["0" * 16, "8" * 16, "f" * 16]
IDENTITY = {"schema_version": SCHEMA_VERSION, "validation_fraction": 0.1}


def write_dataset(
    folder: Path, vae_fingerprint: str = "", identity: dict = IDENTITY, parts: dict | None = None
) -> Path:
    """Write two videos of three clips with two people per frame, and one rejected video.

    parts: columns that are added to each clip.
    """
    people = [np.stack([person(40, 20), person(10, 40)])] * 3
    with writing(str(folder)):
        writer = ShardWriter(str(folder), identity, 2**30, 1e9)
        sources = [Source(f"/{video}", video, "1-1") for video in IDS]
        assembler = VideoAssembler(
            writer, sources, min_person_fraction=0, min_person_height=0, validation_fraction=0.1
        )
        for video in IDS[:2]:
            for start in (0, 3, 6):
                assembler.add(encoded_row(video, start, people) | (parts or {}))
            assembler.add(end_row(video, 3))
        assembler.add(end_row(IDS[2], None, "decode"))
        writer.commit()
        contents = read_contents(str(folder), identity)
        info = {
            "schema_version": SCHEMA_VERSION, "counts": contents.counts, "files": contents.files, "identity": identity,
            "height": 64, "width": 64, "vae_fingerprint": vae_fingerprint, "mlflow_run_id": None,
        }  # fmt: skip
        write_info(str(folder), info)
    return folder


def only_file(folder: Path, part: str = "clips") -> Path:
    (file,) = (folder / part).iterdir()
    return file


def flip_byte(folder: Path) -> None:
    file = only_file(folder)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def rewrite(change: Callable[[list[dict]], None]) -> Callable[[Path], None]:
    """Return a function that changes rows and updates the file name and dataset.json accordingly."""

    def tamper(folder: Path) -> None:
        file = only_file(folder)
        table = pq.read_table(file)
        rows = table.to_pylist()
        change(rows)
        buffer = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(rows, table.schema), buffer)
        file.unlink()
        name = file_name("clips", io.BytesIO(buffer.getvalue()))
        (folder / "clips" / name).write_bytes(buffer.getvalue())
        info = json.loads((folder / "dataset.json").read_text())
        del info["files"][f"clips/{file.name}"]
        info["files"][f"clips/{name}"] = len(rows)
        (folder / "dataset.json").write_text(json.dumps(info))

    return tamper


def edit_info(folder: Path) -> None:
    info = json.loads((folder / "dataset.json").read_text())
    info["identity"]["validation_fraction"] = 0.0
    (folder / "dataset.json").write_text(json.dumps(info))


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "changed byte": (flip_byte, "digest mismatch"),
    "missing file": (lambda folder: only_file(folder, "rejected").unlink(), "rejected-.*: missing"),
    "unknown file": (
        lambda folder: (folder / "clips" / "x.parquet").write_bytes(only_file(folder).read_bytes()),
        "x.parquet: not listed in dataset.json",
    ),
    "other settings": (edit_info, "created with other settings"),
    "missing clip": (rewrite(lambda rows: rows.pop()), "6 clips listed, the files contain 5"),
    "duplicate clip": (rewrite(lambda rows: rows.append(rows[0])), "clips overlap"),
    "wrong shape": (
        rewrite(lambda rows: rows[0].update(latent_mean=b"\0" * 64)),
        "array shape does not match 3 frames",
    ),
    "NaN": (
        rewrite(lambda rows: rows[0].update(latent_logvar=np.full(3 * 4 * 64, np.nan, "<f2").tobytes())),
        "NaN or inf values",
    ),
    "wrong split": (rewrite(lambda rows: rows[0].update(split="train")), "wrong split train"),
    "wrong id": (
        rewrite(lambda rows: rows[0].update(start=1)),
        "clip_id does not match video_id and start",
    ),
    "wrong main person": (
        rewrite(lambda rows: rows[0].update(main_person=[0, 0, 0])),
        "keypoints differ from those of the main person",
    ),
    "missing person": (
        rewrite(lambda rows: rows[0].update(people_per_frame=[2, 2, 1])),
        "people do not match people_per_frame",
    ),
}


def test_intact_dataset_passes_verification(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_dataset(tmp_path)
    assert cli.main(["dataset", "verify", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path}: verified: 2 files, 2 videos, 6 clips\n"
    assert cli.main(["dataset", "info", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert "2 videos (1 train, 1 validation) in 6 clips, 18 frames, 0.0 minutes" in output
    assert "1 of 3 sources rejected, 0 duplicates; 2 files" in output and "1  decode: broken" in output
    assert cli.main(["dataset", "rejected", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"/{IDS[2]}\tdecode\tbroken\n"


def test_closed_output_pipe_is_no_error(tmp_path: Path) -> None:
    write_dataset(tmp_path)
    command = shlex.join([sys.executable, "-m", "pipelines.cli", "dataset", "info", str(tmp_path)])
    process = subprocess.run(
        ["bash", "-c", f"{command} | true; exit ${{PIPESTATUS[0]}}"], capture_output=True, text=True
    )
    assert (process.returncode, process.stderr) == (0, "")


def test_missing_file_is_reported_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    only_file(write_dataset(tmp_path)).unlink()
    assert cli.main(["dataset", "verify", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("clips/clips-") and line.endswith(": missing")


@pytest.mark.parametrize("fault", FAULTS)
def test_verify_detects_fault(tmp_path: Path, capsys: pytest.CaptureFixture[str], fault: str) -> None:
    tamper, message = FAULTS[fault]
    tamper(write_dataset(tmp_path))
    capsys.readouterr()
    assert cli.main(["dataset", "verify", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"tcan: error: {tmp_path}: ")
    assert re.search(message, captured.out), captured.out


def test_row_groups_and_files_have_the_configured_size(tmp_path: Path) -> None:
    """Clips of 1 MB: row groups of 2 MiB contain two clips; files end with the video that reaches 4 MB."""
    noise = np.random.default_rng(0)
    with writing(str(tmp_path)):
        writer = ShardWriter(str(tmp_path), {}, 4 * 10**6, 1e9)
        for video in range(4):
            rows = [
                dict.fromkeys(CLIP_SCHEMA.names)
                | {"clip_id": f"{video}-{i}", "video_id": str(video), "latent_mean": noise.bytes(10**6)}
                for i in range(3)
            ]
            writer.add_video(rows)
        writer.commit()
    files = [pq.ParquetFile(file) for file in (tmp_path / "clips").iterdir()]
    assert [file.metadata.num_rows for file in files] == [6, 6]
    assert [[f.metadata.row_group(g).num_rows for g in range(f.num_row_groups)] for f in files] == [
        [2, 2, 2]
    ] * 2


def test_forget_rejected_deletes_only_the_given_rejections_and_no_duplicates(tmp_path: Path) -> None:
    with writing(str(tmp_path)):
        writer = ShardWriter(str(tmp_path), {}, 2**30, 1e9)
        for name, step in {"a": "decode", "b": "pose", "elsewhere": "decode", "twin": "duplicate"}.items():
            writer.add_rejected(Source(f"/{name}", name, "1-1"), step, "broken")
            writer.commit()
        assert forget_rejected(str(tmp_path), {}, {"/a", "/b", "/twin"}) == 2
        assert set(read_contents(str(tmp_path), {}).rejected) == {
            ("/elsewhere", "elsewhere"),
            ("/twin", "twin"),
        }
        assert forget_rejected(str(tmp_path), {}, {"/a", "/b"}) == 0


def test_preview_shows_latents_and_poses(tmp_path: Path, pretrained_folder: Path) -> None:
    write_dataset(tmp_path / "data", fingerprint(load_part("vae", str(pretrained_folder))))
    out = tmp_path / "preview.png"
    assert (
        cli.main(
            [
                "dataset",
                "preview",
                str(tmp_path / "data"),
                f"--out={out}",
                f"--pretrained.vae={pretrained_folder}",
            ]
        )
        == 0
    )
    sheet = np.asarray(Image.open(out)).astype(int)
    assert sheet.shape == (6 * 64, 8 * 64, 3)
    # All frames of a clip decode to the same image, so deviations from its median belong to the poses.
    first = sheet[:64, :64]
    main, other = first[12:52, 8:13], first[22:42, 38:43]
    assert np.ptp(main, axis=-1).max() > 60  # in color
    assert np.abs(other - np.median(first, axis=(0, 1))).mean() > 10  # in gray

    with pytest.raises(UserError, match="another VAE"):
        preview(str(write_dataset(tmp_path / "other", "feed")), str(out), load_config())


def test_hands_and_faces_are_stored_if_enabled(
    tmp_path: Path, pretrained_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In wide frames, face and hand points are cropped like the body joint that they are copied from, also in the preview."""
    identity = IDENTITY | {"hand_fingerprint": "feed", "face_fingerprint": "beef"}
    people = np.tile(np.stack([person(100, 40), person(90, 10)]), (3, 1, 1))
    latent = np.zeros((3, 4, 8, 16), "<f2").tobytes()
    parts = {"width": 128, "latent_mean": latent, "latent_logvar": latent, "people": people.tobytes()}
    hands, faces = np.zeros((6, 2, 21, 3), "<f4"), np.zeros((6, 70, 3), "<f4")
    hands[:, 1] = people[:, :1]
    faces[:, 7] = people[:, 0]
    parts |= {"hands": hands.tobytes(), "faces": faces.tobytes()}
    vae = fingerprint(load_part("vae", str(pretrained_folder)))
    write_dataset(tmp_path / "data", vae, identity, parts)
    table = pq.read_table(only_file(tmp_path / "data"))
    assert table.schema.names == [*CLIP_SCHEMA.names, "hands", "faces"]
    clip = decode_row(table.to_pylist()[0])
    assert clip["people"][0, 0, 0] < 64
    assert np.array_equal(clip["faces"][:, 7], clip["people"][:, 0])
    assert np.array_equal(clip["hands"][:, 1, 5], clip["people"][:, 0])
    assert not clip["hands"][:, 0].any() and not clip["faces"][:, :7].any()
    assert cli.main(["dataset", "verify", str(tmp_path / "data")]) == 0

    out = tmp_path / "preview.png"
    command = [
        "dataset",
        "preview",
        str(tmp_path / "data"),
        f"--out={out}",
        f"--pretrained.vae={pretrained_folder}",
    ]
    assert cli.main(command) == 0
    x, y = clip["people"][0, 0, :2].astype(int)
    assert (np.asarray(Image.open(out))[y, x] == 255).all()

    write_dataset(tmp_path / "disabled", vae)
    assert pq.read_schema(only_file(tmp_path / "disabled")).remove_metadata().equals(CLIP_SCHEMA)
    write_dataset(tmp_path / "fewer", vae, identity, parts | {"hands": hands[1:].tobytes()})
    assert cli.main(["dataset", "verify", str(tmp_path / "fewer")]) == 2
    assert "hands or faces do not match the number of people" in capsys.readouterr().out


def test_missing_or_unfinished_dataset_is_a_user_error(tmp_path: Path) -> None:
    assert cli.main(["dataset", "verify", str(tmp_path)]) == 2
    write_dataset(tmp_path)
    (tmp_path / "dataset.json").unlink()
    with pytest.raises(UserError, match="not finished"):
        read_info(tmp_path)
    (tmp_path / "a.mp4").touch()
    for name in ("a.mp4", "missing"):
        with pytest.raises(
            UserError, match=rf"{name}: no dataset here \(no dataset\.json\); give the output"
        ):
            read_info(tmp_path / name)


def test_missing_and_damaged_files_are_user_errors_on_one_line(
    tmp_path: Path, pretrained_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_dataset(tmp_path / "data", fingerprint(load_part("vae", str(pretrained_folder))))
    (file,) = (data / "clips").glob("*.parquet")
    content = file.read_bytes()
    commands = (
        ["info", str(data)],
        ["preview", str(data), f"--out={tmp_path}/a.png", f"--pretrained.vae={pretrained_folder}"],
    )
    for damage, message in (
        (lambda: file.write_bytes(content[:-50]), f"{file}: cannot be read"),
        (file.unlink, f"{data}: {file.relative_to(data)} is missing; restore"),
    ):
        damage()
        for command in commands:
            assert cli.main(["dataset", *command]) == 2
            error = capsys.readouterr().err
            assert error.startswith(f"tcan: error: {message}") and error.count("\n") == 1

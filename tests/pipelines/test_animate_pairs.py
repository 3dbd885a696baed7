"""`tcan animate --pairs` on a local Ray cluster, with a local MLflow store."""

import csv
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from mlflow import MlflowClient

from pipelines import animate_pairs as module
from pipelines import staging, storage, tracking
from pipelines.animate_pairs import Animator, animate_pairs, read_pairs
from pipelines.config.parser import load_config
from pipelines.puppets.world import sample_clip, write_clip
from tcan.errors import UserError
from tcan.video import read_image, read_video, write_image, write_video
from tests.pipelines.test_cli import error_of


def write_table(path: Path, *rows: tuple[str, ...]) -> None:
    head = ("image", "driving", "out", "person", "driving_person")
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([head[: len(rows[0])], *rows])


def report_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_rerun_completes_missing_and_failed_pairs(
    ray_cluster: None, model_folder: Path, tmp_path: Path
) -> None:
    write_image(sample_clip("dance", 1, 1).frames[0], tmp_path / "hero.png")
    write_clip(sample_clip("dance", 2, 4), tmp_path / "dance")
    gap = sample_clip("dance", 3, 20).frames
    gap[6:14] = 0  # no person, for longer than the gap filling of joints
    write_video(gap, tmp_path / "gap.mp4", 24)
    write_table(
        tmp_path / "pairs.csv",
        ("hero.png", "dance.mp4", "out/first.mp4"),
        ("hero.png", "later.mp4", "out/second.gif"),
        ("hero.png", "", "out/third.mp4"),
        ("hero.png", "gap.mp4", str(tmp_path / "out" / "fourth")),
    )
    settings = {
        "animate.steps": 1,
        "animate.guidance_scale": 1,
        "animate.workers": 1,
        "tracking.folder": tmp_path / "runs",
    }
    config = load_config(*(word for key, value in settings.items() for word in (f"--{key}", str(value))))
    with pytest.raises(UserError, match=r"2 of 4 pairs failed, such as .*later\.mp4: no such video") as error:
        animate_pairs(tmp_path / "pairs.csv", model_folder, config)
    assert "\n" not in str(error.value)
    rows = report_of(tmp_path / "pairs.report.csv")
    assert [row["status"] for row in rows] == ["done", "failed", "failed", "done"]
    assert [row["frames"] for row in rows] == ["4", "0", "0", "20"]
    assert rows[2]["note"] == "empty driving in this row"
    assert "gap.mp4: no person found in frames 6-13 of 0-19" in rows[3]["note"]
    assert read_video(tmp_path / "out" / "first.mp4")[0].shape == (4, 64, 64, 3)
    assert read_image(tmp_path / "out" / "fourth" / "000019.png").shape == (64, 64, 3)

    client = MlflowClient(tracking.resolve_uri(config.tracking))
    (run,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert (run.data.tags["tcan.kind"], run.info.status) == ("animate", "FINISHED")
    metrics = {key: run.data.metrics[key] for key in ("pairs_done", "pairs_failed", "frames")}
    assert metrics == {"pairs_done": 2, "pairs_failed": 1, "frames": 24}
    artifacts = [item.path for item in client.list_artifacts(run.info.run_id)]
    assert "pairs.report.csv" in artifacts and "videos" in artifacts

    modified = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()}
    os.replace(tmp_path / "dance.mp4", tmp_path / "later.mp4")
    with pytest.raises(UserError, match="1 of 4 pairs failed"):
        animate_pairs(tmp_path / "pairs.csv", model_folder, config)
    statuses = [row["status"] for row in report_of(tmp_path / "pairs.report.csv")]
    assert statuses == ["skipped", "done", "failed", "skipped"]
    assert all(path.stat().st_mtime_ns == time for path, time in modified.items())
    assert len(read_video(tmp_path / "out" / "second.gif")[0]) == 4


class KillableAnimator(Animator):
    """A worker whose process ends, as if by the kernel's out-of-memory killer, at some pairs.

    Instead of a model, it loads a file with the number of processes that end while they load it.
    """

    def load(self) -> None:
        deaths = int(Path(self.model).read_text())
        if deaths:
            Path(self.model).write_text(str(deaths - 1))
            os._exit(1)

    def animate(self, pair: module.Outcome) -> dict[str, Any]:
        if "deadly" in pair.image:
            os._exit(1)
        return {"status": "done", "frames": 1}


@pytest.mark.slow
def test_worker_death_fails_only_its_pair_and_not_the_loading_of_the_model(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "Animator", KillableAnimator)
    names = ["a", "deadly", "b", "c"]
    pending = [module.Outcome(name, "dance.mp4", f"{name}.mp4") for name in names]
    config = load_config("--animate.workers", "1")
    (tmp_path / "model").write_text("4")
    finished = list(module._on_workers(pending, str(tmp_path / "model"), config, {}))
    assert sorted(outcome.image for outcome in finished) == sorted(names)
    assert [outcome.status for outcome in pending] == ["done", "failed", "done", "done"]
    assert pending[1].note == "deadly.mp4: the worker died 2 times, possibly out of memory"

    (tmp_path / "model").write_text("5")
    with pytest.raises(UserError, match="model: 5 workers in a row died while they loaded the model"):
        list(module._on_workers(pending, str(tmp_path / "model"), config, {}))


def test_csv_and_parquet_tables_give_the_same_pairs(tmp_path: Path) -> None:
    columns = {
        "out": ["a.mp4", "b"],
        "image": ["a.png", None],
        "driving": ["d.mp4", "/d.mp4"],
        "extra": [1, 2],
    }
    pyarrow.parquet.write_table(pa.table(columns), tmp_path / "pairs.parquet")
    (tmp_path / "pairs.csv").write_text("\ufeffextra,driving,image,out\n1,d.mp4,a.png,a.mp4\n2,/d.mp4, ,b\n")
    for name in ("pairs.parquet", "pairs.csv"):
        first, second = read_pairs(tmp_path / name)
        assert (first.image, first.driving) == (str(tmp_path / "a.png"), str(tmp_path / "d.mp4"))
        assert first.out == str(tmp_path / "a.mp4")
        assert (second.image, second.driving, second.out) == ("", "/d.mp4", str(tmp_path / "b"))


def test_pairs_in_a_bucket_are_read_rendered_and_skipped_when_complete(
    bucket: str, model_folder: Path, tmp_path: Path
) -> None:
    """Without Ray: its workers would need the address of the test's server."""
    write_image(sample_clip("dance", 1, 1).frames[0], tmp_path / "hero.png")
    write_clip(sample_clip("dance", 2, 3), tmp_path / "dance")
    staging.upload(tmp_path, f"{bucket}/pairs")
    staging.upload(model_folder, f"{bucket}/model")
    rows = (
        f"hero.png,{bucket}/pairs/dance.mp4,out/a.mp4",
        "hero.png,dance.mp4,out/b",
        f"hero.png,{tmp_path}/none.mp4,c.mp4",
    )
    storage.write(f"{bucket}/pairs/table.csv", "\n".join(("image,driving,out", *rows)).encode())
    pairs = read_pairs(f"{bucket}/pairs/table.csv")
    assert [pair.out.removeprefix(f"{bucket}/pairs/") for pair in pairs] == ["out/a.mp4", "out/b", "c.mp4"]
    assert pairs[2].driving == f"{tmp_path}/none.mp4"
    config = load_config("--animate.steps", "1", "--animate.guidance_scale", "1")
    animator = Animator(f"{bucket}/model", config, {})
    for pair in pairs[:2]:
        assert not module._exists(pair.out)
        fields = animator.animate(pair)
        assert fields["status"] == "done" and fields["frames"] == 3, fields
        assert module._exists(pair.out)
    assert read_video(staging.local_input(pairs[0].out))[0].shape == (3, 64, 64, 3)
    names = [name.rpartition("/")[2] for name in storage.list_files(pairs[1].out)]
    assert names == ["000000.png", "000001.png", "000002.png", "frames.json"]
    storage.delete(f"{pairs[1].out}/frames.json")  # as if the upload had been interrupted
    assert not module._exists(pairs[1].out)
    pairs[2].driving = f"{bucket}/pairs/none.mp4"
    assert (
        animator.animate(pairs[2])["note"]
        == f"{bucket}/pairs/none.mp4: no such file or folder; check the URI"
    )
    assert not [*Path(staging._folder().name).glob(f"{staging.TEMPORARY}*")]


def test_people_are_selected_by_row(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without Ray. The pose image of each result has its skeletons where the row's people are."""
    left, right = (sample_clip("dance", seed, 4) for seed in (2, 5))
    write_image(np.concatenate([left.frames[0], right.frames[0]], axis=1), tmp_path / "duo.png")
    write_video(np.concatenate([left.frames, right.frames], axis=2), tmp_path / "duo.mp4", 12)
    rows = (("left", "right"), ("", ""), ("200,60", "1"), ("left+right", "1+2"))
    names = [(str(tmp_path / "duo.png"), str(tmp_path / "duo.mp4"), str(tmp_path / str(i))) for i in range(4)]
    write_table(tmp_path / "pairs.csv", *((*name, *row) for name, row in zip(names, rows, strict=True)))
    config = load_config("--animate.steps", "1", "--animate.guidance_scale", "1", "--animate.width", "128")
    options = {"side_by_side": True, "person": "right"}
    animator, sides = Animator(str(model_folder), config, options), []
    for pair in read_pairs(tmp_path / "pairs.csv"):
        assert animator.animate(pair)["status"] == "done"
        drawn = read_image(Path(pair.out) / "000000.png")[:, 128:256].max(axis=(0, 2)) > 100
        sides.append([bool(drawn[:64].any()), bool(drawn[64:].any())])
    assert sides == [[True, False], [False, True], [False, True], [True, True]]

    for row, reason in (
        (("left+right", ""), "row 2: person left+right: 2 of the image, but"),
        (("", "0"), "row 2: driving_person 0: invalid person"),
        (("somebody", ""), "row 2: person somebody: invalid person"),
    ):
        write_table(tmp_path / "bad.csv", (*names[0], "left", "2"), (*names[1], *row))
        arguments = ("--pairs", str(tmp_path / "bad.csv"), "--model", str(model_folder))
        assert reason in error_of(capsys, "animate", *arguments)


def test_invalid_tables_are_user_errors(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    head = "image,driving,out\n"
    for name, text, reason in (
        ("missing.csv", None, "cannot be read (No such file or directory)"),
        ("pairs.xlsx", "text", "pass a table of pairs as .csv or .parquet"),
        ("pairs.parquet", "text", "cannot be read as a table"),
        ("bytes.csv", b"\xff\xfe\x00", "cannot be read as a table"),
        (
            "columns.csv",
            "image,video,out\n",
            "no column driving (columns: image, video, out); the table needs image, driving",
        ),
        ("empty.csv", head, "no pairs; add one row per animation"),
        (
            "cells.csv",
            "image,driving,out,person\na,b,c.mp4,310,95\n",
            "row 1: more cells than columns; quote",
        ),
        ("same.csv", f"{head}a,b,c.mp4\nd,e,c.mp4\n", "two pairs have the same output"),
    ):
        if text is not None:
            (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        arguments = ("--pairs", str(tmp_path / name), "--model", str(model_folder))
        assert reason in error_of(capsys, "animate", *arguments)
    write_table(tmp_path / "good.csv", ("a.png", "b.mp4", "c.mp4"))
    arguments = ("--pairs", str(tmp_path / "good.csv"), "--model", str(tmp_path / "missing"))
    assert "not a model folder" in error_of(capsys, "animate", *arguments)

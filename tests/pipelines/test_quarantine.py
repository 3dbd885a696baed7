"""Clips that crash the model process are rejected after a fixed number of attempts."""

import os
import signal

import pyarrow as pa
import ray
import ray.data

from pipelines.preprocess.quarantine import DEATHS, Quarantine, count_attempts
from pipelines.preprocess.schemas import DECODED_SCHEMA, ENCODED_SCHEMA


class CrashingModel:
    """Stand-in for the models that kills its process at frame 16 of video "bad"."""

    def __call__(self, clips: pa.Table) -> pa.Table:
        (row,) = clips.drop_columns(["frames"]).to_pylist()
        if (row["video_id"], row["start"]) == ("bad", 16):
            os.kill(os.getpid(), signal.SIGKILL)
        return pa.Table.from_pylist([row], ENCODED_SCHEMA)


def test_clip_that_always_crashes_the_models_rejects_its_video(ray_cluster: None) -> None:
    clips = [
        {"video_id": video, "source": f"{video}.mp4", "start": start, "frames": b""}
        for video in ("bad", "good")
        for start in (0, 16, 32)
    ]
    ends = [{"video_id": video, "source": f"{video}.mp4", "num_clips": 3} for video in ("bad", "good")]
    rows = (
        ray.data.from_arrow([pa.Table.from_pylist([row], DECODED_SCHEMA) for row in clips + ends])
        .map_batches(
            Quarantine,
            fn_constructor_args=(CrashingModel, count_attempts()),
            batch_size=1,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=2),
        )
        .take_all()
    )
    done = {(row["video_id"], row["start"]) for row in rows if row["reason"] is None and not row["num_clips"]}
    assert {("good", 0), ("good", 16), ("good", 32)} <= done
    assert ("bad", 16) not in done
    lost = [row for row in rows if row["reason"] is not None]
    assert {(row["video_id"], row["source"], row["step"]) for row in lost} == {("bad", "bad.mp4", "models")}
    assert f"the model process died {DEATHS} times at the clip from frame 16" in {
        row["reason"] for row in lost
    }
    assert sorted(row["video_id"] for row in rows if row["num_clips"] == 3) == ["bad", "good"]


def test_completed_attempts_are_not_counted_as_crashes(ray_cluster: None) -> None:
    """Ray recomputes the blocks that were lost with a node, so completed clips are processed again."""
    attempts = count_attempts()
    for _ in range(2 * DEATHS):
        assert ray.get(attempts.begin.remote("a", 0))
        attempts.end.remote("a", 0)
    for _ in range(DEATHS):
        assert ray.get(attempts.begin.remote("a", 16))
    assert not ray.get(attempts.begin.remote("a", 16))
    assert not ray.get(attempts.begin.remote("a", 32))
    assert ray.get(attempts.begin.remote("b", 16))

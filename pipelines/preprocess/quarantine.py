"""Rejection of videos with a clip that repeatedly kills the process of the models, for example by running out of memory.

Without it, Ray would restart the process and process the same clip again indefinitely.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import ray

from pipelines.preprocess.schemas import ENCODED_SCHEMA

DEATHS = 3  # process deaths at one clip; a lost node rarely hits the same clip this often


class Attempts:
    """Number of attempts at each unfinished clip. Runs as one Ray actor per job."""

    def __init__(self) -> None:
        self.num_attempts: Counter[tuple[str, int]] = Counter()
        self.rejected: set[str] = set()

    def begin(self, video_id: str, start: int) -> bool:
        """Record an attempt at a clip; return whether to process the clip.

        False if DEATHS attempts at this clip, or at another clip of the same video, have failed.
        """
        self.num_attempts[video_id, start] += 1
        if self.num_attempts[video_id, start] > DEATHS:
            self.rejected.add(video_id)
        return video_id not in self.rejected

    def end(self, video_id: str, start: int) -> None:
        """Record that a clip was processed."""
        del self.num_attempts[video_id, start]


def count_attempts() -> Any:
    """Create an `Attempts` actor. It lives as long as a handle to it exists."""
    return ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Attempts).remote()


class Quarantine:
    """Actor around the models: rows of DECODED_SCHEMA -> rows of ENCODED_SCHEMA, one clip per call.

    Args:
        make_models: creates `PoseAndLatents` in the process of the actor.
        attempts: handle from `count_attempts`, the same for all actors.
    """

    def __init__(self, make_models: Callable[[], Callable[[pa.Table], pa.Table]], attempts: Any) -> None:
        self.models = make_models()
        self.attempts = attempts

    def __call__(self, clips: pa.Table) -> pa.Table:
        (row,) = clips.select(["video_id", "source", "start"]).to_pylist()
        start = row.pop("start")
        if start is None:  # end-of-video row
            return self.models(clips)
        clip = row["video_id"], start
        if not ray.get(self.attempts.begin.remote(*clip)):
            reason = f"the model process died {DEATHS} times at the clip from frame {start}"
            return pa.Table.from_pylist([row | {"step": "models", "reason": reason}], ENCODED_SCHEMA)
        encoded = self.models(clips)
        self.attempts.end.remote(*clip)
        return encoded

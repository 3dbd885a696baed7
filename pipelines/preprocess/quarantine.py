"""What becomes of a clip that ends the process of the models each time, for want of memory, say: Ray would start that
process again and give it the clip again, without end. Here its video is rejected."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import ray

from pipelines.preprocess.schemas import ENCODED_SCHEMA

DEATHS = 3  # at one clip: that a machine is lost happens, but hardly so often


class Attempts:
    """How often each clip was begun that is not ended: a Ray actor, one for the job."""

    def __init__(self) -> None:
        self.begun: Counter[tuple[str, int]] = Counter()
        self.given_up: set[str] = set()

    def begin(self, video_id: str, start: int) -> bool:
        """Whether to try this clip: not if it was tried often enough, nor when another one of its video was."""
        self.begun[video_id, start] += 1
        if self.begun[video_id, start] > DEATHS:
            self.given_up.add(video_id)
        return video_id not in self.given_up

    def end(self, video_id: str, start: int) -> None:
        del self.begun[video_id, start]


def count_attempts() -> Any:
    """The handle of a new `Attempts`, which lives as long as somebody has it."""
    return ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Attempts).remote()


class Quarantine:
    """The actor around the models: rows of DECODED_SCHEMA -> rows of ENCODED_SCHEMA, a clip at a time.

    make_models: what makes `PoseAndLatents` in the actor's process. attempts: from `count_attempts`, the same for all actors.
    """

    def __init__(self, make_models: Callable[[], Callable[[pa.Table], pa.Table]], attempts: Any) -> None:
        self.models = make_models()
        self.attempts = attempts

    def __call__(self, clips: pa.Table) -> pa.Table:
        (row,) = clips.select(["video_id", "source", "start"]).to_pylist()
        start = row.pop("start")
        if start is None:  # the end of a video
            return self.models(clips)
        clip = row["video_id"], start
        if not ray.get(self.attempts.begin.remote(*clip)):
            reason = f"their process died {DEATHS} times at the clip from frame {start}"
            return pa.Table.from_pylist([row | {"stage": "models", "reason": reason}], ENCODED_SCHEMA)
        encoded = self.models(clips)
        self.attempts.end.remote(*clip)
        return encoded

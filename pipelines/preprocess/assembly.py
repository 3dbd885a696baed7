"""Assembly of the clips of each video into rows of the dataset, or into a rejection."""

import logging
import os
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np

from pipelines import storage
from pipelines.preprocess.person_crop import Crop, crop_around
from pipelines.preprocess.pose import person_height, tracked_people, unpack_people
from pipelines.preprocess.shards import ShardWriter, reason_kind
from pipelines.preprocess.sources import Source

logger = logging.getLogger(__name__)
LATENTS_IN_MEMORY = 4 * 2**20  # bytes per incomplete video; more are stored on disk


class VideoAssembler:
    """Collects the clips of each video, in any order, and passes complete videos and rejections to the writer.

    Latents of incomplete videos are stored on disk: one hour at 512 pixels has 6 GB of latents. Only the people are kept in
    memory; the filters on the main person apply when the video is complete.
    """

    def __init__(
        self,
        writer: ShardWriter,
        sources: list[Source],
        *,
        min_person_fraction: float,
        min_person_height: float,
        validation_fraction: float,
        only_main: bool = True,
    ) -> None:
        self.writer = writer
        self.sources = {source.video_id: source for source in sources}
        self.min_person_fraction = min_person_fraction
        self.min_person_height = min_person_height
        self.validation_fraction = validation_fraction
        self.only_main = only_main
        self.finished: set[str] = set()
        self._clips: dict[str, dict[int, dict[str, Any]]] = {}  # video_id -> start -> clip without latents
        self._latents: dict[str, _Latents] = {}
        self._num_clips: dict[str, int] = {}

    def add(self, row: dict[str, Any]) -> str | None:
        """Add a row of ENCODED_SCHEMA. Return None unless the row completes its video: "kept", or the kind of reason for its
        rejection (`reason_kind`).
        """
        video_id = row["video_id"]
        if video_id in self.finished:  # the video was rejected because of another clip
            return None
        if row["reason"] is not None:
            return self._reject(video_id, row["step"], row["reason"])
        clips = self._clips.setdefault(video_id, {})
        if row["num_clips"] is not None:
            self._num_clips[video_id] = row["num_clips"]
            if row["warning"]:
                logger.warning("%s: %s", row["source"], row["warning"])
        else:
            if video_id not in self._latents:
                self._latents[video_id] = _Latents(self.writer.folder)
            self._latents[video_id].put(row["start"], row.pop("latent_mean"), row.pop("latent_logvar"))
            clips[row["start"]] = row
        if len(clips) != self._num_clips.get(video_id):
            return None
        return self._complete(video_id, [clips[start] for start in sorted(clips)])

    def _complete(self, video_id: str, clips: list[dict[str, Any]]) -> str:
        people = [
            frame for clip in clips for frame in unpack_people(clip["people_per_frame"], clip["people"])
        ]
        height, width = clips[0]["height"], clips[0]["width"]
        keypoints, main_indices = tracked_people(people, height, width, self.only_main)
        canvas_height, canvas_width = clips[0]["canvas"]
        crop = crop_around(keypoints, height, width, (canvas_height, canvas_width))
        if reason := self._filter_person(keypoints[:, 0], crop):
            return self._reject(video_id, "pose", reason)
        self.writer.add_video(self._rows(clips, keypoints, main_indices, crop))
        self._finish(video_id)
        return "kept"

    def _filter_person(self, keypoints: np.ndarray, crop: Crop) -> str | None:
        """The reason to reject the video, or None if it passes the filters on the main person."""
        fraction = float(np.mean(crop.shows(keypoints)))
        if fraction < self.min_person_fraction:
            return (
                f"no person: visible in {fraction:.0%} of the frames, minimum {self.min_person_fraction:.0%}"
            )
        height = person_height(keypoints) / crop.height
        if height < self.min_person_height:
            return (
                f"person too small: {height:.0%} of the canvas height, minimum {self.min_person_height:.0%}"
            )
        return None

    def _rows(
        self, clips: list[dict[str, Any]], keypoints: np.ndarray, main_indices: list[int], crop: Crop
    ) -> Iterator[dict[str, Any]]:
        """Rows of the writer's schema, cropped; one clip's latents are in memory at a time.

        keypoints: `[F, P, 18, 3]` in pixels of the full frames, the main person first.
        """
        first, video_id = clips[0], clips[0]["video_id"]
        height, width = first["height"], first["width"]
        keypoints = crop.crop_keypoints(keypoints)
        latents = self._latents[video_id]
        mean = crop.crop_latents(latents.get(first["start"])[0], height, width)
        shared = {
            "source_version": self.sources[video_id].version,
            "split": assign_split(video_id, self.validation_fraction),
            "height": crop.height,
            "width": crop.width,
            "reference_latent_mean": mean[: len(mean) // first["num_frames"]],
            "reference_keypoints": keypoints[0, 0].tobytes(),
            "tracked_people": keypoints.shape[1],
        }
        offset = 0
        for clip in clips:
            span = slice(offset, offset := offset + clip["num_frames"])
            mean, logvar = (crop.crop_latents(both, height, width) for both in latents.get(clip["start"]))
            points = {
                name: crop.crop_keypoints(np.frombuffer(clip[name], "<f4").reshape(-1, 3)).tobytes()
                for name in ("people", "hands", "faces")
                if clip.get(name) is not None
            }
            values = {
                "clip_id": f"{video_id}-{clip['start']:06d}",
                "crop": crop.source_box(clip["crop"], width),
                "latent_mean": mean,
                "latent_logvar": logvar,
                "keypoints": keypoints[span].tobytes(),
                "main_person": main_indices[span],
            }
            row = clip | shared | points | values
            yield {name: row[name] for name in self.writer.schema.names}

    def _reject(self, video_id: str, step: str, reason: str) -> str:
        self.writer.add_rejected(self.sources[video_id], step, reason)
        self._finish(video_id)
        return reason_kind(step, reason)

    def _finish(self, video_id: str) -> None:
        self.finished.add(video_id)
        self._clips.pop(video_id, None)
        if latents := self._latents.pop(video_id, None):
            latents.close()


class _Latents:
    """The latents of one video's clips, in memory or, above LATENTS_IN_MEMORY, in an unnamed temporary file.

    The file is in the dataset's folder, which needs the disk space anyway; for a bucket, in the local temporary folder.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        local = None if storage.is_remote(folder) else folder
        self._file = tempfile.SpooledTemporaryFile(  # noqa: SIM115 - closed by `close`
            LATENTS_IN_MEMORY, prefix=".", suffix=".partial", dir=local
        )
        self._spans: dict[int, tuple[int, int]] = {}  # start -> (offset, bytes) of mean and logvar

    def put(self, start: int, mean: bytes, logvar: bytes) -> None:
        with storage.user_errors(self.folder):
            offset = self._file.seek(0, os.SEEK_END)
            self._file.write(mean + logvar)
        self._spans[start] = offset, len(mean) + len(logvar)

    def get(self, start: int) -> tuple[bytes, bytes]:
        offset, size = self._spans[start]
        self._file.seek(offset)
        both = self._file.read(size)
        return both[: size // 2], both[size // 2 :]

    def close(self) -> None:
        self._file.close()


def assign_split(video_id: str, validation_fraction: float) -> str:
    """Split of a video. It depends on the id only, which is a uniformly distributed digest, so adding videos never changes it."""
    return "validation" if int(video_id, 16) < validation_fraction * 16 ** len(video_id) else "train"

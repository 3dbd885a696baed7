"""The work behind the page: detect poses, preview the retargeting, animate; one job at a time on the device."""

import itertools
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from torch import Tensor

from pipelines.animate import Animation, Inputs, generate_frames, prepare_motion, side_by_side
from pipelines.config import Config
from pipelines.inference import memory_advice
from pipelines.match import Motion, check_character, clean_people
from pipelines.pose import number_labels, overlay
from tcan.errors import UserError
from tcan.pipeline import TCANPipeline
from tcan.pose import find_people
from tcan.pose.tracking import People, numbered_people
from tcan.video import VideoFrames, is_image, read_image, write_image, write_video

OVERLAY_SIDE = 360  # pixels of the shorter side of the pose overlays

Progress = Callable[[int, int, str], None]
"""Called with the number of finished steps, of all steps, and what is done."""


class Cancelled(Exception):
    """The job was cancelled; the message says when."""


class Job:
    """One use of the device, which another thread can cancel."""

    def __init__(self) -> None:
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    def check(self, when: str) -> None:
        """End the job if it is cancelled.

        Raises:
            Cancelled: it is.
        """
        if self.cancelled:
            raise Cancelled(f"Cancelled {when}.")


@dataclass(frozen=True)
class DetectedPeople:
    """The people of an image or of a driving video."""

    path: Path
    fps: float  # 1 for an image
    people: People  # keypoints [P, 18, 3] of each frame, in pixels
    height: int
    width: int
    count: int  # people that can be selected, numbered from 1
    image: np.ndarray | None = None  # uint8 [H, W, 3]; None for a video


@dataclass
class Session:
    """State of one open page."""

    folder: Path
    """Of all files that are made for it."""
    character: DetectedPeople | None = None
    driver: DetectedPeople | None = None
    motion: Motion | None = None
    job: Job = field(default_factory=Job)
    uploads: set[Path] = field(default_factory=set)
    numbers: Iterator[int] = field(default_factory=itertools.count)
    closed: bool = False

    def new_job(self) -> Job:
        self.job = Job()
        return self.job

    def new_folder(self) -> Path:
        """A new folder for files, so that browsers do not show older files of the same name."""
        folder = self.folder / str(next(self.numbers))
        folder.mkdir(parents=True)
        return folder


class Studio:
    """A loaded model and the rules for its use.

    Args:
        max_frames: maximum number of frames of a driving video.
    """

    def __init__(self, pipe: TCANPipeline, config: Config, max_frames: int) -> None:
        self.pipe, self.config, self.max_frames = pipe, config, max_frames
        self._device = threading.Lock()

    def read_image(self, path: Path, session: Session) -> tuple[DetectedPeople, Path]:
        """Detect the people of an image. Returns them, and an image of their poses and numbers.

        Raises:
            UserError: not an image; nobody found.
            Cancelled: the job was cancelled.
        """
        image, job = read_image(path), session.new_job()
        with self._use_device(job):
            people, height, width = find_people(self.pipe.pose_detector, [image])
        found = _numbered(DetectedPeople(path, 1.0, people, height, width, 0, image))
        preview = session.new_folder() / f"{path.stem}-poses.png"
        write_image(next(_overlays(found, [image])), preview)
        return found, preview

    def read_video(self, path: Path, session: Session, progress: Progress) -> tuple[DetectedPeople, Path]:
        """Detect the people of a driving video. Returns them, and a video of their poses and numbers.

        Raises:
            UserError: not a video, or too long; nobody found.
            Cancelled: the job was cancelled.
        """
        if is_image(path):
            raise UserError(f"{path}: an image, not a video; choose a driving video")
        video, job = VideoFrames(path), session.new_job()
        count = max(video.num_frames, 1)
        if count > self.max_frames:
            raise UserError(
                f"{path}: {count} frames ({count / video.fps:.0f} s), more than the maximum of {self.max_frames}; cut "
                "the video, or restart tcan app with a larger --max_frames"
            )
        with self._use_device(job):
            frames = _watched(video, job, lambda done: progress(done, count, "detecting poses"))
            people, height, width = find_people(self.pipe.pose_detector, frames)
        found = _numbered(DetectedPeople(path, video.fps, people, height, width, 0))
        preview = session.new_folder() / f"{path.stem}-poses.mp4"
        frames = _watched(video, job, lambda done: progress(done, count, "drawing poses"))
        write_video(_overlays(found, frames), preview, video.fps)
        return found, preview

    def match(
        self, character: DetectedPeople, driver: DetectedPeople, person: list[str], driving_person: list[str]
    ) -> Motion:
        """Retarget the poses of the selected people of the video to those of the image, and check them.

        Args:
            person, driving_person: numbers of the people, such as ["1"].

        Raises:
            UserError: an invalid selection, or one that does not match; see `pipelines.animate.read_motion`.
        """
        if len(person) != len(driving_person) or not person:
            raise UserError(
                f"people: {len(person)} selected in the image, {len(driving_person)} in the driving video; select the same "
                "number, at least one"
            )
        assert character.image is not None
        drivers = clean_people(
            driver.people,
            driver.height,
            driver.width,
            "+".join(driving_person),
            driver.path.name,
            self.config,
        )
        characters = []
        if self.config.animate.retarget != "none":
            selected = clean_people(
                character.people,
                character.height,
                character.width,
                "+".join(person),
                character.path.name,
                self.config,
            )
            characters = [check_character(clean.poses[0], character.path.name) for clean in selected]
        animation = Animation(Path(character.path.name), Path(), Path(driver.path.name))
        inputs = Inputs(character.image, driver.fps, None, drivers, (driver.height, driver.width), characters)
        return prepare_motion(self.pipe, animation, inputs, self.config)

    def animate(
        self, session: Session, sampling: dict[str, Any], seed: int, progress: Progress
    ) -> tuple[Path, Path]:
        """Generate the video of a session. Returns the result, and the result next to image and poses.

        Args:
            sampling: fields of `animate` in the configuration that replace its values.

        Raises:
            UserError: a value out of its range; out of GPU memory; a full disk.
            Cancelled: the job was cancelled. The denoising ends after its current step.
        """
        motion, character, driver = session.motion, session.character, session.driver
        if motion is None or character is None or driver is None:
            raise UserError("animate: nothing to animate; choose an image and a driving video first")
        config = replace(self.config, seed=seed, animate=replace(self.config.animate, **sampling))
        folder, job = session.new_folder(), session.new_job()
        result = folder / f"{character.path.stem}-{driver.path.stem}.mp4"
        comparison = result.with_name(f"{result.stem}-side-by-side.mp4")
        height, width = motion.image.shape[:2]
        with self._use_device(job), memory_advice(config):
            frames = generate_frames(self.pipe, motion, config, self._on_step(config, job, progress))
            job.check("during the denoising")
            count = len(motion.poses)
            write_video(
                _watched(frames, job, lambda done: progress(done, count, "decoding frames")),
                result,
                driver.fps,
            )
        drawn = (self.pipe.draw(pose[None], height, width)[0] for pose in motion.poses)
        write_video(side_by_side(motion.image, drawn, VideoFrames(result)), comparison, driver.fps)
        return result, comparison

    @staticmethod
    def _on_step(config: Config, job: Job, progress: Progress) -> Callable[..., None]:
        """Callback of the denoising: progress with the time left, and its end if the job is cancelled."""
        steps, start = config.animate.steps, time.monotonic()
        progress(0, steps, "denoising")

        def on_step(pipe: TCANPipeline, step: int, _: int, tensors: dict[str, Tensor]) -> None:
            done = step + 1
            if job.cancelled:
                pipe._interrupt = True
                print(f"animation cancelled after step {done} of {steps}", flush=True)
                return
            left = (time.monotonic() - start) / done * (steps - done)
            progress(done, steps, f"denoising, about {duration(left)} left")

        return on_step

    @contextmanager
    def _use_device(self, job: Job) -> Iterator[None]:
        """Wait for the device. The queue of the page admits one job too, but forgets a cancelled one before it ends."""
        while not self._device.acquire(timeout=0.1):
            job.check("before its start")
        try:
            job.check("before its start")
            yield
        finally:
            self._device.release()


def duration(seconds: float) -> str:
    """A duration for people, such as 8 s, 2 min or 1 h 5 min."""
    if seconds < 90:
        return f"{max(round(seconds), 1)} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _watched(frames: Iterable[np.ndarray], job: Job, progress: Callable[[int], None]) -> Iterator[np.ndarray]:
    """The frames, with progress, until the job is cancelled.

    Raises:
        Cancelled: the job was cancelled.
    """
    for done, frame in enumerate(frames):
        job.check("while frames were processed")
        progress(done)
        yield frame


def _numbered(found: DetectedPeople) -> DetectedPeople:
    """With the number of people that can be selected.

    Raises:
        UserError: nobody was found.
    """
    if not any((body[:, 2] > 0).any() for bodies in found.people for body in bodies):
        raise UserError(f"{found.path}: no person found; use one that shows the full body")
    return replace(found, count=len(numbered_people(found.people, found.height, found.width)))


def _overlays(found: DetectedPeople, frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """The darkened frames with the poses of all people and their numbers, with OVERLAY_SIDE pixels on the shorter side."""
    scale = OVERLAY_SIDE / min(found.height, found.width)
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    height, width = round(found.height * scale), round(found.width * scale)
    people = [bodies * np.array([scale, scale, 1], np.float32) for bodies in found.people]
    labels = number_labels(people, height, width)
    for frame, bodies, label in zip(frames, people, labels, strict=True):
        yield overlay(cv2.resize(frame, (width, height), interpolation=method), bodies, label)

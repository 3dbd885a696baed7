"""The poses of an animation, and the verdict on them before anything is generated.

tcan animate --image hero.png --driving dance.mp4 --model run/model --out hero.mp4 --dry-run
tcan pose dance.mp4 --match hero.png --out match.png
"""

import logging
import math
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from pipelines.config import Config
from pipelines.inference import create_folder
from tcan.crop import Box, Size, crop_box, fit_image, fit_keypoints, nearest_size, pad_box, usual_sizes
from tcan.errors import UserError
from tcan.person_box import describe_crop, person_box
from tcan.pose import PoseDetector, draw_poses, find_people, retarget
from tcan.pose.cleaning import CleanPoses, clean_poses
from tcan.pose.match import Finding, match_poses, outside_frame
from tcan.pose.openpose import body_detector
from tcan.pose.parts import BODY
from tcan.pose.skeleton import NECK, NOSE
from tcan.pose.tracking import People, select_people
from tcan.video import write_image

SAMPLES = 8
COLUMNS = 3
SIDE = 240  # pixels of the shorter side of the output in the sheet
MARGIN = 0.2  # around the output in the sheet, as a fraction of its sides
BACKGROUND, BORDER, WARNING = 32, (200, 200, 200), (255, 80, 80)

logger = logging.getLogger(__name__)


@dataclass
class Motion:
    """Inputs of the denoising loop, and what is known about them."""

    image: np.ndarray  # uint8 [H, W, 3], fitted to the output
    poses: np.ndarray  # [F, P, N, 3] in pixels of the output, N: 18, or 130 with hands and faces
    characters: np.ndarray | None  # [P, 18, 3] in pixels of the output; None without retargeting
    findings: list[tuple[int, Finding]]  # index of the person, result of a check


def clean_people(
    people: People, height: float, width: float, person: str, source: str, config: Config
) -> list[CleanPoses]:
    """The selected people of each frame, in the order of the selection.

    Raises:
        UserError: see `tcan.pose.tracking.select_people`; a person who is in no frame.
    """
    selected = select_people(people, height, width, person, source)
    return [clean_poses(poses, source, config.animate.smoothing_window) for poses in selected]


def output_size(image: np.ndarray, trained: Size, config: Config) -> Size:
    """Height and width of the result: those of the configuration, else of the aspect ratio of the image.

    If only one is set, the other follows, with an aspect ratio from 1:2 to 2:1. If none is set, it is one of `usual_sizes`,
    so a compiled model meets few sizes.

    Args:
        image: uint8 `[H, W, 3]`.
        trained: training size of the model; only its area is used.
    """
    height, width = config.animate.height, config.animate.width
    aspect = min(max(image.shape[1] / image.shape[0], 0.5), 2)
    if height is None and width is None:
        side = max(64, round(math.sqrt(trained[0] * trained[1]) / 64) * 64)
        return nearest_size(image.shape[0], image.shape[1], usual_sizes(side))
    if height is None:
        height = max(8, round(width / aspect / 8) * 8)
    return height, width or max(8, round(height * aspect / 8) * 8)


def match_motion(
    image: np.ndarray,
    drivers: list[CleanPoses],
    characters: list[np.ndarray],
    source_size: tuple[int, int] | None,
    config: Config,
    size: tuple[int, int],
    source: str,
) -> Motion:
    """Fit the image and the driving poses to the output, and check them.

    Args:
        image: uint8 `[H, W, 3]`.
        drivers: driving poses.
        characters: keypoints `[18, 3]` in pixels of the image, one per driver; ignored without retargeting.
        source_size: height and width that the driving poses refer to; used without retargeting.
        config: `animate.fit` chooses how the image, and without retargeting also the poses, get the aspect ratio of the output.
        size: height and width of the output.
        source: name of the image in messages.

    Raises:
        UserError: the numbers of people differ; see `tcan.pose.retarget.retarget`.
    """
    method = config.animate.retarget
    if method == "none":
        assert source_size is not None
        fit = pad_box if config.animate.fit == "pad" else crop_box
        poses = [fit_keypoints(d.poses, *source_size, *size, fit(*source_size, *size)) for d in drivers]
        findings = [(i, f) for i, d in enumerate(drivers) for f in match_poses(d, poses[i], *size)]
        fitted_image = fit_image(image, *size, fit(image.shape[0], image.shape[1], *size))
        return Motion(fitted_image, np.stack(poses, axis=1), None, findings)
    if len(characters) != len(drivers):
        raise UserError(
            f"{source}: {len(characters)} people selected, but {len(drivers)} in the driving motion; select the same number "
            "with --person and --driving_person"
        )
    sizes = (image.shape[0], image.shape[1], *size)
    box = _image_box(characters, sizes, config, source)
    fitted = [fit_keypoints(character, *sizes, box=box) for character in characters]
    poses = [retarget(d.poses, c, method) for d, c in zip(drivers, fitted, strict=True)]
    findings = [(i, f) for i, d in enumerate(drivers) for f in match_poses(d, poses[i], *size, fitted[i])]
    return Motion(fit_image(image, *size, box), np.stack(poses, axis=1), np.stack(fitted), findings)


def _image_box(
    characters: list[np.ndarray], sizes: tuple[int, int, int, int], config: Config, source: str
) -> Box:
    """The part of the image that the output shows; a warning names a crop that is not at the center.

    sizes: height and width of the image and of the output.
    """
    if config.animate.fit == "pad":
        return pad_box(*sizes)
    people = np.stack(characters)
    box = person_box(people, *sizes)
    if box != crop_box(*sizes):
        logger.warning("%s: %s", source, describe_crop(people, box))
    return box


def find_characters(
    detector: PoseDetector, image: np.ndarray, person: str, source: str, config: Config
) -> list[np.ndarray]:
    """Keypoints `[18, 3]` of the selected people of the image.

    Raises:
        UserError: a person who was not found, or without neck and nose.
    """
    people, height, width = find_people(body_detector(detector), [image])
    found = clean_people(people, height, width, person, source, config)
    return [check_character(clean.poses[0], source) for clean in found]


def check_character(character: np.ndarray, source: str | Path) -> np.ndarray:
    """The joints `[18, 3]` of the keypoints.

    Raises:
        UserError: neck or nose is missing.
    """
    if not (character[[NECK, NOSE], 2] > 0).all():
        raise UserError(
            f"{source}: no person found with visible neck and nose; use an image that shows a person from the front, or "
            "pass keypoints with --character"
        )
    return character[BODY]


def problems(motion: Motion) -> list[str]:
    """Texts of the findings that are problems."""
    return [finding_text(motion, index, finding) for index, finding in motion.findings if finding.problem]


def refuse_problems(motion: Motion, source: str, strict: bool) -> None:
    """Refuse to continue with poses that do not match the image.

    Raises:
        UserError: `strict`, and there are problems.
    """
    if strict and (found := problems(motion)):
        raise UserError(f"{source}: {'; '.join(found)}; use other inputs, or omit --strict")


def print_verdict(motion: Motion) -> None:
    """Print all findings, one a line."""
    for index, finding in motion.findings:
        kind = "problem" if finding.problem else "ok"
        print(f"{kind:<8}{finding.check:<8}  {finding_text(motion, index, finding)}", flush=True)


def report(motion: Motion, preview: Path) -> None:
    """Write the preview and print all findings."""
    create_folder(preview.parent)
    write_image(contact_sheet(motion), preview)
    print_verdict(motion)
    count = len(problems(motion))
    print(f"{preview}: {len(motion.poses)} frames, {count} problems", flush=True)


def finding_text(motion: Motion, index: int, finding: Finding) -> str:
    """The text of a finding, with the number of the person if there are several."""
    return finding.text if motion.poses.shape[1] == 1 else f"person {index + 1}: {finding.text}"


def contact_sheet(motion: Motion) -> np.ndarray:
    """The image with the character's pose, then with the poses of sampled frames: uint8 RGB.

    The margin shows joints outside the output; such frames have a red border.
    """
    frames = np.unique(np.linspace(0, len(motion.poses) - 1, SAMPLES).round().astype(int))
    cells = []
    if motion.characters is not None:
        cells.append(_cell(motion, motion.characters, "image"))
    cells += [_cell(motion, motion.poses[frame], f"frame {frame}") for frame in frames]
    cells += [np.full_like(cells[0], BACKGROUND)] * (-len(cells) % COLUMNS)
    rows = [np.concatenate(cells[i : i + COLUMNS], axis=1) for i in range(0, len(cells), COLUMNS)]
    return np.concatenate(rows)


def _cell(motion: Motion, people: np.ndarray, label: str) -> np.ndarray:
    """The darkened image with poses `[P, N, 3]` and a label."""
    height, width = motion.image.shape[:2]
    scale = SIDE / min(height, width)
    h, w = round(height * scale), round(width * scale)
    top, left = round(h * MARGIN), round(w * MARGIN)
    canvas = np.full((h + 2 * top, w + 2 * left, 3), BACKGROUND, np.uint8)
    image = cv2.resize(motion.image, (w, h), interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    canvas[top : top + h, left : left + w] = image // 2
    scaled = people.copy()
    scaled[..., :2] = people[..., :2] * scale + (left, top)
    strokes = draw_poses(scaled[None], canvas.shape[0], canvas.shape[1], 3)[0]
    canvas = np.where(strokes.any(axis=-1, keepdims=True), strokes, canvas)
    color = WARNING if outside_frame(people[:, BODY], height, width).any() else BORDER
    cv2.rectangle(canvas, (left - 1, top - 1), (left + w, top + h), color, 1)
    cv2.putText(canvas, label, (left, top - 8), cv2.FONT_HERSHEY_SIMPLEX, 0.5, color, 1, cv2.LINE_AA)
    return canvas

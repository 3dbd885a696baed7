"""Contact sheets of the corpus of synthetic skeletons.

python -m tests.tcan.pose.corpus_sheet FOLDER

A row is a case: the pose of the image, three frames of the driver, and the same frames after retargeting. Gray lines behind the
result are the pose that follows from the geometry. The border is that of the image; what is outside it is not animated.
Rows of crossing people have seven frames: red is the person selected as the left one, blue the right one, dark green who was
not selected.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

from tcan.pose.draw import draw_poses
from tcan.pose.retarget import retarget
from tcan.video import write_image
from tests.tcan.pose.test_corpus import (
    CASES,
    CHARACTERS,
    CROSSINGS,
    DRIVERS,
    FRONT,
    SIZE,
    VERDICTS,
    driver,
    run,
    run_crossing,
    run_driver,
)

SHOWN = (0, 4, 8)
CROSSING_SHOWN = (0, 6, 10, 12, 14, 18, 23)
NARROW, WIDE = 8, SIZE // 4
"""Pixels that are drawn around the image."""
CELL = 170
ROWS = 7


def cell(poses: np.ndarray, behind: np.ndarray | None = None, margin: int = NARROW) -> np.ndarray:
    """Draw poses `[18, 3]` or `[P, 18, 3]` in the image and around it, in front of gray ones."""
    side = SIZE + 2 * margin
    shift = np.array([margin, margin, 0], np.float32)
    image = draw_poses((poses + shift)[None], side, side, 3)[0]
    if behind is not None:
        gray = draw_poses((behind + shift)[None], side, side, 5)[0].max(axis=2, keepdims=True) // 3
        image = np.where(image.any(axis=2, keepdims=True), image, gray)
    cv2.rectangle(image, (margin, margin), (margin + SIZE, margin + SIZE), (120, 120, 120), 2)
    image = cv2.resize(image, (CELL, CELL), interpolation=cv2.INTER_AREA)
    return np.pad(image, ((0, 2), (0, 2), (0, 0)), constant_values=40)


def fitted(poses: np.ndarray) -> np.ndarray:
    """Scale poses `[F, 18, 3]` of any size into the image, together."""
    found = poses[poses[..., 2] > 0][:, :2]
    low, high = found.min(axis=0), found.max(axis=0)
    factor = 0.9 * SIZE / (high - low).max()
    result = poses.copy()
    result[..., :2] = (poses[..., :2] - (low + high) / 2) * factor + SIZE / 2
    return result


def row(
    name: str, character: np.ndarray, driving: np.ndarray, result: np.ndarray, expected: np.ndarray | None
) -> np.ndarray:
    shown = fitted(driving)
    cells = [cell(character), *(cell(shown[f]) for f in SHOWN)]
    if expected is None:
        cells += [cell(result[f], margin=WIDE) for f in SHOWN]
    else:
        cells += [cell(result[f], expected[f]) for f in SHOWN]
    return labelled(name, cells)


def labelled(name: str, cells: list[np.ndarray]) -> np.ndarray:
    image = np.concatenate(cells, axis=1)
    cv2.putText(image, name, (6, 16), cv2.FONT_HERSHEY_SIMPLEX, 0.42, (255, 255, 255), 1, cv2.LINE_AA)
    return image


def crossing_row(speed: float, gap: int) -> np.ndarray:
    case = run_crossing(speed, gap)
    cells = []
    for f in CROSSING_SHOWN:
        one, other = (cell(case.selected[k][f], margin=WIDE).max(axis=2) for k in (0, 1))
        true = cell(np.stack([case.left[f], case.right[f]]), margin=WIDE) // 4
        cells.append(np.maximum(np.stack([one, np.minimum(one, other), other], axis=2), true))
    return labelled(f"crossing at {speed:g} px per frame, {gap} frames with one person", cells)


def groups() -> Iterator[tuple[str, list[np.ndarray]]]:
    """Rows of each group of cases, by the name of its sheets."""
    rows = []
    for name in CASES:
        case = run(name)
        rows.append(row(name, case.character, case.driving, case.result, case.expected))
    yield "characters", rows
    for who, scale in CHARACTERS.items():
        rows = []
        for name in DRIVERS:
            case = run_driver(name, scale)
            rows.append(
                row(f"{who}; driver: {name}", case.character, case.driving, case.result, case.expected)
            )
        yield f"drivers-{who.replace(' ', '-')}", rows
    rows = []
    for name, (poses, check, _) in VERDICTS.items():
        result = retarget(driver(poses).poses, FRONT)
        rows.append(row(f"{name}; problem: {check or 'none'}", FRONT, poses, result, None))
    yield "verdicts", rows
    yield "crossings", [crossing_row(*case) for case in CROSSINGS]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in groups():
        for number, first in enumerate(range(0, len(rows), ROWS), start=1):
            path = folder / f"{name}-{number}.png"
            write_image(np.concatenate(rows[first : first + ROWS]), path)
            print(f"{path}: {len(rows[first : first + ROWS])} cases")


if __name__ == "__main__":
    main()

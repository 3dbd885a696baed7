"""Heatmap peaks at frame resolution, without computing most of the resized maps.

controlnet_aux's `Body` resizes each map by 8, crops the padding, resizes to the frame, and blurs. All of these steps
are linear and separable, so together they are one matrix per axis (`ResizedAxis`), applied to the network's small map.
"""

from collections.abc import Sequence
from functools import lru_cache

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d
from torch import Tensor

from tcan.pose.skeleton import STRIDE

PEAK_THRESHOLD = 0.1
"""Minimum of the blurred heatmap at a joint."""
TILE = 24
"""Tile side in pixels, about the width of a joint's peak."""
TILES_PER_BATCH = 4096
"""Bounds the memory of the peak search."""
MIN_MAGNITUDE = 1e-12
"""Smaller values are set to 0 before float32 products."""
CANDIDATE_MARGIN = 1e-4
"""Larger than the float32 error of a blurred map."""


class ResizedAxis:
    """Resize of one axis of a map to one axis of the frame, as matrices.

    Attributes:
        resize: float64 `[pixels, cells]`.
        blur: float64 `[pixels, cells]`, the resize followed by the Gaussian blur.
        pixels: `[T, TILE + 2]`, the pixels of each tile and one neighbor at either end.
        tiles: float32 `[T, TILE + 2, cells]`, the rows of `blur` for each tile.
        bound: `[T, cells]`, the maximum magnitude of each column of `tiles`.
    """

    def __init__(self, resize: NDArray[np.float64], sigma: float):
        self.resize = torch.from_numpy(resize)
        self.blur = torch.from_numpy(gaussian_filter1d(resize, sigma, axis=0))
        pixels = torch.arange(-(-len(resize) // TILE))[:, None] * TILE + torch.arange(-1, TILE + 1)
        self.pixels = pixels.clamp(0, len(resize) - 1)
        self.tiles = self.blur.float()[self.pixels]
        self.bound = self.tiles.abs().amax(1)


def interpolation_method(scale: float) -> int:
    """OpenCV interpolation flag that `Body` uses for a scale factor."""
    return cv2.INTER_AREA if scale < 1 else cv2.INTER_LANCZOS4


def resized_axes(
    map_size: Sequence[int],
    input_size: Sequence[int],
    frame_size: Sequence[int],
    sigma: float,
) -> tuple[ResizedAxis, ResizedAxis]:
    """The vertical and horizontal `ResizedAxis` from maps to frames.

    Args:
        map_size: height and width of the maps in cells.
        input_size: height and width in pixels of the network's images, without padding.
        frame_size: height and width in pixels of the frames.
        sigma: standard deviation of the blur in frame pixels.
    """
    # `Body` chooses one interpolation method for both axes.
    method = interpolation_method(sum(frame_size) / sum(input_size))
    rows, columns = (
        _resized_axis(*sizes, method, sigma) for sizes in zip(map_size, input_size, frame_size, strict=True)
    )
    return rows, columns


@lru_cache(maxsize=16)
def _resized_axis(cells: int, input_pixels: int, pixels: int, method: int, sigma: float) -> ResizedAxis:
    def resize_matrix(old: int, new: int, method: int) -> NDArray[np.float64]:
        # The columns of a linear operation's matrix are its results on the unit vectors.
        return cv2.resize(np.eye(old, dtype=np.float32), (old, new), interpolation=method).astype(np.float64)

    by_stride = resize_matrix(cells, cells * STRIDE, cv2.INTER_LANCZOS4)
    return ResizedAxis(resize_matrix(input_pixels, pixels, method) @ by_stride[:input_pixels], sigma)


def find_peaks(heatmap: Tensor, rows: ResizedAxis, columns: ResizedAxis) -> tuple[Tensor, Tensor]:
    """Find the peaks of the resized, blurred heatmaps `[B, 18, h, w]`.

    float32 is accurate enough to find candidates, but it cannot rank two neighbors of almost equal value: if both
    became peaks, one person would be detected as two. Therefore, the few candidates are compared in float64.

    Returns:
        Peaks `[N, 4]` (frame, joint, y, x), sorted in that order, and their scores `[N]` in float64: the unblurred map.
    """
    height, width = len(rows.blur), len(columns.blur)
    candidates = _find_candidates(heatmap, rows, columns)
    frame, joint, y, x = candidates.unbind(1)
    maps = heatmap.double()[frame, joint]  # [N, h, w]
    value = _values_at(maps, rows.blur, columns.blur, y, x)
    is_peak = value > PEAK_THRESHOLD
    for v, u in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
        inside = (v >= 0) & (v < height) & (u >= 0) & (u < width)
        neighbor = _values_at(maps, rows.blur, columns.blur, v.clamp(0, height - 1), u.clamp(0, width - 1))
        is_peak &= (value >= neighbor) | ~inside
    return candidates[is_peak], _values_at(maps, rows.resize, columns.resize, y, x)[is_peak]


def _values_at(maps: Tensor, rows: Tensor, columns: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Values `[N]` of the resized maps at pixels (y, x), from maps `[N, h, w]`."""
    return torch.einsum("nh,nhw,nw->n", rows[y], maps, columns[x])


def _find_candidates(heatmap: Tensor, rows: ResizedAxis, columns: ResizedAxis) -> Tensor:
    """Pixels `[N, 4]` (frame, joint, y, x), sorted, that may be peaks of the blurred map according to float32.

    A candidate exceeds the threshold and its four neighbors, up to CANDIDATE_MARGIN. Peaks are few and small, so the
    map is computed only in tiles whose upper bound exceeds the threshold.
    """
    min_bound = PEAK_THRESHOLD - CANDIDATE_MARGIN
    # Denormal float32 values, such as a Gaussian's tail, make CPU arithmetic ten times slower.
    heatmap = torch.where(heatmap.abs() < MIN_MAGNITUDE, 0, heatmap)
    bound = rows.bound @ heatmap.abs() @ columns.bound.T  # [B, 18, tiles, tiles]
    resized_columns = columns.blur.float() @ heatmap.mT  # [B, 18, W, h]
    candidates = []
    for v, tile_rows in enumerate(rows.tiles):  # one product per row of tiles is faster than one per tile
        for batch in (bound[:, :, v] > min_bound).nonzero().split(TILES_PER_BATCH):
            frame, joint, u = batch.unbind(1)
            strips = resized_columns[frame[:, None], joint[:, None], columns.pixels[u]]  # [M, TILE + 2, h]
            values = strips @ tile_rows.mT  # [M, TILE + 2, TILE + 2]: x, then y
            center = values[:, 1:-1, 1:-1] + CANDIDATE_MARGIN
            is_peak = center > PEAK_THRESHOLD
            for neighbor in (slice(0, -2), slice(2, None)):
                is_peak &= (center >= values[:, neighbor, 1:-1]) & (center >= values[:, 1:-1, neighbor])
            tile, x, y = is_peak.nonzero().unbind(1)
            candidates.append(
                torch.stack([frame[tile], joint[tile], v * TILE + y, u[tile] * TILE + x], dim=1)
            )
    if not candidates:
        return torch.empty(0, 4, dtype=torch.long)
    found = torch.cat(candidates)
    height, width = len(rows.blur), len(columns.blur)
    found = found[(found[:, 2] < height) & (found[:, 3] < width)]  # the last tiles extend past the frame
    order = ((found[:, 0] * 18 + found[:, 1]) * height + found[:, 2]) * width + found[:, 3]
    return found[order.argsort()]

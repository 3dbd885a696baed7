"""Training targets of a body pose network: heatmaps and part affinity fields of ground-truth keypoints."""

import torch
from torch import Tensor

from tcan.pose.skeleton import LIMBS, PAF_CHANNELS, STRIDE

LIMB_WEIGHT = 4.0
"""Loss weight of cells on a limb, which are few; other cells have weight 1."""


def pose_targets(
    keypoints: Tensor,
    height: int,
    width: int,
    stride: int = STRIDE,
    sigma: float = 7.0,
    limb_width: float = 6.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Render the target maps of one person per image (Cao et al., CVPR 2017, equations 6 to 9).

    Args:
        keypoints: `[B, 18, 3]`, (x, y, score) in pixels; a joint with score 0 is not rendered.
        height, width: image size in pixels.
        stride: image pixels per cell of the maps.
        sigma, limb_width: in pixels; should not be much smaller than `stride`.

    Returns:
        float32 on the device of `keypoints`:
        paf `[B, 38, h, w]`: the limb's unit vector in cells within `limb_width` of it, else 0;
        heatmap `[B, 19, h, w]`: exp(-distance^2 / (2 sigma^2)) for 18 joints, then the background, 1 - their maximum;
        weight `[B, 38, h, w]` of the squared error of paf: LIMB_WEIGHT on a limb, 1 elsewhere.
    """
    h, w = height // stride, width // stride
    points = keypoints[..., :2].float()
    found = (keypoints[..., 2] > 0).float()

    # Cell centers in the coordinates of the keypoints, where pixel i covers [i - 0.5, i + 0.5).
    ys = (torch.arange(h, device=points.device) + 0.5) * stride - 0.5
    xs = (torch.arange(w, device=points.device) + 0.5) * stride - 0.5
    cells = torch.stack(torch.meshgrid(xs, ys, indexing="xy"), dim=-1)  # [h, w, 2]

    distance = (cells - points[:, :, None, None]).square().sum(-1)
    joints = torch.exp(-distance / (2 * sigma**2)) * found[..., None, None]
    heatmap = torch.cat([joints, 1 - joints.amax(dim=1, keepdim=True)], dim=1)

    start, end = torch.tensor(LIMBS, device=points.device).unbind(1)
    limb = points[:, end] - points[:, start]  # [B, 19, 2]
    length = limb.norm(dim=-1, keepdim=True)
    direction = limb / length.clamp(min=1e-6)
    offset = cells - points[:, start, None, None]  # [B, 19, h, w, 2]
    along = (offset * direction[:, :, None, None]).sum(-1)
    across = (
        offset[..., 0] * direction[..., 1, None, None] - offset[..., 1] * direction[..., 0, None, None]
    ).abs()
    beyond = torch.maximum(-along, along - length[..., None]).clamp(min=0)  # distance past either end
    on_limb = (across <= limb_width) & (beyond <= limb_width)
    on_limb = on_limb & (found[:, start] * found[:, end] > 0)[..., None, None] & (length[..., None] > 0)

    paf = points.new_zeros(len(points), 38, h, w)
    weight = points.new_ones(len(points), 38, h, w)
    channels = torch.tensor(PAF_CHANNELS, device=points.device)
    for axis in (0, 1):
        paf[:, channels + axis] = direction[..., axis, None, None] * on_limb
        weight[:, channels + axis] += (LIMB_WEIGHT - 1) * on_limb
    return paf, heatmap, weight

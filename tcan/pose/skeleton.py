"""OpenPose's 18-point skeleton: joints, limbs, and the layout of a pose network's maps."""

JOINTS = (
    "nose",
    "neck",
    "right_shoulder",
    "right_elbow",
    "right_wrist",
    "left_shoulder",
    "left_elbow",
    "left_wrist",
    "right_hip",
    "right_knee",
    "right_ankle",
    "left_hip",
    "left_knee",
    "left_ankle",
    "right_eye",
    "left_eye",
    "right_ear",
    "left_ear",
)
NOSE, NECK = 0, 1
RIGHT_SHOULDER, LEFT_SHOULDER = 2, 5
RIGHT_WRIST, LEFT_WRIST = 4, 7

LIMBS = (
    (1, 2),
    (1, 5),
    (2, 3),
    (3, 4),
    (5, 6),
    (6, 7),
    (1, 8),
    (8, 9),
    (9, 10),
    (1, 11),
    (11, 12),
    (12, 13),
    (1, 0),
    (0, 14),
    (14, 16),
    (0, 15),
    (15, 17),
    (2, 16),
    (5, 17),
)
"""(start, end) joints of each limb with a part affinity field, in the order in which the detector joins them."""
DRAWN_LIMBS = 17
"""Number of limbs that are drawn. The last two of LIMBS (shoulder to ear) only help to separate people."""

PAF_CHANNELS = (12, 20, 14, 16, 22, 24, 0, 2, 4, 6, 8, 10, 28, 30, 34, 32, 36, 18, 26)
"""Channel of the part affinity field's x component for each of LIMBS; y is the next channel."""
STRIDE = 8
"""Image pixels per cell of the network's maps, in each direction."""

PARENTS = {
    0: 1,
    2: 1,
    5: 1,
    8: 1,
    11: 1,
    14: 0,
    15: 0,
    3: 2,
    6: 5,
    9: 8,
    12: 11,
    16: 14,
    17: 15,
    4: 3,
    7: 6,
    10: 9,
    13: 12,
}
"""Joint -> parent joint, from the neck outwards; parents come before their children."""

MIRROR = (0, 1, 5, 6, 7, 2, 3, 4, 11, 12, 13, 8, 9, 10, 15, 14, 17, 16)
"""Index of each joint's counterpart on the other side of the body."""

PROPORTIONS = {0: 0.11, 2: 0.115, 3: 0.186, 4: 0.146, 8: 0.295, 9: 0.245, 10: 0.246}
"""Bone length / body height by the joint at the end of the bone, right side (Drillis and Contini, 1966; the neck of the
skeleton is between the shoulders)."""

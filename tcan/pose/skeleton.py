"""The 18-point body of OpenPose: its joints, its limbs, and where a network's channels hold them."""

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

# (from, to) of every limb a network predicts a part affinity field for, in the order in which a detector joins them.
# The first 17 are drawn; the last two (shoulder to ear) only help to tell people apart.
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
DRAWN_LIMBS = 17

# The part affinity field's x channel of each of LIMBS; y is the next one.
PAF_CHANNELS = (12, 20, 14, 16, 22, 24, 0, 2, 4, 6, 8, 10, 28, 30, 34, 32, 36, 18, 26)

# The joint that each hangs on, from the neck outwards; a parent comes before its children.
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

# The same joint on the other side of the body.
MIRROR = (0, 1, 5, 6, 7, 2, 3, 4, 11, 12, 13, 8, 9, 10, 15, 14, 17, 16)

"""Check of the pose network: it finds the labelled joints of the sample."""

import numpy as np

from pipelines.doctor.finding import Finding, grade
from pipelines.doctor.subject import Subject
from tcan.metrics import joint_errors

TOLERANCE = 0.05
OK, SUSPICIOUS = 0.75, 0.5


def joints(subject: Subject) -> Finding:
    """Fraction of the labelled joints within `TOLERANCE` of the image height, of the person nearest to the labels."""
    image, labels = subject.sample.image, subject.sample.keypoints
    with subject.on_device("pose") as (detector,):
        people = detector.detect(image[None])[0]
    errors = [joint_errors(person[None], labels[None], len(image))[0] for person in people]
    labelled = labels[:, 2] > 0
    within = max((float((e[labelled] <= TOLERANCE).mean()) for e in errors), default=0.0)
    distances = [e[labelled & np.isfinite(e)] for e in errors]
    mean = min((float(d.mean()) for d in distances if d.size), default=float("nan")) * len(image)
    return Finding(
        "pose",
        grade(within >= OK, within >= SUSPICIOUS),
        f"{len(people)} people; {within:.0%} of {labelled.sum()} labelled joints found, mean distance {mean:.1f} px",
        f"at least {OK:.0%} within {TOLERANCE * len(image):.0f} px ({TOLERANCE:.0%} of the height)",
        "use OpenPose's body_pose_model.pth (lllyasviel/Annotators), and compare its file with the original",
    )

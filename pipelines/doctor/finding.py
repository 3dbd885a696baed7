"""The result of one check of `tcan doctor`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Status = Literal["OK", "suspicious", "failed"]


@dataclass(frozen=True)
class Finding:
    """What a check found, what it expected and why, and what to do if both differ."""

    check: str
    status: Status
    found: str
    expected: str = ""
    """Thresholds, and the reason for them."""
    advice: str = ""
    files: Mapping[str, bytes] = field(default_factory=dict)
    """Files to write next to the report, by name."""
    seconds: float = 0.0
    """Duration of the check."""


def grade(ok: bool, suspicious: bool) -> Status:
    """OK if `ok`, else suspicious if `suspicious`, else failed. Comparisons with NaN are false and so fail."""
    return "OK" if ok else "suspicious" if suspicious else "failed"

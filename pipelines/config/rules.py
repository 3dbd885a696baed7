"""Range checks of configuration values."""

from collections.abc import Callable
from typing import Any

from tcan.errors import UserError

Rule = tuple[str, Callable[[Any], bool]]
"""A requirement in words, and its test. NaN fails every test."""

ABOVE_0: Rule = ("must be above 0", lambda value: value > 0)
FRAME_RATE: Rule = ("must be from 0.1 to 1000", lambda value: 0.1 <= value <= 1000)
DECAY: Rule = ("must be at least 0 and below 1", lambda value: 0 <= value < 1)


def at_least(minimum: int) -> Rule:
    return f"must be at least {minimum}", lambda value: value >= minimum


def between(low: int, high: int) -> Rule:
    return f"must be from {low} to {high}", lambda value: low <= value <= high


def multiple_of(divisor: int) -> Rule:
    return f"must be above 0 and a multiple of {divisor}", lambda value: value > 0 and value % divisor == 0


def check(config: Any, prefix: str, rule: Rule, **examples: float) -> None:
    """Check several fields of a dataclass; None (unset) is valid.

    Args:
        prefix: prefix of the keys in error messages, e.g. "train.".
        examples: the names of the fields, each with a valid value for the error message.

    Raises:
        UserError: the value of a field violates the rule.
    """
    requirement, is_valid = rule
    for name, example in examples.items():
        value = getattr(config, name)
        if value is not None and not is_valid(value):
            raise UserError(f"{prefix}{name} = {value}: {requirement}; set e.g. {example}")

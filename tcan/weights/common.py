"""Helpers for loading weights: checks of names and shapes, and silencing of library logs."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from logging import CRITICAL

from diffusers.utils import logging as diffusers_logging
from torch import Tensor
from transformers.utils import logging as transformers_logging

from tcan.errors import UserError


def check_keys(where: str, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """Require that no keys are missing or unexpected.

    Raises:
        UserError: there are such keys; the message lists the first three.
    """
    if names := sorted(missing):
        raise UserError(f"{where}: missing keys: {_abbreviate(names)}; provide weights of this architecture")
    if names := sorted(unexpected):
        raise UserError(
            f"{where}: unexpected keys: {_abbreviate(names)}; provide weights of this architecture"
        )


def _abbreviate(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def check_shapes(where: str, expected: Mapping[str, Tensor], actual: Mapping[str, Tensor]) -> None:
    """Require that tensors of the same names have the same shapes.

    Raises:
        UserError: a shape differs; the message names the first such tensor.
    """
    for name, tensor in expected.items():
        if tensor.shape != actual[name].shape:
            raise UserError(
                f"{where}: {name} has shape {list(actual[name].shape)}, expected {list(tensor.shape)}; "
                "provide weights of this architecture"
            )


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the logs and progress bars of diffusers and transformers; the loaders here raise `UserError` instead."""
    libraries = (diffusers_logging, transformers_logging)
    states = [(lib, lib.get_verbosity(), lib.is_progress_bar_enabled()) for lib in libraries]
    for library in libraries:
        library.set_verbosity(
            CRITICAL
        )  # diffusers logs an error for a folder with .bin files, then loads these
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, level, progress in states:
            library.set_verbosity(level)
            if progress:
                library.enable_progress_bar()

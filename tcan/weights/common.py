"""What loading and saving share: fingerprints, the check of names, one line of a library's error."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from diffusers.utils import logging as diffusers_logging
from torch import Tensor
from transformers.utils import logging as transformers_logging

from tcan.errors import UserError


def check_keys(what: str, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """Raises UserError, naming the first few, if there is any."""
    for kind, keys in (("lacks", sorted(missing)), ("has too many", sorted(unexpected))):
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise UserError(
                f"{what}: does not fit: {kind} {', '.join(keys[:3])}{more}; give weights of this architecture"
            )


def check_shapes(what: str, expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """Raises UserError for the first tensor of another shape; the names are known to be the same."""
    for name, tensor in expected.items():
        if tensor.shape != given[name].shape:
            raise UserError(
                f"{what}: does not fit: {name} is {list(given[name].shape)}, not {list(tensor.shape)}"
            )


@contextmanager
def quiet() -> Iterator[None]:
    """What the loaders have to say is said once and in one line, by the errors raised here."""
    verbosity = [(library, library.get_verbosity()) for library in (diffusers_logging, transformers_logging)]
    progress = transformers_logging.is_progress_bar_enabled()
    for library, _ in verbosity:
        library.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        for library, level in verbosity:
            library.set_verbosity(level)
        if progress:
            transformers_logging.enable_progress_bar()

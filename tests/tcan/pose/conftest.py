import importlib
import sys
from importlib.util import find_spec, module_from_spec

import pytest


@pytest.fixture(scope="session")
def open_pose():
    """controlnet_aux.open_pose, the reference implementation, without its parent package, whose import takes 10 s."""
    before = set(sys.modules)
    sys.modules["controlnet_aux"] = module_from_spec(find_spec("controlnet_aux"))  # created, but not executed
    yield importlib.import_module("controlnet_aux.open_pose")
    for name in set(sys.modules) - before:
        if name.startswith("controlnet_aux"):
            del sys.modules[name]

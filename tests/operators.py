"""Count of dispatched operators: on a GPU, each launches at least one kernel from the CPU, except views."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch._dynamo.backends.debugging import aot_eager, boxed_nop
from torch.utils._python_dispatch import TorchDispatchMode


class CountOperators(TorchDispatchMode):
    """Context manager that counts the operators that torch dispatches inside it, without views and without those of graphs
    compiled by a backend from `outside`."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self._in_graph = False

    def outside(self, backend: Callable[..., Any]) -> Callable[..., Any]:
        """A backend of `torch.compile` that compiles as `backend` does."""

        def compile_graph(*arguments: Any) -> Any:
            graph: Any = backend(*arguments)

            def run(*inputs: Any) -> Any:
                self._in_graph = True
                try:
                    return graph(*inputs)
                finally:
                    self._in_graph = False

            run._boxed_call = getattr(graph, "_boxed_call", False)  # type: ignore[attr-defined]
            return run

        return compile_graph

    def outside_forward_and_backward(self) -> Callable[..., Any]:
        """The backend "aot_eager", which also compiles the backward pass."""
        compile_graph = self.outside(boxed_nop)
        return partial(aot_eager, fw_compiler=compile_graph, bw_compiler=compile_graph)

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Under other modes, torch does not run compiled graphs."""
        return True

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not op.is_view and not self._in_graph
        return op(*args, **(kwargs or {}))

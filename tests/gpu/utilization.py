"""Idle time of a GPU, sampled from the driver."""

import threading
from typing import Any


class Utilization:
    """Context manager that samples the utilization of the first GPU every 50 ms. `idle`: mean idle time in percent."""

    def __init__(self, device: str):
        self._device, self._samples, self._stop = device, [], threading.Event()
        self._samples: list[int]
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> "Utilization":
        if self._device == "cuda":
            self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        if self._device == "cuda":
            self._thread.join()

    def _sample(self) -> None:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        while not self._stop.wait(0.05):
            self._samples.append(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu)

    @property
    def idle(self) -> str:
        return f"{100 - sum(self._samples) / len(self._samples):.0f} %" if self._samples else "not measured"

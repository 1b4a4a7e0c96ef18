"""Tensors on their way from a device to the host, while the device goes on with what comes next."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor


class HostCopy:
    """Starts to copy tensors when it is made; who asks for the arrays waits for them.

    From a GPU they go into pinned memory and on a stream of their own, so that neither the thread that made them nor later work
    on the device waits for the copy. On a CPU nothing is copied.
    """

    def __init__(self, *tensors: Tensor) -> None:
        device = tensors[0].device
        self._copied: torch.cuda.Event | None = None
        if device.type != "cuda":
            self._tensors = [tensor.cpu() for tensor in tensors]
            return
        stream = _copy_stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            # Without blocking, what a GPU copies to the host is allocated in pinned memory.
            self._tensors = [tensor.to("cpu", non_blocking=True) for tensor in tensors]
            self._copied = stream.record_event()
        for tensor in tensors:
            tensor.record_stream(stream)  # its memory is not given to others before it is copied

    def arrays(self) -> list[np.ndarray]:
        """Return the tensors as arrays, in the order they were given."""
        if self._copied is not None:
            self._copied.synchronize()
        return [tensor.numpy() for tensor in self._tensors]


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch leaves it untyped

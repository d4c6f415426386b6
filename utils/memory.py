"""How much memory a device has left, and which errors mean that it ran out; torch is not imported for that."""

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

OUT_OF_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUDA error: out of memory",
    "STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """True for the errors of Python, torch or CUDA libraries if a device, or the machine, is out of memory."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError)
        and (type(error).__name__ == "OutOfMemoryError" or any(text in str(error) for text in OUT_OF_MEMORY))
    )


def peak_memory() -> int:
    """The peak main memory of this process so far, in bytes."""
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        info = psutil.Process().memory_info()
        return int(getattr(info, "peak_wset", info.rss))
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def free_memory(device: "torch.device") -> int:
    """Bytes that can still be allocated on a device, including those that torch caches."""
    if device.type in ("cuda", "npu"):
        import torch

        card = getattr(torch, device.type)
        kept = card.memory_reserved(device) - card.memory_allocated(device)
        return int(card.mem_get_info(device)[0] + kept)
    import psutil

    return psutil.virtual_memory().available

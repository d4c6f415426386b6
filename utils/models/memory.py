"""How much memory a device has left, and how much this process has taken; torch is not imported for that."""

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


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

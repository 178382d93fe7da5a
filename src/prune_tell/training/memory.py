"""Peak memory of a run, that starts from nothing for every job of a sweep."""

import resource
from pathlib import Path

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def reset_peak_memory(device: torch.device) -> None:
    """Forget the peak so far, or one job's peak would be reported for all that follow in the same process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif CLEAR.exists():
        CLEAR.write_text("5")  # Linux: sets the high-water mark to what is resident now


def peak_memory(device: torch.device) -> int:
    """Bytes at the peak: of CUDA's allocator, or of the whole process on a CPU (its resident size)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if STATUS.exists():
        for line in STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

"""How far memory rises: above what a process, or a GPU, held at the beginning."""

from __future__ import annotations

from pathlib import Path

import torch


class Memory:
    """The peak above what the process, or the GPU, holds when the object is made. Reads /proc on the CPU: OSError where there is none."""

    def __init__(self, gpu: bool):
        self.gpu = gpu
        if gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the resident peak begins anew
            self.before = self._status("VmRSS:")

    def peak_mb(self) -> float:
        """MB above the beginning."""
        return ((torch.cuda.max_memory_allocated() if self.gpu else self._status("VmHWM:")) - self.before) / 1e6

    @staticmethod
    def _status(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024

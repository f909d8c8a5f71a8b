"""What the measurements were taken on, and how busy it was with other things."""

from __future__ import annotations

import os
import platform
from pathlib import Path

# What decides which arithmetic a runtime can use.
FLAGS = ["avx2", "fma", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_bf16", "amx_int8"]


def cpu_info() -> dict[str, str]:
    lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    pairs = (line.split(":", 1) for line in lines if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


# Flags of which a processor has one if it multiplies a precision itself. Without, PyTorch takes
# seconds to minutes for a product, and a comparison says nothing.
NATIVE = {
    "f32": None,
    "bf16": {"avx512_bf16", "amx_bf16"},
    "int8": {"avx512_vnni", "avx_vnni", "amx_int8"},
}


def native(precision: str) -> bool:
    """Whether the processor multiplies in this precision itself."""
    wanted = NATIVE[precision]
    return wanted is None or bool(wanted & set(cpu_info().get("flags", "").split()))


def describe() -> dict:
    info = cpu_info()
    flags = info.get("flags", "").split()
    # Hypervisors hide the name; family and model still tell the generation.
    name = f"{info.get('model name')} (family {info.get('cpu family')}, model {info.get('model')})"
    kib = int(Path("/proc/meminfo").read_text().split()[1])
    return {
        "processor": name,
        "cores": os.cpu_count(),
        "flags": [flag for flag in FLAGS if flag in flags],
        "memory_gib": round(kib / 2**20, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
    }


class OtherLoad:
    """How much of the machine's processors everything but ourselves takes, 0 to 1.

    Ourselves are this process and the workers it names; they are read from /proc.
    """

    def __init__(self, pids: list[int]) -> None:
        self.pids = pids
        self.began = self._read()

    def share(self) -> float:
        total, busy, own = (b - a for a, b in zip(self.began, self._read()))
        return max(0.0, busy - own) / max(total, 1)

    def _read(self) -> tuple[int, int, int]:
        ticks = [int(n) for n in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        idle = ticks[3] + ticks[4]
        own = 0
        for pid in [os.getpid(), *self.pids]:
            try:
                fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            # User and system time, its own and of the children it has waited for.
            own += sum(int(n) for n in fields[11:15])
        return sum(ticks), sum(ticks) - idle, own

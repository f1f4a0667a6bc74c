"""How much memory there is, and how much of it this process has."""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Where Linux says what a container may use."""


def memory_bytes() -> int:
    """Bytes of memory that this machine has, or this container."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for limit in LIMITS:
        with suppress(OSError, ValueError):  # no container, or "max"
            found.append(int(Path(limit).read_text()))
    return min(found)


def free_bytes() -> int | None:
    """Bytes of memory that nothing else on this machine uses now; None where it does not say."""
    with suppress(OSError, ValueError, IndexError):
        text = Path("/proc/meminfo").read_text()
        return min(1024 * int(text.split("MemAvailable:")[1].split()[0]), memory_bytes())
    return None


def resident_bytes(kind: str = "VmRSS", pid: int | str = "self") -> int | None:
    """Bytes of memory that a process has now, or has had at most ("VmHWM"); None where the system does not say."""
    with suppress(OSError, ValueError, IndexError):
        return 1024 * int(Path(f"/proc/{pid}/status").read_text().split(f"{kind}:")[1].split()[0])
    return None


def forget_peak(pid: int | str = "self") -> None:
    """Counts a process's "VmHWM" from here, where the system can."""
    with suppress(OSError):
        Path(f"/proc/{pid}/clear_refs").write_text("5")


def temporaries(program: Any) -> int:
    """Bytes that a compiled program takes beside its arguments; 0 where it does not say."""
    analysis = program.memory_analysis() if hasattr(program, "memory_analysis") else None
    return 0 if analysis is None else analysis.temp_size_in_bytes + analysis.output_size_in_bytes

"""The memory of this process."""

import sys
from pathlib import Path

try:
    import resource  # not on Windows: there the process's memory stays unknown
except ImportError:
    resource = None


def peak_bytes() -> int | None:
    """Return the most memory that this process held so far, in bytes; None where the system does not say.

    On Linux the peak of its own memory map: getrusage's count survives fork and exec, so it may be that of the process
    which started this one.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if resource is None:
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, others kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

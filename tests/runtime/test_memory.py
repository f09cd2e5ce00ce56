"""The peak of memory counts what this process held, and nothing of the process that started it."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bas.runtime.memory import peak_bytes

FILE = Path(sys.modules[peak_bytes.__module__].__file__)


def test_the_peak_counts_what_this_process_touched():
    """It stays when the memory is given back."""
    block = np.ones(2**27, np.uint8)
    assert peak_bytes() >= block.nbytes
    size = block.nbytes
    del block
    assert peak_bytes() >= size


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="elsewhere a process inherits its parent's count")
def test_a_process_starts_at_its_own_peak():
    """A bare Python takes about 10 MB. The one that starts it holds 256 MB more than that."""
    block = np.ones(2**28, np.uint8)
    code = "import sys; sys.path.insert(0, sys.argv[1]); from memory import peak_bytes; print(peak_bytes())"
    words = [sys.executable, "-c", code, str(FILE.parent)]
    found = int(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
    assert 1e6 < found < 100e6 < block.nbytes

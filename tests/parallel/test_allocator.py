import subprocess
import sys

import pytest

CHILD = """
import resource, sys, threading
from plasticity_jax.parallel.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()

def work():
    for repeat in range(6):
        if repeat == 2:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        b"x" * (64 * 2**20)  # allocated, touched and freed
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

thread = threading.Thread(target=work)  # XLA allocates on threads, whose heaps are the ones glibc limits
thread.start()
thread.join()
"""


def page_faults(kind):
    return int(subprocess.run([sys.executable, "-c", CHILD, kind], check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc alone has these settings")
def test_large_buffers_are_not_faulted_in_again():
    assert page_faults("keep") < 1000
    assert page_faults("default") > 4000  # what is avoided; without it the line above would show nothing


HELD = """
from pathlib import Path
from plasticity_jax.parallel.allocator import keep_freed_memory, release_freed_memory

def resident():
    return int(Path("/proc/self/status").read_text().partition("VmRSS:")[2].split()[0]) // 1024

keep_freed_memory()
before = resident()
buffers = [b"x" * 2**20 for _ in range(200)]
after_it = b"x" * 2**20  # keeps the heap from shrinking at its end
del buffers
kept = resident() - before
assert release_freed_memory()
print(kept, resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc alone has these settings")
def test_freed_memory_is_given_back_when_the_work_is_over():
    kept, left = map(int, subprocess.run([sys.executable, "-c", HELD], check=True, capture_output=True, text=True).stdout.split())
    assert kept > 150 and left < 20

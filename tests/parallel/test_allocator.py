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

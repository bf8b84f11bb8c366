"""One process that carries out studies one after the other holds no more after the third than after the second, and gives freed memory back."""

import json

import pytest
from running import TINY, python

# Of a study's stages those that compile most: training, and decoding.
CODE = """
import contextlib, gc, io, json, os, sys, tempfile, threading
from plasticity_jax.cli import main

def resident():
    return 1024 * int(open("/proc/self/status").read().partition("VmRSS:")[2].split()[0])

def study(config):
    with tempfile.TemporaryDirectory() as work, contextlib.redirect_stdout(io.StringIO()):
        small = ["--config.data.max_documents=100", "--config.model.vocab_size=300", "--config.data.sources=('bbc',)"]
        status = main(["study", "--quiet", "--config", config, "--workdir", work, "--stages", "prepare,init,pretrain,finetune,evaluate", *small])
        assert status == 0, status
    import jax
    from jax.extend.backend import get_backend
    from plasticity_jax.parallel.allocator import release_freed_memory
    gc.collect()
    held = resident()
    release_freed_memory()
    return {
        "left": held - resident(),
        "objects": sys.getallocatedblocks(),
        "programs": len(get_backend().live_executables()),
        "arrays": len(jax.live_arrays()),
        "files": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "children": len(open(f"/proc/self/task/{os.getpid()}/children").read().split()),
    }

print(json.dumps([study(sys.argv[1]) for _ in range(3)]))
"""


@pytest.mark.slow
def test_a_further_study_in_one_process_adds_nothing(wheels_dir):
    first, second, third = json.loads(python(CODE, TINY, PLASTICITY_WHEELS=str(wheels_dir)).splitlines()[-1])
    assert first["programs"] == second["programs"] == third["programs"] > 10
    assert first["arrays"] == second["arrays"] == third["arrays"] == 0
    assert third["objects"] - second["objects"] < 8000
    assert third["left"] < 32e6, "bytes that were free and not given back"
    assert third["files"] <= second["files"]
    assert third["threads"] <= second["threads"]
    assert first["children"] == second["children"] == third["children"] == 0

"""Soak: one process carries out the tiny study again and again, each time in a new workdir; what it holds on to shows in its memory, files and children.

Command: python benchmarks/soak.py --minutes 5
"""

import argparse
import contextlib
import gc
import io
import logging
import multiprocessing
import os
import tempfile
import time
from pathlib import Path

from side_by_side import finish

from plasticity_jax.cli import main as plasticity

CONFIG = "configs/tiny.py"


def held() -> dict[str, int]:
    """Megabytes, open files, threads and child processes of this process."""
    gc.collect()
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    of = {name: int(status.partition(f"{name}:")[2].split()[0]) for name in ("VmRSS", "Threads")}
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text(encoding="utf-8").split()
    return {"MB": of["VmRSS"] // 1024, "open files": len(os.listdir("/proc/self/fd")), "threads": of["Threads"], "child processes": len(children)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5)
    arguments = parser.parse_args()
    rows, begin = [], time.monotonic()
    while not rows or time.monotonic() - begin < 60 * arguments.minutes:
        start = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="soak-") as work, contextlib.redirect_stdout(io.StringIO()):
            status = plasticity(["study", "--config", CONFIG, "--workdir", work])
        assert status == 0, f"study {len(rows) + 1} ended with status {status}"
        rows.append({"study": len(rows) + 1, "seconds": round(time.monotonic() - start, 1)} | held())
        logging.getLogger("plasticity_jax").info("%s", rows[-1])
        assert not multiprocessing.active_children(), "a child process is left"
    # The first study compiles and fills caches.
    settled = rows[2:] or rows
    growth = (settled[-1]["MB"] - settled[0]["MB"]) / max(len(settled) - 1, 1)
    summary = {"studies": len(rows), "MB after the first": rows[0]["MB"], "MB after the last": rows[-1]["MB"], "MB per study, from the third": growth}
    finish("Soak", {"One process": [summary], "Study by study": rows})


if __name__ == "__main__":
    main()

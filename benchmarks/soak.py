"""Soak: one process carries out the tiny study again and again, each time in a new workdir; what it holds on to shows in its memory, files and children.

Command: python benchmarks/soak.py --minutes 60          (writes docs/figures/soak.svg too)

Three numbers are about memory: the most that the process held during the study, what it holds after it, both as the operating system counts, and what
of that is allocated in glibc's heaps. The benchmark fails if a number of anything but memory has grown.
"""

import argparse
import contextlib
import ctypes
import gc
import io
import logging
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path

from side_by_side import ROOT, finish

from plasticity_jax.cli import main as plasticity

CONFIG = "configs/tiny.py"
FIGURE = ROOT / "docs" / "figures" / "soak.svg"
SETTLED = 3  # studies after which every cache is filled
ROWS = 13  # of the table, spread over the time
MEMORY = ("MB at most", "MB", "MB allocated")
COUNTED = ("open files", "threads", "child processes", "live arrays", "programs")

log = logging.getLogger("plasticity_jax")


class _Heaps(ctypes.Structure):
    """glibc's `struct mallinfo2`; all fields are bytes or counts."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    ]


def allocated() -> int:
    """Bytes that the process has allocated in glibc's heaps, or in mappings of glibc's."""
    mallinfo2 = ctypes.CDLL("libc.so.6").mallinfo2
    mallinfo2.restype = _Heaps
    heaps = mallinfo2()
    return heaps.uordblks + heaps.hblkhd


def held() -> dict[str, int]:
    """What this process holds: megabytes, and numbers of what the operating system and jax count."""
    import jax
    from jax.extend.backend import get_backend

    gc.collect()
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    of = {name: int(status.partition(f"{name}:")[2].split()[0]) for name in ("VmHWM", "VmRSS", "Threads")}
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text(encoding="utf-8").split()
    counts = (len(os.listdir("/proc/self/fd")), of["Threads"], len(children), len(jax.live_arrays()), len(get_backend().live_executables()))
    memory = {"MB at most": of["VmHWM"] * 1024 // 10**6, "MB": of["VmRSS"] * 1024 // 10**6, "MB allocated": allocated() // 10**6}
    return memory | dict(zip(COUNTED, counts, strict=True))


def draw(rows: list[dict]) -> None:
    """Memory above, what is counted below, against time."""
    import matplotlib
    from matplotlib.figure import Figure

    from plasticity_jax.report.drawing import SERIES, STYLE

    minutes = [row["minutes"] for row in rows]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 4.6))
        above, below = figure.subplots(2, 1, sharex=True)
        for panel, names in ((above, MEMORY), (below, COUNTED)):
            for name, color in zip(names, SERIES):
                panel.plot(minutes, [row[name] for row in rows], marker=".", color=color, label=name)
            panel.set_ylim(bottom=0)
            panel.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
        above.set_ylabel("memory (MB)")
        below.set_ylabel("number")
        below.set_xlabel("minutes")
        FIGURE.parent.mkdir(exist_ok=True)
        figure.savefig(FIGURE, metadata={"Date": None}, bbox_inches="tight")


def slope(rows: list[dict], name: str) -> float:
    """Growth per study by least squares, which one study's peak does not decide."""
    import numpy as np

    return float(np.polyfit([row["study"] for row in rows], [row[name] for row in rows], 1)[0]) if len(rows) > 1 else 0.0


def tables(rows: list[dict]) -> dict[str, list[dict]]:
    settled = rows[SETTLED - 1 :] or rows
    summary = {"minutes": rows[-1]["minutes"], "studies": len(rows)}
    for name in MEMORY:
        summary |= {f"{name} after study {settled[0]['study']}": settled[0][name], f"{name} after the last": rows[-1][name]}
        summary |= {f"{name} per study": round(slope(settled, name), 2)}
    of_time = {round(index * (len(rows) - 1) / (ROWS - 1)) for index in range(ROWS)}
    return {"One process": [summary], "Over time": [rows[index] for index in sorted(of_time)]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5)
    arguments = parser.parse_args()
    rows, begin = [], time.monotonic()
    while not rows or time.monotonic() - begin < 60 * arguments.minutes:
        start = time.monotonic()
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM counts anew from here
        with tempfile.TemporaryDirectory(prefix="soak-") as work, contextlib.redirect_stdout(io.StringIO()):
            status = plasticity(["study", "--quiet", "--config", CONFIG, "--workdir", work])
        assert status == 0, f"study {len(rows) + 1} ended with status {status}"
        ended = time.monotonic()
        rows.append({"study": len(rows) + 1, "minutes": round((ended - begin) / 60, 1), "seconds": round(ended - start, 1)} | held())
        print(rows[-1], file=sys.stderr, flush=True)
        assert not multiprocessing.active_children(), "a child process is left"
        draw(rows)
        finish("Soak", tables(rows), series=rows)
    # Pools of libraries have a thread or two more or less at times.
    part = max(SETTLED, len(rows) // 4)
    grown = [name for name in COUNTED if min(row[name] for row in rows[-part:]) > max(row[name] for row in rows[:part])]
    if grown:
        sys.exit(f"grown from the first {part} studies to the last: {', '.join(grown)}")


if __name__ == "__main__":
    main()

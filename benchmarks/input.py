"""The input of training: how fast batches are read beside how fast the step consumes them, and what opening ten million records takes.

Command: python benchmarks/input.py

The loader reads a made-up corpus on a local disk, whose pages are in memory, as pretraining does: records in the order of the shuffle, as batches, a few
ahead of the step. The step is that of configs/default.py. The two take turns, so each has the machine to itself. Ten million records are ten names of
one file of a million, each record two tokens long, opened in a fresh process.
"""

import dataclasses
import os
import tempfile
import time
from pathlib import Path

from side_by_side import Round, Side, finish, measure, peak_megabytes, serve

FOLDER = "BENCHMARK_RECORDS"  # environment variable of the sides: where the records lie
BATCHES, STEPS = 500, 10  # of a round
RECORDS, MANY, FILES, OPENINGS = 20_000, 1_000_000, 10, 3
WANTED_RATIO, WANTED_SECONDS, WANTED_MEGABYTES = 20, 1.0, 300


def default_config():
    from plasticity_jax.config import load_config

    return load_config("configs/default.py", [("train.compute_dtype", "float32")])


def write_corpus(folder: Path, *, seq_len: int, records: int, names: int = 1, held_out: int = 0) -> None:
    """Random tokens in the form of a streamed corpus. Every shard has the same records: one file under several names. A document is a record."""
    import numpy as np

    from plasticity_jax.data.packing import MANIFEST, SplitWriter
    from plasticity_jax.runs.jsonfiles import write_json

    shards = [f"shards/{i:06d}" for i in range(names)]
    for shard in shards:
        (folder / shard).mkdir(parents=True)
    dtype = np.dtype("<u2")
    numbers = {"train": records, "held_out": held_out}
    for split, number in numbers.items():
        writer = SplitWriter(folder / shards[0], split, dtype)
        for i, record in enumerate(np.random.default_rng(number).integers(0, 1000, (number, seq_len + 1)).astype(dtype)):
            writer.write(record, i)
        writer.close()
    for shard in shards[1:]:
        for file in (folder / shards[0]).iterdir():
            os.link(file, folder / shard / file.name)
    counts = [{"name": shard} | numbers | {f"{split}_documents": number for split, number in numbers.items()} for shard in shards]
    manifest = {
        "seq_len": seq_len,
        "vocab_size": 1000,
        "dtype": dtype.str,
        "domains": ["random"],
        "fingerprint": "",
        "splits": {"train": {}, "held_out": {}},
    }
    write_json(folder / MANIFEST, manifest | {"shards": counts})


def loader() -> Round:
    from plasticity_jax.data.loader import TokenRecords, batches

    records, rows = TokenRecords(Path(os.environ[FOLDER]), "train"), default_config().train.batch_size

    def one_round() -> dict[str, float]:
        start, tokens = time.perf_counter(), 0
        for batch in batches(records, seed=0, batch_size=rows, start_step=0, steps=BATCHES):
            tokens += batch["targets"].size
        return {"tokens/s": tokens / (time.perf_counter() - start)}

    return one_round


def step() -> Round:
    from plasticity_jax.parallel.allocator import keep_freed_memory

    keep_freed_memory()
    import jax

    from plasticity_jax.data.loader import TokenRecords, batch_at
    from plasticity_jax.model.transformer import init_params
    from plasticity_jax.parallel.mesh import make_mesh
    from plasticity_jax.train.pretrain import step_settings
    from plasticity_jax.train.step import compile_train_step, hyper_parameters, initial_state, state_shardings

    config = default_config()
    mesh = make_mesh(config.mesh)
    settings = step_settings(config, mesh)
    state = jax.device_put(initial_state(settings, init_params(config.model, 0)), state_shardings(settings, mesh, members=False))
    train_step = compile_train_step(settings, mesh, members=False)
    batch = batch_at(TokenRecords(Path(os.environ[FOLDER]), "train"), seed=0, batch_size=config.train.batch_size, step=0)
    hyper = hyper_parameters(weight_decay=0.1, peak_lr=1e-3, warmup=10, total=100)

    def one_round() -> dict[str, float]:
        nonlocal state
        start = time.perf_counter()
        for _ in range(STEPS):
            state, metrics = train_step(state, batch, hyper)
            jax.block_until_ready(metrics)
        return {"tokens/s": STEPS * batch["targets"].size / (time.perf_counter() - start)}

    return one_round


def opening() -> Round:
    def one_round() -> dict[str, float]:
        from plasticity_jax.data.loader import TokenRecords, batches, order

        start = time.perf_counter()
        records = TokenRecords(Path(os.environ[FOLDER]), "train")
        order(len(records), seed=0, batch_size=32, step=0)
        found = {"open and shuffle": time.perf_counter() - start, "memory then": peak_megabytes()}
        import grain  # noqa: F401  brings jax, which training has anyway

        found["memory with jax"] = peak_megabytes()
        start = time.perf_counter()
        next(batches(records, seed=0, batch_size=32, start_step=0, steps=100))
        return found | {"first batch": time.perf_counter() - start, "memory in the end": peak_megabytes()}

    return one_round


SIDES = {"loader": Side(loader), "training step": Side(step), "opening": Side(opening)}


def speeds() -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        write_corpus(Path(folder), seq_len=default_config().train.seq_len, records=RECORDS)
        sides = {name: dataclasses.replace(SIDES[name], variables={FOLDER: folder}) for name in ("loader", "training step")}
        found = measure(sides, rounds=5)
    rows = [one.row(name) for name, one in found.items()]
    for row in rows:
        row["times the step's"] = row["tokens/s"] / rows[1]["tokens/s"]
    rows[0]["wanted"] = f"at least {WANTED_RATIO}"
    return rows


def openings() -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        write_corpus(Path(folder), seq_len=1, records=MANY, names=FILES)
        side = dataclasses.replace(SIDES["opening"], variables={FOLDER: folder})
        tried = [measure({"opening": side}, rounds=0)["opening"].numbers or {} for _ in range(OPENINGS)]
    found = sorted(tried, key=lambda one: one["open and shuffle"])[OPENINGS // 2]
    return [
        {
            "what": "open the records and shuffle them",
            "seconds": found["open and shuffle"],
            "peak memory of the process, MB": found["memory then"],
            "wanted": f"under {WANTED_SECONDS:g} s and {WANTED_MEGABYTES} MB",
        },
        {"what": "import of grain, and with it jax", "peak memory of the process, MB": found["memory with jax"]},
        {"what": "first batch, besides", "seconds": found["first batch"], "peak memory of the process, MB": found["memory in the end"]},
    ]


def main() -> None:
    config = default_config()
    heading = f"Batches of {config.train.batch_size} x {config.train.seq_len} tokens"
    finish("Input", {heading: speeds(), f"{FILES * MANY:,} records, in {FILES} files, in a fresh process": openings()})


if __name__ == "__main__":
    serve(SIDES)
    main()

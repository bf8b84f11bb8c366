"""What a training step of the paper's configs takes on TPUs and GPUs that are not here: memory, communication, FLOPs, and seconds to compile it.

Command: make bench-scale          (python benchmarks/at_scale.py; half an hour to an hour. With names of CASES, only these, and the others' rows stay)

Everything is by compiling, as `plasticity check` does it; no device was timed. Communication is what the compiled program's collectives move, loops
counted as often as they turn, beside the least that FSDP needs: each part of the batch gathers all parameters twice in bfloat16, for the forward and
for the backward pass, which can compute again with what it has gathered, and gradients are reduced once, in bfloat16. FLOPs are those of the step as it is given to the
compiler, recomputation included, with attention as matrix products of whole rows, over the model's. XLA counts a loop's body once, so they are counted
with one and with two layers that are not in a loop; every further layer adds as much as the second. MaxText compiles the same shape with its own
trainer, in its own environment.
"""

import dataclasses
import json
import sys
from typing import Any

from side_by_side import RESULTS, Round, Side, finish, measure, serve

# name → config file, overrides, topology, environment. Where the config has no rule for the device, remat is that of its other rules.
DOTS = (("train.remat", "dots"), ("train.grad_accum_steps", "1"))
CASES = {
    "0.5b, v5e:4x4": ("llama_0p5b_20tpp", (), "v5e:4x4", "extra"),
    "0.5b, v5p:2x2x4": ("llama_0p5b_20tpp", DOTS, "v5p:2x2x4", "extra"),
    "0.5b, h100:8": ("llama_0p5b_20tpp", (), "h100:8", "cuda"),
    "1b, v5e:8x8": ("llama_1b_20tpp", (), "v5e:8x8", "extra"),
    "1b, v5p:2x2x4": ("llama_1b_20tpp", DOTS, "v5p:2x2x4", "extra"),
    "1b, h100:8": ("llama_1b_20tpp", (), "h100:8", "cuda"),
    "4b, v5p:4x4x4": ("llama_4b_20tpp", (), "v5p:4x4x4", "extra"),
    "4b, h100:32": ("llama_4b_20tpp", (), "h100:32", "cuda"),
}
HEADING = "The training steps of configs/llama_*_20tpp.py"
MAXTEXT = "1b, v5e:8x8, MaxText"
KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
SHAPE = {
    "base_emb_dim": 2048,
    "base_num_query_heads": 32,
    "base_num_kv_heads": 4,
    "head_dim": 64,
    "base_mlp_dim": 4896,
    "base_num_decoder_layers": 22,
    "vocab_size": 32000,
    "max_target_length": 2048,
    "per_device_batch_size": 8,
}


def config_of(name: str) -> Any:
    from plasticity_jax.config import load_config

    config, overrides, *_ = CASES[name]
    return load_config(f"configs/{config}.py", list(overrides))


def compiled(name: str) -> Round:
    """A round that compiles the step of a case."""

    def one_round() -> dict[str, float]:
        from plasticity_jax.parallel.deviceless import target
        from plasticity_jax.train.check import check

        answer = check(config_of(name), target(CASES[name][2]))
        return (
            {"fits": answer.fits, "memory": answer.total, "limit": answer.limit, "state": answer.params + answer.optimizer}
            | {"compile seconds": answer.compile_seconds, "parts": answer.config.train.grad_accum_steps}
            | answer.collectives
        )

    return one_round


def by_maxtext() -> Round:
    """A round that compiles MaxText's step for llama-1b's shape: its defaults, so with full remat; "minimal_with_context", which recomputes less, needs more than a v5e has."""

    def one_round() -> dict[str, float]:
        import os
        import time

        os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
        import maxtext
        from maxtext.trainers.pre_train import train_compile

        kept: list[Any] = []
        compile_ = train_compile.jit_and_compile

        def keeping(*arguments: Any) -> Any:
            start = time.monotonic()
            kept.extend([compile_(*arguments), time.monotonic() - start])
            return kept[0]

        train_compile.jit_and_compile = keeping
        settings = SHAPE | {"decoder_block": "llama2", "remat_policy": "full", "dataset_type": "synthetic", "run_name": "benchmark"}
        settings |= {
            "compile_topology": "v5e-64",
            "compile_topology_num_slices": 1,
            "base_output_directory": "/tmp",
            "skip_jax_distributed_system": True,
        }
        base = os.path.join(os.path.dirname(maxtext.__file__), "configs", "base.yml")
        train_compile.main(["train_compile", base, *(f"{key}={value}" for key, value in settings.items())])
        program, seconds = kept
        return {"memory": program.memory_analysis().peak_memory_in_bytes, "compile seconds": seconds, "parts": 1, "full": True} | collective_bytes(
            program.as_text()
        )

    return one_round


def flops_over_model(name: str) -> float:
    """FLOPs of the step that is given to the compiler, over the model's."""
    from plasticity_jax.model.flops import flops_per_token
    from plasticity_jax.parallel.deviceless import target
    from plasticity_jax.parallel.mesh import make_mesh
    from plasticity_jax.train.check import lower_step, resolved

    here, config = target("cpu:1"), resolved(config_of(name), target_of(name))
    counted = []
    for n_layers in (1, 2):
        train = dataclasses.replace(config.train, batch_size=1, grad_accum_steps=1, loss_chunks=1, scan_layers=False, attention="xla")
        own = dataclasses.replace(config, model=dataclasses.replace(config.model, n_layers=n_layers), train=train)
        counted.append(lower_step(own, make_mesh(own.mesh, here.devices), 1).cost_analysis()["flops"])
    flops = counted[0] + (config.model.n_layers - 1) * (counted[1] - counted[0])
    return flops / (flops_per_token(config.model, config.train.seq_len) * config.train.seq_len)


def target_of(name: str) -> Any:
    """A stand-in for the devices of a case, whose compiler need not be here: a config's hardware rules go by the kind alone."""
    from types import SimpleNamespace

    from plasticity_jax.parallel.hardware import named

    known = named(CASES[name][2].partition(":")[0])
    return SimpleNamespace(devices=[SimpleNamespace(device_kind=known.kind, platform="tpu" if "TPU" in known.kind else "gpu")])


def row_of(name: str, found: Any) -> dict[str, Any]:
    from plasticity_jax.model.param_count import count_params

    if found.missing:
        return {"step": name, "missing": found.missing}
    numbers = found.numbers
    bytes_of_params = 2 * count_params(config_of(name if name in CASES else "1b, v5e:8x8").model)
    moved = sum(numbers.get(kind, 0) for kind in KINDS)
    parts = int(numbers["parts"])
    least = bytes_of_params * (2 * parts + 1)
    row: dict[str, Any] = {"step": name, "parts": parts, "GiB per device": numbers["memory"] / 2**30}
    row |= {"of": numbers["limit"] / 2**30, "state, GiB": numbers["state"] / 2**30} if "limit" in numbers else {"of": None, "state, GiB": None}
    row["compile, s"] = numbers["compile seconds"]
    if name in CASES:  # of another compiler's program the collectives are not counted: its text may name them otherwise
        row |= {"moved, GiB": moved / 2**30, "moved / least": moved / least} | {kind: numbers.get(kind, 0) / 2**30 for kind in KINDS}
        row["FLOPs / model's"] = flops_over_model(name)
    return row | {"versions": found.versions}


SIDES = {name: Side(lambda name=name: compiled(name), environment=case[3]) for name, case in CASES.items()} | {MAXTEXT: Side(by_maxtext, "maxtext")}


def main() -> None:
    rows = {row["step"]: row for row in results()}
    for name in [name for name in SIDES if name in sys.argv[1:]] or SIDES:
        rows[name] = row_of(name, measure({name: SIDES[name]}, rounds=0)[name])
        # After each of them, because all take an hour: what was compiled stays.
        finish("Steps at scale", {HEADING: [rows[name] for name in SIDES if name in rows]}, command="make bench-scale")


def results() -> list[dict[str, Any]]:
    """The rows that were written before."""
    path = RESULTS / "at_scale.json"
    return json.loads(path.read_text(encoding="utf-8"))["tables"][HEADING] if path.exists() else []


if __name__ == "__main__":
    serve(SIDES)
    main()

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
import functools
import json
import sys
from typing import Any

from side_by_side import RESULTS, Round, Side, finish, measure, serve

# Cases that MaxText compiles too, and its names for their topologies. It has full remat by default, so ours are compiled with it besides.
OF_MAXTEXT = {
    "0.5b, v5e:4x4": "v5e-16",
    "0.5b, v5p:2x2x4": "v5p-32",
    "1b, v5e:8x8": "v5e-64",
    "1b, v5p:2x2x4": "v5p-32",
    "4b, v5p:4x4x4": "v5p-128",
}
# name → config file, overrides, topology, environment. Where the config has no rule for the device, remat is that of its other rules.
DOTS, FULL = {"train.remat": "dots", "train.grad_accum_steps": "1"}, {"train.remat": "full"}
CASES: dict[str, tuple[str, dict[str, str], str, str]] = {}
for _name, _config, _overrides, _topology, _environment in (
    ("0.5b, v5e:4x4", "llama_0p5b_20tpp", {}, "v5e:4x4", "extra"),
    ("0.5b, v5p:2x2x4", "llama_0p5b_20tpp", DOTS, "v5p:2x2x4", "extra"),
    ("0.5b, h100:8", "llama_0p5b_20tpp", {}, "h100:8", "cuda"),
    ("1b, v5e:8x8", "llama_1b_20tpp", {}, "v5e:8x8", "extra"),
    ("1b, v5p:2x2x4", "llama_1b_20tpp", DOTS, "v5p:2x2x4", "extra"),
    ("1b, h100:8", "llama_1b_20tpp", {}, "h100:8", "cuda"),
    ("4b, v5p:4x4x4", "llama_4b_20tpp", {}, "v5p:4x4x4", "extra"),
    ("4b, h100:32", "llama_4b_20tpp", {}, "h100:32", "cuda"),
):
    CASES[_name] = (_config, _overrides, _topology, _environment)
    if _name in OF_MAXTEXT:
        CASES[f"{_name}, full remat"] = (_config, _overrides | FULL, _topology, _environment)
HEADING = "The training steps of configs/llama_*_20tpp.py"
KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")


def config_of(name: str) -> Any:
    from plasticity_jax.config import load_config

    config, overrides, *_ = CASES[name]
    return load_config(f"configs/{config}.py", list(overrides.items()))


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


def maxtext_settings(name: str) -> dict[str, Any]:
    """The case as MaxText's settings: its defaults, so with full remat, and as many parts of the batch."""
    import math

    from plasticity_jax.config import for_device

    kind, _, shape = CASES[name][2].partition(":")
    config, devices = for_device(config_of(name), kind_of(kind)), math.prod(map(int, shape.split("x")))
    model, train = config.model, config.train
    return {
        "base_emb_dim": model.d_model,
        "base_num_query_heads": model.n_heads,
        "base_num_kv_heads": model.n_kv_heads,
        "head_dim": model.head_dim,
        "base_mlp_dim": model.d_ff,
        "base_num_decoder_layers": model.n_layers,
        "vocab_size": model.vocab_size,
        "max_target_length": train.seq_len,
        "per_device_batch_size": train.batch_size // devices // train.grad_accum_steps,
        "gradient_accumulation_steps": train.grad_accum_steps,
        "decoder_block": "llama2",
        "remat_policy": "full",
        "dataset_type": "synthetic",
        "compile_topology": OF_MAXTEXT[name],
        "compile_topology_num_slices": 1,
        "run_name": "benchmark",
        "base_output_directory": "/tmp",
        "skip_jax_distributed_system": True,
    }


def by_maxtext(name: str) -> Round:
    """A round that compiles MaxText's step for the shapes of a case."""

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
        settings = maxtext_settings(name)
        base = os.path.join(os.path.dirname(maxtext.__file__), "configs", "base.yml")
        train_compile.main(["train_compile", base, *(f"{key}={value}" for key, value in settings.items())])
        program, seconds = kept
        return {
            "memory": program.memory_analysis().peak_memory_in_bytes,
            "compile seconds": seconds,
            "parts": settings["gradient_accumulation_steps"],
        }

    return one_round


def flops_over_model(name: str) -> float:
    """FLOPs of the step that is given to the compiler, over the model's."""
    from plasticity_jax.model import cpu
    from plasticity_jax.model.flops import flops_per_token
    from plasticity_jax.parallel.deviceless import target
    from plasticity_jax.parallel.mesh import make_mesh
    from plasticity_jax.train.check import lower_step, resolved

    cpu.one_cpu = lambda mesh: False  # other devices take other forms
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

    kind = kind_of(CASES[name][2].partition(":")[0])
    return SimpleNamespace(devices=[SimpleNamespace(device_kind=kind, platform="tpu" if "TPU" in kind else "gpu")])


def kind_of(name: str) -> str:
    """jax's `device_kind` of the hardware with this name."""
    from plasticity_jax.parallel.hardware import named

    known = named(name)
    assert known is not None
    return known.kind


def row_of(name: str, found: Any) -> dict[str, Any]:
    from plasticity_jax.model.param_count import count_params

    if found.missing:
        return {"step": name, "missing": found.missing}
    numbers = found.numbers
    parts = int(numbers["parts"])
    row: dict[str, Any] = {"step": name, "parts": parts, "GiB per device": numbers["memory"] / 2**30}
    row |= {"of": numbers["limit"] / 2**30, "state, GiB": numbers["state"] / 2**30} if "limit" in numbers else {"of": None, "state, GiB": None}
    row["compile, s"] = numbers["compile seconds"]
    if name in CASES:  # of another trainer's program the collectives are not counted: its text may name them otherwise
        moved = sum(numbers.get(kind, 0) for kind in KINDS)
        least = 2 * count_params(config_of(name).model) * (2 * parts + 1)
        row |= {"moved, GiB": moved / 2**30, "moved / least": moved / least} | {kind: numbers.get(kind, 0) / 2**30 for kind in KINDS}
        row["FLOPs / model's"] = flops_over_model(name)
    return row | {"versions": found.versions}


SIDES = {}
for _name, (*_, _environment) in CASES.items():
    SIDES[_name] = Side(functools.partial(compiled, _name), environment=_environment)
    _base = _name.removesuffix(", full remat")
    if _base != _name:
        SIDES[f"{_base}, MaxText"] = Side(functools.partial(by_maxtext, _base), environment="maxtext")


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

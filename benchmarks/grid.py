"""A grid of weight decays until its last member is saved, compiling included: one by one, as one program, and one by one with torch.compile.

Command: python benchmarks/grid.py

The model and batch are those of the train-step benchmark's 0.5M row, random tokens, float32 on our sides and bfloat16 on torch's (its faster dtype).
A round is the whole grid from fresh parameters, its last states written to disk; the first round compiles and is the one that counts here.
"""

import functools
import tempfile
from pathlib import Path

import train_step
from side_by_side import Round, Side, finish, measure, serve

SIZE, STEPS, GRIDS = "0.5M", 10, (9, 16)


def of_us(members: int, together: bool) -> Round:
    from plasticity_jax.parallel.allocator import keep_freed_memory

    keep_freed_memory()
    import jax

    from plasticity_jax.config import ModelConfig, StudyConfig, TrainConfig
    from plasticity_jax.data.loader import as_batch
    from plasticity_jax.model.checkpoint import Checkpoints
    from plasticity_jax.model.transformer import init_params
    from plasticity_jax.parallel.mesh import make_mesh
    from plasticity_jax.train.pretrain import step_settings
    from plasticity_jax.train.step import compile_train_step, hyper_parameters, initial_state, stack, state_shardings

    shape, rows, length, _ = train_step.SIZES[SIZE]
    config = StudyConfig(model=ModelConfig(**shape), train=TrainConfig(batch_size=rows, seq_len=length, compute_dtype="float32"))
    mesh = make_mesh(config.mesh)
    settings = step_settings(config, mesh)
    step = compile_train_step(settings, mesh, members=together)
    shardings = state_shardings(settings, mesh, members=together)
    batch = as_batch(train_step.tokens(SIZE))
    hypers = [hyper_parameters(weight_decay=0.1 * i, peak_lr=train_step.PEAK_LR, warmup=10, total=STEPS) for i in range(members)]

    def save(state, folder: Path) -> None:
        with Checkpoints(folder) as checkpoints:
            checkpoints.save(STEPS, state["params"], state["optimizer"])

    def one_round():
        with tempfile.TemporaryDirectory() as folder:
            groups = [list(range(members))] if together else [[i] for i in range(members)]
            for group in groups:
                states = [initial_state(settings, init_params(config.model, 0)) for _ in group]
                state = jax.device_put(stack(states) if together else states[0], shardings)
                hyper = stack([hypers[i] for i in group]) if together else hypers[group[0]]
                for _ in range(STEPS):
                    state, metrics = step(state, batch, hyper)
                jax.block_until_ready(metrics)
                for place, i in enumerate(group):
                    save(jax.tree.map(lambda x, place=place: x[place], state) if together else state, Path(folder) / str(i))
        return {"programs": step._cache_size()}

    return one_round


def of_torch(members: int) -> Round:
    import torch
    import transformers

    shape = train_step.SIZES[SIZE][0]
    config = train_step.torch_config(shape)
    ids = torch.tensor(train_step.tokens(SIZE))

    def one_round():
        with tempfile.TemporaryDirectory() as folder:
            torch.manual_seed(0)
            model = transformers.LlamaForCausalLM(config)
            start = {name: value.clone() for name, value in model.state_dict().items()}
            forward = torch.compile(model)
            for i in range(members):
                model.load_state_dict(start)  # the compiled function serves every member
                optimizer = torch.optim.AdamW(model.parameters(), lr=train_step.PEAK_LR, weight_decay=0.1 * i, fused=True)
                for _ in range(STEPS):
                    train_step.torch_step(model, forward, optimizer, ids, "bfloat16")
                torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, Path(folder) / f"{i}.pt")

    return one_round


KINDS = {
    "torch.compile bf16, one by one": lambda members: Side(functools.partial(of_torch, members), "extra"),
    "plasticity_jax, one by one": lambda members: Side(functools.partial(of_us, members, False)),
    "plasticity_jax, one program": lambda members: Side(functools.partial(of_us, members, True)),
    "plasticity_jax, newest, one by one": lambda members: Side(functools.partial(of_us, members, False), "newest"),
    "plasticity_jax, newest, one program": lambda members: Side(functools.partial(of_us, members, True), "newest"),
}
SIDES = {f"{members}: {kind}": make(members) for members in GRIDS for kind, make in KINDS.items()}


def main() -> None:
    tables = {}
    for members in GRIDS:
        found = measure({side: SIDES[side] for side in SIDES if side.startswith(f"{members}: ")}, rounds=1)
        rows = []
        for side, one in found.items():
            name = side.partition(": ")[2]
            if one.missing:
                rows.append({"side": name, "missing": one.missing})
                continue
            numbers = {"programs": one.numbers["programs"]} if one.numbers else {}
            rows.append({"side": name, "seconds": one.first_seconds, "seconds when compiled": one.median} | numbers | {"versions": one.versions})
        tables[f"{members} weight decays x {STEPS} steps, seconds to the last saved state"] = rows
    finish("The grid as one program", tables)


if __name__ == "__main__":
    serve(SIDES)
    main()

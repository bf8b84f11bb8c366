"""What the compiled step sends between eight devices: weights, and no activations over fsdp; and that it works in its state's own memory."""

import textwrap

import pytest
from running import python

COMPILED = """
    import re, sys
    import jax, numpy as np
    from plasticity_jax.config import MeshConfig, ModelConfig
    from plasticity_jax.data.loader import as_batch
    from plasticity_jax.model import abstract_params
    from plasticity_jax.parallel import make_mesh
    from plasticity_jax.train.optimizer import OptimizerSettings, Schedule
    from plasticity_jax.train.step import Execution, StepSettings, compile_train_step, hyper_parameters, initial_state, state_shardings

    scan, remat = sys.argv[1] == "scan", sys.argv[2]
    BATCH, LENGTH = 16, 48
    model = ModelConfig(vocab_size=512, d_model=64, n_layers=2, n_heads=8, n_kv_heads=4, d_ff=192)
    optimizer = OptimizerSettings(0.9, 0.95, 1e-8, 1.0, Schedule("cosine", 0.1, 1.0), "coupled", "all")
    settings = StepSettings(model, optimizer, "float32", 0.0, False, Execution(1, scan, remat, "xla", 1))
    mesh = make_mesh(MeshConfig(data=1, fsdp=8))
    state = jax.eval_shape(lambda p: initial_state(settings, p), abstract_params(model))
    batch = jax.eval_shape(lambda: as_batch(np.zeros((BATCH, LENGTH + 1), np.int32)))
    hyper = jax.eval_shape(lambda: hyper_parameters(weight_decay=0.1, peak_lr=1.0, warmup=1, total=2))
    compiled = compile_train_step(settings, mesh, members=False).lower(state, batch, hyper).compile()

    gathered = set()
    for result, kind in re.findall(r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\\(", compiled.as_text()):
        for dims in re.findall(r"f32\\[([0-9,]*)\\]", result):
            shape = tuple(int(n) for n in dims.split(",") if n and int(n) > 1)
            assert shape[:1] != (BATCH * LENGTH,) and shape[:2] != (BATCH, LENGTH), f"{kind} of every token's {shape}"
            if kind == "all-gather":
                gathered.add(shape)
    matrices = {x.shape[-2:] for path, x in jax.tree_util.tree_leaves_with_path(state["params"]) if "scale" not in str(path)}
    assert gathered == matrices, (gathered, matrices)
    shardings = jax.tree.leaves(state_shardings(settings, mesh, members=False))
    held = sum(int(np.prod(s.shard_shape(x.shape))) * x.dtype.itemsize for x, s in zip(jax.tree.leaves(state), shardings, strict=True))
    assert compiled.memory_analysis().alias_size_in_bytes == held
"""


@pytest.mark.parametrize("layers, remat", [("unrolled", "none"), ("scan", "full")])
def test_fsdp_sends_weights_alone_and_the_state_is_donated(layers, remat):
    python(textwrap.dedent(COMPILED), layers, remat, devices=8)

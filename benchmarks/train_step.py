"""A training step on the CPU at three sizes, beside torch with transformers (compiled and eager) and a plain decoder of Flax's own layers.

Command: python benchmarks/train_step.py [--sizes 0.5M 5M 27M]

Same shapes, batch, clipping and AdamW on all sides; float32 parameters and optimizer state, matmuls in the dtype that a row names. A round is several
steps on random tokens.
"""

import argparse
import functools

from side_by_side import Round, Side, finish, measure, serve

# name → (shape, rows, tokens per row, steps per round)
SIZES = {
    "0.5M": (dict(vocab_size=1024, d_model=96, n_layers=3, n_heads=4, n_kv_heads=2, d_ff=256), 32, 128, 10),
    "5M": (dict(vocab_size=4096, d_model=256, n_layers=4, n_heads=4, n_kv_heads=4, d_ff=688), 16, 256, 4),
    "27M": (dict(vocab_size=8192, d_model=512, n_layers=6, n_heads=8, n_kv_heads=8, d_ff=1376), 16, 256, 2),
}
PEAK_LR, WEIGHT_DECAY, CLIP = 1e-3, 0.1, 1.0


def tokens(size: str):
    import numpy as np

    shape, rows, length, _ = SIZES[size]
    return np.random.default_rng(0).integers(0, shape["vocab_size"], (rows, length + 1))


def of_us(size: str, dtype: str) -> Round:
    from plasticity_jax.parallel.allocator import keep_freed_memory

    keep_freed_memory()
    import jax

    from plasticity_jax.config import ModelConfig, StudyConfig, TrainConfig
    from plasticity_jax.data.loader import as_batch
    from plasticity_jax.model.transformer import init_params
    from plasticity_jax.parallel.mesh import make_mesh
    from plasticity_jax.train.pretrain import step_settings
    from plasticity_jax.train.step import compile_train_step, hyper_parameters, initial_state, state_shardings

    shape, rows, length, steps = SIZES[size]
    config = StudyConfig(model=ModelConfig(**shape), train=TrainConfig(batch_size=rows, seq_len=length, compute_dtype=dtype))
    mesh = make_mesh(config.mesh)
    settings = step_settings(config, mesh)
    state = jax.device_put(initial_state(settings, init_params(config.model, 0)), state_shardings(settings, mesh, members=False))
    step = compile_train_step(settings, mesh, members=False)
    batch = as_batch(tokens(size))
    hyper = hyper_parameters(weight_decay=WEIGHT_DECAY, peak_lr=PEAK_LR, warmup=10, total=1000)

    def one_round():
        nonlocal state
        for _ in range(steps):
            state, metrics = step(state, batch, hyper)
        jax.block_until_ready(metrics)

    return one_round


def of_flax(size: str, dtype: str) -> Round:
    """A decoder of flax.nnx's own layers, trained by optax.adamw: what one writes in an afternoon."""
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx

    shape, _, length, steps = SIZES[size]
    heads, kv_heads, width = shape["n_heads"], shape["n_kv_heads"], shape["d_model"] // shape["n_heads"]
    angles = jnp.arange(length)[:, None] * 1e4 ** (-jnp.arange(0, width, 2) / width)

    def rotate(x):
        cos, sin = jnp.cos(angles)[:, None].astype(x.dtype), jnp.sin(angles)[:, None].astype(x.dtype)
        a, b = jnp.split(x, 2, axis=-1)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    class Layer(nnx.Module):
        def __init__(self, rngs):
            linear = functools.partial(nnx.Linear, use_bias=False, dtype=dtype, rngs=rngs)
            self.norms = nnx.List([nnx.RMSNorm(shape["d_model"], dtype=dtype, rngs=rngs) for _ in range(2)])
            self.q, self.o = (linear(shape["d_model"], shape["d_model"]) for _ in range(2))
            self.k, self.v = (linear(shape["d_model"], kv_heads * width) for _ in range(2))
            self.gate, self.up = (linear(shape["d_model"], shape["d_ff"]) for _ in range(2))
            self.down = linear(shape["d_ff"], shape["d_model"])

        def __call__(self, x):
            y = self.norms[0](x)
            q, k, v = (f(y).reshape(*x.shape[:2], -1, width) for f in (self.q, self.k, self.v))
            out = jax.nn.dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
            x = x + self.o(out.reshape(*x.shape[:2], heads * width))
            y = self.norms[1](x)
            return x + self.down(nnx.silu(self.gate(y)) * self.up(y))

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(shape["vocab_size"], shape["d_model"], dtype=dtype, rngs=rngs)
            self.layers = nnx.List([Layer(rngs) for _ in range(shape["n_layers"])])
            self.norm = nnx.RMSNorm(shape["d_model"], dtype=dtype, rngs=rngs)
            self.head = nnx.Linear(shape["d_model"], shape["vocab_size"], use_bias=False, dtype=dtype, rngs=rngs)

        def __call__(self, ids):
            x = self.embed(ids)
            for layer in self.layers:
                x = layer(x)
            return self.head(self.norm(x)).astype(jnp.float32)

    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.chain(optax.clip_by_global_norm(CLIP), optax.adamw(PEAK_LR, weight_decay=WEIGHT_DECAY)), wrt=nnx.Param)
    ids = jnp.asarray(tokens(size))

    @nnx.jit
    def step(model, optimizer):
        loss, gradient = nnx.value_and_grad(lambda model: optax.softmax_cross_entropy_with_integer_labels(model(ids[:, :-1]), ids[:, 1:]).mean())(
            model
        )
        optimizer.update(model, gradient)
        return loss

    def one_round():
        for _ in range(steps):
            loss = step(model, optimizer)
        jax.block_until_ready(loss)

    return one_round


def torch_config(shape: dict):
    """The same shape as a configuration of transformers."""
    import transformers

    names = {"d_model": "hidden_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads", "n_kv_heads": "num_key_value_heads"}
    names["d_ff"] = "intermediate_size"
    return transformers.LlamaConfig(**{names.get(name, name): value for name, value in shape.items()}, tie_word_embeddings=False)


def torch_step(model, forward, optimizer, ids, dtype: str):
    """One update; returns the loss."""
    import torch

    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        logits = forward(input_ids=ids[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    optimizer.step()
    optimizer.zero_grad()
    return loss


def of_torch(size: str, dtype: str, compiled: bool) -> Round:
    import torch
    import transformers

    shape, _, _, steps = SIZES[size]
    torch.manual_seed(0)
    config = torch_config(shape)
    model = transformers.LlamaForCausalLM(config)
    forward = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, weight_decay=WEIGHT_DECAY, fused=True)
    ids = torch.tensor(tokens(size))

    def one_round():
        for _ in range(steps):
            loss = torch_step(model, forward, optimizer, ids, dtype)
        loss.item()

    return one_round


KINDS = {
    "torch.compile, bf16": lambda size: Side(functools.partial(of_torch, size, "bfloat16", True), "extra"),
    "torch eager, bf16": lambda size: Side(functools.partial(of_torch, size, "bfloat16", False), "extra"),
    "torch eager, float32": lambda size: Side(functools.partial(of_torch, size, "float32", False), "extra"),
    "Flax layers and optax, newest, bf16": lambda size: Side(functools.partial(of_flax, size, "bfloat16"), "newest"),
    "plasticity_jax, float32": lambda size: Side(functools.partial(of_us, size, "float32")),
    "plasticity_jax, newest, float32": lambda size: Side(functools.partial(of_us, size, "float32"), "newest"),
    "plasticity_jax, newest, bf16": lambda size: Side(functools.partial(of_us, size, "bfloat16"), "newest"),
}
SIDES = {f"{size}: {kind}": make(size) for size in SIZES for kind, make in KINDS.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    tables = {}
    for size in arguments.sizes:
        _, rows, length, steps = SIZES[size]
        found = measure({f"{size}: {kind}": SIDES[f"{size}: {kind}"] for kind in arguments.kinds}, rounds=arguments.rounds)
        reference = found[f"{size}: {arguments.kinds[0]}"]
        lines = []
        for side, one in found.items():
            row = one.row(side.removeprefix(f"{size}: "), reference)
            lines.append(row if one.missing else row | {key: row[key] / steps for key in ("seconds", "least", "most")})
        tables[f"{size} parameters, {rows} x {length} tokens, seconds a step"] = lines
    finish("Train step on the CPU", tables, by_units=True)


if __name__ == "__main__":
    serve(SIDES)
    main()

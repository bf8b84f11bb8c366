"""The optimizer against torch.optim.AdamW: fifty steps on the same gradients, with clipping and the study's schedule."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from plasticity_jax.train.optimizer import OptimizerSettings, Schedule, make_optimizer, schedule_shape
from plasticity_jax.train.step import hyper_parameters

pytestmark = pytest.mark.parity

STEPS, WARMUP, PEAK = 50, 5, 1e-2
SHAPES = {"embed": {"embedding": (31, 8)}, "attn": {"kernel": (2, 8, 24)}, "attn_norm": {"scale": (2, 8)}, "head": {"kernel": (8, 31)}}


def draw(seed: int, scale: float) -> dict:
    generator = np.random.default_rng(seed)
    return jax.tree.map(lambda shape: (scale * generator.normal(size=shape)).astype(np.float32), SHAPES, is_leaf=lambda x: isinstance(x, tuple))


@pytest.mark.parametrize("kind", ["cosine", "wsd"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1, 10.0])
@pytest.mark.parametrize("mask, left_out", [("all", ()), ("matrices-only", ("embed", "attn_norm"))])
def test_fifty_steps_equal_torch(kind, weight_decay, mask, left_out):
    schedule = Schedule(kind, final_fraction=0.1, decay_fraction=0.3)
    optimizer = make_optimizer(OptimizerSettings(b1=0.9, b2=0.95, eps=1e-8, clip_norm=1.0, schedule=schedule, decay_kind="coupled", decay_mask=mask))
    hyper = hyper_parameters(weight_decay=weight_decay, peak_lr=PEAK, warmup=WARMUP, total=STEPS)
    params = jax.tree.map(jnp.asarray, draw(0, 0.3))
    state = optimizer.init(params)
    step = jax.jit(lambda gradient, state, params: optimizer.update(gradient, state, params, hyper=hyper))

    theirs = {name: torch.nn.Parameter(torch.tensor(next(iter(leaf.values())))) for name, leaf in draw(0, 0.3).items()}
    groups = [{"params": [theirs[name]], "weight_decay": 0.0 if name in left_out else weight_decay} for name in theirs]
    adamw = torch.optim.AdamW(groups, lr=PEAK, betas=(0.9, 0.95), eps=1e-8)
    shape = schedule_shape(jnp.arange(STEPS), warmup=jnp.float32(WARMUP), total=jnp.float32(STEPS), schedule=schedule)
    scheduler = torch.optim.lr_scheduler.LambdaLR(adamw, lambda s: float(shape[min(s, STEPS - 1)]))
    for t in range(STEPS):
        gradient = draw(100 + t, 0.01 if t % 3 else 1.0)  # on both sides of the clipping limit
        updates, state = step(gradient, state, params)
        params = optax.apply_updates(params, updates)
        for name, leaf in gradient.items():
            theirs[name].grad = torch.tensor(next(iter(leaf.values())))
        torch.nn.utils.clip_grad_norm_(theirs.values(), 1.0)
        adamw.step()
        scheduler.step()
    for name, leaf in params.items():
        ours, expected = np.asarray(next(iter(leaf.values()))), theirs[name].detach().numpy()
        assert np.linalg.norm(ours - expected) <= 1e-6 * np.linalg.norm(expected), name

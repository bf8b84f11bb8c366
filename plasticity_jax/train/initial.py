"""Step-0 parameters, which every member of a seed starts from."""

import hashlib

import jax

from plasticity_jax.config import ModelConfig
from plasticity_jax.model.checkpoint import Checkpoints, checksums
from plasticity_jax.model.transformer import count_params, init_params
from plasticity_jax.parallel.rules import param_paths
from plasticity_jax.runs.directory import CHECKPOINTS
from plasticity_jax.runs.storage import AnyPath
from plasticity_jax.train.optimizer import Params


def params_sha256(params: Params) -> str:
    """sha256 (hex) over path, dtype, shape and checksum of every parameter, in the order of the paths. Computed where the arrays lie, on any mesh alike."""
    described = zip(param_paths(params), jax.tree.leaves(params), checksums(params), strict=True)
    lines = sorted(f"{path} {leaf.dtype} {leaf.shape} {checksum}\n" for path, leaf, checksum in described)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def save_initial(config: ModelConfig, seed: int, run: AnyPath) -> tuple[int, str]:
    """Draws the parameters of a network from a seed and saves them as checkpoint 0 of a run, unless they are there.

    Returns:
      The number of parameters, and `params_sha256` of them.
    """
    params = init_params(config, seed)
    with Checkpoints(run / CHECKPOINTS, keep=1, asynchronous=False, alone=True) as checkpoints:
        if checkpoints.latest() is None:
            checkpoints.save(0, params)
    return count_params(config), params_sha256(params)

"""Step-0 parameters, which every member of a seed starts from."""

import hashlib

import jax
import numpy as np

from plasticity_jax.config import ModelConfig
from plasticity_jax.model.checkpoint import Checkpoints
from plasticity_jax.model.transformer import count_params, init_params
from plasticity_jax.parallel.arrays import to_host
from plasticity_jax.parallel.rules import param_paths
from plasticity_jax.runs.directory import CHECKPOINTS
from plasticity_jax.runs.storage import AnyPath
from plasticity_jax.train.optimizer import Params


def params_sha256(params: Params) -> str:
    """sha256 (hex) over path, dtype, shape and bytes of every parameter, in the order of the paths."""
    digest = hashlib.sha256()
    for path, leaf in sorted(zip(param_paths(params), jax.tree.leaves(params), strict=True), key=lambda pair: pair[0]):
        array = to_host(leaf)
        digest.update(f"{path} {array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


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

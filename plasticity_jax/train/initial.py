"""The init stage: the step-0 parameters that every member of a seed starts from."""

import hashlib
from typing import Any

import jax
import numpy as np

from plasticity_jax.model.checkpoint import Checkpoints
from plasticity_jax.model.transformer import count_params, init_params
from plasticity_jax.parallel.arrays import to_host
from plasticity_jax.parallel.rules import param_paths
from plasticity_jax.runs.records import Context
from plasticity_jax.train.optimizer import Params

CHECKPOINTS = "checkpoints"


def params_sha256(params: Params) -> str:
    """sha256 (hex) over path, dtype, shape and bytes of every parameter, in the order of the paths."""
    digest = hashlib.sha256()
    for path, leaf in sorted(zip(param_paths(params), jax.tree.leaves(params), strict=True), key=lambda pair: pair[0]):
        array = to_host(leaf)
        digest.update(f"{path} {array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def run(context: Context) -> dict[str, Any]:
    """Draws the parameters from the run's seed and saves them as checkpoint 0.

    Returns:
      `parameters` (their number) and `params_sha256`.
    """
    params = init_params(context.config.model, context.run.seed)
    with Checkpoints(context.directory.path / CHECKPOINTS, keep=1, asynchronous=False, alone=True) as checkpoints:
        if checkpoints.latest() is None:
            checkpoints.save(0, params)
    sha256 = params_sha256(params)
    context.directory.provenance["step_0_sha256"] = sha256
    return {"parameters": count_params(context.config.model), "params_sha256": sha256}

"""Step-0 parameters, which every member of a seed starts from."""

import hashlib
from dataclasses import replace

import jax

from plasticity_jax.config import ModelConfig, to_dict
from plasticity_jax.errors import UserError
from plasticity_jax.model.checkpoint import Checkpoints, checksums
from plasticity_jax.model.hf_import import open_folder
from plasticity_jax.model.load import load_model
from plasticity_jax.model.transformer import count_params, init_params
from plasticity_jax.parallel.rules import param_paths
from plasticity_jax.runs.directory import CHECKPOINTS
from plasticity_jax.runs.storage import AnyPath, location
from plasticity_jax.train.optimizer import Params


def params_sha256(params: Params) -> str:
    """sha256 (hex) over path, dtype, shape and checksum of every parameter, in the order of the paths. Computed where the arrays lie, on any mesh alike."""
    described = zip(param_paths(params), jax.tree.leaves(params), checksums(params), strict=True)
    lines = sorted(f"{path} {leaf.dtype} {leaf.shape} {checksum}\n" for path, leaf, checksum in described)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def check_initial(config: ModelConfig, place: str) -> None:
    """Checks that a Hugging Face folder holds a network, from its headers only. Raises UserError if it does not, or holds another one."""
    path = location(place)
    if not path.is_dir():
        raise UserError(f"train.initial={place}: no such directory; give the Hugging Face folder with the weights of step 0.")
    found, _ = open_folder(path)
    wanted, there = to_dict(config), to_dict(replace(found.model, init=config.init))  # how weights were drawn is not part of a network
    other = [f"{name} {there[name]} for {wanted[name]}" for name in wanted if there[name] != wanted[name]]
    if other:
        raise UserError(f"train.initial={place} holds another network than model: {', '.join(other)}; correct the one or the other.")


def save_initial(config: ModelConfig, seed: int, run: AnyPath, *, place: str | None = None) -> tuple[int, str]:
    """Draws the parameters of a network from a seed and saves them as checkpoint 0 of a run, unless they are there.

    Args:
      place: a Hugging Face folder whose weights are taken instead.
    Returns:
      The number of parameters, and `params_sha256` of them.
    Raises:
      UserError: see `check_initial`.
    """
    if place is None:
        params = init_params(config, seed)
    else:
        check_initial(config, place)
        params = load_model(place).params
    with Checkpoints(run / CHECKPOINTS, keep=1, asynchronous=False, alone=True) as checkpoints:
        if checkpoints.latest() is None:
            checkpoints.save(0, params)
    return count_params(config), params_sha256(params)

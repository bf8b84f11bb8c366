"""The real train step, compiled for TPU chips that are not here."""

import dataclasses

import pytest
from worlds import CONFIG, change

from plasticity_jax.config import MeshConfig
from plasticity_jax.model.transformer import count_params
from plasticity_jax.parallel.deviceless import target
from plasticity_jax.train.check import check

pytestmark = pytest.mark.tpu_compile


def test_a_small_step_fits_on_four_chips_and_a_huge_batch_does_not():
    place = target("v5e:2x2")
    assert len(place.devices) == 4
    config = change(CONFIG, "train", batch_size=8, seq_len=128, compute_dtype="bfloat16")
    config = dataclasses.replace(config, mesh=MeshConfig(data=1, fsdp=4))
    small = check(config, place)
    assert small.fits and small.collectives and small.params >= 4 * count_params(config.model) // 4
    large = check(change(config, "train", batch_size=131072, seq_len=2048), place)
    assert not large.fits and large.total > large.limit and large.largest

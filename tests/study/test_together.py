"""Which runs become one program, by mode, devices and memory."""

import logging
from dataclasses import dataclass, replace

import pytest
from running import TINY

from plasticity_jax.config import load_config
from plasticity_jax.study import together
from plasticity_jax.study.graph import build_graph, run_configs
from plasticity_jax.study.together import MEMORY_SHARE, grouped, members_that_fit

GIB = 2**30


@pytest.mark.parametrize("members", range(1, 12))
@pytest.mark.parametrize("axis", [1, 2, 4])
@pytest.mark.parametrize("of_one", [0.1, 1, 2.1, 5, 9])
def test_groups_fit_in_half_of_the_memory_fill_the_member_axis_and_are_as_few_as_can_be(members, axis, of_one):
    size = members_that_fit(members, int(of_one * GIB), 16 * GIB, axis)
    assert 1 <= size <= members and (size % axis == 0 or size == members)
    # Only what the axis asks for may take more.
    assert size <= axis or size * of_one <= MEMORY_SHARE * 16
    if size < members:
        larger = size + axis
        assert -(-members // larger) == -(-members // size) or larger * of_one > MEMORY_SHARE * 16


@dataclass(frozen=True)
class Device:
    platform: str
    device_kind: str
    bytes_limit: int | None = None

    def memory_stats(self):
        return None if self.bytes_limit is None else {"bytes_limit": self.bytes_limit}


class Mesh:
    def __init__(self, device, **shape):
        import numpy as np

        self.devices, self.shape = np.array([device], object), {"member": 1, "data": 1, "fsdp": 1, "tensor": 1} | shape


@pytest.fixture
def sizes(monkeypatch):
    """Mode, device, bytes of one → sizes of the groups of pretraining, of nine members."""

    def found(mode, device, of_one=GIB, done=(), **shape):
        import plasticity_jax.parallel.mesh as mesh

        config = load_config(TINY, [("grid.mode", mode), ("grid.timescales", "(None,8.0,4.0,2.0,1.0,0.8,0.4,0.2,0.1)")])
        runs = [run for run in build_graph(config) if run.stage == "pretrain"]
        declared = together.stages()
        of_pretrain = replace(declared["pretrain"], batched=replace(declared["pretrain"].batched, bytes=lambda config, mesh: of_one))
        monkeypatch.setattr(together, "stages", lambda: {**declared, "pretrain": of_pretrain})
        monkeypatch.setattr(mesh, "make_mesh", lambda config: Mesh(device, **shape))
        left = {run.id for number, run in enumerate(runs) if number not in done}
        return [len(group) for group in grouped(runs, run_configs(config, runs), left)]

    return found


CPU, V5E, UNKNOWN = Device("cpu", "cpu"), Device("tpu", "TPU v5 lite"), Device("gpu", "a new one", 8 * GIB)


def test_the_mode_decides_and_auto_looks_at_the_devices(sizes, caplog):
    caplog.set_level(logging.INFO, "plasticity_jax")
    assert sizes("sequential", V5E) == [1] * 9
    assert sizes("vmapped", CPU) == [9]
    assert not caplog.records
    assert sizes("auto", CPU) == [1] * 9
    assert sizes("auto", V5E) == [5, 4]  # seven fit: two groups, nearly equal
    assert "grid.mode auto → pretrain: 5 of 9 alike runs as one program (one takes about 1.00 GiB of 15.75 per device, of which 50%" in caplog.text
    assert caplog.text.count("5 of 9 alike runs") == 1, "of both groups once"
    caplog.clear()
    assert sizes("auto", V5E, done=range(9)) == [] and not caplog.records
    assert sizes("auto", UNKNOWN) == [3, 3, 3]
    assert sizes("auto", Device("gpu", "one that says nothing")) == [1] * 9
    assert sizes("auto", CPU, member=3) == [9]
    assert sizes("auto", V5E, of_one=30 * GIB) == [1] * 9


def test_what_is_done_does_not_change_which_of_the_others_go_together(sizes):
    """A group that is interrupted is the same program when it resumes."""
    assert sizes("auto", UNKNOWN, done={0, 4, 5}) == [2, 1, 3]

"""Topologies by their text, and what is known of the devices."""

import jax
import pytest

from plasticity_jax.errors import UserError
from plasticity_jax.parallel import deviceless, hardware


@pytest.mark.parametrize(
    "text, says",
    [
        ("v9:2x2", "unknown"),
        ("v5e:4", "2 numbers"),
        ("v5p:4x4", "3 numbers"),
        ("h100:0", "a number of devices"),
        ("h100:12", "whole nodes"),
        ("cpu:9999", "simulates"),
    ],
)
def test_a_wrong_topology_is_one_line(text, says):
    jax.devices()  # jax has begun, so that its number of devices is fixed
    with pytest.raises(UserError, match=says) as refusal:
        deviceless.target(text)
    assert text in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_missing_compiler_names_its_extra(monkeypatch):
    from jax.experimental import topologies

    def missing(*arguments, **options):
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr(topologies, "get_topology_desc", missing)
    with pytest.raises(UserError, match=r"pip install 'plasticity_jax\[cuda\]'"):
        deviceless.target("h100:8")


@pytest.mark.parametrize(
    "kind, name",
    [
        ("TPU v4", "v4"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v5p", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
    ],
)
def test_jax_device_kinds_are_known(kind, name):
    assert hardware.of_kind(kind) == hardware.named(name)
    assert hardware.of_kind("cpu") is None

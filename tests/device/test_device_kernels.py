"""On the accelerator that is here: every kernel it has against float64 NumPy, forward and backward."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpy_attention
import pytest

from plasticity_jax.config import MeshConfig
from plasticity_jax.errors import UserError
from plasticity_jax.model.attention import attend, attention_mask
from plasticity_jax.model.kernels import KERNELS, choose_kernel, kernel_attention
from plasticity_jax.parallel import make_mesh

pytestmark = pytest.mark.device

# Of the error's norm in that of the exact result. Products of float32 are rounded to TF32 on GPUs and to bfloat16 on TPUs unless asked otherwise.
TOLERANCE = {"float32": 2e-2, "bfloat16": 2e-2, "float16": 4e-3}

# Kernels of a platform and the types that they take; a GPU is an NVIDIA one of compute capability 8.0 or more.
HERE = {"gpu": {"xla": TOLERANCE, "cudnn": ("bfloat16", "float16")}, "tpu": {"xla": TOLERANCE, "splash": ("float32", "bfloat16")}}


def attention_of(kernel, mesh=None):
    if kernel == "xla":
        return lambda q, k, v, segments: attend(q, k, v, attention_mask(q.shape[1], segments))[0]
    return lambda q, k, v, segments: kernel_attention(kernel, q, k, v, segment_ids_BxT=segments, mesh=mesh)


def out_and_gradients(attention, q, k, v, out_gradient, segments):
    out, pull = jax.vjp(lambda q, k, v: attention(q, k, v, segments), q, k, v)
    return out, *pull(out_gradient)


def assert_close(actual, arrays, segments, dtype):
    """Against the float64 result of the same, already rounded, arrays."""
    q, k, v, out_gradient = (np.asarray(x, np.float64) for x in arrays)
    expected = numpy_attention.forward(q, k, v, segments), *numpy_attention.backward(q, k, v, out_gradient, segments)
    for name, a, e in zip(("out", "q", "k", "v"), actual, expected, strict=True):
        assert a.dtype == jnp.dtype(dtype)
        error = np.linalg.norm(np.asarray(a, np.float64) - e) / np.linalg.norm(e)
        assert error <= TOLERANCE[dtype], f"{name}: {error:.2e} of the norm"


@pytest.mark.parametrize("segmented", [False, True], ids=["whole", "segments"])
@pytest.mark.parametrize("head_dim", [48, 64, 128])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_equals_float64_forward_and_backward_or_is_refused(kernel, dtype, head_dim, segmented):
    chosen = functools.partial(choose_kernel, kernel, platform=jax.default_backend(), head_dim=head_dim, compute_dtype=dtype)
    if dtype not in HERE[jax.default_backend()].get(kernel, ()):
        with pytest.raises(UserError, match="set train.attention to 'auto' or 'xla'"):
            chosen()
        return
    assert chosen() == kernel
    for length in (128, 99):
        *arrays, segments = numpy_attention.example(head_dim, length=length, segmented=segmented)
        arrays = [jnp.asarray(x, dtype) for x in arrays]
        assert_close(jax.jit(functools.partial(out_and_gradients, attention_of(kernel)))(*arrays, segments), arrays, segments, dtype)


@pytest.mark.parametrize("segmented", [False, True], ids=["whole", "segments"])
def test_the_kernel_of_this_device_serves_members_over_all_devices(segmented):
    """The kernel that auto takes, in the form that a vmapped grid runs it."""
    kernel = choose_kernel("auto", platform=jax.default_backend(), head_dim=64, compute_dtype="bfloat16", seq_len=128)
    assert kernel == {"gpu": "cudnn", "tpu": "splash"}[jax.default_backend()]
    attention = attention_of(kernel, make_mesh(MeshConfig(data=-1)))
    batch = 2 * len(jax.devices())
    members = [numpy_attention.example(64, length=128, segmented=segmented, seed=seed, batch=batch) for seed in (0, 1)]
    segments = members[0][-1]
    stacked = [jnp.asarray(np.stack(arrays), jnp.bfloat16) for arrays in list(zip(*members))[:4]]
    step = jax.vmap(functools.partial(out_and_gradients, attention), in_axes=(0, 0, 0, 0, None), spmd_axis_name="member")
    of_members = jax.jit(step)(*stacked, segments)
    for member in range(2):
        assert_close([x[member] for x in of_members], [x[member] for x in stacked], segments, "bfloat16")

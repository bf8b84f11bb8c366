"""Fused attention: which kernel runs where, and the kernels behind one signature.

"xla" is `attention.attend`, which materializes the scores of every head; "cudnn" (NVIDIA) and "splash" (TPU) do not. With segment ids, cuDNN still
materializes a 16-bit mask [B, 1, T, T] shared by all heads.
"""

import functools
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from plasticity_jax.errors import UserError

KERNELS = ("xla", "cudnn", "splash")

AMPERE, HOPPER = (8, 0), (9, 0)  # compute capabilities of NVIDIA GPUs
LANES = 128  # width of a TPU's vector unit; splash's blocks are multiples of it
LARGEST_BLOCK = 512  # tokens; a block of scores in float32 is then 1 MiB of the TPU's 16 MiB of fast memory
SPLASH_HEAD_DIM = 256  # the largest that has been compiled


def choose_kernel(name: str, *, platform: str, head_dim: int, compute_dtype: str, seq_len: int | None = None) -> str:
    """The kernel that `train.attention` stands for: one of KERNELS.

    "auto" is splash on a TPU, if its blocks divide the sequences; cuDNN's on an NVIDIA GPU that has it, in 16-bit formats; else "xla".

    Args:
      name: "auto" or a kernel.
      platform: "cpu", "gpu" (or "cuda") or "tpu".
      head_dim: features per head.
      compute_dtype: "float32", "bfloat16" or "float16", of queries, keys and values.
      seq_len: tokens per sequence; None if it varies. The kernels take every length, but splash pads to the next multiple of 128.
    Raises:
      UserError: the named kernel cannot run there.
    """
    refusals = {
        "xla": None,
        "cudnn": _cudnn_refusal(platform, head_dim, compute_dtype),
        "splash": _splash_refusal(platform, head_dim, compute_dtype),
    }
    if name == "auto":
        if refusals["splash"] is None and (seq_len is None or seq_len % LANES == 0):
            return "splash"
        return "cudnn" if refusals["cudnn"] is None else "xla"
    if refusals[name] is not None:
        raise UserError(f"train.attention={name!r}: {refusals[name]}; set train.attention to 'auto' or 'xla'.")
    return name


def _cudnn_refusal(platform: str, head_dim: int, compute_dtype: str) -> str | None:
    """Why cuDNN's attention cannot run; None if it can. Source of the rules: jax 0.10, `check_is_flash_attention`."""
    if platform not in ("gpu", "cuda"):
        return f"cuDNN runs on NVIDIA GPUs only, and this is a {platform.upper()}"
    if compute_dtype not in ("bfloat16", "float16"):
        return f"cuDNN's attention takes bfloat16 and float16, and train.compute_dtype is {compute_dtype}"
    found = _compute_capability()
    numbers = re.fullmatch(r"(\d+)\.(\d+)", found) if found else None
    capability = (int(numbers[1]), int(numbers[2])) if numbers else None
    if found and (capability is None or capability < AMPERE):
        return f"cuDNN's attention needs an NVIDIA GPU of compute capability 8.0 or more, and this one has {found}"
    largest = 256 if capability is not None and capability >= HOPPER else 128
    if head_dim % 8 or head_dim > largest:
        return f"cuDNN's attention takes head sizes that are multiples of 8 up to {largest} on this GPU, and the model's is {head_dim}"
    return None


def _compute_capability() -> str | None:
    """Compute capability of the first local GPU, such as "9.0" (AMD's begin with "gfx"); None without a GPU."""
    try:
        return str(jax.local_devices(backend="gpu")[0].compute_capability)
    except RuntimeError:
        return None


def _splash_refusal(platform: str, head_dim: int, compute_dtype: str) -> str | None:
    """Why splash attention cannot run; None if it can."""
    if platform != "tpu":
        return f"splash attention runs on TPUs only, and this is a {platform.upper()}"
    if compute_dtype not in ("float32", "bfloat16"):
        return f"splash attention takes float32 and bfloat16, and train.compute_dtype is {compute_dtype}"
    if head_dim > SPLASH_HEAD_DIM:
        return f"splash attention takes head sizes up to {SPLASH_HEAD_DIM}, and the model's is {head_dim}"
    return None


def kernel_attention(
    kernel: str,
    q_BxTxHxD: Float[Array, "B T H D"],
    k_BxTxKxD: Float[Array, "B T K D"],
    v_BxTxKxD: Float[Array, "B T K D"],
    *,
    segment_ids_BxT: Int[Array, "B T"] | None = None,
    mesh: Mesh | None = None,
    interpret: bool = False,
) -> Float[Array, "B T H D"]:
    """Causal softmax attention with scale 1/sqrt(D); query head h reads key-value head h // (H/K). Softmax in float32.

    Args:
      kernel: "cudnn" or "splash".
      segment_ids_BxT: if given, a token attends only within its own id.
      mesh: where the arrays are sharded, rows over data and fsdp and heads over tensor; None for one device.
      interpret: run splash without a TPU, as plain operations (slow).
    Returns:
      The output, in q's dtype.
    """
    attend = _cudnn if kernel == "cudnn" else functools.partial(_splash, interpret=interpret)
    if mesh is None or mesh.size == 1:
        return attend(q_BxTxHxD, k_BxTxKxD, v_BxTxKxD, segment_ids_BxT)
    return _sharded(attend, mesh, q_BxTxHxD, k_BxTxKxD, v_BxTxKxD, segment_ids_BxT)


def _sharded(attend: Callable, mesh: Mesh, q: Array, k: Array, v: Array, segments: Array | None) -> Array:
    """`attend` on every device's own rows and heads, because the compiler cannot partition a kernel."""
    n_heads, n_kv_heads = q.shape[2], k.shape[2]
    tensor = mesh.shape["tensor"]
    rows = ("data", "fsdp") if q.shape[0] % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0 else None
    heads = "tensor" if n_heads % tensor == 0 else None
    kv_heads = "tensor" if heads and n_kv_heads % tensor == 0 else None
    of_q, of_kv = PartitionSpec(rows, None, heads, None), PartitionSpec(rows, None, kv_heads, None)

    def local(q, k, v, segments):
        if heads and not kv_heads:
            index = _kv_heads_of_shard(n_heads, n_kv_heads, tensor, jax.lax.axis_index("tensor"))
            k, v = jnp.take(k, index, axis=2), jnp.take(v, index, axis=2)
        return attend(q, k, v, segments)

    # A kernel does not declare over which axes its output varies, so this is not checked.
    specs = (of_q, of_kv, of_kv, PartitionSpec(rows, None))
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=of_q, check_vma=False)(q, k, v, segments)


def _kv_heads_of_shard(n_heads: int, n_kv_heads: int, shards: int, shard: Array) -> Array:
    """The key-value heads of a shard's query heads, in order, each for the same number of query heads."""
    local, group = n_heads // shards, n_heads // n_kv_heads
    run = math.gcd(local, group)  # adjacent query heads of a shard with the same key-value head
    return (shard * local + run * jnp.arange(local // run)) // group


def _pad(x: Array, multiple: int) -> Array:
    """Pads with zeros at the end, up to a multiple. Under a causal mask no earlier token attends to them, so they change nothing."""
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % multiple)] + [(0, 0)] * (x.ndim - 2))


# ---------------------------------------------------------------------------------------------------------------------------- splash


def _splash(q: Array, k: Array, v: Array, segments: Array | None, *, interpret: bool) -> Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask import MultiHeadMask

    length, n_heads, head_dim = q.shape[1:]
    q, k, v = (_pad(x, LANES).swapaxes(1, 2) for x in (q * head_dim**-0.5, k, v))
    padded = q.shape[2]
    block = max(size for size in range(LANES, LARGEST_BLOCK + 1, LANES) if padded % size == 0)
    sizes = splash.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=block, block_q_dkv=block, block_kv_dkv=block, block_kv_dkv_compute=block,
        block_q_dq=block, block_kv_dq=block,
    )  # fmt: skip
    # Created in every trace, because it holds arrays of that trace.
    attend = splash.make_splash_mha_single_device(MultiHeadMask([_causal_mask(padded)] * n_heads), block_sizes=sizes, interpret=interpret)
    if segments is None:
        out = jax.vmap(attend)(q, k, v)
    else:
        segments = _pad(segments, LANES)
        out = jax.vmap(attend)(q, k, v, splash.SegmentIds(segments, segments))
    return out.swapaxes(1, 2)[:, :length]  # pyright: ignore[reportAttributeAccessIssue]


@functools.lru_cache(maxsize=32)
def _causal_mask(length: int) -> Any:
    """One object for all layers, because the kernel is compiled once per mask object."""
    from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask import CausalMask

    return CausalMask((length, length))


# ----------------------------------------------------------------------------------------------------------------------------- cuDNN


def _cudnn(q: Array, k: Array, v: Array, segments: Array | None) -> Array:
    length = q.shape[1]
    q, k, v = (_pad(x, 2) for x in (q, k, v))  # its backward pass supports even lengths only
    if segments is None:
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")[:, :length]
    return _cudnn_within_segments(q, k, v, _pad(segments, 2))[:, :length]


def _merge_mapped_axis(function: Callable) -> Callable:
    """A function of arrays with a leading batch axis; under `jax.vmap`, the mapped axis is merged into the batch.

    jax's own vmap rule for cuDNN fails if a mask has one head or is not mapped as the queries are.
    """
    merged = jax.custom_batching.custom_vmap(function)

    @merged.def_vmap
    def rule(size: int, mapped: list[bool], *arrays: Array) -> tuple[Any, Any]:
        stacked = [x if is_mapped else jnp.broadcast_to(x, (size, *x.shape)) for x, is_mapped in zip(arrays, mapped)]
        out = merged(*(x.reshape(-1, *x.shape[2:]) for x in stacked))
        return jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), out), jax.tree.map(lambda _: True, out)

    return merged


def _masked(q: Array, k: Array, v: Array, segments: Array) -> Array:
    mask_Bx1xTxT = (segments[:, :, None] == segments[:, None, :])[:, None]
    return jax.nn.dot_product_attention(q, k, v, mask=mask_Bx1xTxT, is_causal=True, implementation="cudnn")


def _masked_gradients(q: Array, k: Array, v: Array, segments: Array, out_gradient: Array) -> tuple[Array, Array, Array]:
    return jax.vjp(functools.partial(_masked, segments=segments), q, k, v)[1](out_gradient)


_merged_masked, _merged_masked_gradients = _merge_mapped_axis(_masked), _merge_mapped_axis(_masked_gradients)


# jax cannot differentiate through a custom vmap rule, so both passes are given; the backward pass recomputes the forward pass.
@jax.custom_vjp
def _cudnn_within_segments(q: Array, k: Array, v: Array, segments: Array) -> Array:
    return _merged_masked(q, k, v, segments)


def _forward(*arrays: Array) -> tuple[Array, tuple[Array, ...]]:
    return _merged_masked(*arrays), arrays


def _backward(arrays: tuple[Array, ...], out_gradient: Array) -> tuple[Array | None, ...]:
    return *_merged_masked_gradients(*arrays, out_gradient), None


_cudnn_within_segments.defvjp(_forward, _backward)

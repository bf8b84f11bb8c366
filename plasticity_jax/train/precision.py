"""The compute dtype."""


def resolve_compute_dtype(requested: str) -> str:
    """The dtype of the matmuls in training: "float32" or "bfloat16".

    Args:
      requested: one of the two, or "auto": bfloat16 on TPU and GPU, float32 on CPU. The dtype is a result field, so it depends on the platform and
        never on a measured speed.
    """
    if requested != "auto":
        return requested
    import jax

    return "bfloat16" if jax.default_backend() in ("tpu", "gpu") else "float32"

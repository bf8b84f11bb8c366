"""The dtype of the matrix products."""


def resolve_compute_dtype(requested: str) -> str:
    """The dtype of the products in training: "float32" or "bfloat16".

    Args:
      requested: one of the two, which is returned as it is, or "auto": bfloat16 on TPU and GPU, float32 on a CPU. The dtype is a result field, so the
        platform decides and never a stopwatch.
    """
    if requested != "auto":
        return requested
    import jax

    return "bfloat16" if jax.default_backend() in ("tpu", "gpu") else "float32"

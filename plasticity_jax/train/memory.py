"""How much device memory training takes, in closed form: what decides how many members of a grid are trained together."""

import math

from jax.sharding import Mesh

from plasticity_jax.model.param_count import count_params
from plasticity_jax.parallel.batches import row_shards
from plasticity_jax.train.step import StepSettings


def training_bytes(settings: StepSettings, mesh: Mesh, rows: int, seq_len: int) -> int:
    """Bytes per device of training one model: parameters, gradients and both moments in float32, and what the backward pass keeps of a part.

    Without remat, it keeps about twice what the projections put out, and with attention that is no kernel its probabilities. The rest is the larger of
    one layer's backward pass and the logits. Within 15% of what the TPU and GPU compilers need for the paper's configs.

    Args:
      rows, seq_len: of the longest batches.
    """
    model, execution, tensor = settings.model, settings.execution, mesh.shape["tensor"]
    width = 2 if settings.compute_dtype == "bfloat16" else 4
    queries, keys, hidden = model.n_heads * model.head_dim, model.n_kv_heads * model.head_dim, model.d_ff
    projections = (queries + 2 * keys + 2 * hidden) / tensor + 3 * model.d_model
    probabilities = 0 if execution.attention != "xla" else model.n_heads / tensor * seq_len * (1 + 4 / width)
    kept = {"full": model.d_model, "dots": projections, "none": 2 * projections + probabilities}[execution.remat]
    of_layer = 5 * hidden / tensor + 8 * model.d_model + probabilities
    tokens = math.ceil(rows / execution.grad_accum_steps / row_shards(mesh)) * seq_len
    logits = (4 + width) * model.vocab_size / tensor / execution.loss_chunks
    state = 16 * count_params(model) / (mesh.shape["fsdp"] * tensor)
    return int(state + tokens * (width * model.n_layers * kept + max(width * of_layer, logits)))

"""Attention from its definition, in NumPy float64, row by row: what the kernels are compared with."""

import numpy as np


def forward(q, k, v, segments=None):
    """Causal attention of q [B, T, H, D] over k and v [B, T, K, D], within equal `segments` [B, T] where given → [B, T, H, D]."""
    return _walk(q, k, v, segments)[0]


def backward(q, k, v, out_gradient, segments=None):
    """Gradients of sum(out_gradient · forward(q, k, v)) for q, k and v."""
    return _walk(q, k, v, segments, out_gradient)[1]


def _walk(q, k, v, segments, out_gradient=None):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out, gradients = np.zeros(q.shape), [np.zeros(x.shape) for x in (q, k, v)]
    (batch, length, n_heads, dim), n_kv_heads = q.shape, k.shape[2]
    for b in range(batch):
        for head in range(n_heads):
            shared = head // (n_heads // n_kv_heads)
            for t in range(length):
                may_read = [s for s in range(t + 1) if segments is None or segments[b][s] == segments[b][t]]
                keys, values = k[b, may_read, shared], v[b, may_read, shared]
                scores = keys @ q[b, t, head] / np.sqrt(dim)
                probs = np.exp(scores - scores.max())
                probs /= probs.sum()
                out[b, t, head] = probs @ values
                if out_gradient is not None:
                    wanted = np.asarray(out_gradient[b, t, head], np.float64)
                    of_probs = values @ wanted
                    of_scores = probs * (of_probs - probs @ of_probs) / np.sqrt(dim)
                    gradients[0][b, t, head] = of_scores @ keys
                    gradients[1][b, may_read, shared] += np.outer(of_scores, q[b, t, head])
                    gradients[2][b, may_read, shared] += np.outer(probs, wanted)
    return out, gradients


def example(head_dim, *, length, n_heads=4, n_kv_heads=2, batch=2, segmented=False, seed=0):
    """Random q, k, v and out_gradient, float32, and segment ids (None if not `segmented`) with borders off every block's, ending in padding."""
    rng = np.random.default_rng(seed)
    arrays = [rng.normal(size=(batch, length, heads, head_dim)).astype(np.float32) for heads in (n_heads, n_kv_heads, n_kv_heads, n_heads)]
    if not segmented:
        return *arrays, None
    segments = np.zeros((batch, length), np.int32)
    for row in segments:
        borders = np.sort(rng.choice(np.arange(1, length - 1), 3, replace=False))
        for number, (start, end) in enumerate(zip([0, *borders[:-1]], borders)):
            row[start:end] = number + 1
    return *arrays, segments

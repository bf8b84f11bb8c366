"""Two analyses: the attention spectra of a model of a billion parameters, and the gap of the default model beside its forward passes alone.

Command: python benchmarks/spectra_and_gap.py

The spectra are of random matrices in the shapes of llama-1b, all 22 layers with 32 heads. Beside them, numpy.linalg.svd decomposes the same products,
d_model x d_model, for a sample of heads; its time for all of them is an extrapolation. The gap reads as many tokens as configs/default.py says from a
made-up corpus of the default study's size. Its unigram model counts the whole corpus for the first model of a command, and not again.
"""

import os
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from side_by_side import Round, Side, finish, measure, peak_megabytes, serve

FOLDER = "BENCHMARK_CORPUS"  # environment variable of the gap's sides: where the corpus lies
SAMPLE = 1  # heads of the peer, of one layer
TRAIN_RECORDS, HELD_OUT_RECORDS = 80_000, 8_000
WANTED = "under 60 s and 8,000 MB"


def factors() -> tuple[Any, dict]:
    """llama-1b's config, and random attention matrices."""
    import numpy as np

    from plasticity_jax.config.presets import presets

    config = presets()["llama-1b"]
    rng, width = np.random.default_rng(0), config.n_heads * config.head_dim
    narrow = config.n_kv_heads * config.head_dim
    shapes = {"q": (config.d_model, width), "k": (config.d_model, narrow), "v": (config.d_model, narrow), "o": (width, config.d_model)}
    kernels = {name: {"kernel": rng.standard_normal((config.n_layers, *shape), np.float32) / config.d_model**0.5} for name, shape in shapes.items()}
    return config, {"blocks": {"attn": kernels}}


def spectra() -> Round:
    from plasticity_jax.parallel.allocator import keep_freed_memory

    keep_freed_memory()
    from plasticity_jax.analysis.spectra import attention_spectra

    config, params = factors()

    def one_round() -> dict[str, float]:
        found = attention_spectra((config, params))
        assert found["W_QK"].shape == (config.n_layers, config.n_heads, config.head_dim)
        return {"peak memory, MB": peak_megabytes()}

    return one_round


def spectra_by_numpy() -> Round:
    import numpy as np

    config, params = factors()
    q, k = (params["blocks"]["attn"][name]["kernel"][0] for name in ("q", "k"))
    del params

    def one_round() -> dict[str, float]:
        for head in range(SAMPLE):
            of_head, of_group = (slice(h * config.head_dim, (h + 1) * config.head_dim) for h in (head, head * config.n_kv_heads // config.n_heads))
            np.linalg.svd(q[:, of_head] @ k[:, of_group].T, compute_uv=False)
        return {"peak memory, MB": peak_megabytes()}

    return one_round


def default_model() -> tuple[Any, Any, Any]:
    """The default config, a random model of it as the gap takes it, and how it is run."""
    from plasticity_jax.parallel.allocator import keep_freed_memory

    keep_freed_memory()
    from plasticity_jax.config import load_config
    from plasticity_jax.model.forward import Forward
    from plasticity_jax.model.transformer import init_params

    config = load_config("configs/default.py", [("train.compute_dtype", "float32")])
    model = SimpleNamespace(config=config.model, params=init_params(config.model, 0))
    return config, model, Forward.of(config, config.model, None)


def gap(first: bool) -> Round:
    """Rounds of the whole gap; if `first`, as the first model of a command."""
    config, model, forward = default_model()
    from plasticity_jax.analysis import gap as module

    def one_round() -> None:
        if first:
            module._COUNTS.clear()
        module.measure_gap(
            model,
            config,
            Path(os.environ[FOLDER]),
            forward=forward,
            reading_seed=0,
            tokens_per_side=config.gap.tokens_per_side,
            seed=0,
            batch_size=config.gap.batch_size,
        )

    return one_round


def passes() -> Round:
    """Rounds of the forward passes alone, on records that are in memory."""
    config, model, forward = default_model()
    import numpy as np

    from plasticity_jax.model.forward import record_nats

    seq_len = config.train.seq_len
    records = np.random.default_rng(0).integers(0, 1000, (2 * (config.gap.tokens_per_side // seq_len), seq_len + 1))

    def one_round() -> None:
        record_nats(
            forward,
            model.config,
            model.params,
            lambda indices: records[indices],
            np.arange(len(records)),
            seq_len=seq_len,
            batch_size=config.gap.batch_size,
            isolate=None,
            loss_chunks=config.train.loss_chunks,
            what="forward passes",
        )

    return one_round


OF_SPECTRA = {"attention_spectra": Side(spectra), "numpy.linalg.svd": Side(spectra_by_numpy)}
OF_GAP = {
    "forward passes alone": Side(passes),
    "gap, first model of a command": Side(lambda: gap(True)),
    "gap, every other model": Side(lambda: gap(False)),
}


def about_spectra() -> list[dict]:
    from plasticity_jax.config.presets import presets

    config = presets()["llama-1b"]
    products = 2 * config.n_layers * config.n_heads
    found = measure(OF_SPECTRA, rounds=1)
    rows = []
    for (side, one), done in zip(found.items(), (products, SAMPLE)):
        seconds = one.median * products / done
        row = {"side": side, "products decomposed": done, "seconds": one.median, "seconds for all (extrapolated)": seconds}
        rows.append(row | dict(one.numbers or {}) | {"times as fast": None, "wanted": None, "versions": one.versions})
    ours, theirs = rows
    ours |= {"times as fast": theirs["seconds for all (extrapolated)"] / ours["seconds"], "wanted": WANTED}
    return rows


def about_gap() -> list[dict]:
    from input import write_corpus

    from plasticity_jax.config import load_config
    from plasticity_jax.data.packing import TOKENS

    config = load_config("configs/default.py")
    with tempfile.TemporaryDirectory() as folder:
        write_corpus(Path(folder) / TOKENS, seq_len=config.train.seq_len, records=TRAIN_RECORDS, held_out=HELD_OUT_RECORDS)
        found = measure({name: Side(side.prepare, variables={FOLDER: folder}) for name, side in OF_GAP.items()}, rounds=5)
    alone = found["forward passes alone"]
    return [one.row(side) | {"times the forward passes": one.median / alone.median} for side, one in found.items()]


def main() -> None:
    finish("Spectra and gap", {"Spectra of W_QK and W_VO in llama-1b's shapes": about_spectra(), "Gap of the default model": about_gap()})


if __name__ == "__main__":
    serve(OF_SPECTRA | OF_GAP)
    main()

"""The study's pretraining and fine-tuning recipes (arXiv 2602.11137), shared by the config files of its experiments.

Each function returns a ConfigDict for `get_config()` to change. What the paper leaves open is said where it is decided, in docs/decisions.md.
"""

from plasticity_jax.config import base_config, preset, task


def llama(preset_name: str, *, tokens: float, batch_size: int, peak_lr: float):
    """A Llama-style model on FineWeb-Edu: cosine to 10% after 10% of warm-up, every parameter decayed. Source: paper sections 2.1, 3 and 4.1.

    Args:
      preset_name: of `plasticity_jax.presets()`.
      tokens: of the whole run; the steps follow.
      batch_size: sequences of 2048 tokens.
    """
    config = _study(preset_name, tokens=tokens, batch_size=batch_size, seq_len=2048, peak_lr=peak_lr, seed=42)
    config.data.files = "data/fineweb-edu/sample/350BT"
    config.data.tokenizer = "sentencepiece-32k"
    config.decay.mask = "all"
    return config


def olmo2(*, tokens: float):
    """OLMo-2 1B on its own mixture: batches of 512 x 4096 tokens, z-loss, all but the input embedding decayed. Source: paper sections 2.2, 3 and 4.1.

    Args:
      tokens: of the whole run; the steps follow.
    """
    config = _study("olmo2-1b", tokens=tokens, batch_size=512, seq_len=4096, peak_lr=4e-4, seed=6198)
    config.data.files = "data/olmo-mix-1124"
    config.data.tokenizer = "dolma2"
    config.train.z_loss = 1e-5
    config.decay.mask = "olmo"
    return config


def _study(preset_name: str, *, tokens: float, batch_size: int, seq_len: int, peak_lr: float, seed: int):
    config = base_config()
    config.model = preset(preset_name)
    config.train.batch_size = batch_size
    config.train.seq_len = seq_len
    config.train.peak_lr = peak_lr
    set_tokens(config, tokens)
    config.train.compute_dtype = "bfloat16"
    config.train.held_out_tokens = 50_000_000
    config.train.eval_tokens = 2_000_000
    config.train.eval_every = 500
    config.train.checkpoint_every = 500
    config.train.scan_layers = True
    config.train.remat = "full"
    config.train.loss_chunks = 8
    config.data.held_out_share = 0.01
    config.grid.timescales = None
    config.grid.seeds = (seed,)
    config.mesh.data = 1
    config.mesh.fsdp = -1
    config.finetune.peak_lr = 1e-5
    config.finetune.batch_size = 64
    config.finetune.length_buckets = (256, 512, 1024, 2048)
    config.finetune.seeds = (42,)
    config.tasks = {
        "addition3": task(train_rows=6000, test_rows=1000, epochs=3, max_new_tokens=64),
        "topic": task(train_rows=6000, test_rows=1000, epochs=3, max_new_tokens=32),
        "sentiment": task(train_rows=6000, test_rows=1000, epochs=3, max_new_tokens=32),
    }
    config.evaluate.n_samples = 16
    config.evaluate.seed = 42
    config.evaluate.prompt_buckets = (128, 256, 512, 1024)
    config.probe.max_length = 512
    config.gap.tokens_per_side = 50_000_000
    return config


def set_tokens(config, tokens: float) -> None:
    """Sets the steps that read `tokens` with the config's batches, and reads as much text as one epoch of them needs."""
    config.train.steps = int(tokens / (config.train.batch_size * config.train.seq_len))
    config.data.max_tokens = config.train.steps * config.train.batch_size * config.train.seq_len

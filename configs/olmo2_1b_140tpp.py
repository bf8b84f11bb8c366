"""OLMo-2 1B at 140 tokens per parameter: the over-trained sweep, where the pretraining loss and what can be learned part ways.

Command:     plasticity study --config configs/olmo2_1b_140tpp.py --workdir /mnt/work --config.data.files=gs://BUCKET/olmo-mix-1124
Devices:     v5p:4x4x4 or h100:8, as plasticity check names them.
Tokens:      210.0B = 100,135 steps of 512 x 4096, peak learning rate 4e-4; 4,000 steps of warm-up, level, then the last fifth linearly to zero.
Timescales:  of the run, at the peak rate: λ 0 none, 0.1 0.25, 0.3 0.0832, 1 0.025.
Not yet run here; held-out loss reported 2.6088 at λ 0.1, 2.6208 at 0.3, 2.7064 at 1; best after fine-tuning at 0.3. The share of the final decay is
not known, and the authors' λ 0.1 was decayed from an early public checkpoint instead of trained with the others.
"""

from plasticity_jax.config.recipes import olmo2


def get_config(faithful=False):
    config = olmo2(tokens=210e9, faithful=faithful)
    config.name = "olmo2-1b-140tpp"
    config.train.schedule = "wsd"
    config.train.warmup_fraction = 4000 / config.train.steps
    config.train.decay_fraction = 0.2
    config.train.final_lr_fraction = 0.0
    config.grid.weight_decay = (0.0, 0.1, 0.3, 1.0)
    config.hardware = (
        ("TPU v5p?$", {"train.remat": "dots"}),
        ("H100|H200", {"train.grad_accum_steps": 4, "train.remat": "dots"}),
    )
    return config

"""OLMo-2 1B at 20 tokens per parameter over weight decay and learning rate: is it the decay, or its product with the rate?

Command:     plasticity study --config configs/olmo2_1b_lr_grid.py --workdir /mnt/work --config.data.files=gs://BUCKET/olmo-mix-1124
Devices:     v5p:4x4x4 or h100:8, as plasticity check names them.
Tokens:      30.0B = 14,305 steps of 512 x 4096, peak learning rates 2e-4, 4e-4 and 8e-4.
Timescales:  of the run, at the peak rate: 2e-4: λ 0.1 3.5, 0.6 0.583, 1 0.35; 4e-4: λ 0.1 1.75, 0.6 0.291, 1 0.175; 8e-4: λ 0.1 0.874, 0.6 0.146, 1 0.0874.
Not yet run here.
"""

from plasticity_jax.config.recipes import olmo2


def get_config(faithful=False):
    config = olmo2(tokens=30e9, faithful=faithful)
    config.name = "olmo2-1b-lr-grid"
    config.grid.weight_decay = (0.1, 0.6, 1.0)
    config.grid.fields = (("train.peak_lr", (2e-4, 4e-4, 8e-4)),)
    config.hardware = (
        ("TPU v5p?$", {"train.remat": "dots"}),
        ("H100|H200", {"train.grad_accum_steps": 4, "train.remat": "dots"}),
    )
    return config

"""OLMo-2 1B at 20 tokens per parameter, sweep of the fine-tuning: learning rate x batch x weight decay on two tasks, at four pretraining weight decays.

Command:     plasticity study --config configs/olmo2_1b_sft_sweep.py --workdir /mnt/work --config.data.files=gs://BUCKET/olmo-mix-1124
Base models: those of olmo2_1b_20tpp.py. With --config.name=olmo2-1b-20tpp and its workdir they are found there and not trained again.
Devices:     v5p:4x4x4 or h100:8, as plasticity check names them; 135 fine-tunings on each task, of all rows but 500 to choose the
             best setting of each model on, and what resembles them; with --config.faithful=True of all, and nothing is chosen.
Not yet run here; the paper reports that the advantage of a large pretraining decay survives these sweeps.
"""

from plasticity_jax.config.recipes import olmo2, paper_task, sft_sweep


def get_config(faithful=False):
    config = olmo2(tokens=30e9, faithful=faithful)
    config.name = "olmo2-1b-sft-sweep"
    config.grid.weight_decay = (0.1, 0.3, 0.6, 1.0)
    config.grid.fields = sft_sweep(1e-5, 3e-5, 6e-5, 6e-4)
    config.grid.leave_out = ("^wd0.6-sft_peak_lr0.0006-",)  # the authors' 0.6 came later, without the largest rate
    config.finetune.select = "none" if faithful else "validation"
    config.tasks = {name: paper_task(name, validation_rows=0 if faithful else 500) for name in ("MetaMathQA", "SimpleScaling")}
    config.hardware = (
        ("TPU v5p?$", {"train.remat": "dots"}),
        ("H100|H200", {"train.grad_accum_steps": 4, "train.remat": "dots"}),
    )
    return config

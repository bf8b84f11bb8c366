"""Llama 1B, sweep of the fine-tuning: learning rate x batch x weight decay on SimpleScaling, at three pretraining weight decays.

Command:     plasticity study --config configs/llama_1b_sft_sweep.py --workdir /mnt/work --config.data.files=gs://BUCKET/fineweb-edu/sample/350BT
Base models: those of llama_1b_20tpp.py. With --config.name=llama-1b-20tpp and its workdir they are found there and not trained again.
Devices:     v5e:8x8, v4:2x2x4 or h100:8, as plasticity check names them; 81 fine-tunings of SimpleScaling's 54,484 rows, less 500 to choose
             the best setting of each model on, and what resembles them; with --config.faithful=True of all, and nothing is chosen.
Not yet run here; the paper reports that the advantage of a large pretraining decay survives these sweeps.
"""

from plasticity_jax.config.recipes import llama_1b, paper_task, sft_sweep


def get_config(faithful=False):
    config = llama_1b(faithful=faithful)
    config.name = "llama-1b-sft-sweep"
    config.grid.weight_decay = (0.1, 0.5, 1.0)
    config.grid.fields = sft_sweep(1e-5, 3e-5, 6e-4)
    config.finetune.select = "none" if faithful else "validation"
    config.tasks = {"SimpleScaling": paper_task("SimpleScaling", validation_rows=0 if faithful else 500)}
    return config

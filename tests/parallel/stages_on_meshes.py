"""Run by test_stages.py on one device, on eight, and on two processes of four each: what loads a model, runs it or trains from it.

Arguments: a folder with a world of runs, a tag for what is written there, the size of the mesh axis fsdp, and with several processes the coordinator and
this process's number of two. The first process writes <tag>.json.
"""

import contextlib
import dataclasses
import json
import sys
from pathlib import Path

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))
from test_verifier import RECIPE  # noqa: E402
from worlds import MODEL, change  # noqa: E402

from plasticity_jax.analysis.probes import features  # noqa: E402
from plasticity_jax.analysis.spectra import attention_spectra  # noqa: E402
from plasticity_jax.config import MeshConfig  # noqa: E402
from plasticity_jax.data.completions import read_completions  # noqa: E402
from plasticity_jax.data.tasks import read_task  # noqa: E402
from plasticity_jax.evaluate.reward import open_scorer  # noqa: E402
from plasticity_jax.model.forward import Forward, record_nats  # noqa: E402
from plasticity_jax.model.load import load_model  # noqa: E402
from plasticity_jax.parallel import arrays, make_mesh, processes  # noqa: E402
from plasticity_jax.runs.directory import RunDirectory  # noqa: E402
from plasticity_jax.runs.run import Run  # noqa: E402
from plasticity_jax.train.finetune import Tuned, finetune  # noqa: E402
from plasticity_jax.train.initial import params_sha256  # noqa: E402
from plasticity_jax.train.restore import param_norms  # noqa: E402
from plasticity_jax.train.verifier import train_verifier  # noqa: E402

TEXTS = ["the cat sees a dog", "a bird", "the old tree by the river"]


def held(tree) -> int:
    """Bytes on the first of this process's devices."""
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


def opened(path, stage, work):
    """The directory of a run, which the first process opens and finishes; all work."""
    directory = RunDirectory(path)
    with directory.work(Run("tiny", stage, path.name, {}, task="topic", seed=0), RECIPE) if processes.primary() else contextlib.nullcontext():
        processes.broadcast(lambda: None)
        found = work(path)
        processes.broadcast(lambda: directory.finish(found))
    return found


def examined(root: Path, config, mesh) -> tuple:
    """The base model, and what is found by loading, running and examining it."""
    base, narrow, hf = (
        load_model(root / name, mesh=mesh, dtype=dtype) for name, dtype in (("base", "float32"), ("base", "bfloat16"), ("hf", "float32"))
    )
    forward = Forward.of(config, MODEL, mesh)
    tokens = np.random.default_rng(0).integers(2, 300, (5, 17))
    options = {"seq_len": 16, "batch_size": 2, "isolate": None, "loss_chunks": 0, "what": "nats"}
    nats = {
        name: record_nats(dataclasses.replace(forward, compute_dtype=model.dtype), MODEL, model.params, tokens.__getitem__, np.arange(5), **options)
        for name, model in (("float32", base), ("bfloat16", narrow), ("hf", hf))
    }
    found = {
        "held": {"float32": held(base.params), "bfloat16": held(narrow.params), "hf": held(hf.params)},
        "hash": {"float32": params_sha256(base.params), "bfloat16": params_sha256(narrow.params), "hf": params_sha256(hf.params)},
        "norms": param_norms(base.params),
        "nats": {name: values.tolist() for name, values in nats.items()},
        "states": features(base, TEXTS, base.tokenizer, 16, forward).tolist(),
        "spectra": {name: values.tolist() for name, values in attention_spectra(base).items()},
        "logits": arrays.to_host(base(tokens, capture=())[0]).tolist(),
    }
    return base, found


def main(root: Path, tag: str, fsdp: int) -> dict:
    config = dataclasses.replace(RECIPE, mesh=MeshConfig(data=1, fsdp=fsdp))
    mesh = make_mesh(config.mesh)
    mesh = mesh if mesh.size > 1 else None
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if name.endswith("backend_compile_duration") else None
    )
    base, found = examined(root, config, mesh)
    first = len(compiled)
    again = examined(root, config, mesh)[1]
    found |= {"compiled": [first, len(compiled) - first], "same again": again == found}
    uneven, rows = change(config, "finetune", batch_size=6), read_task(root / "task").train

    def tune(path):
        return finetune([Tuned(base, uneven, tag, path)], rows, epochs=1, seed=0)[0]

    found["finetuned"] = opened(root / f"tuned-{tag}", "finetune", tune)
    samples = read_completions(root / "told")
    verifier = root / f"verifier-{tag}"
    found["verifier"] = opened(verifier, "verifier", lambda path: train_verifier(base, samples, config, name=tag, path=path))
    scorer = open_scorer(change(config, "reward", scorer="verifier"), verifier, mesh, "rewards")
    found["rewards"] = scorer.scores(samples)[0].tolist()
    return found


if __name__ == "__main__":
    root, tag, fsdp, *together = sys.argv[1:]
    if together:
        processes.start(together[0], 2, int(together[1]), timeout=120)
    found = main(Path(root), tag, int(fsdp))
    if processes.primary():
        (Path(root) / f"{tag}.json").write_text(json.dumps(found))
    processes.leave(0)

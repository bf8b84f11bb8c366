"""A corpus, a task and runs small enough for tests, written in the formats that the real stages write."""

import dataclasses
import json
from pathlib import Path

import numpy as np

from plasticity_jax.config import FinetuneConfig, MeshConfig, ModelConfig, StudyConfig, TaskConfig, TrainConfig
from plasticity_jax.data.packing import MANIFEST, index_path, pack, records_path
from plasticity_jax.data.tasks import Example, Rows, write_task
from plasticity_jax.data.tokenizer import Tokenizer
from plasticity_jax.runs.directory import RunDirectory
from plasticity_jax.runs.run import Run
from plasticity_jax.stages import init
from plasticity_jax.stages.stage import Context

# How far twenty float32 steps of two programs of one meaning may lie apart, relative, in any parameter and in a loss: four to ten times the rounding seen with
# AVX2, AVX-512, and AMX. That the meaning is one is proven in float64, to 1e-10.
OF_PARAMS, OF_LOSSES = 4e-5, 3e-6

MODEL = ModelConfig(vocab_size=320, d_model=16, n_layers=1, n_heads=2, n_kv_heads=1, d_ff=32)
TRAIN = TrainConfig(
    batch_size=4,
    seq_len=16,
    steps=20,
    peak_lr=1e-2,
    compute_dtype="float32",
    held_out_tokens=128,
    eval_tokens=64,
    eval_every=10,
    log_every=4,
    checkpoint_every=8,
)
FINETUNE = FinetuneConfig(peak_lr=1e-2, batch_size=8, length_buckets=(16, 24), log_every=4, checkpoint_every=8)
CONFIG = StudyConfig(name="tiny", model=MODEL, train=TRAIN, finetune=FINETUNE, mesh=MeshConfig(), tasks={"topic": TaskConfig(epochs=2)})


def change(config: StudyConfig, section: str, **values) -> StudyConfig:
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **values)})


def write_corpus(directory: Path, config: StudyConfig) -> None:
    """Two domains of made-up sentences, packed as the corpus is."""
    from array_record.python.array_record_module import ArrayRecordWriter

    rng = np.random.default_rng(0)
    words = "the a cat dog bird sees hears follows old young red house tree river and then again é".split()
    texts = {name: [" ".join(rng.choice(words, 30)) + "." for _ in range(40)] for name in ("north", "south")}
    tokenizer = Tokenizer.train([text for domain in texts.values() for text in domain] + list(words), 300)
    # Pads the vocabulary to the model's size; entries without text do no harm.
    directory.mkdir(parents=True)
    tokenizer.save(directory / "tokenizer.json")
    tokens = directory / "tokens"
    tokens.mkdir()
    counts = {}
    for split in ("train", "held_out"):
        writer = ArrayRecordWriter(str(records_path(tokens, split)), "group_size:1,uncompressed")
        domain_of, document_of = [], []
        for d, domain in enumerate(texts.values()):
            documents = tokenizer.encode_batch(domain[:30] if split == "train" else domain[30:])
            for record, document in pack(documents, eos_id=tokenizer.eos_id, record_length=config.train.seq_len + 1):
                writer.write(record.astype("<u2").tobytes())
                domain_of.append(d)
                document_of.append(document)
        writer.close()
        counts[split] = {name: {"records": domain_of.count(d)} for d, name in enumerate(texts)}
        np.save(index_path(tokens, split, "domain_of"), np.asarray(domain_of, np.int32))
        np.save(index_path(tokens, split, "document_of"), np.asarray(document_of, np.int32))
    manifest = {
        "seq_len": config.train.seq_len,
        "vocab_size": 300,
        "dtype": "<u2",
        "domains": list(texts),
        "fingerprint": "f00d",
        "splits": counts,
    }
    (tokens / MANIFEST).write_text(json.dumps(manifest))
    _finish(directory, Run("tiny", "prepare", "corpus", {}), config)


def write_copy_task(directory: Path, config: StudyConfig, n: int) -> None:
    """Answers "red" to "r" and "tree" to "t"."""
    rng = np.random.default_rng(1)
    rows = [Example(str(i), *(("r", "red", "red") if rng.random() < 0.5 else ("the t", "tree", "tree")), "generated", "generated") for i in range(n)]
    directory.mkdir(parents=True)
    write_task(directory, Rows(rows, rows[:2]))
    _finish(directory, Run("tiny", "prepare", "task-topic", {}, task="topic"), config)


def _finish(path: Path, run: Run, config: StudyConfig) -> None:
    directory = RunDirectory(path)
    with directory.work(run, config):
        directory.finish({})


class World:
    """Runs of one tiny study below a folder."""

    def __init__(self, root: Path, config: StudyConfig):
        self.root, self.config = root, config
        self.corpus, self.task, self.init = root / "corpus", root / "task", root / "init"
        write_corpus(self.corpus, config)
        write_copy_task(self.task, config, 40)
        self.stage(init.run, Run("tiny", "init", "s0", {}, seed=0), self.init, config, {})

    def pretrain_context(self, name: str, weight_decay: float, config: StudyConfig) -> Context:
        run = Run("tiny", "pretrain", name, {"weight_decay": weight_decay, "seed": 0}, member=name, seed=0)
        return Context(config, run, RunDirectory(self.root / name), {"corpus": self.corpus, "init": self.init})

    def pretrain(self, members: dict[str, float], config: StudyConfig) -> list[dict]:
        """Trains members (name → weight decay) in one call."""
        return self.pretrain_grid({name: (decay, config) for name, decay in members.items()})

    def pretrain_grid(self, members: dict[str, tuple[float, StudyConfig]]) -> list[dict]:
        """Trains members (name → weight decay and own config) in one call."""
        from plasticity_jax.stages import pretrain

        contexts = [self.pretrain_context(name, decay, config) for name, (decay, config) in members.items()]
        return self.in_work(contexts, pretrain.run_batch)

    def finetune(self, name: str, base: str, config: StudyConfig, seed: int = 0) -> dict:
        from plasticity_jax.stages import finetune

        run = Run("tiny", "finetune", name, {}, task="topic", seed=seed)
        context = Context(config, run, RunDirectory(self.root / name), {"base": self.root / base, "task": self.task})
        return self.in_work([context], lambda contexts: [finetune.run(contexts[0])])[0]

    def stage(self, function, run: Run, path: Path, config: StudyConfig, parents: dict) -> dict:
        context = Context(config, run, RunDirectory(path), parents)
        return self.in_work([context], lambda contexts: [function(contexts[0])])[0]

    def in_work(self, contexts: list[Context], function) -> list[dict]:
        import contextlib

        with contextlib.ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context.directory.work(context.run, context.config))
            results = [dataclasses.asdict(record) for record in function(contexts)]
            for context, result in zip(contexts, results, strict=True):
                context.directory.finish(result)
        return results

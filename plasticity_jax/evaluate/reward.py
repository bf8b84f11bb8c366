"""Rewards: rates completions, and lets the highest reward choose among the samples of a problem."""

import logging
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from plasticity_jax.config import ModelConfig, StudyConfig
from plasticity_jax.data.completions import Completion
from plasticity_jax.errors import UserError
from plasticity_jax.evaluate.likelihood import log_likelihoods, lower_likelihoods
from plasticity_jax.evaluate.metrics import reward_metrics
from plasticity_jax.evaluate.reward_model import FAMILY, open_reward_model
from plasticity_jax.model.forward import Forward
from plasticity_jax.model.hf_config import read_description
from plasticity_jax.model.hf_import import is_hugging_face
from plasticity_jax.model.hf_names import FAMILIES
from plasticity_jax.model.load import LoadedModel, abstract_loaded, load_model, narrow
from plasticity_jax.model.scalar_head import (
    ScalarModel,
    encode_answers,
    length_buckets,
    load_verifier,
    lower_row_scores,
    scalar_shardings,
    score_rows,
    without_output,
)
from plasticity_jax.parallel import processes
from plasticity_jax.runs.directory import REWARDS, open_run
from plasticity_jax.runs.jsonfiles import write_jsonl
from plasticity_jax.runs.storage import AnyPath, location

log = logging.getLogger("plasticity_jax")


@runtime_checkable
class Scorer(Protocol):
    """Rates completions; higher is better.

    Attributes:
      name: its name in the report, on one line.
    """

    name: str

    def scores(self, completions: Sequence[Completion]) -> tuple[Float[np.ndarray, " n"], int]:
        """float32 rewards, and the number of completions that lost their beginning to `reward.max_length`. All processes call it."""
        ...


class LogProbability:
    """The mean log-probability of a completion's tokens under a language model, in nats. The end of text counts if the completion ended by itself.

    An empty completion is one token, the end of text.
    """

    def __init__(self, config: StudyConfig, path: AnyPath, mesh: Mesh | None, what: str):
        self._model, self._config, self._what = load_model(path, mesh=mesh, dtype=config.train.compute_dtype), config, what
        _ = self._model.text_tokenizer
        under = "the model that wrote the completion" if config.reward.model is None else _called(self._model)
        self.name = f"length-normalized log-probability under {under}"

    def scores(self, completions: Sequence[Completion]) -> tuple[Float[np.ndarray, " n"], int]:
        tokenizer, reward = self._model.text_tokenizer, self._config.reward
        begin = tokenizer.before_prompts(faithful=self._config.faithful)
        prompts = tokenizer.encode_batch([completion.prompt for completion in completions])
        texts = tokenizer.encode_batch([completion.text for completion in completions])
        ends = [[tokenizer.eos_id] if completion.ended or not text else [] for completion, text in zip(completions, texts, strict=True)]
        found = log_likelihoods(
            self._model,
            [([*begin, *prompt], [*text, *end]) for prompt, text, end in zip(prompts, texts, ends, strict=True)],
            forward=Forward.of(self._config, self._model.config, self._model.mesh),
            batch_size=reward.batch_size,
            max_length=reward.max_length,
            what=self._what,
        )
        return np.array([likelihood.total / likelihood.n_tokens for likelihood in found], np.float32), sum(likelihood.cut for likelihood in found)


class Verifier:
    """The logit of a trained outcome verifier that a completion is right."""

    def __init__(self, config: StudyConfig, path: AnyPath, mesh: Mesh | None, what: str):
        (self._model, self._tokenizer), self._config, self._mesh, self._what = load_verifier(path, mesh), config, mesh, what
        narrow(self._model.params["decoder"], config.train.compute_dtype)
        results = open_run(path).results()
        self.name = f"outcome verifier ({'no AUC: ' + results['reason'] if results['auc'] is None else 'held-out AUC {:.2f}'.format(results['auc'])})"

    def scores(self, completions: Sequence[Completion]) -> tuple[Float[np.ndarray, " n"], int]:
        reward, prompts, texts = self._config.reward, [c.prompt for c in completions], [c.text for c in completions]
        rows, n_cut = encode_answers(self._tokenizer, prompts, texts, max_length=reward.max_length, bos=self._config.faithful)
        return _score(self._config, self._model, rows, self._mesh, self._what), n_cut


class RewardModel:
    """The logit of a Hugging Face reward model for the chat [user = problem, assistant = completion]."""

    def __init__(self, config: StudyConfig, folder: AnyPath, mesh: Mesh | None, what: str):
        (self._model, self._chat), self._config, self._mesh, self._what = open_reward_model(folder, mesh), config, mesh, what
        narrow(self._model.params["decoder"], config.train.compute_dtype)
        self.name = folder.resolve().name

    def scores(self, completions: Sequence[Completion]) -> tuple[Float[np.ndarray, " n"], int]:
        pairs = [(completion.problem, completion.text) for completion in completions]
        rows, n_cut = self._chat.rows(pairs, self._config.reward.max_length, faithful=self._config.faithful)
        return _score(self._config, self._model, rows, self._mesh, self._what), n_cut


def _score(config: StudyConfig, model: ScalarModel, rows: Sequence[Sequence[int]], mesh: Mesh | None, what: str) -> Float[np.ndarray, " n"]:
    reward, forward = config.reward, Forward.of(config, model.config, mesh)
    buckets = length_buckets(reward.max_length)
    while max(map(len, rows)) > buckets[-1]:  # texts that are not cut (`faithful`)
        buckets = (*buckets, 2 * buckets[-1])
    return score_rows(model, rows, buckets=buckets, batch_size=reward.batch_size, forward=forward, what=what)


def _called(model: LoadedModel) -> str:
    """A model's name in the report: of a member's base, the member; of one that was fine-tuned, its run."""
    return model.path.name if model.run is None else model.run.name


def open_scorer(config: StudyConfig, path: AnyPath, mesh: Mesh | None, what: str) -> Scorer:
    """The scorer that `reward.scorer` names, on the model or verifier at `path`, over `mesh`. Raises UserError if it cannot be opened."""
    kinds = {"log-probability": LogProbability, "verifier": Verifier, "sequence-classification": RewardModel}
    return kinds[config.reward.scorer](config, path, mesh, what)


def lower_scores(config: StudyConfig, mesh: Mesh) -> Any:
    """The program of a study's rewards for its longest texts, lowered for the mesh's devices.

    Raises:
      UserError: the network of `reward.model` is not known, because the folder is not here.
    """
    reward, model, params = config.reward, network(config), abstract_scorer(config, mesh)
    forward, shape = Forward.of(config, model, mesh), {"batch_size": reward.batch_size, "max_length": reward.max_length}
    if reward.scorer == "log-probability":
        return lower_likelihoods(forward, model, params, **shape)
    return lower_row_scores(forward, without_output(model), params, **shape)


def abstract_scorer(config: StudyConfig, mesh: Mesh) -> Any:
    """Shapes and shardings of the parameters that rate. Raises UserError as `network` does."""
    model, dtype = network(config), config.train.compute_dtype
    if config.reward.scorer == "log-probability":
        return abstract_loaded(model, mesh, dtype)
    decoder = without_output(model)
    head = jax.ShapeDtypeStruct((model.d_model,), np.float32, sharding=scalar_shardings(mesh, decoder)["head"])
    return {"decoder": abstract_loaded(decoder, mesh, dtype), "head": head}


def network(config: StudyConfig) -> ModelConfig:
    """The network that rates the completions of a study. Raises UserError where it is that of a `reward.model` that is not here."""
    if config.reward.model is None:
        return config.model
    path = location(config.reward.model)
    if not path.is_dir():
        raise UserError(f"reward.model={path} is not here, so the size of its network is not known; put the folder there.")
    return read_description(path, (*FAMILIES, FAMILY)).model if is_hugging_face(path) else open_run(path).config().model


def rate(scorer: Scorer, completions: Sequence[Completion], folder: AnyPath) -> dict[str, Any]:
    """Rates completions; one that a problem has several times is rated once.

    Writes rewards.jsonl: one line per completion, in the order given: id, sample (0 is greedy), reward.

    Args:
      completions: of an evaluate run, problem by problem, the greedy one first.
      folder: the run's directory.
    Returns:
      On the first process (empty on the others): scorer (its name), metrics ("rm@n" and "orm_score", see `metrics.reward_metrics`), per_problem (rm:
      whether the sample with the highest reward is right, 0/1; orm: mean reward of the samples), cut (how many texts were longer than
      `reward.max_length` and lost their beginning).
    Raises:
      UserError: a reward is not finite.
    """
    different = {_key(completion): completion for completion in completions}
    rewards, n_cut = scorer.scores(list(different.values()))
    if not np.isfinite(rewards).all():
        raise UserError(
            f"{scorer.name} gives {np.count_nonzero(~np.isfinite(rewards))} rewards that are not finite; set another reward.scorer or reward.model."
        )
    if not processes.primary():
        return {}
    reward_of = dict(zip(different, rewards.tolist(), strict=True))
    rows = [{"id": c.id, "sample": c.sample, "reward": reward_of[_key(c)]} for c in completions]
    write_jsonl(folder / REWARDS, rows)
    if n_cut:
        log.warning("%s: %d texts are longer than reward.max_length and lost their beginning", folder.name, n_cut)
    width = 1 + max(completion.sample for completion in completions)
    sampled = np.array([row["reward"] for row in rows], np.float32).reshape(-1, width)[:, 1:]
    correct = np.array([completion.correct for completion in completions]).reshape(-1, width)[:, 1:]
    chosen = sampled.argmax(axis=1)  # the first of equals
    return {
        "scorer": scorer.name,
        "metrics": reward_metrics(correct, sampled),
        "per_problem": {"rm": correct[np.arange(len(correct)), chosen].astype(int).tolist(), "orm": sampled.mean(axis=1, dtype=np.float64).tolist()},
        "cut": n_cut,
    }


def _key(completion: Completion) -> tuple[str, str, bool]:
    return completion.id, completion.text, completion.ended

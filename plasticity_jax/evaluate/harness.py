"""Our models behind the interface of lm-evaluation-harness. Needs the extra `harness`, but neither torch nor transformers."""

import collections
import functools
from collections.abc import Sequence
from typing import Any

from plasticity_jax.data.batching import length_buckets
from plasticity_jax.errors import UserError
from plasticity_jax.evaluate.generate import Sampling, cut_at_stop, generate, layout_for, placed, stop_check
from plasticity_jax.evaluate.likelihood import MIN_LENGTH, log_likelihoods
from plasticity_jax.model.forward import Forward
from plasticity_jax.model.load import LoadedModel
from plasticity_jax.progress import Progress

try:
    from lm_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]
    from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs  # pyright: ignore[reportMissingImports]
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # pyright: ignore[reportMissingImports]
except ImportError as error:
    raise UserError(f"lm-evaluation-harness is not installed ({error}); install it with: pip install 'plasticity_jax[harness]'") from error

Pair = tuple[list[int], list[int]]

MAX_NEW_TOKENS = 256  # default for tasks that set no limit, as in the harness' own models
_SAMPLING = ("top_k", "top_p", "repetition_penalty")
_IGNORED = ("max_length",)  # of prompt and completion together; contexts are cut to leave room for the completion anyway


class HarnessModel(TemplateLM):
    """A model for `lm_eval.evaluate` and `lm_eval.simple_evaluate`.

    Texts become tokens as in the harness' Hugging Face backend (`HFLM`): spaces at the context's end move to the continuation, then both are encoded
    together and split, with what the tokenizer's own post-processor puts around a text, such as a beginning of text. The beginning-of-text token, or
    else the end-of-text token, precedes a continuation without context, and a text whose whole likelihood is requested. Unlike there, text that spells
    out a special token stays text.

    Args:
      model: with a tokenizer.
      batch_size: sequences computed at once.
      max_length: maximum number of tokens that the model reads. Longer texts lose their beginning; whole likelihoods are computed in windows.
      forward: how to run the model. With several processes, all make the same requests and get the same results.
      add_bos_token: put the beginning-of-text token before every text, or nothing around any. None leaves it to the tokenizer's own post-processor.
      seed: of sampled completions.
      weights: where the matrices lie while completions are decoded, as `evaluate.weights`.
      what: label of the progress displays.
    Attributes:
      n_cut: number of texts so far that were too long and lost their beginning.
    Raises:
      UserError: the model has no tokenizer, or `add_bos_token` is set and the tokenizer has no beginning-of-text token.
    """

    def __init__(
        self,
        model: LoadedModel,
        *,
        batch_size: int,
        max_length: int,
        forward: Forward,
        add_bos_token: bool | None = None,
        seed: int = 0,
        weights: str = "auto",
        what: str = "harness",
    ):
        super().__init__()
        if model.tokenizer is None:
            raise UserError(f"{model.path} has no tokenizer.json, so it can read no text; put the model's tokenizer there.")
        if add_bos_token and model.tokenizer.bos_id is None:
            raise UserError(f"add_bos_token=True, but the tokenizer of {model.path} has no beginning of text; leave it out.")
        self.tokenizer = model.tokenizer
        self.n_cut = 0
        self._model, self._forward, self._layout = model, forward, layout_for(weights, model.config, forward)
        self._batch_size, self._max_length = batch_size, max_length
        self._add_bos_token, self._seed, self._what = add_bos_token, seed, what

    @functools.cached_property
    def _decoding_params(self) -> Any:
        return placed(self._model.params, self._layout)

    @property
    def eot_token_id(self) -> int:
        """The end-of-text token."""
        return self.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context."""
        return self.tokenizer.eos_id if self.tokenizer.bos_id is None else self.tokenizer.bos_id

    @property
    def max_length(self) -> int:
        """Maximum number of tokens that the model reads."""
        return self._max_length

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids of a text, with the beginning-of-text token first if `add_special_tokens`; None stands for `add_bos_token`."""
        tokens = self.tokenizer.encode(string)
        with_bos = self._add_bos_token if add_special_tokens is None else add_special_tokens
        if with_bos is None:
            return [*self.tokenizer.prefix_ids, *tokens, *self.tokenizer.suffix_ids]
        return [self.tokenizer.bos_id, *tokens] if with_bos and self.tokenizer.bos_id is not None else tokens

    # ------------------------------------------------------------------------------------------------------------------- likelihoods

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether greedy decoding gives it) of each request's (context, continuation).

        An empty continuation has likelihood 1. Context and continuation are encoded separately if the joint encoding merges them and leaves the
        continuation no token.
        """
        encoded = []
        with Progress(f"{self._what}: encode", total=len(requests), unit="continuations") as progress:
            for request in requests:
                encoded.append((request.args, *self._split(*request.args)))
                progress.update(1)
        return self._loglikelihood_tokens(encoded)

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each request's text, in nats. Every token is predicted once, from the tokens before it in its window."""
        owners: list[int] = []
        windows: list[tuple[None, list[int], list[int]]] = []
        with Progress(f"{self._what}: encode", total=len(requests), unit="texts") as progress:
            for place, request in enumerate(requests):
                rolling = get_rolling_token_windows(self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, 1)
                of_text = [(None, *make_disjoint_window(window)) for window in rolling]
                owners += [place] * len(of_text)
                windows += of_text
                progress.update(1)
        totals = [0.0] * len(requests)
        for place, (total, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[place] += total
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _split(self, context: str, continuation: str) -> Pair:
        if context:
            before, after = self._encode_pair(context, continuation)
            return (before, after) if before and after else (self.tok_encode(context) or [self.prefix_token_id], self.tokenizer.encode(continuation))
        after = self.tokenizer.encode(continuation)
        if len(after) > 1 and after[0] == self.prefix_token_id:
            return after[:1], after[1:]
        return [self.prefix_token_id], after

    def _loglikelihood_tokens(self, requests: Sequence[tuple[Any, list[int], list[int]]], **unused: Any) -> list[tuple[float, bool]]:
        scored = [index for index, (_, _, continuation) in enumerate(requests) if continuation]
        likelihoods = log_likelihoods(
            self._model,
            [requests[index][1:] for index in scored],
            forward=self._forward,
            batch_size=self._batch_size,
            max_length=self._max_length,
            what=self._what,
        )
        self.n_cut += sum(likelihood.cut for likelihood in likelihoods)
        answers = [(0.0, True)] * len(requests)
        for index, likelihood in zip(scored, likelihoods, strict=True):
            answers[index] = (likelihood.total, likelihood.greedy)
        for (key, _, _), answer in zip(requests, answers, strict=True):
            if key is not None:  # None: a window of a text, which is cached as a whole
                self.cache_hook.add_partial("loglikelihood", key, answer)
        return answers

    # -------------------------------------------------------------------------------------------------------------------- completions

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """The completion of each request's context, up to its first stop string or the end of text.

        Settings of a request: until, max_gen_toks (or max_new_tokens, max_tokens), do_sample, temperature, top_k, top_p, repetition_penalty. Requests
        for several samples of one context get different samples.

        Raises:
          UserError: a setting is unknown or out of range.
        """
        groups: dict[str, list[int]] = collections.defaultdict(list)
        for index, request in enumerate(requests):
            groups[repr(sorted(request.args[1].items()))].append(index)
        texts = [""] * len(requests)
        for indices in groups.values():
            contexts = [requests[index].args[0] for index in indices]
            for index, text in zip(indices, self._complete(contexts, requests[indices[0]].args[1]), strict=True):
                texts[index] = text
                self.cache_hook.add_partial("generate_until", requests[index].args, text)
        return texts

    def _complete(self, contexts: list[str], settings: dict[str, Any]) -> list[str]:
        settings = dict(normalize_gen_kwargs(settings, MAX_NEW_TOKENS))
        # The end of text is a token. A completion that spells it out must end too.
        end_of_text = self.tokenizer.decode([self.eot_token_id], skip_special=False)
        stop = [text for text in handle_stop_sequences(settings.pop("until", None), eos=end_of_text) if text]
        max_new_tokens, sampled = settings.pop("max_gen_toks"), settings.pop("do_sample")
        temperature = settings.pop("temperature", 0.0) * bool(sampled)
        allowed = {name: settings.pop(name) for name in _SAMPLING if settings.get(name) is not None}
        unknown = sorted(set(settings) - set(_IGNORED))
        if unknown:
            raise UserError(
                f"generation setting {unknown[0]!r} is unknown; known: until, max_gen_toks, do_sample, temperature, {', '.join(_SAMPLING)}."
            )
        if max_new_tokens >= self.max_length:
            raise UserError(f"max_gen_toks={max_new_tokens} leaves no room for a prompt in max_length={self.max_length}; ask for fewer tokens.")
        distinct = list(dict.fromkeys(contexts))
        repeats = max(collections.Counter(contexts).values()) if sampled and temperature > 0 else 0
        try:
            sampling = Sampling(n_samples=repeats, temperature=temperature or 1.0, seed=self._seed, **allowed)
        except ValueError as error:
            raise UserError(f"generation settings: {error}") from error
        longest = self.max_length - max_new_tokens
        prompts = [self.tok_encode(context) or [self.prefix_token_id] for context in distinct]
        self.n_cut += sum(len(prompt) > longest for prompt in prompts)
        completions = generate(
            (self._model.config, self._decoding_params),
            prompts,
            sampling=sampling,
            max_new_tokens=max_new_tokens,
            buckets=length_buckets(longest, (MIN_LENGTH,)),
            batch_size=self._batch_size,
            eos_id=self.tokenizer.eos_ids,
            pad_id=self.tokenizer.pad_id,
            compute_dtype=self._forward.compute_dtype,
            what=self._what,
            layout=self._layout,
            is_end=stop_check(self.tokenizer, stop),
        )
        of_context = dict(zip(distinct, completions, strict=True))
        taken: collections.Counter[str] = collections.Counter()
        texts = []
        for context in contexts:
            texts.append(cut_at_stop(self.tokenizer.decode(of_context[context][taken[context]]), stop))
            taken[context] += repeats > 0
        return texts

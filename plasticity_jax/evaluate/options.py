"""Multiple choice without generation: the option that the model finds most likely after the prompt."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from plasticity_jax.data.tasks import Example, format_prompt
from plasticity_jax.data.tokenizer import Tokenizer
from plasticity_jax.errors import UserError
from plasticity_jax.evaluate.likelihood import log_likelihoods
from plasticity_jax.model.forward import Forward


class Choice(NamedTuple):
    """How a model rates the options of one example.

    Attributes:
      log_likelihoods: of each option after the prompt, in nats.
      lengths: of each option, in characters.
      byte_lengths: the same in bytes of UTF-8.
      best: index of the option with the highest log-likelihood; ties go to the first.
      best_by_length, best_by_bytes: the same with log-likelihoods divided by the lengths, or by the byte lengths.
      cut: whether an option's prompt was too long and lost its beginning.
    """

    log_likelihoods: list[float]
    lengths: list[int]
    byte_lengths: list[int]
    best: int
    best_by_length: int
    best_by_bytes: int
    cut: bool


def choose(
    model: Any,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    *,
    forward: Forward,
    batch_size: int,
    what: str,
    max_length: int | None = None,
    faithful: bool = False,
) -> list[Choice]:
    """Rates the options of each example in the study's template.

    Prompt and option are tokenized separately, as prompt and response are in fine-tuning (`data.sft`). No end of text follows.

    Args:
      model: a loaded model, or the pair (config, params).
      examples: with at least one option each.
      forward, batch_size, what, max_length: of `log_likelihoods`.
      faithful: leave out what the tokenizer's own post-processor puts before a text.
    Returns:
      One per example, in order.
    Raises:
      UserError: an example without options, or an option without text.
    Source: acc, acc_norm and acc_bytes of lm-evaluation-harness 0.4.13 (`ConfigurableTask.process_results`), which counts `len(choice)` and
      `len(choice.encode("utf-8"))` without the space before a choice.
    """
    for example in examples:
        if not example.options or not all(example.options):
            raise UserError(f"example {example.id} has options {example.options}, and each option needs text; correct or drop the row.")
    texts = [pair for example in examples for pair in _pairs(example)]
    begin = [] if faithful else tokenizer.prefix_ids
    prompts = [[*begin, *prompt] for prompt in tokenizer.encode_batch([prompt for prompt, _ in texts])]
    pairs = list(zip(prompts, tokenizer.encode_batch([scored for _, scored in texts]), strict=True))
    scores = iter(log_likelihoods(model, pairs, forward=forward, batch_size=batch_size, max_length=max_length, what=what))
    return [_choice([next(scores) for _ in example.options], example.options) for example in examples]


def _pairs(example: Example) -> list[tuple[str, str]]:
    """(prompt in the template, text that is scored) of each option."""
    if not example.ending:
        return [(format_prompt(example.prompt), option) for option in example.options]
    begins = [option.removesuffix(example.ending).strip() for option in example.options]
    return [(format_prompt(f"{example.prompt} {begin}".strip()), example.ending) for begin in begins]


def _choice(scores: list, options: Sequence[str]) -> Choice:
    totals = [score.total for score in scores]
    lengths, byte_lengths = [len(option) for option in options], [len(option.encode("utf-8")) for option in options]
    by_length, by_bytes = ([total / length for total, length in zip(totals, found, strict=True)] for found in (lengths, byte_lengths))
    best, best_by_length, best_by_bytes = (found.index(max(found)) for found in (totals, by_length, by_bytes))
    return Choice(totals, lengths, byte_lengths, best, best_by_length, best_by_bytes, any(score.cut for score in scores))

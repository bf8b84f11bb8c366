"""Hugging Face reward models: Llama with a scalar head, which reads a problem and its answer as a chat.

Source: paper section 5.4, which uses Skywork-Reward-Llama-3.1-8B-v0.2.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import jinja2
import jinja2.ext
import jinja2.sandbox
import numpy as np
import tokenizers
from jax.sharding import Mesh

from plasticity_jax.data.tokenizer import CONFIG_FILE, SPECIALS_FILE, TOKENIZER_FILE, special_settings
from plasticity_jax.errors import UserError, reason
from plasticity_jax.model.hf_config import Description, read_description, read_object
from plasticity_jax.model.hf_import import check_tensors, file_hashes, read_params
from plasticity_jax.model.hf_names import FAMILIES, parts
from plasticity_jax.model.hf_tensors import Weights
from plasticity_jax.model.scalar_head import ScalarModel, scalar_shardings, with_head, without_output
from plasticity_jax.parallel import arrays
from plasticity_jax.runs.storage import AnyPath, is_local

HEAD = "score.weight"
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
FAMILY = replace(FAMILIES[0], architecture="LlamaForSequenceClassification")  # Llama's tensors, with a score head in place of the output matrix


@dataclass(frozen=True)
class Chat:
    """How a reward model reads a problem and its answer.

    Attributes:
      template: the compiled chat template.
      specials: name → text of the special tokens, for the template.
      backend: the tokenizer; it recognizes special tokens spelled out in a text.
      place: the template's file, for messages.
      size: vocabulary size of the model.
      pad_id: the model's padding token; the reward is read at the last other token. None: at the last token.
    """

    template: jinja2.Template
    specials: dict[str, str]
    backend: tokenizers.Tokenizer
    place: AnyPath
    size: int
    pad_id: int | None

    def text(self, problem: str, completion: str) -> str:
        """The conversation [user = problem, assistant = completion] as transformers' `apply_chat_template` writes it.

        Raises:
          UserError: the template fails or rejects the conversation.
        """
        messages = [{"role": "user", "content": problem}, {"role": "assistant", "content": completion}]
        try:
            return self.template.render(messages=messages, tools=None, documents=None, add_generation_prompt=False, **self.specials)
        except Exception as error:  # a template is third-party code
            raise UserError(f"{self.place}: the chat template fails ({reason(error)}); restore the model's own template.") from error

    def rows(self, pairs: Sequence[tuple[str, str]], max_length: int, *, faithful: bool = False) -> tuple[list[list[int]], int]:
        """Token ids of each (problem, completion), up to the token where the reward is read, and the number of rows that lost their beginning.

        The template writes the special tokens, so none is added. A doubled beginning-of-text token is reduced to one. A row that is too long loses
        its beginning, but keeps the beginning-of-text token, without which the model was never used.

        With `faithful`, as in the original: the text that the template wrote is tokenized with special tokens, so that Llama 3's chats begin with two
        beginnings of text, and no row is cut.

        Source: the model card of Skywork-Reward-Llama-3.1-8B-v0.2; transformers' `LlamaForSequenceClassification` for the position; paper section 12
        for the original.
        """
        texts = [self.text(problem, completion) for problem, completion in pairs]
        rows = [list(encoding.ids) for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=faithful)]
        bos = self.backend.token_to_id(self.specials["bos_token"]) if "bos_token" in self.specials else None
        n_cut = 0
        for i, row in enumerate(rows):
            if bos is not None and row[:2] == [bos, bos] and not faithful:
                row = row[1:]
            while len(row) > 1 and row[-1] == self.pad_id:
                row = row[:-1]
            if len(row) > max_length and not faithful:
                n_cut += 1
                begin = row[:1] if row[0] == bos and max_length > 1 else []
                row = [*begin, *row[len(row) - max_length + len(begin) :]]
            if not row or max(row) >= self.size:
                given = f"the token {max(row)}" if row else "no token"
                raise UserError(
                    f"{self.place.parent}: its tokenizer gives {given}, and its model knows {self.size}; use the model and the tokenizer of one folder."
                )
            rows[i] = row
        return rows, n_cut


def check_folder(folder: AnyPath) -> None:
    """Checks that a folder holds a reward model, from its headers only.

    Raises:
      UserError: no such folder, another architecture, no score head or several outputs, no tokenizer, no chat template, or tensors of wrong shapes.
    """
    description, _ = _open(folder)
    _open_chat(folder, description)


def open_reward_model(folder: AnyPath, mesh: Mesh | None = None) -> tuple[ScalarModel, Chat]:
    """The model of a folder, sharded over `mesh` (None: on one device), and its chat format. Raises UserError as `check_folder` does."""
    description, weights = _open(folder)
    chat = _open_chat(folder, description)
    shardings = None if mesh is None else scalar_shardings(mesh, description.model)
    params = read_params(description, weights, folder.name, None if shardings is None else shardings["decoder"])
    head_D = weights.read(HEAD)[0].astype(np.float32)
    return with_head(description.model, params, jnp.asarray(head_D) if shardings is None else arrays.put(head_D, shardings["head"])), chat


def fingerprint(folder: Path) -> dict[str, str]:
    """Name → sha256 of every file that determines the rewards."""
    beside = [folder / name for name in (TOKENIZER_FILE, CONFIG_FILE, SPECIALS_FILE, *TEMPLATE_FILES)]
    return file_hashes([folder / "config.json", *Weights(folder).files, *(file for file in beside if file.is_file())], folder)


def _open(folder: AnyPath) -> tuple[Description, Weights]:
    if not is_local(folder):
        raise UserError(f"{folder} is on an object store, and a reward model's weights are read from a local disk; copy the folder to one first.")
    if not folder.is_dir():
        raise UserError(f"reward.model={folder}: no such directory; give the folder of a Hugging Face reward model.")
    path = folder / "config.json"
    settings = read_object(path)
    named = settings.get("architectures")
    named = named[0] if isinstance(named, list) and named else named
    if isinstance(named, str) and named.endswith("ForCausalLM"):
        raise UserError(
            f"{path}: {named} has no score head, so it gives no rewards; give a {FAMILY.architecture}, or set reward.scorer to 'log-probability'."
        )
    description = read_description(folder, (FAMILY,))
    description = replace(description, model=without_output(description.model))
    n_labels = settings.get("num_labels", len(settings.get("id2label") or [1]))
    weights = Weights(folder)
    if HEAD in weights.tensors and weights.tensors[HEAD].shape[:1] != (1,):
        n_labels = weights.tensors[HEAD].shape[0]
    if n_labels != 1:
        raise UserError(f"{path}: the model gives {n_labels} numbers (num_labels) where a reward is one; give a model with num_labels=1.")
    if HEAD not in weights.tensors:
        raise UserError(f"{folder} has no score head: its weights hold no {HEAD} [1, {description.model.d_model}]; give the whole reward model.")
    expected = {part.name: part.shape for part in parts(description.model, description.family)} | {HEAD: (1, description.model.d_model)}
    check_tensors(folder, weights, expected, tied=False)
    return description, weights


def _open_chat(folder: AnyPath, description: Description) -> Chat:
    path = folder / TOKENIZER_FILE
    if not path.is_file():
        raise UserError(f"{folder} holds no {TOKENIZER_FILE}, so no text can be given to the reward model; put its tokenizer there.")
    try:
        backend = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises bare Exception for every kind of bad file
        raise UserError(f"{path} is not a valid tokenizer ({reason(error)}); restore the file.") from error
    backend.no_truncation()
    backend.no_padding()
    settings = read_object(folder / CONFIG_FILE) if (folder / CONFIG_FILE).is_file() else {}
    source, place = _template(folder, settings)
    pad_id = description.carried.get("pad_token_id")
    return Chat(_compiled(source, place), _special_texts(special_settings(folder)), backend, place, description.model.vocab_size, pad_id)


def _special_texts(settings: dict[str, Any]) -> dict[str, str]:
    """Name → text of the special tokens; an entry is a string, or an object with the string as "content"."""
    found = {}
    for name, entry in settings.items():
        text = entry.get("content") if isinstance(entry, dict) else entry
        if name.endswith("_token") and isinstance(text, str):
            found[name] = text
    return found


def _template(folder: AnyPath, settings: dict[str, Any]) -> tuple[str, AnyPath]:
    """The chat template, and its file. A separate template file takes precedence over the tokenizer's configuration, as in transformers."""
    plain, wrapped = (folder / name for name in TEMPLATE_FILES)
    if plain.is_file():
        return plain.read_text(encoding="utf-8"), plain
    for place, entry in ((folder / CONFIG_FILE, settings), (wrapped, read_object(wrapped) if wrapped.is_file() else {})):
        found = entry.get("chat_template")
        if isinstance(found, list):  # several, by name
            found = next((each.get("template") for each in found if isinstance(each, dict) and each.get("name") == "default"), None)
        if isinstance(found, str):
            return found, place
    raise UserError(
        f"{folder} has no chat template (no {TEMPLATE_FILES[0]}, no chat_template in {CONFIG_FILE}), and a reward model reads a chat; "
        "put the model's own template there."
    )


def _compiled(source: str, place: AnyPath) -> jinja2.Template:
    """The template in the environment that transformers gives it, without the current date, which would change the rewards from day to day."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols])
    environment.filters["tojson"] = _as_json
    environment.globals["raise_exception"] = _refuse
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise UserError(f"{place}: the chat template is not valid ({reason(error)}); restore the model's own template.") from error


def _as_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
    # Jinja's own filter escapes HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)

"""Text to token ids and back: the tokenizer that a study trains, and any other that comes as a tokenizer.json."""

import functools
import hashlib
import json
from array import array
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import Int
from tokenizers import decoders, models, pre_tokenizers, trainers

from plasticity_jax.data.pretokenize import SPACE, own_pre_tokenizer, splitter
from plasticity_jax.errors import UserError, reason
from plasticity_jax.runs.storage import AnyPath, location, make_folder, write_bytes
from plasticity_jax.text import valid_text

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|pad|>"
TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
SPECIALS_FILE = "special_tokens_map.json"
# What transformers takes settings of generation from: the second only if there is no first.
GENERATION_FILES = ("generation_config.json", "config.json")
# Files beside a model's weights that say how it reads and writes text. Runs keep them and exports carry them, unchanged.
COMPANIONS = (CONFIG_FILE, SPECIALS_FILE, "added_tokens.json", "chat_template.jinja", "chat_template.json", "tokenizer.model", "vocab.json",
              "merges.txt", "generation_config.json", TOKENIZER_FILE)  # fmt: skip
CHAT_TEMPLATES = "additional_chat_templates"  # a folder of further ones
N_BYTES = 256
MIN_VOCAB_SIZE = N_BYTES + 2
# Pieces whose tokens are cached between calls: at most about 100 MB. A text that cannot be split is one long piece and is not cached.
MAX_PIECES = 500_000
MAX_PIECE_CHARACTERS = 64
# The keys of the special tokens in tokenizer_config.json.
SPECIAL_KEYS = ("bos_token", "eos_token", "pad_token", "unk_token")
# The ends of text of tokenizers whose files name none: of GPT-2's and of Llama's class.
USUAL_ENDS = (END_OF_TEXT, "</s>")


class Tokenizer:
    """Token ids of texts, and texts of token ids.

    Byte-level tokenizers (the study's own, and OLMo-2's) are lossless: `decode(encode(text)) == text` for every text that UTF-8 can encode.
    SentencePiece adds a space before every text, which `decode` removes, and reads "▁" as a space.

    `encode` adds no beginning or end of text and never emits a special token, even if the text spells one out. Special tokens enter token
    streams only through `eos_id`, `pad_id`, `bos_id`, and `prefix_ids` and `suffix_ids`.

    Args:
      backend: a tokenizer of the tokenizers library.
      specials: the special tokens, by key of SPECIAL_KEYS. The end of text defaults to the first of USUAL_ENDS in the vocabulary. Padding defaults
        to "<|pad|>" if the vocabulary has it, and to the end of text otherwise.
      more_eos_ids: further tokens that end a text that a model writes.
    Attributes:
      vocab_size: the highest token id, added tokens included, plus 1.
      eos_id, pad_id, bos_id: end of text, padding (`eos_id` where there is none), beginning of text (None where there is none).
      eos_ids: the tokens that end a completion: `eos_id` first. Training knows `eos_id` only.
    Raises:
      UserError: a special token is not in the vocabulary, or there is no end of text.
    """

    def __init__(self, backend: tokenizers.Tokenizer, specials: dict[str, str] | None = None, more_eos_ids: Sequence[int] = ()):
        self._backend = backend
        # Without this, text that spells "<|endoftext|>" would end a document. The flag is not part of tokenizer.json.
        backend.encode_special_tokens = True
        # Some files ask for truncation or padding; batches take care of both here.
        backend.no_truncation()
        backend.no_padding()
        if hasattr(backend.model, "_resize_cache"):
            # The library keeps the pieces of every tokenizer, also of those that are gone, until the thread ends. Ours are kept here.
            backend.model._resize_cache(0)
        self._ids_of_piece: dict[str, bytes] = {}  # int32 ids; joining bytes is the fastest way to concatenate
        self._split = splitter(backend)
        self._specials = dict(specials or {})
        self.vocab_size: int = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        usual = next((token for token in USUAL_ENDS if backend.token_to_id(token) is not None), None)
        eos_id = self._special_id("eos_token", usual)
        if eos_id is None:
            raise UserError(
                f'the tokenizer defines no end of text and has no {END_OF_TEXT} token; put a {CONFIG_FILE} with {{"eos_token": "..."}} beside it'
            )
        pad_id = self._special_id("pad_token", PADDING)
        self.eos_id: int = eos_id
        self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys((eos_id, *more_eos_ids)))
        self.pad_id: int = eos_id if pad_id is None else pad_id
        self.bos_id: int | None = self._special_id("bos_token", None)

    def _special_id(self, key: str, default: str | None) -> int | None:
        token = self._specials.get(key, default)
        index = None if token is None else self._backend.token_to_id(token)
        if index is None and key in self._specials:
            raise UserError(
                f"{key} {token!r} is not in the tokenizer's vocabulary of {self.vocab_size:,}; set {key} in {CONFIG_FILE} to one of its tokens"
            )
        return index

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Trains a byte-level BPE of exactly `vocab_size` entries: two special tokens, 256 bytes, and merges learned from `texts`.

        Every digit is its own token.
        "<|endoftext|>" is 0 and "<|pad|>" is 1.

        Raises:
          UserError: `vocab_size` is below 258, or the texts are too short for that many merges.
        """
        if vocab_size < MIN_VOCAB_SIZE:
            raise UserError(
                f"model.vocab_size={vocab_size} is below {MIN_VOCAB_SIZE} ({N_BYTES} bytes and 2 special tokens); set it to {MIN_VOCAB_SIZE} or more"
            )
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = own_pre_tokenizer()
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=[END_OF_TEXT, PADDING], show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        )
        backend.train_from_iterator(texts, trainer)
        found = backend.get_vocab_size(with_added_tokens=True)
        if found != vocab_size:
            raise UserError(
                f"model.vocab_size={vocab_size} is more than the training text supports ({found} entries); set model.vocab_size to at most "
                f"{found} or train on more text"
            )
        return cls(backend)

    @classmethod
    def load(cls, path: AnyPath) -> "Tokenizer":
        """Reads a tokenizer.json (or the one in a folder), and the special tokens from the files beside it (`read_specials`).

        Raises:
          UserError: the file does not exist, is not a tokenizer, or has no end of text.
        """
        path = location(path)
        path = path / TOKENIZER_FILE if path.is_dir() else path
        if not path.is_file():
            raise UserError(f"tokenizer {path} does not exist; run `plasticity prepare` for this study")
        try:
            backend = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises bare Exception for every kind of bad file
            raise UserError(f"tokenizer {path} cannot be read ({reason(error)}); delete it and run `plasticity prepare`") from error
        try:
            return cls(backend, *read_specials(path.parent, backend))
        except UserError as error:
            raise UserError(f"{path}: {error}") from error

    def save(self, path: AnyPath) -> None:
        """Writes the standard tokenizer.json, and a tokenizer_config.json beside it if the special tokens are not the default ones.

        Each file is written atomically, the configuration first.
        """
        path = location(path)
        config = path.with_name(CONFIG_FILE)
        if self._specials:
            settings = self._specials | {
                "add_bos_token": False,
                "add_eos_token": False,
                "clean_up_tokenization_spaces": False,
                "tokenizer_class": "PreTrainedTokenizerFast",
            }
            write_bytes(config, (json.dumps(settings, indent=1, ensure_ascii=False) + "\n").encode())
        else:
            config.unlink(missing_ok=True)
        write_bytes(path, self._backend.to_str(pretty=True).encode())

    @property
    def prefix_ids(self) -> tuple[int, ...]:
        """What the tokenizer's own post-processor puts before a text, such as Llama 3's beginning of text; often nothing."""
        return self._frame[0]

    @property
    def suffix_ids(self) -> tuple[int, ...]:
        """What the tokenizer's own post-processor puts after a text; almost always nothing."""
        return self._frame[1]

    def before_prompts(self, *, faithful: bool) -> tuple[int, ...]:
        """What an evaluation puts before a prompt: `prefix_ids`, or in a faithful study the beginning of text wherever there is one.

        The original's tokenizer put it before prompts, though not before the rows of fine-tuning. Source: paper section 4.1.
        """
        return self.prefix_ids if not faithful else () if self.bos_id is None else (self.bos_id,)

    @functools.cached_property
    def _frame(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        found = self._backend.encode("a", add_special_tokens=True)
        text = [place for place, special in enumerate(found.special_tokens_mask) if not special]
        return tuple(found.ids[: text[0]]), tuple(found.ids[text[-1] + 1 :])

    def without_frame(self) -> "Tokenizer":
        """This tokenizer with a post-processor that adds nothing: the one of a model that is trained on what `encode` returns."""
        if not (self.prefix_ids or self.suffix_ids):
            return self
        backend = tokenizers.Tokenizer.from_str(json.dumps(json.loads(self._backend.to_str()) | {"post_processor": None}))
        return Tokenizer(backend, self._specials, self.eos_ids)

    @functools.cached_property
    def token_bytes(self) -> Int[np.ndarray, " vocab"]:
        """int32 [vocab]: UTF-8 bytes of text that each token stands for, 0 for special tokens.

        The sum over an encoded text is the text's size in bytes; with SentencePiece, plus one for the space that it adds.
        """
        definition = json.loads(self._backend.to_str())
        specials = {token["id"] for token in definition["added_tokens"] if token["special"]} | {self.eos_id, self.pad_id, self.bos_id}
        added = {token["id"] for token in definition["added_tokens"]}
        byte_level = _is_byte_level(definition["pre_tokenizer"])
        sizes = np.zeros(self.vocab_size, np.int32)
        for token, index in self._backend.get_vocab(with_added_tokens=True).items():
            if index in specials:
                continue
            if byte_level and index not in added:
                sizes[index] = len(token)  # the byte-level alphabet writes every byte as one character
            elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                sizes[index] = 1
            else:
                sizes[index] = len(token.replace(SPACE, " ").encode("utf-8"))
        return sizes

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) of the tokenizer's definition and special tokens. Unchanged by saving and loading."""
        digest = hashlib.sha256(self._backend.to_str(pretty=False).encode("utf-8"))
        if self._specials:
            digest.update(json.dumps(self._specials, sort_keys=True).encode("ascii"))
        return digest.hexdigest()

    def encode(self, text: str) -> list[int]:
        """Token ids of one text, without specials."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without specials: `encode` of each, several times faster."""
        return [ids.tolist() for ids in self.encode_arrays(texts)]

    def encode_arrays(self, texts: Sequence[str]) -> list[Int[np.ndarray, " tokens"]]:
        """`encode_batch` with an int32 array per text, the fastest form for a corpus."""
        if self._split is None:
            return [np.asarray(encoding.ids, np.int32) for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]
        if len(self._ids_of_piece) > MAX_PIECES:
            self._ids_of_piece.clear()
        split = [self._split(text) for text in texts]
        new = sorted(set().union(*split).difference(self._ids_of_piece))
        for piece, encoding in zip(new, self._backend.encode_batch_fast(new, add_special_tokens=False)):
            self._ids_of_piece[piece] = array("i", encoding.ids).tobytes()
        encoded = [np.frombuffer(b"".join(map(self._ids_of_piece.__getitem__, pieces)), np.int32) for pieces in split]
        for piece in new:
            if len(piece) > MAX_PIECE_CHARACTERS:
                del self._ids_of_piece[piece]
        return encoded

    def decode(self, ids: Sequence[int] | np.ndarray, skip_special: bool = True) -> str:
        """The text of `ids`. Bytes that are not UTF-8, such as half a character, become U+FFFD."""
        return self._backend.decode([int(index) for index in ids], skip_special_tokens=skip_special)


def companions(folder: AnyPath) -> list[str]:
    """The names of the COMPANIONS and further chat templates that a folder holds; tokenizer.json last."""
    more = folder / CHAT_TEMPLATES
    templates = [f"{CHAT_TEMPLATES}/{path.name}" for path in more.iterdir() if path.suffix == ".jinja"] if more.is_dir() else []
    return sorted(templates) + [name for name in COMPANIONS if (folder / name).is_file()]


def copy_tokenizer(source: AnyPath, target: AnyPath) -> None:
    """Copies a tokenizer's files and all other `companions` from one run's folder to another's, each atomically, and removes stale ones there.

    Raises:
      UserError: the source holds no tokenizer.json.
    """
    if not (source / TOKENIZER_FILE).is_file():
        raise UserError(f"{source} holds no {TOKENIZER_FILE}; put the model's tokenizer there")
    names = companions(source)
    for name in companions(target):
        if name not in names:
            (target / name).unlink(missing_ok=True)
    copy_companions(source, target)


def copy_companions(source: AnyPath, target: AnyPath) -> None:
    """Copies the `companions` of a folder, each atomically."""
    for name in companions(source):
        make_folder((target / name).parent)
        write_bytes(target / name, (source / name).read_bytes())


def read_specials(folder: AnyPath, backend: tokenizers.Tokenizer) -> tuple[dict[str, str], tuple[int, ...]]:
    """The special tokens that the files of a folder define, in transformers' order of precedence.

    tokenizer_config.json defines them, unless it lists no added_tokens_decoder: then special_tokens_map.json does, and the configuration what that
    leaves out. If neither names an end of text, it is the first of generation_config.json, or of config.json if there is no such file. All ends of
    text that are listed there end a completion.

    Args:
      backend: the tokenizer whose tokens they are.
    Returns:
      (special tokens by key of SPECIAL_KEYS, ids that end a completion).
    Raises:
      UserError: a file is not valid, or the ids of ends of text are not ids.
    """
    settings = special_settings(folder)
    found: dict[str, str] = {}
    for key in SPECIAL_KEYS:
        entry: Any = settings.get(key)
        token = entry.get("content") if isinstance(entry, dict) else entry
        if isinstance(token, str):
            found[key] = valid_text(f"{key} of {CONFIG_FILE} or {SPECIALS_FILE}", token)
    path = next((folder / name for name in GENERATION_FILES if (folder / name).is_file()), None)
    ids = () if path is None else _end_ids(path)
    if ids and "eos_token" not in found and (token := backend.id_to_token(ids[0])) is not None:
        found["eos_token"] = token
    return found, ids


def special_settings(folder: AnyPath) -> dict[str, Any]:
    """The settings of tokenizer_config.json, with those of special_tokens_map.json where that is read. Raises UserError if a file is not JSON."""
    settings = _read_json(folder / CONFIG_FILE)
    return settings if "added_tokens_decoder" in settings else settings | _read_json(folder / SPECIALS_FILE)


def _end_ids(path: AnyPath) -> tuple[int, ...]:
    entry = _read_json(path).get("eos_token_id")
    ids = entry if isinstance(entry, list) else [] if entry is None else [entry]
    if not all(isinstance(index, int) and not isinstance(index, bool) and index < 2**31 for index in ids):
        raise UserError(f"{path.name} beside it has eos_token_id={str(entry)[:100]}; give a token id, or a list of them")
    return tuple(index for index in ids if index >= 0)  # -1 says that there is none


def _read_json(path: AnyPath) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path.name} beside it is not valid JSON ({reason(error)}); correct it") from error
    return entries if isinstance(entries, dict) else {}


def _is_byte_level(pre_tokenizer: dict | None) -> bool:
    steps = [] if pre_tokenizer is None else pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    return any(step["type"] == "ByteLevel" for step in steps)

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
from plasticity_jax.runs.storage import AnyPath, location, write_bytes

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|pad|>"
TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
N_BYTES = 256
MIN_VOCAB_SIZE = N_BYTES + 2
# Pieces whose tokens are cached between calls: at most about 100 MB. A text that cannot be split is one long piece and is not cached.
MAX_PIECES = 500_000
MAX_PIECE_CHARACTERS = 64
# The keys of the special tokens in tokenizer_config.json.
SPECIAL_KEYS = ("bos_token", "eos_token", "pad_token", "unk_token")


class Tokenizer:
    """Token ids of texts, and texts of token ids.

    Byte-level tokenizers (the study's own, and OLMo-2's) are lossless: `decode(encode(text)) == text` for every text that UTF-8 can encode.
    SentencePiece adds a space before every text, which `decode` removes, and reads "▁" as a space.

    `encode` adds no beginning or end of text and never emits a special token, even if the text spells one out. Special tokens enter token
    streams only through `eos_id`, `pad_id` and `bos_id`.

    Args:
      backend: a tokenizer of the tokenizers library.
      specials: the special tokens, by key of SPECIAL_KEYS. The end of text defaults to "<|endoftext|>". Padding defaults to "<|pad|>" if the
        vocabulary has it, and to the end of text otherwise.
    Attributes:
      vocab_size: the highest token id, added tokens included, plus 1.
      eos_id, pad_id, bos_id: end of text, padding (`eos_id` where there is none), beginning of text (None where there is none).
    Raises:
      UserError: a special token is not in the vocabulary, or there is no end of text.
    """

    def __init__(self, backend: tokenizers.Tokenizer, specials: dict[str, str] | None = None):
        self._backend = backend
        # Without this, text that spells "<|endoftext|>" would end a document. The flag is not part of tokenizer.json.
        backend.encode_special_tokens = True
        # Some files ask for truncation or padding; batches take care of both here.
        backend.no_truncation()
        backend.no_padding()
        self._ids_of_piece: dict[str, bytes] = {}  # int32 ids; joining bytes is the fastest way to concatenate
        self._split = splitter(backend)
        self._specials = dict(specials or {})
        self.vocab_size: int = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        eos_id = self._special_id("eos_token", END_OF_TEXT)
        if eos_id is None:
            raise UserError(
                f'the tokenizer defines no end of text and has no {END_OF_TEXT} token; put a {CONFIG_FILE} with {{"eos_token": "..."}} beside it'
            )
        pad_id = self._special_id("pad_token", PADDING)
        self.eos_id: int = eos_id
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
                f"vocab_size={vocab_size} is below {MIN_VOCAB_SIZE} ({N_BYTES} bytes and 2 special tokens); set it to {MIN_VOCAB_SIZE} or more"
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
                f"vocab_size={vocab_size} is more than the training text supports ({found} entries); set vocab_size to at most "
                f"{found} or train on more text"
            )
        return cls(backend)

    @classmethod
    def load(cls, path: AnyPath) -> "Tokenizer":
        """Reads a tokenizer.json (or the one in a folder), and the special tokens from a tokenizer_config.json beside it.

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
            return cls(backend, _read_specials(path.with_name(CONFIG_FILE)))
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


def copy_tokenizer(source: AnyPath, target: AnyPath) -> None:
    """Copies a tokenizer's files from one run's folder to another's, each atomically, and removes a stale tokenizer_config.json there.

    Raises:
      UserError: the source holds no tokenizer.json.
    """
    if not (source / TOKENIZER_FILE).is_file():
        raise UserError(f"{source} holds no {TOKENIZER_FILE}; put the model's tokenizer there")
    for name in (CONFIG_FILE, TOKENIZER_FILE):
        original, copy = source / name, target / name
        if original.is_file():
            write_bytes(copy, original.read_bytes())
        else:
            copy.unlink(missing_ok=True)


def _read_specials(path: AnyPath) -> dict[str, str]:
    """The special tokens in a tokenizer_config.json. An entry is a string, or an object with the string as "content"."""
    if not path.is_file():
        return {}
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path.name} beside it is not valid JSON ({error}); correct it") from error
    found: dict[str, str] = {}
    for key in SPECIAL_KEYS:
        entry: Any = entries.get(key) if isinstance(entries, dict) else None
        token = entry.get("content") if isinstance(entry, dict) else entry
        if isinstance(token, str):
            found[key] = token
    return found


def _is_byte_level(pre_tokenizer: dict | None) -> bool:
    steps = [] if pre_tokenizer is None else pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    return any(step["type"] == "ByteLevel" for step in steps)

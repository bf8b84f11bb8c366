"""The tokenizer of a study: byte-level BPE without normalisation, every digit a token of its own."""

import functools
import hashlib
import os
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from jaxtyping import Int
from tokenizers import decoders, models, pre_tokenizers, trainers

from plasticity_jax.data.pieces import pieces
from plasticity_jax.errors import UserError

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|pad|>"
N_BYTES = 256
MIN_VOCAB_SIZE = N_BYTES + 2
# Pieces whose tokens are remembered between calls; about 100 MB of memory at most.
MAX_PIECES = 500_000


class Tokenizer:
    """Text to token ids and back, without loss: `decode(encode(text)) == text` for every text that UTF-8 can hold.

    `encode` never emits a special token, also where the text spells one out; "<|endoftext|>" and "<|pad|>" enter token streams
    only by `eos_id` (0) and `pad_id` (1).
    """

    def __init__(self, backend: tokenizers.Tokenizer):
        self._backend = backend
        # Without this, text that spells "<|endoftext|>" would end a document. The flag is not part of tokenizer.json.
        backend.encode_special_tokens = True
        self._ids_of_piece: dict[str, bytes] = {}  # int32 ids: joining bytes is the fastest concatenation there is
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self.eos_id: int = backend.token_to_id(END_OF_TEXT)
        self.pad_id: int = backend.token_to_id(PADDING)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """A tokenizer of exactly `vocab_size` entries: two specials, 256 bytes, and merges learned from `texts`.

        Raises:
          UserError: `vocab_size` is below 258, or the texts are too small for that many merges.
        """
        if vocab_size < MIN_VOCAB_SIZE:
            raise UserError(f"vocab_size={vocab_size} is below {MIN_VOCAB_SIZE} ({N_BYTES} bytes and 2 special tokens); set it to "
                            f"{MIN_VOCAB_SIZE} or more")
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ])
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[END_OF_TEXT, PADDING], show_progress=False,
                                      initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
        backend.train_from_iterator(texts, trainer)
        found = backend.get_vocab_size(with_added_tokens=True)
        if found != vocab_size:
            raise UserError(f"vocab_size={vocab_size} is more than the training text gives ({found} entries); set vocab_size to at most "
                            f"{found} or train on more text")
        return cls(backend)

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Reads a tokenizer.json that `save` wrote.

        Raises:
          UserError: no such file, not a tokenizer, or one without the two special tokens.
        """
        if not Path(path).is_file():
            raise UserError(f"tokenizer {path} does not exist; run `plasticity prepare` for this study")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for every kind of bad file
            reason = " ".join(str(error).split())
            raise UserError(f"tokenizer {path} is not readable ({reason}); delete it and run `plasticity prepare`") from error
        for token in (END_OF_TEXT, PADDING):
            if backend.token_to_id(token) is None:
                raise UserError(f"tokenizer {path} has no {token} token; use one that `plasticity prepare` trained")
        return cls(backend)

    def save(self, path: Path) -> None:
        """Writes the standard tokenizer.json of the tokenizers library, atomically."""
        path = Path(path)
        partial = path.with_name(path.name + ".partial")
        self._backend.save(str(partial))
        os.replace(partial, path)

    @functools.cached_property
    def token_bytes(self) -> Int[np.ndarray, " vocab"]:
        """int32 [vocab]: UTF-8 bytes of text behind each token, 0 for the specials."""
        sizes = np.zeros(self.vocab_size, np.int32)
        for token, index in self._backend.get_vocab(with_added_tokens=True).items():
            # The byte-level alphabet writes every byte as one character.
            sizes[index] = 0 if index in (self.eos_id, self.pad_id) else len(token)
        return sizes

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) of the tokenizer's definition; equal after save and load."""
        return hashlib.sha256(self._backend.to_str(pretty=False).encode("utf-8")).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Token ids of one text, without specials."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without specials; the same as `encode` of each, several times faster."""
        return [ids.tolist() for ids in self.encode_arrays(texts)]

    def encode_arrays(self, texts: Sequence[str]) -> list[Int[np.ndarray, " tokens"]]:
        """`encode_batch` with an int32 array for each text: the fast way for a corpus."""
        if len(self._ids_of_piece) > MAX_PIECES:
            self._ids_of_piece.clear()
        cut = [pieces(text) for text in texts]
        new = sorted(set().union(*cut).difference(self._ids_of_piece))
        for piece, encoding in zip(new, self._backend.encode_batch_fast(new, add_special_tokens=False)):
            self._ids_of_piece[piece] = array("i", encoding.ids).tobytes()
        return [np.frombuffer(b"".join(map(self._ids_of_piece.__getitem__, text_pieces)), np.int32) for text_pieces in cut]

    def decode(self, ids: Sequence[int] | np.ndarray, skip_special: bool = True) -> str:
        """The text of `ids`; bytes that are not UTF-8 (a character cut in two) become U+FFFD."""
        return self._backend.decode([int(index) for index in ids], skip_special_tokens=skip_special)

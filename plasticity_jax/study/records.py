"""Records of a study: what its page is made from, without parameters, token records and completions, small enough to be committed.

One archive per pretraining seed, and one for what all seeds share. Each holds the small files of finished runs, byte for byte, below the ids of
their runs; `DONE` keeps the checksums of these files.
"""

import gzip
import io
import json
import re
import tarfile
from collections.abc import Iterator

from plasticity_jax.config import grid_members, restore_config
from plasticity_jax.errors import UserError, reason
from plasticity_jax.progress import Progress
from plasticity_jax.runs.directory import ASKED, CONFIG, DONE, PROVENANCE, RESULTS, STUDY, WARNINGS, RunDirectory
from plasticity_jax.runs.jsonfiles import damaged, read_json, to_json
from plasticity_jax.runs.logs import METRICS
from plasticity_jax.runs.storage import AnyPath, make_folder, read_bytes, write_bytes
from plasticity_jax.study.graph import read_study, runs_beside

KEPT = (CONFIG, PROVENANCE, RESULTS, WARNINGS, ASKED)  # of every run
CURVES = ("pretrain",)  # stages whose metrics are drawn, so that they are kept too
SHARED = "shared"  # the archive of what belongs to no seed
ARCHIVE = ".tar.gz"
MOST = 2**28  # bytes of an unpacked archive; one of the reproduction has 2**23

_METRICS = METRICS.replace(".", "*.")  # numbered parts on a store
_PART = r"[\w+-][\w.+-]*"  # of a path, never hidden and never ".."
_NAME = re.compile(rf"{re.escape(STUDY)}|{_PART}/{_PART}/(?:{'|'.join(map(re.escape, (*KEPT, DONE)))}|metrics(?:\.\d+)?\.jsonl)")


def save_records(study_dir: AnyPath, out: AnyPath) -> list[AnyPath]:
    """Writes the records of all finished runs of a study. An archive whose runs did not change stays the same, byte for byte.

    Args:
      study_dir: `<workdir>/<study>`.
      out: folder of the archives: `shared.tar.gz`, with study.json, and `seed-<seed>.tar.gz`.
    Returns:
      The archives, the shared one first.
    Raises:
      UserError: no study there, or a finished run whose files have changed since.
    """
    tree, runs = read_study(study_dir / STUDY)
    with damaged(study_dir / STUDY):
        seeds = {name: member.seed for member in grid_members(restore_config(tree["config"])) for name in (member.name, member.base)}
    runs += [other.run for other in runs_beside(study_dir / STUDY) if not other.stale]  # what commands were asked for by themselves
    archives: dict[str, dict[str, bytes]] = {SHARED: {STUDY: read_bytes(study_dir / STUDY)}}
    with Progress(f"records of {study_dir.name}", total=len(runs), unit="runs") as progress:
        for run in runs:
            directory = RunDirectory(study_dir / run.id)
            if directory.done:
                name = f"seed-{seeds[run.member]}" if run.member in seeds else SHARED
                for file, content in _small_files(directory, curves=run.stage in CURVES).items():
                    archives.setdefault(name, {})[f"{run.id}/{file}"] = content
            progress.update(1)
    make_folder(out)
    written = [out / f"{name}{ARCHIVE}" for name in archives]
    for path, files in zip(written, archives.values(), strict=True):
        write_bytes(path, _archive(files))
    return written


def unpack_records(records: AnyPath, workdir: AnyPath) -> list[AnyPath]:
    """Writes the runs that records hold as studies below `workdir`, for the report and every other reader. What is there already stays.

    Args:
      records: what `save_records` wrote, or a folder of such folders.
    Returns:
      `<workdir>/<study>` of each.
    Raises:
      UserError: no records there, an archive that is damaged or holds anything but files of runs, or another study of the name below `workdir`.
    """
    found = [path.parent for path in sorted([*records.glob(f"{SHARED}{ARCHIVE}"), *records.glob(f"*/{SHARED}{ARCHIVE}")])]
    if not found:
        raise UserError(f"--records={records} holds no {SHARED}{ARCHIVE}; give the folder that plasticity records wrote.")
    return [_unpack(folder, workdir) for folder in found]


def _unpack(records: AnyPath, workdir: AnyPath) -> AnyPath:
    files: dict[str, bytes] = {}
    for path in sorted(records.glob(f"*{ARCHIVE}")):
        files |= dict(_members(path))
    shared = records / f"{SHARED}{ARCHIVE}"
    with damaged(shared):
        study = json.loads(files[STUDY])["study"]
    if not re.fullmatch(_PART, study):
        raise UserError(f"{shared} names its study {study!r}, which is no name of a folder; write the records again with plasticity records.")
    folder = workdir / study
    if (folder / STUDY).is_file() and (folder / STUDY).read_bytes() != files[STUDY]:
        raise UserError(f"{folder} holds another study than {records}; give another --workdir.")
    with Progress(f"unpack {records.name}", total=len(files), unit="files") as progress:
        for name in sorted(files, key=lambda name: (name.endswith(f"/{DONE}"), name)):  # DONE last, as a run writes it
            if not (folder / name).is_file():
                make_folder((folder / name).parent)
                write_bytes(folder / name, files[name])
            progress.update(1)
    return folder


def _small_files(directory: RunDirectory, *, curves: bool) -> dict[str, bytes]:
    """The files of a finished run that its record holds, and a DONE that vouches for these."""
    directory.check_whole()
    patterns = (*KEPT, *([_METRICS] if curves else []))
    files = {path.name: read_bytes(path) for pattern in patterns for path in sorted(directory.path.glob(pattern))}
    done = read_json(directory.path / DONE)
    done["files"] = {name: checksum for name, checksum in done.get("files", {}).items() if name in files}
    done["record"] = True
    return files | {DONE: (to_json(done, indent=1) + "\n").encode()}


def _archive(files: dict[str, bytes]) -> bytes:
    """A tar.gz of the files: the same bytes for the same files, whenever it is made."""
    content = io.BytesIO()
    with gzip.GzipFile(filename="", fileobj=content, mode="wb", mtime=0) as packed, tarfile.open(fileobj=packed, mode="w") as archive:
        for name in sorted(files):
            about = tarfile.TarInfo(name)
            about.size = len(files[name])
            archive.addfile(about, io.BytesIO(files[name]))
    return content.getvalue()


def _members(path: AnyPath) -> Iterator[tuple[str, bytes]]:
    """Names and contents of an archive. Raises UserError for one that is damaged, too large, or holds anything but the small files of runs."""
    try:
        with path.open("rb") as file, gzip.GzipFile(fileobj=file) as packed:
            content = packed.read(MOST + 1)
        if len(content) > MOST:
            raise UserError(f"{path} unpacks to more than {MOST:,} bytes, so it is no archive of records; remove it.")
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as archive:
            for about in archive:
                if not (about.isreg() and _NAME.fullmatch(about.name)):
                    raise UserError(f"{path} holds {about.name[:80]!r}, which is no file of a run's record; write the records again.")
                file = archive.extractfile(about)
                yield about.name, b"" if file is None else file.read()
    except UserError:
        raise
    except (OSError, EOFError, tarfile.TarError, ValueError) as error:
        raise UserError(f"{path} is damaged ({reason(error)}); bring it again, or write the records again with plasticity records.") from error

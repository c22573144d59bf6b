"""Fetching a teacher's weights, once, on a node with network; training reads what is recorded here and nothing else."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import constants, errors, get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache

from fdscale.config.errors import UserError, attempt, nearest, settings_renamed, told_as
from fdscale.config.settings import DistillSettings, RunSettings, TeacherSettings
from fdscale.students.geometry import STUDENTS
from fdscale.teachers.fetched import Fetched, fetched, record, sha256_of, verify
from fdscale.teachers.table import OWN, STUDENT_FILE, UnbuiltTeacher, teacher_geometry

NEWEST = "main"
SHA256 = re.compile(r"[0-9a-f]{64}")

logger = logging.getLogger(__name__)


class HubFile(NamedTuple):
    """A file of a hub's repository."""

    repository: str
    file: str

    def __str__(self) -> str:
        return f"{self.repository}/{self.file}"


def fetch(settings: RunSettings) -> list[Fetched]:
    """Bring the recipe's teachers' weights into the hub's cache and record them; where there is any to fetch.

    What is recorded and whole stays as it is: no network is needed then. Raises UserError where no hub has the
    weights, where the hub cannot be reached or refuses, and where the bytes are not those that the hub names.
    """
    if not isinstance(settings, DistillSettings):
        logger.info("nothing to fetch: `fdscale %s` has no teacher", settings.program)
        return []
    found = []
    for where, (table, _) in settings.teachers.items():
        with told_as(where):
            found.append(_fetch_one(where, table))
    return [weights for weights in found if weights is not None]


def _fetch_one(where: str, table: TeacherSettings) -> Fetched | None:
    if reason := _nothing_to_fetch(table):
        logger.info("nothing to fetch: %s", settings_renamed(reason, where))
        return None
    source = hub_file(table.name)
    found = _recorded(table.name, table.revision, source)
    if found is None:
        found = _bring(source, table.revision or NEWEST)
        record(table.name, table.revision, found)
    return found


def _nothing_to_fetch(table: TeacherSettings) -> str | None:
    """Why this teacher needs no hub, or None."""
    if table.weights == "random":
        return 'teacher.weights = "random"'
    if table.weights is not None:
        _refuse_no_file(table.name, table.weights)
    return table.weights and f"teacher.weights is {table.weights}, which is used as it is"


def _refuse_no_file(name: str, weights: str) -> None:
    if not Path(weights).is_file():
        remedies: list[str] = []
        attempt(lambda: hub_file(name), remedies)
        remedy = "; ".join(remedies) or "leave teacher.weights out, and this brings the hub's"
        raise UserError(f"teacher.weights: no such file: {weights}; {remedy}")


def hub_file(teacher_name: str) -> HubFile:
    """Where a teacher's weights lie; raises UserError, saying whose file is needed, where that is on no hub."""
    if teacher_name == OWN:
        raise UserError(f"teacher.name={OWN}: your Python call gives the network with its weights; nothing is fetched")
    if teacher_name == STUDENT_FILE or teacher_name in STUDENTS:
        raise UserError(
            f"teacher.name={teacher_name}: no hub carries it; a student file of your own is needed, from a run or "
            "from `fdscale import FILE --output DIR`: name it with teacher.weights=FILE"
        )
    spec = teacher_geometry(teacher_name)
    if isinstance(spec, UnbuiltTeacher):
        return _timm_file(spec.model)
    if not spec.repository:
        raise UserError(
            f"teacher.name={teacher_name}: no hub carries it; get the checkpoint from its authors' pages and name it "
            "with teacher.weights=FILE"
        )
    return HubFile(spec.repository, spec.file)


def _timm_file(model: str) -> HubFile:
    import timm  # a second of imports that the table's own teachers do without

    try:
        config = timm.get_pretrained_cfg(model, allow_unregistered=False)
    except RuntimeError as error:
        raise UserError(f"teacher.name: timm says of {model!r}: {error}{nearest(model, timm.list_models())}") from error
    if config is None or not config.hf_hub_id:
        url = f", they lie at {config.url}" if config is not None and config.url else ""
        raise UserError(
            f"teacher.name=timm:{model}: timm knows no hub that has its weights{url}; name a file of them with "
            "teacher.weights=FILE"
        )
    return HubFile(config.hf_hub_id, config.hf_hub_filename or "model.safetensors")


def _recorded(name: str, revision: str | None, source: HubFile) -> Fetched | None:
    """What was fetched before, if it is still what is wanted, and whole (said in the log otherwise)."""
    found = fetched(name, revision)
    if found is None or found.repository != source.repository:
        return None
    try:
        verify(found)
    except UserError as error:
        logger.warning("%s", error)
        return None
    logger.info("fetched before and whole: nothing to download")
    return found


def _bring(source: HubFile, revision: str) -> Fetched:
    """The file at the commit that `revision` is now: from the hub's cache if it is whole there, else downloaded."""
    commit, sha256, size = _asked(source, revision)
    cached = try_to_load_from_cache(source.repository, source.file, revision=commit)
    if isinstance(cached, str) and sha256_of(Path(cached)) == sha256:
        logger.info("in the hub's cache and whole: nothing to download")
        return Fetched(Path(cached), source.repository, commit, sha256, size)
    if isinstance(cached, str):
        logger.warning("%s is damaged and is downloaded again", cached)
    logger.info("downloading %s at revision %s (%.2f GB)", source, commit, size / 1e9)
    path = _downloaded(source, commit, anew=isinstance(cached, str))
    _refuse_another_hash(path, source, sha256)
    return Fetched(path, source.repository, commit, sha256, size)


def _asked(source: HubFile, revision: str) -> tuple[str, str, int]:
    """What the hub says of a file: the commit that `revision` is, SHA-256 and size in bytes."""
    try:
        told = get_hf_file_metadata(hf_hub_url(source.repository, source.file, revision=revision))
    except Exception as error:  # the hub's clients share no base class of their errors
        raise _unreachable(source, revision, error) from error
    if told.commit_hash is None or told.size is None or not SHA256.fullmatch(told.etag or ""):
        raise UserError(
            f"{source}: {constants.ENDPOINT} names no commit, size or SHA-256 for it, so it cannot be checked: if "
            "HF_ENDPOINT is set, point it to a hub that does, or name a file of your own with teacher.weights=FILE"
        )
    assert told.etag is not None, "it has matched"
    return told.commit_hash, told.etag, told.size


def _downloaded(source: HubFile, commit: str, anew: bool) -> Path:
    try:
        return Path(hf_hub_download(source.repository, source.file, revision=commit, force_download=anew))
    except Exception as error:  # HTTP's and Xet's, and the disk's
        raise UserError(
            f"{source}: the download failed and nothing of it is used ({_first_line(error)}): fetch it again, or name "
            "a file of your own with teacher.weights=FILE"
        ) from error


def _refuse_another_hash(path: Path, source: HubFile, wanted: str) -> None:
    """Raise UserError, and take the file out of the hub's cache, unless its bytes are those that the hub names."""
    got = sha256_of(path)
    if got == wanted:
        return
    for part in (path.resolve(), path):  # the bytes, and the link that names them
        part.unlink(missing_ok=True)
    raise UserError(
        f"{source}: what came has SHA-256 {got}, the hub names {wanted}; it was removed: fetch it again, and if it "
        f"comes so again, ask who stands between you and {constants.ENDPOINT}"
    )


def _unreachable(source: HubFile, revision: str, error: Exception) -> UserError:
    """Why the hub does not give a file, with what to do about it."""
    page = f"{constants.ENDPOINT}/{source.repository}"
    match error:
        case errors.OfflineModeIsEnabled():
            remedy = "HF_HUB_OFFLINE is set: unset it for `fdscale fetch`, on a node with network"
        case errors.GatedRepoError():
            remedy = f"its licence must be accepted: do so at {page}, then `hf auth login` with a token of that account"
        case errors.RevisionNotFoundError():
            remedy = f"teacher.revision: no branch, tag or commit {revision!r} there; allowed: those of {page}/commits"
        case errors.EntryNotFoundError():
            remedy = f"no such file at revision {revision!r}: see {page}/tree/{revision}, and set teacher.revision"
        case errors.RepositoryNotFoundError():
            remedy = f"{page} does not exist or is not for everyone: `hf auth login` with an account that sees it"
        case _:
            remedy = (
                f"{constants.ENDPOINT} cannot be reached ({_first_line(error)}): run `fdscale fetch` on a node with "
                "network, or name a file of your own with teacher.weights=FILE"
            )
    return UserError(f"{source}: {remedy}")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__

"""Which URLs of shard folders may be opened, and those of the files in them; nothing is opened in here.

WebDataset opens URLs by other programs. All but `pipe:` reach them as one argument, without a shell, but curl expands
brackets, gsutil stars, and a rewriting rule (GOPEN_REWRITE) may hand any of them to a shell: so an address has none of
the characters that mean something to any of these. Names of shards come from an index that lies elsewhere, and become
part of a URL, of a path and, with `pipe:`, of a shell command: they are plain.
"""

from __future__ import annotations

import re

from fdscale.config.errors import UserError

PIPE = "pipe:"
PLACE = "{}"  # of a file's name in the command of a `pipe:`
SCHEMES = ("file", "http", "https", "s3", "gs", "hf", "ais", "htgs", "sftp", "ftps", "scp")
ADDRESS = r"([a-z0-9]+)://([A-Za-z0-9._~:/@%+=-]+)"
SHARD_NAME = r"[A-Za-z0-9_][A-Za-z0-9_.+=-]{0,199}\.tar"


def is_remote(folder: object) -> bool:
    """Whether a setting names shards by a URL, rather than by a folder."""
    return isinstance(folder, str) and re.match(r"pipe:|[A-Za-z][A-Za-z0-9+.-]*://", folder) is not None


def refuse_url(folder: str, allow_pipe: bool) -> None:
    """Raise UserError for the URL of a folder that may not be opened."""
    if folder.startswith(PIPE):
        refuse_pipe(folder, allow_pipe)
        if PLACE not in folder:
            raise UserError(f"{folder!r} has no place for a file's name: write {PLACE}, as in 'pipe:cat /in1k/{PLACE}'")
        return
    found = re.fullmatch(ADDRESS, folder)
    if found is None:
        raise UserError(
            f"{folder!r} is not the URL of a folder of shards: allowed after SCHEME:// are letters, digits and "
            f"._~:/@%+=- (what a shell, curl or gsutil would read otherwise is refused); a signed URL goes into a "
            f"command, 'pipe:curl -sf \"https://host/in1k/{PLACE}?key=…\"', with data.allow_pipe = true"
        )
    if found[1] not in SCHEMES:
        raise UserError(f"{folder!r}: scheme {found[1]} is unknown; allowed: {', '.join(SCHEMES)}, {PIPE}")


def refuse_pipe(url: str, allow_pipe: bool) -> None:
    """Raise UserError for a URL that runs a shell, unless that is allowed."""
    if url.startswith(PIPE) and not allow_pipe:
        raise UserError(
            f"{url!r} runs a command in a shell on every node; allowed where you trust it: set data.allow_pipe = true"
        )


def url_of(folder: str, name: str) -> str:
    """The URL of a file in the folder; `name` is plain."""
    return folder.replace(PLACE, name) if folder.startswith(PIPE) else f"{folder.rstrip('/')}/{name}"


def readable_name(folder: str) -> str:
    """What tells a person which folder it was: the last part of its path, in plain letters."""
    path = folder.partition(PLACE)[0] if folder.startswith(PIPE) else folder
    words = re.findall(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", path)
    return words[-1][-60:].lstrip(".-") if words else "shards"

"""Plans on the Hugging Face Hub, through its own client: found by ``USER/NAME``, and uploaded with a model card."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import AusteerError, FileFormatError, one_line
from ..version import __version__
from .files import FILE_NAME, LARGEST_FILE, WRITTEN_BY

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, HfApi

CARD_NAME = "README.md"


class HubError(AusteerError):
    """A plan that cannot be taken from the Hub, or put there."""


def split_id(text: str) -> tuple[str, str | None] | None:
    """(``USER/NAME``, revision or None) of a Hub id, which may end in ``@REVISION``; None for anything else."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    repo_id, _, revision = text.partition("@")
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        return None
    return (repo_id, revision or None) if repo_id.count("/") == 1 else None


def locate(
    source: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """Where a plan's file or folder lies, fetched from the Hub if need be; the arguments of ``Plan.from_pretrained``.

    Raises:
        HubError: it is a Hub id, and cannot be had. FileFormatError: it is none, and there is no such file.
    """
    path = Path(source)
    try:
        exists = path.exists()
    except OSError:  # longer than a path may be
        exists = False
    found = None if exists or isinstance(source, Path) else split_id(source)
    if found is None and revision is not None:
        raise FileFormatError(f"{path}: found revision {revision!r} for what is no Hub id; leave it out for a folder")
    if not exists and found is None:
        hint = "" if isinstance(source, Path) else ", or a Hub id as in USER/NAME or USER/NAME@REVISION"
        raise FileFormatError(f"{path}: no such file or folder; expected {WRITTEN_BY}{hint}")
    if found is None:
        return path
    repo_id, named = found
    if revision is not None and named is not None and revision != named:
        raise HubError(f"{source}: found two revisions, {named!r} and {revision!r}; give one")
    return _fetch(repo_id, _check_revision(named if revision is None else revision), token, cache_dir, local_files_only)


def _fetch(
    repo_id: str, revision: str | None, token: str | bool | None, cache_dir: str | Path | None, local_files_only: bool
) -> Path:
    from huggingface_hub.errors import LocalEntryNotFoundError

    api = _client(token)
    with _explained(repo_id, revision):
        away = "it was not asked (local_files_only)" if local_files_only else _look(api, repo_id, revision)
        try:
            path = api.hf_hub_download(
                repo_id, FILE_NAME, revision=revision, cache_dir=cache_dir, local_files_only=away is not None
            )
        except LocalEntryNotFoundError as error:
            raise HubError(
                f"{repo_id}{_at(revision)}: found no folder of that name here, nothing in the cache of the Hub's "
                f"client, and the Hub gave no such plan ({away or one_line(error.__cause__ or error)}); check the name"
            ) from error
    return Path(path)


def _look(api: HfApi, repo_id: str, revision: str | None) -> str | None:
    """Why the Hub cannot be reached, or None; and no file is fetched that is too large to be a plan.

    Asked once: the client's download would try for half a minute, also for a folder's name that is mistyped.
    """
    from huggingface_hub import hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

    try:
        url = hf_hub_url(repo_id, FILE_NAME, revision=revision, endpoint=api.endpoint)
        size = api.get_hf_file_metadata(url=url).size
    except HfHubHTTPError:  # an answer: the download makes what can be made of it
        return None
    except (HTTPError, OfflineModeIsEnabled) as error:
        return one_line(error)
    if size is not None and size > LARGEST_FILE:
        raise HubError(
            f"{repo_id}{_at(revision)}: found {size} bytes in {FILE_NAME}, expected at most "
            f"{LARGEST_FILE}; it is no plan, and was not downloaded"
        )
    return None


def push(
    contents: Mapping[str, bytes],
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    commit_message: str = "Upload an austeer plan",
) -> CommitInfo:
    """Uploads files, by name, in one commit; the other arguments are those of ``Plan.push_to_hub``."""
    from huggingface_hub import CommitOperationAdd

    _check_revision(revision)
    api = _client(token)
    with _explained(repo_id, revision):
        api.create_repo(repo_id, private=private, exist_ok=True)
        _check_repository(api, repo_id, private)
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        operations = [CommitOperationAdd(name, content) for name, content in contents.items()]
        return api.create_commit(repo_id, operations, commit_message=commit_message, revision=revision)


def _check_repository(api: HfApi, repo_id: str, private: bool | None) -> None:
    """Before anything is uploaded: nothing that should be private is shown, and no one else's card is lost."""
    info = api.model_info(repo_id)
    if private and not info.private:
        raise HubError(
            f"{repo_id}: the repository is public already, and --private (private=True) was asked for; make it private "
            "in its settings, or give another name. Nothing was uploaded"
        )
    names = {file.rfilename for file in info.siblings or []}
    if CARD_NAME in names and FILE_NAME not in names:
        raise HubError(
            f"{repo_id}: holds something else ({', '.join(sorted(names)[:5])}), and its {CARD_NAME} would be replaced; "
            "give another name. Nothing was uploaded"
        )


def _client(token: str | bool | None) -> HfApi:
    from huggingface_hub import HfApi

    return HfApi(token=token, library_name="austeer", library_version=__version__)


def _check_revision(revision: str | None) -> str | None:
    if revision is not None and (not re.fullmatch(r"[^\s~^:?*\[\\]{1,250}", revision) or ".." in revision):
        raise HubError(f"revision: found {revision[:80]!r}, expected a branch, a tag or a commit")
    return revision


@contextmanager
def _explained(repo_id: str, revision: str | None) -> Iterator[None]:
    """Turns the client's errors into ours, which say what to do."""
    from huggingface_hub import errors

    try:
        yield
    # no connection, offline mode, no token saved, a card that the Hub does not take, a full disk, or an answer
    except (errors.EntryNotFoundError, errors.HTTPError, ValueError, OSError) as error:
        raise HubError(f"{repo_id}{_at(revision)}: {_reason(error, repo_id)}") from error


def _reason(error: Exception, repo_id: str) -> str:
    from huggingface_hub import errors

    log_in = "log in (hf auth login), set HF_TOKEN or pass token="
    if isinstance(error, errors.GatedRepoError):
        return f"the repository is gated; ask for access at https://huggingface.co/{repo_id}, then {log_in}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"no such repository on the Hub, nor a folder here; check the name. If it is private, {log_in}"
    if isinstance(error, errors.RevisionNotFoundError):
        return "the repository has no such revision; expected a branch, a tag or a commit"
    if isinstance(error, errors.EntryNotFoundError):
        return f"the repository holds no {FILE_NAME}; expected one made by Plan.push_to_hub or austeer push"
    if not isinstance(error, errors.HfHubHTTPError):
        return f"{one_line(error)}. Check the connection and the arguments"
    status = error.response.status_code
    remedy = {
        401: f"the Hub does not know who asks; {log_in}",
        403: "this account or token may not do that; use a token with write access to the repository",
        429: "too many requests; wait, then try again",
    }.get(status, "try again later" if status >= 500 else "check the arguments")
    told = f": {' '.join(error.server_message.split())[:200]}" if error.server_message else ""
    return f"the Hub answered {status}{told}; {remedy}"


def _at(revision: str | None) -> str:
    return "" if revision is None else f" at {revision}"

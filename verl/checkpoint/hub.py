"""Uploading to a model repository of the hub in one commit, and what can go wrong, in one line with the way out."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from verl.errors import UserError, as_user_error

# A connection error comes from the hub's HTTP library; its class is one of the bases of HfHubHTTPError.
HUB_ERRORS: tuple[type[Exception], ...] = (OSError, HFValidationError, *HfHubHTTPError.__bases__)
# The library says what it does not like of a card or of an answer by a ValueError, and that a file could not be sent by
# a RuntimeError.
_UPLOAD_ERRORS: tuple[type[Exception], ...] = (*HUB_ERRORS, ValueError, RuntimeError)
_SHOWN_CHARS = 300
_WAYS_OUT = {
    401: "log in with `hf auth login`, or set HF_TOKEN, with a token that may write",
    403: "this login may not do that: give its token the right to write there, or name a repository of your own",
    404: "there is no such repository or branch for this login; check the name",
}


def check_repo(repo: str, flag: str) -> None:
    """Raise `UserError` if `repo`, the value of `flag`, cannot be the name of a repository."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"{flag}={repo}: {in_one_line(error)}") from error


def check_login() -> None:
    """Raise `UserError` if there is no token."""
    if get_token() is None:
        raise UserError(f"there is no login of the hub: {_WAYS_OUT[401]}")


def upload_files(
    files: Mapping[str, Path | bytes], repo: str, message: str, *, private: bool = False, revision: str | None = None
) -> CommitInfo:
    """Upload files in one commit, into a repository and a branch that are made where there are none.

    What the repository has already is not sent again, so the same call continues one that was interrupted; other files
    of the repository stay.

    Args:
        files: contents by their names in the repository.
        private: make the repository private; an existing public one is an error.
        revision: branch; None = main.

    Raises:
        UserError: the hub cannot be reached, or rejects it.
    """
    api = HfApi()
    with explained(repo):
        api.create_repo(repo, private=private, exist_ok=True)
        if private and not api.repo_info(repo).private:
            raise UserError(f"--private: {repo} exists and is public; make it private, or give another name")
        if revision:
            api.create_branch(repo, branch=revision, exist_ok=True)
        operations = [CommitOperationAdd(name, content) for name, content in files.items()]
        return api.create_commit(repo, operations, commit_message=message, revision=revision)


def explained(repo: str) -> AbstractContextManager[None]:
    """Raise what goes wrong between here and the hub as a `UserError` of one line."""
    return as_user_error(*_UPLOAD_ERRORS, say=lambda error: f"{repo} on {constants.ENDPOINT}: {_reason(error)}")


def _reason(error: Exception) -> str:
    cause = error.__cause__ if type(error) is RuntimeError and isinstance(error.__cause__, HUB_ERRORS) else error
    response = getattr(cause, "response", None)
    if response is not None:
        way_out = _WAYS_OUT.get(response.status_code, "try again later")
    elif isinstance(cause, OSError) and cause.filename is not None:
        way_out = "check that file"
    elif isinstance(cause, HUB_ERRORS):
        way_out = "the hub cannot be reached; check the network, a proxy, and HF_ENDPOINT, and start the command again"
    else:
        way_out = "put that right and start the command again"
    return f"{in_one_line(cause)}; {way_out}"


def in_one_line(error: BaseException | None) -> str:
    """The message of a library's error in one line, at most 300 characters of it, and without the hub's token."""
    text = " ".join(str(error).split())
    if token := get_token():
        text = text.replace(token, "***")
    return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]} ..."

"""A folder to a repository of the Hugging Face Hub. What is there already, or came in an interrupted call, is kept."""

from __future__ import annotations

from pathlib import Path

import httpx2
from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from tenp_dist.errors import OutputError, one_line

_LEFT_OUT = [".*"]  # marks and leftovers of writers


def upload(folder: Path, repo: str, message: str, *, private: bool) -> str:
    """Make the repository if it is not there, and commit the folder's files; returns the commit.

    Raises:
        OutputError: no token that may write there, or the Hub cannot be reached or refuses.
    """
    try:
        api = HfApi(library_name="tenp-dist")
        api.create_repo(repo, private=private, exist_ok=True)
        return str(
            api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message, ignore_patterns=_LEFT_OUT).oid
        )
    except (httpx2.HTTPError, OSError, RuntimeError, ValueError) as error:  # ValueError: of the card
        raise _not_uploaded(repo, error) from error


def _not_uploaded(repo: str, error: Exception) -> OutputError:
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    where = f"{repo}, at {constants.ENDPOINT}"
    if isinstance(error, OfflineModeIsEnabled):
        return OutputError(
            "Nothing can be published while the Hub is not asked",
            where=where,
            found="HF_HUB_OFFLINE is set",
            next_step="unset it and run `tenp-dist publish` again",
        )
    if status in (401, 403, 404):
        return OutputError(
            "The Hub does not let this token write there",
            where=where,
            found=f"status {status}, {'a token is set' if get_token() else 'no token is set'}",
            wanted="a token with write permission for that user or organisation",
            next_step="set HF_TOKEN, or log in with `hf auth login`; then `tenp-dist publish` again",
        )
    return OutputError(
        "The checkpoint could not be uploaded",
        where=where,
        found=one_line(error),
        next_step="run `tenp-dist publish` again: what has been uploaded is kept",
    )

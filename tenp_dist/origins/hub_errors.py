"""What huggingface_hub raises, as errors of ours: what is wrong with a name, a token, the network or the disk."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator

import httpx2
from huggingface_hub import constants, get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tenp_dist.errors import DiskFullError, SourceError, TenpError, first_line, one_line

_AGAIN = "files that came are kept, and the same command goes on from them"
_LOG_IN = "set HF_TOKEN, or log in with `hf auth login`"


@contextlib.contextmanager
def explained(name: str) -> Iterator[None]:
    """Turn what is raised inside into TenpErrors. name: of the model, as the job gives it."""
    try:
        yield
    except (HFValidationError, httpx2.HTTPError, OSError) as error:
        raise _error_of(name, error) from error


def _error_of(name: str, error: Exception) -> TenpError:
    if isinstance(error, GatedRepoError):
        return _gated(name)
    if isinstance(error, RepositoryNotFoundError):
        return _not_found(name)
    if isinstance(error, RevisionNotFoundError):
        return SourceError(
            "The repository has no such revision",
            where=name,
            found=name.partition("@")[2] or None,
            wanted="a branch, a tag or a commit of it",
            next_step=f"look at {constants.ENDPOINT}/{name.partition('@')[0]}/commits, or leave @revision out for main",
        )
    cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ else error
    if isinstance(cause, OfflineModeIsEnabled) or constants.is_offline_mode():
        return _offline(name, error)
    if isinstance(cause, HfHubHTTPError):
        return _refused(name, cause)
    if isinstance(cause, httpx2.HTTPError | ConnectionError | LocalEntryNotFoundError):
        return SourceError(
            "The Hub cannot be reached",
            where=f"{name}, from {constants.ENDPOINT}",
            found=one_line(cause),
            next_step=f"check the network, proxies and HF_ENDPOINT; {_AGAIN}",
        )
    return _of_files(name, error)


def _gated(name: str) -> SourceError:
    repo = name.partition("@")[0]
    return SourceError(
        "The repository is gated: its terms have to be accepted first",
        where=name,
        found="a token without access to it" if get_token() else "no token",
        wanted="the token of an account that may read it",
        next_step=f"accept its terms at {constants.ENDPOINT}/{repo}, then {_LOG_IN}",
    )


def _not_found(name: str) -> SourceError:
    """The Hub does not tell private repositories from none."""
    token = get_token()
    return SourceError(
        "Model not found: neither a folder of that name, nor a repository on the Hub",
        where=f"{name}, at {constants.ENDPOINT}",
        found="a token is set" if token else "no token is set",
        wanted="a folder, or org/name of a public repository, or of a private one with a token that may read it",
        next_step="correct `model`" + ("" if token else f"; for a private repository {_LOG_IN}"),
    )


def _offline(name: str, error: Exception) -> SourceError:
    repo, _, revision = name.partition("@")
    words = f"hf download {repo}" + (f" --revision {revision}" if revision else "")
    return SourceError(
        "Model not found: no folder of that name, it is not in the Hub's cache as a whole, and the Hub is not asked",
        where=f"{name}, in {constants.HF_HUB_CACHE}",
        found=f"HF_HUB_OFFLINE is set; {first_line(error)}",
        wanted="a folder, or a model that was downloaded before",
        next_step=f"correct `model`, unset HF_HUB_OFFLINE, or `{words}` where there is a network",
    )


def _refused(name: str, error: HfHubHTTPError) -> SourceError:
    status = error.response.status_code
    login = status in (401, 403)
    return SourceError(
        "The Hub refuses the token" if login else "The Hub does not answer as it should",
        where=f"{name}, from {constants.ENDPOINT}",
        found=f"status {status}: {one_line(error)}",
        next_step=_LOG_IN if login else f"try again later; {_AGAIN}",
    )


def _of_files(name: str, error: Exception) -> TenpError:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFullError(
            "No space left for the model",
            where=f"{name}, in {error.filename or constants.HF_HUB_CACHE}",
            found=error.strerror,
            next_step=f"free space, or set HF_HOME or model_cache to a larger file system; {_AGAIN}",
        )
    return SourceError(
        "The model cannot be brought here from the Hub",
        where=name,
        found=one_line(error),
        next_step=f"check that the cache ({constants.HF_HUB_CACHE}) can be written to; {_AGAIN}",
    )

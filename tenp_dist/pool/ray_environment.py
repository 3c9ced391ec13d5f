"""What Ray reads from the environment: settings, how to prove who we are, and which addresses it would prefer."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

_ADDRESSES = (
    "RAY_API_SERVER_ADDRESS",
    "RAY_ADDRESS",
)  # Ray's job client lets them win over its argument, in this order
_DEFAULTS = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # under `uv run`, every worker would make the environment anew
}

_SOCKET_PATH = 107  # bytes that a Unix socket's path may have
_BELOW = len("/ray/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store_1")


def ray_folder() -> Path:
    """The folder below which a Ray of this machine keeps its sockets and logs, as Ray chooses it."""
    return Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp")


def unfit(folder: Path) -> str | None:
    """Why Ray cannot keep its sockets below a folder, None where it can."""
    if not str(folder).isascii():
        return "has letters beyond ASCII, which Ray does not take"
    if len(os.fsencode(folder)) + _BELOW > _SOCKET_PATH:
        return "is too long for Ray's sockets"
    return None


def set_ray_environment() -> None:
    """Settings that the caller's environment leaves open. To be called before Ray is imported."""
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)


def use_token() -> None:
    """Prove who we are to a cluster by the token that is there, unless the environment says how.

    `ray start` decides so; with an address given, neither `ray.init` nor Ray's job client does.
    """
    if "RAY_AUTH_MODE" in os.environ or not _has_token():
        return
    os.environ["RAY_AUTH_MODE"] = "token"
    if "ray" in sys.modules:  # which has read it
        from ray._raylet import Config  # type: ignore[attr-defined]  # compiled

        Config.initialize("")


def _has_token() -> bool:
    if os.environ.get("RAY_AUTH_TOKEN"):
        return True
    path = os.environ.get("RAY_AUTH_TOKEN_PATH")
    return (Path(path) if path else Path.home() / ".ray" / "auth_token").is_file()


def job_server_address() -> str:
    """Where a job goes that names no server: as Ray's own commands choose it, else this machine's."""
    named = (value for name in _ADDRESSES if (value := os.environ.get(name)) and "http" in value[:5])
    return next(named, "http://127.0.0.1:8265")


def overruling() -> list[str]:
    """The variables that are set and that Ray's job client would take in place of its argument."""
    return [name for name in _ADDRESSES if os.environ.get(name)]


@contextlib.contextmanager
def address_given() -> Iterator[None]:
    """Without the variables that Ray's job client takes in place of the address that it is given."""
    saved = {name: os.environ.pop(name) for name in overruling()}
    try:
        yield
    finally:
        os.environ.update(saved)

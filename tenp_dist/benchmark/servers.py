"""OpenAI-compatible servers that serve the models of a benchmark."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from dataclasses import dataclass

from tenp_dist.errors import BenchmarkError

_TIMEOUT = 20.0  # seconds


@dataclass(frozen=True)
class Served:
    """A model behind a URL.

    url: of the API, with its `/v1`.
    name: as the server calls it.
    max_length: tokens of prompt and answer together, None where the server does not say.
    """

    url: str
    name: str
    max_length: int | None


def served_model(url: str, name: str | None = None) -> Served:
    """Ask a server what it serves. name: of one of several models, None for the only one.

    Raises:
        BenchmarkError: it does not answer, or serves no such model, or several and none was named.
    """
    base = url.rstrip("/")
    models = {model["id"]: model for model in _models(base)}
    if (name is None and len(models) != 1) or (name is not None and name not in models):
        raise BenchmarkError(
            "The server does not serve that model",
            where=base,
            found=", ".join(models) or "no model",
            wanted=name or "one model, or the name of one",
            next_step="write it into the job as benchmark.source_name or benchmark.pruned_name",
        )
    model = models[name or next(iter(models))]
    return Served(base, model["id"], model.get("max_model_len"))


def _models(base: str) -> list[dict]:
    key = os.environ.get("OPENAI_API_KEY")
    request = urllib.request.Request(f"{base}/models", headers={"Authorization": f"Bearer {key}"} if key else {})
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:
            return list(json.load(response)["data"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BenchmarkError(
            "No OpenAI-compatible server answers",
            where=f"{base}/models",
            found=error,
            wanted="a list of the models that it serves",
            next_step="start the server, or correct benchmark.source_url and benchmark.pruned_url (they end in /v1)",
        ) from error

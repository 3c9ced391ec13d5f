"""The machines of a cluster, as a YAML file describes them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from tenp_dist.config import Size
from tenp_dist.errors import JobError, first_line

Flops = Annotated[float, BeforeValidator(lambda value: float(str(value))), Field(gt=0)]


class Machines(BaseModel):
    """Nodes that are all alike."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    nodes: int = Field(1, ge=1, description="nodes of the cluster")
    accelerators: int = Field(0, ge=0, description="of a node; 0: layers run on its cores")
    cores: int = Field(ge=1, description="of a node")
    accelerator_memory: Size = Field(0, description="of an accelerator")
    host_memory: Size = Field(description="of a node")
    disk: Size | None = Field(None, description="free where run_dir is; default not checked")
    read: Size = Field(description="bytes per second at which a node reads the model")
    write: Size = Field(description="bytes per second at which a node writes to run_dir")
    upload: Size | None = Field(None, description="bytes per second from a node's memory to one accelerator")
    link: Size | None = Field(None, description="bytes per second at which ranks of a shard exchange sums, or free")
    flops: Flops = Field(
        description="operations per second in matrix products of the compute dtype that an accelerator, or a node "
        "without any, really reaches (a third to a half of the data sheet)"
    )
    solve_flops: Flops | None = Field(None, description="the same in float64, default flops / 16")
    start: float = Field(60.0, ge=0, description="seconds until the workers of a stage are up")
    price: float | None = Field(None, ge=0, description="of a node for an hour, in any currency")

    @property
    def device(self) -> str:
        return "accelerator" if self.accelerators else "node"

    @property
    def workers(self) -> int:
        """Ranks of which a node holds one each at most; cores can be shared among any number."""
        return self.accelerators or self.cores


def read_machines(path: Path, nodes: int | None = None) -> Machines:
    """Read the description. nodes: in place of what the file says.

    Raises:
        JobError: no such file, no YAML, unknown or missing key, value out of range.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise _unreadable(path, first_line(error)) from error
    if not isinstance(values, dict):
        raise _unreadable(path, type(values).__name__)
    try:
        return Machines(**values | ({} if nodes is None else {"nodes": nodes}))
    except (ValidationError, TypeError) as error:
        raise _unreadable(path, _first(error)) from error


def _first(error: ValidationError | TypeError) -> str:
    if isinstance(error, TypeError):
        return first_line(error)
    errors = error.errors()
    found = next((one for one in errors if one["type"] == "extra_forbidden"), errors[0])
    return f"{'.'.join(str(part) for part in found['loc'])}: {found['msg']}"


def _unreadable(path: Path, found: str) -> JobError:
    return JobError(
        "The description of the cluster cannot be read",
        where=path,
        found=found,
        wanted=f"a YAML mapping of {', '.join(Machines.model_fields)}",
        next_step="start from a file in cluster/machines/",
    )

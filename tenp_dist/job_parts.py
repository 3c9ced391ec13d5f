"""Parts of a job that one stage alone reads: how layers are learnt, weights trained, experts searched, tasks measured,
and what is published. And the one that no plan depends on: where the job runs.

With the names of layouts, which a job's output and its benchmark choose among.
"""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from tenp_dist.job_values import Exact, Size, names_repository

LAYOUTS = ("ragged", "padded", "uniform", "less_is_moe")
"""Each names a file of `layouts/`; the first is the default."""


def parse_layout(value: object) -> object:
    """The name of a layout. Raises ValueError."""
    if value not in LAYOUTS:
        *most, last = map(repr, LAYOUTS)
        raise ValueError(f"Input should be {', '.join(most)} or {last}")
    return value


LayoutName = Annotated[str, BeforeValidator(parse_layout)]


class Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)


class Trsp(Part):
    """How methods `trsp` and `trsp-once` learn which layers leave."""

    penalty: float = Field(0.05, ge=0, description="lambda1: what the sum of the layers' weights costs")
    rate: float = Field(0.05, gt=0, description="Adam's rate at the first step of a round; it falls to zero")
    steps: int = Field(30, ge=1, description="steps of a round, each a pass up and back")
    sequences: int = Field(4, ge=1, description="calibration sequences of a step")
    seed: int = Field(0, description="order in which sequences come")


class Train(Part):
    """Training of a small set of weights around pruning: norms, and changes of low rank of two projections a layer."""

    when: Literal["before", "after"] = Field(
        "before",
        description="before: the whole model, with a penalty on what the layers that leave do, TRSP's stage 2; after: "
        "the pruned model, whatever the method took out of it",
    )
    penalty: float | None = Field(
        None,
        ge=0,
        description="lambda2: what a leaving layer's change costs, as a share of what enters it; default 0.3",
    )
    rank: int = Field(
        8,
        ge=0,
        description="of the changes of attention's output projection and of the shared experts' W_down; 0: norms alone",
    )
    rate: float = Field(0.002, gt=0, description="Adam's rate at the first step; it falls to zero")
    steps: int = Field(60, ge=0, description="steps, each a pass up and back")
    sequences: int = Field(4, ge=1, description="calibration sequences of a step")
    seed: int = Field(0, description="order in which sequences come, and the changes that training begins with")

    @model_validator(mode="after")
    def _something_to_penalise(self) -> Train:
        if self.when == "after" and self.penalty:
            raise ValueError(f"penalty is of layers that have not left yet, found {self.penalty} with when: after")
        return self

    @property
    def lambda2(self) -> float:
        """The penalty as it is applied."""
        given = 0.3 if self.penalty is None else self.penalty
        return given if self.when == "before" else 0.0


ACCURACY: Literal["accuracy"] = "accuracy"


class Search(Part):
    """How method eep looks for the experts to keep and to merge."""

    passes: int = Field(20, ge=2, description="passes over the model at most, the last one on the development split")
    individuals: int = Field(16, ge=2, description="individuals that go through the model in one pass")
    prune_share: Exact = Field(
        Decimal("0.25"),
        ge=0,
        le=1,
        description="share of the passes in which experts are exchanged, before any is merged",
    )
    start: Literal["rankings", "random"] = Field(
        "rankings", description="the first individuals: the best sets of several rankings, or drawn by chance alone"
    )
    local_share: Exact = Field(
        Decimal("0.5"),
        ge=0,
        le=1,
        description="share of a prune pass that tries single exchanges on the best individual; the authors: 0",
    )
    depth_groups: int | None = Field(
        None,
        ge=1,
        description="groups of layers that keep and merge alike; default every layer by itself, the paper: 4",
    )
    router: Literal["selection", "mapped"] = Field(
        "selection",
        description="what becomes of the router in the merge phase: rows of the source, or a matrix of its own",
    )
    neighbours: int | None = Field(
        3, ge=0, description="removed experts that may be merged into a kept one, the nearest; null: all (the authors')"
    )
    active: tuple[int, ...] | None = Field(
        None, min_length=1, description="numbers of experts that a token may go to; default as in the source"
    )
    fitness: Literal["nll", "kl", "accuracy"] = Field(
        "nll",
        description="what decides: NLL of the text or divergence from the source, the least; accuracy on `items`",
    )
    items: Path | None = Field(
        None, description="jsonl for fitness accuracy: prompt, choices and the right one's number, or prompt and answer"
    )
    sequences: int | None = Field(
        None,
        ge=1,
        description="calibration sequences a domain, or items, that fitness is measured on; default all not set aside",
    )
    development: int = Field(20, ge=1, description="best individuals that are measured again on the text set aside")

    @model_validator(mode="after")
    def _possible(self) -> Search:
        if self.active is not None and min(self.active) < 1:
            raise ValueError(f"active must be numbers above 0, found {min(self.active)}")
        if (self.items is not None) != (self.fitness == ACCURACY):
            raise ValueError(
                f"fitness {ACCURACY} and items go together, found fitness {self.fitness} and items {self.items}"
            )
        return self


class Benchmark(Part):
    """Tasks of lm-eval that source and pruned checkpoint are measured on."""

    tasks: tuple[str, ...] = Field(min_length=1, description="names of tasks or groups, lm-eval's or of tasks_folder")
    tasks_folder: Path | None = Field(None, description="folder with tasks of your own, as lm-eval describes them")
    backend: Literal["transformers", "vllm", "server"] = Field(
        "transformers", description="what runs the models: transformers or vllm here, or OpenAI-compatible servers"
    )
    source_url: str | None = Field(None, description="server of the source, http://HOST:PORT/v1")
    pruned_url: str | None = Field(None, description="server of the pruned checkpoint, http://HOST:PORT/v1")
    source_name: str | None = Field(None, description="the source as its server calls it; default its only model")
    pruned_name: str | None = Field(None, description="the pruned model as its server calls it")
    layout: LayoutName | None = Field(None, description="checkpoint to measure; default the one that is evaluated")
    limit: int | None = Field(None, ge=1, description="items of a task, its first ones; default all")
    fewshot: int | None = Field(None, ge=0, description="examples in the prompt; default the task's own number")
    batch_size: int = Field(8, ge=1, description="items that go through the model together")
    seed: int = Field(0, description="of the examples in prompts, and of sampling")
    chat_template: bool = Field(False, description="put prompts through the model's chat template")
    python: Path | None = Field(None, description="python of an environment with lm-eval; default one is made")
    model_args: Mapping[str, Any] = Field({}, description="further arguments of lm-eval's model, for both models")

    @model_validator(mode="after")
    def _servers_of_both(self) -> Benchmark:
        given = [url for url in (self.source_url, self.pruned_url) if url]
        if self.backend == "server" and len(given) < 2:
            raise ValueError("the server backend needs source_url and pruned_url")
        if self.backend != "server" and given:
            raise ValueError(f"source_url and pruned_url are for backend server, found {self.backend}")
        return self


class Publish(Part):
    """Where the verified checkpoint is uploaded to; a name alone is its repo."""

    repo: str = Field(description="org/name on the Hugging Face Hub; made if it is not there")
    private: bool = Field(False, description="whether a repository that is made is private")
    layout: LayoutName | None = Field(None, description="checkpoint to upload; default the one that is evaluated")

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, given: Any) -> Any:
        return {"repo": given} if isinstance(given, str) else given

    @field_validator("repo")
    @classmethod
    def _is_a_name(cls, repo: str) -> str:
        if not names_repository(repo):
            raise ValueError(f"repo must be org/name, found {repo}")
        return repo


class Cluster(Part):
    """How a job is spread over nodes and their devices."""

    shards: int = Field(1, ge=1, description="layer shards, each a group of ranks on one node")
    tensor_parallel: int = Field(1, ge=1, description="ranks of a shard, one accelerator each")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: an accelerator where there is one")
    mode: Literal["auto", "resident", "streaming"] = Field(
        "auto", description="resident: a shard keeps its layers; streaming: one after another, the next read ahead"
    )
    device_memory: Size | None = Field(None, description="weights that a rank may hold; default 60 % of what there is")
    host_memory: Size | None = Field(None, description="hidden states that a rank may hold; beyond it they go to disk")
    commit_seconds: float = Field(10.0, ge=0, description="work that a streaming shard may lose")
    start_timeout: float = Field(300.0, gt=0, description="seconds in which shards, and writers, must find a place")
    stall_timeout: float = Field(1800.0, ge=5, description="seconds without any progress after which a worker hangs")
    threads: int | None = Field(None, ge=1, description="CPU threads of a rank; default its cores")
    writers: int | None = Field(None, ge=1, description="parallel writer tasks; default one per core")

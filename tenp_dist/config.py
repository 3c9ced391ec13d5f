"""The parts of a job as frozen, checked objects. Every stage reads its own part and nothing else.

Fractions (`retention`, `important`, `slope`, `weight`) are kept as the decimal strings of the job,
so that the budget is computed in exact rationals. `job_file` reads them.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from tenp_dist.job_parts import LAYOUTS, Benchmark, Cluster, LayoutName, Part, Publish, Search, Train, Trsp
from tenp_dist.job_values import Exact, LayoutBy, Model, Protection, Size

Fused = Annotated[tuple[str, ...], Field(min_length=1)]
"""Methods whose rankings become one."""


COMPENSATE = "compensate"  # of `output`; of a grid too
Compensate = bool | Literal["joint"]
"""Whether W_down is compensated, expert by expert (true) or a whole layer as one system."""
JOINT: Literal["joint"] = "joint"
PRUNED: Literal["pruned"] = "pruned"  # of `compensate_on`
Auto = Literal["auto"]
Unstable = Literal["keep", "even", "prune"]
AUTO: Auto = "auto"
SEARCHED = "eep"  # the method whose experts are found by a search


class Source(Part):
    """One source of text: a file (jsonl, parquet, arrow) or a `datasets` name, and its domain."""

    path: Path | None = Field(None, description="file or folder: .jsonl, .json, .parquet, .arrow")
    name: str | None = Field(None, description="a `datasets` name, with `subset` and `split`")
    subset: str | None = Field(None, description="the configuration of a named dataset")
    split: str = Field("train", description="split of a named dataset")
    text_column: str = Field("text", description="column that holds plain text")
    messages_column: str | None = Field(None, description="column of chat messages, put through the chat template")
    domain: str = Field(description="scores are kept, balanced and reported per domain")
    samples: int = Field(128, ge=1, description="sequences of `sequence_length` tokens to take")
    weight: Exact = Field(Decimal(1), ge=0, description="weight of the domain when domains are added")

    @model_validator(mode="after")
    def _one_origin(self) -> Source:
        if (self.path is None) == (self.name is None):
            raise ValueError("give either path or name")
        return self


class Text(Part):
    """Where text comes from and how it is cut."""

    sources: tuple[Source, ...] = Field(min_length=1, description="where the text comes from")
    sequence_length: int = Field(2048, ge=2, description="tokens per sequence")
    packing: Literal["concat", "document"] = Field(
        "concat", description="concat: BOS + text + EOS joined and cut; document: one each, padded and masked"
    )
    seed: int = Field(0, description="order in which documents are drawn")


class Calibration(Text):
    """Tokens that the model is scored on, and some that an `auto` budget is chosen on."""

    selection_share: Exact | None = Field(
        None, ge=0, lt=1, description="share of every source set aside to choose an auto budget on"
    )

    @model_validator(mode="after")
    def _some_domain_counts(self) -> Calibration:
        first = {source.domain: source.weight for source in reversed(self.sources)}
        if not any(first.values()):
            raise ValueError("every domain has weight 0")
        return self


class Evaluation(Text):
    """Held-out tokens that source, pruned and random-control models are compared on, and plans if asked."""

    batch_tokens: Size = Field(8192, description="tokens per microbatch")
    checkpoint: bool = Field(True, description="measure the written checkpoint and its random control")
    plans: tuple[Path, ...] = Field((), description="plan files to measure, as masks in the same pass")
    grid: Mapping[str, tuple[Any, ...]] = Field(
        {}, description="budget key, or compensate -> values; every combination is measured"
    )

    @field_validator("grid")
    @classmethod
    def _known_keys(cls, grid: Mapping[str, tuple[Any, ...]]) -> Mapping[str, tuple[Any, ...]]:
        known = [*Budget.model_fields, COMPENSATE]
        unknown = [key for key in grid if key not in known]
        if unknown:
            close = difflib.get_close_matches(unknown[0], known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ValueError(f"grid names {unknown[0]}, which is no key of budget{hint}")
        if any(not values or (AUTO in values and key != "protect") for key, values in grid.items()):
            raise ValueError("grid wants at least one value per key, and no `auto`")
        if any(value is not True and value is not False and value != JOINT for value in grid.get(COMPENSATE, ())):
            raise ValueError(f"grid takes true and false, and {JOINT}, for compensate")
        return grid

    @property
    def many(self) -> bool:
        """Whether plans are measured besides the written checkpoint."""
        return bool(self.plans or self.grid)


class Score(Part):
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="compute dtype; auto: float32 on CPU, bfloat16 on accelerators"
    )
    batch_tokens: Size = Field(8192, description="tokens per microbatch")
    waves: int = Field(8, ge=1, description="pieces that the tokens are cut into; sums combine in their order")


class Budget(Part):
    method: str = Field("tenp", description="a registered method (jobs/README.md lists them), or auto")
    experts: str | Fused | None = Field(
        None, description="rank experts as this method does instead, or by the mean rank of several"
    )
    neurons: str | Fused | None = Field(
        None, description="rank neurons as this method does instead, or by the mean rank of several"
    )
    retention: Exact = Field(Decimal("0.6"), description="routed-expert parameters kept, 0 < rho <= 1")
    activated: Annotated[Exact, Field(gt=0, le=1)] | None = Field(
        None, description="routed parameters that a token meets, a share of what it used to (methods global, obs)"
    )
    important: Exact | Auto | None = Field(
        None, description="share of experts kept whole, 0 <= alpha <= rho, or auto; default rho/3"
    )
    slope: Annotated[Exact, Field(ge=-1, le=1)] | Auto = Field(
        Decimal(1), description="0 rectangle, 1 no whole experts in the first layer, or auto"
    )
    align: int = Field(1, ge=1, description="narrow widths are multiples of this")
    neuron_groups: int = Field(
        1,
        ge=1,
        description="neurons stay or go in groups of so many consecutive ones, as FP8, int4 and MXFP4 store them",
    )
    max_widths: int = Field(2, ge=1, description="distinct widths per layer")
    minimum_important: int = Field(0, ge=0, description="whole experts that every layer keeps at least")
    minimum_width: int = Field(0, ge=0, description="neurons that every expert keeps at least (methods global, obs)")
    minimum_layer_retention: Exact = Field(
        Decimal(0), ge=0, le=1, description="share of its neurons that every layer keeps at least (methods global, obs)"
    )
    protect: Auto | Protection = Field(
        AUTO,
        description="decoder layers, or layer/expert, kept whole; auto: experts that must not be starved; none",
    )
    expert_domains: Literal["scaled", "pooled"] = Field(
        "scaled",
        description="adding expert scores over domains: each scaled to length 1, or one score of all tokens together",
    )
    drop_layers: Exact | None = Field(
        None,
        gt=0,
        description="decoder layers that leave (methods that remove layers): a number, or a share of those with "
        "experts; default what retention asks for",
    )
    expert_counts: Literal["per-layer", "global"] = Field(
        "per-layer",
        description="methods that remove experts: as many stay in every layer, or as many in the model as lose least "
        "(to be measured in evaluation.grid: no layout holds them)",
    )
    neuron_domains: Literal["scaled", "mean"] = Field(
        "scaled",
        description="adding an expert's neuron scores over domains: each scaled to length 1, or means over its tokens",
    )
    unstable: Unstable = Field(
        "keep",
        description="layers whose importances fluctuate (method saap): keep more in them, even, or prune them more",
    )
    never_routed: Literal["narrow", "whole"] = Field("narrow", description="experts that no token reached")
    seed: int = Field(0, description="seed of `random` and of the random control")

    @model_validator(mode="after")
    def _feasible(self) -> Budget:
        if not 0 < self.retention <= 1:
            raise ValueError(f"retention must be above 0 and at most 1, found {self.retention}")
        if self.drop_layers is not None and self.drop_layers > 1 and self.drop_layers % 1:
            raise ValueError(f"drop_layers must be a whole number or a share below 1, found {self.drop_layers}")
        if self.method == AUTO and (self.experts or self.neurons):
            raise ValueError("method: auto chooses the rankings too: leave experts and neurons out")
        if isinstance(self.important, Decimal) and not 0 <= self.important <= self.retention:
            raise ValueError(f"important must lie between 0 and retention ({self.retention}), found {self.important}")
        if self.width_step % self.align or self.width_step % self.neuron_groups:
            pair = f"align {self.align} and neuron_groups {self.neuron_groups}"
            raise ValueError(f"one of {pair} must be a multiple of the other")
        return self

    @property
    def width_step(self) -> int:
        """What narrow widths are multiples of: the larger of `align` and `neuron_groups`, a multiple of the other."""
        return max(self.align, self.neuron_groups)

    @property
    def width_key(self) -> str:
        """The key that `width_step` comes from."""
        return "neuron_groups" if self.neuron_groups > self.align else "align"

    @property
    def auto(self) -> tuple[str, ...]:
        """The keys that are to be chosen by measuring."""
        return tuple(key for key in ("method", "important", "slope") if getattr(self, key) == AUTO)

    @property
    def retention_exact(self) -> Fraction:
        return Fraction(self.retention)

    @property
    def important_exact(self) -> Fraction:
        """alpha; the default is rho / 3. Only methods that keep experts whole use it."""
        return self.retention_exact / 3 if self.important is None else Fraction(self.important)


class Output(Part):
    layouts: tuple[LayoutName, ...] = Field(
        LAYOUTS[:1], description="checkpoint layouts to write; where experts are removed uniform, and only that"
    )
    shard_size: Size = Field(5 * 10**9, description="largest output shard (one tensor may exceed it)")
    layout_by: LayoutBy = Field(
        None, description="expert-parallel=N: a set of files for each of N ranks, whole experts in them"
    )
    dtype: Literal["source", "bfloat16", "fp8"] = Field(
        "source",
        description="how tensors are stored. source: as the source has them, FP8, compressed-tensors or MXFP4 again; "
        "bfloat16: plain numbers; fp8: the routed experts of a plain source in 128 x 128 blocks, the rest copied",
    )
    mtp: Literal["keep", "drop"] = Field(
        "keep", description="multi-token prediction layers: keep (whole; pruned in uniform), or drop"
    )
    compensate: Compensate | Auto = Field(
        False,
        description="solve W_down for what pruning takes away: true, narrow experts one by one; joint, all kept "
        "experts of a layer and its shared expert as one system; auto: whichever of both and false measures best",
    )
    compensate_on: Literal["source", "pruned"] = Field(
        "source",
        description="whose activations joint compensation is solved on: the source's; or pruned, layer after layer "
        "those of the model pruned and compensated so far, for the source's hidden state behind each",
    )
    ridge: Exact = Field(Decimal("0.01"), gt=0, description="how much compensation shrinks to the original weights")

    @model_validator(mode="after")
    def _in_turn_is_joint(self) -> Output:
        if self.compensate_on == PRUNED and self.compensate not in (JOINT, AUTO):
            raise ValueError(
                "compensate_on: pruned solves every layer as one system, so compensate must be joint or auto, "
                f"found {str(self.compensate).lower()}"
            )
        return self

    @property
    def expert_ranks(self) -> int | None:
        """Ranks that get a set of files each; None where files are divided by size alone."""
        return None if self.layout_by is None else int(self.layout_by.partition("=")[2])


class Job(Part):
    """One YAML file is one whole run."""

    model: Model = Field(
        description="folder with config.json, safetensors and tokenizer; org/name or org/name@revision on the Hugging "
        "Face Hub; s3:// or gs:// address of such a folder"
    )
    model_cache: Path | None = Field(
        None, description="folder that a model of the Hub or a bucket is downloaded to; default the Hub's cache"
    )
    run_dir: Path = Field(description="folder that receives everything the run writes")
    calibration: Calibration
    score: Score = Score()
    budget: Budget = Budget()
    trsp: Trsp = Trsp()
    search: Search = Search()
    train: Train | None = None
    output: Output = Output()
    evaluation: Evaluation | None = None
    benchmark: Benchmark | None = None
    publish: Publish | None = None
    cluster: Cluster = Cluster()

    @model_validator(mode="after")
    def _something_to_choose_on(self) -> Job:
        if self._measured and not self.selection_share:
            what = f"what method {self.budget.method} keeps"
            what = "an auto budget" if self.budget.auto else "how to compensate" if self.chooses else what
            raise ValueError(f"{what} is chosen on text set aside: selection_share must be above 0")
        if self.selection_share and min(source.samples for source in self.calibration.sources) < 2:
            raise ValueError("selection_share sets aside a part of every source: each needs at least 2 samples")
        return self

    @property
    def selection_share(self) -> Fraction:
        """Share of every calibration source that nothing is scored on; 1/4 if not given and a plan is chosen by it."""
        given = self.calibration.selection_share
        return Fraction(1, 4) * self._measured if given is None else Fraction(given)

    @property
    def chooses(self) -> bool:
        """Whether something of the job is to be chosen by measuring plans."""
        return bool(self.budget.auto) or self.output.compensate == AUTO

    @property
    def forms(self) -> tuple[Compensate, ...]:
        """The ways to compensate that the job may end with."""
        asked = self.output.compensate
        return (False, True, JOINT) if asked == AUTO else (asked,)

    @property
    def _measured(self) -> bool:
        return self.chooses or self.budget.method == SEARCHED

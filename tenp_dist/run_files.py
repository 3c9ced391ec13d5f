"""The name of every file in a run directory, once.

    run_dir/
      facts.json                      what headers say of the source
      source.json                     which version of it, where it comes from the Hub or a bucket
      calibration/                    tokens to score on, and those set aside for an `auto` budget
      scores/                         statistics of every MoE layer; parts and hidden states while it is made
      elimination/                    in which order neurons leave, for methods that ask
      gradients/                      sums of gradients, for methods that ask
      layers/                         in which order decoder layers leave, for methods that ask
      selection/, selection.json      plans tried for an `auto` budget, and what was chosen
      search/, search.json            individuals of method eep's search, and which one was chosen
      plan.json, plan.safetensors     the plan, for people and for the writer
      synthetic/                      a plan from scores that nobody measured, for `write --dry-run`
      compensation/, compensation.json   new W_down of narrow experts, and what that changed
      training/, training.json        new norms and projections, where the job trains; the curve of it
      checkpoint/<layout>/            the pruned model
      verify/, verify.json            parts of the check while it is made, its outcome, sha256 of what was written
      source.sha256.json              digests of the source's files, where `verify --full` was asked for
      evaluation/, evaluation.json    tokens, plans and hidden states of the evaluation, and its figures
      benchmark/, benchmark.json      figures of every model on tasks, and both side by side
      report/                         the page and the numbers behind it
      stages/                         a record and a ledger of every stage, the journal, the lock, the split chosen
      logs/                           a log of every worker

A stage that carries tokens through layers has a folder of its own; what such a folder holds is named here too.
Imports nothing, so that `tenp-dist status` stays quick.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

PLAN_JSON = "plan.json"
PLAN_TENSORS = "plan.safetensors"
COMPENSATION = "compensation"
HIDDEN = "hidden"
PLANS = "plans"
WRITING_MARK = ".writing.json"
CARD = "README.md"
LAYER_FILES = "layer_*.safetensors"
_WAVE_FILE = re.compile(r"wave_(\d+)\.layer_(\d+)\.safetensors$")


def layer_name(layer: int) -> str:
    """The name of a decoder layer in files and tensor names: `layer_00003`."""
    return f"layer_{layer:05d}"


def layer_of_name(name: str) -> int:
    """3 of `layer_00003.kept`, and of a file named so."""
    return int(name.split("_")[1].split(".")[0])


def layer_file(folder: Path, layer: int, rank: int = 0, ranks: int = 1) -> Path:
    """The file of a layer, or of a rank's share of it where a shard has several ranks."""
    part = f".{rank_name(rank)}-of-{ranks:03d}" if ranks > 1 else ""
    return folder / f"{layer_name(layer)}{part}.safetensors"


def rank_name(rank: int) -> str:
    return f"rank_{rank:03d}"


def worker_name(shard: int, rank: int) -> str:
    """What the worker of a rank is called, in its log's name and in progress."""
    return f"shard_{shard}.{rank_name(rank)}"


def wave_file(folder: Path, wave: int, layer: int) -> Path:
    """The hidden states of a wave that enter a layer."""
    return folder / f"wave_{wave:03d}.{layer_name(layer)}.safetensors"


def stored_layers(folder: Path, wave: int) -> list[int]:
    """The layers that a wave has a file of hidden states for."""
    found = (_WAVE_FILE.search(path.name) for path in folder.glob(f"wave_{wave:03d}.*"))
    return [int(match[2]) for match in found if match]


def loss_file(folder: Path, wave: int) -> Path:
    """The loss of a wave, and over how many tokens. folder: of the gradients that it begins."""
    return folder / f"loss_{wave:03d}.json"


def feature_file(folder: Path, name: str, number: int) -> Path:
    """Features of a microbatch of the layer in work, where they do not fit the memory. folder: of hidden states."""
    return folder / "features" / f"{name}.batch_{number:05d}.safetensors"


def owner_file(folder: Path, start: int, rank: int) -> Path:
    """The mark of the worker that a rank of the shard from layer `start` on belongs to. folder: of hidden states."""
    return folder / "owners" / f"{layer_name(start)}.{rank_name(rank)}"


def threads_file(folder: Path) -> Path:
    """How many threads a pass was begun with. folder: of hidden states."""
    return folder / "threads.json"


def greedy_file(folder: Path) -> Path:
    """In which order layers leave, and the losses that were measured. folder: of the layers stage."""
    return folder / "greedy.json"


def learning_file(folder: Path) -> Path:
    """Weights of layers as they were learnt. folder: of the layers stage."""
    return folder / "trsp.json"


def step_text(folder: Path) -> Path:
    """Tokens of the step at work. folder: of the stage."""
    return folder / "step" / "text.arrow"


def layer_gradient_file(folder: Path, layer: int) -> Path:
    """The gradient by a layer's weight. folder: of the layers stage."""
    return folder / "step" / f"{layer_name(layer)}.json"


def small_set_gradient_file(folder: Path, layer: int) -> Path:
    """Gradients of what trains of a layer. folder: of the train stage."""
    return layer_file(folder / "step", layer)


def training_state(folder: Path) -> Path:
    """Where training is: weights and their moving means. folder: of the train stage."""
    return folder / "state.safetensors"


def worker_logs(folder: Path) -> Path:
    """Where the logs of a stage's workers go: beside its folder, for they outlive it."""
    return folder.parent / "logs" / folder.name


@dataclass(frozen=True)
class ScoreFiles:
    """The files below `scores/`."""

    folder: Path

    def layer(self, layer: int) -> Path:
        return layer_file(self.folder, layer)

    @property
    def parts(self) -> Path:
        """What ranks have summed so far."""
        return self.folder / "parts"

    def part(self, layer: int, rank: int, ranks: int) -> Path:
        return self.parts / f"{layer_name(layer)}.{rank_name(rank)}-of-{ranks:03d}.safetensors"

    @property
    def hidden(self) -> Path:
        return self.folder / HIDDEN


@dataclass(frozen=True)
class SearchFiles:
    """The files below `search/`."""

    folder: Path

    @property
    def owner(self) -> Path:
        """The key of the search that the folder belongs to."""
        return self.folder / "owner.json"

    @property
    def fitness_text(self) -> Path:
        """Tokens that fitness is measured on; of items, with what is said of them beside it."""
        return self.folder / "fitness.arrow"

    @property
    def development_text(self) -> Path:
        """The same of the development split, where it is of items."""
        return self.folder / "development.arrow"

    @property
    def chosen(self) -> Path:
        """What the chosen individual keeps and merges, as a plan's tensors."""
        return self.folder / "chosen.safetensors"

    @property
    def population(self) -> Path:
        return self.folder / "population"

    def individuals(self, number: int) -> Path:
        """The individuals of a pass."""
        return self.population / f"pass_{number:04d}.safetensors"

    def figures(self, number: int) -> Path:
        """What the individuals of a pass measured."""
        return self.population / f"pass_{number:04d}.json"

    @property
    def work(self) -> Path:
        """The individuals of the pass at work, as plans."""
        return self.folder / "work"

    def plan_of(self, individual: str) -> Path:
        """An individual's tensors."""
        return self.work / f"{individual}.safetensors"


@dataclass(frozen=True)
class RunFiles:
    """The paths below one run directory."""

    run_dir: Path

    def relative(self, path: Path) -> str:
        """A path of the run as records and reports name it."""
        return str(path.relative_to(self.run_dir))

    @property
    def facts(self) -> Path:
        return self.run_dir / "facts.json"

    @property
    def origin(self) -> Path:
        """Which version of a source from elsewhere the run works on."""
        return self.run_dir / "source.json"

    @property
    def calibration_folder(self) -> Path:
        return self.run_dir / "calibration"

    @property
    def calibration(self) -> Path:
        """Tokens that the model is scored on."""
        return self.calibration_folder / "calibration.arrow"

    @property
    def selection_text(self) -> Path:
        """Tokens that an `auto` budget is chosen on."""
        return self.calibration_folder / "selection.arrow"

    @property
    def scores(self) -> ScoreFiles:
        return ScoreFiles(self.run_dir / "scores")

    @property
    def elimination(self) -> Path:
        return self.run_dir / "elimination"

    @property
    def gradients(self) -> Path:
        return self.run_dir / "gradients"

    @property
    def synthetic_folder(self) -> Path:
        """The two files of a plan that stands for none."""
        return self.run_dir / "synthetic"

    @property
    def layers_folder(self) -> Path:
        return self.run_dir / "layers"

    @property
    def selection_folder(self) -> Path:
        return self.run_dir / "selection"

    @property
    def selection(self) -> Path:
        """What was chosen for an `auto` budget, and the curve that it was chosen on."""
        return self.run_dir / "selection.json"

    @property
    def search(self) -> SearchFiles:
        return SearchFiles(self.run_dir / "search")

    @property
    def search_outcome(self) -> Path:
        """What a search chose, and all that it measured."""
        return self.run_dir / "search.json"

    @property
    def plan(self) -> Path:
        return self.run_dir / PLAN_JSON

    @property
    def plan_tensors(self) -> Path:
        return self.run_dir / PLAN_TENSORS

    @property
    def compensation_folder(self) -> Path:
        return self.run_dir / COMPENSATION

    @property
    def compensation(self) -> Path:
        return self.run_dir / "compensation.json"

    @property
    def training_folder(self) -> Path:
        return self.run_dir / "training"

    @property
    def training(self) -> Path:
        """The loss of every step of training, and what it changed."""
        return self.run_dir / "training.json"

    @property
    def checkpoints(self) -> Path:
        return self.run_dir / "checkpoint"

    def checkpoint(self, layout: str) -> Path:
        return self.checkpoints / layout

    @property
    def verify_folder(self) -> Path:
        return self.run_dir / "verify"

    @property
    def verify(self) -> Path:
        return self.run_dir / "verify.json"

    @property
    def source_digests(self) -> Path:
        """sha256 of every weight file of the source, once somebody asked for it."""
        return self.run_dir / "source.sha256.json"

    @property
    def evaluation_folder(self) -> Path:
        return self.run_dir / "evaluation"

    @property
    def held_out(self) -> Path:
        """Tokens that the evaluation measures on."""
        return self.evaluation_folder / "evaluation.arrow"

    @property
    def random_control(self) -> Path:
        """The folder of the written checkpoint's random control."""
        return self.evaluation_folder / "random"

    @property
    def evaluation(self) -> Path:
        return self.run_dir / "evaluation.json"

    @property
    def benchmark(self) -> Path:
        return self.run_dir / "benchmark.json"

    def benchmark_column(self, model: str) -> Path:
        """What a model scored on every task and item."""
        return self.run_dir / "benchmark" / f"{model}.json"

    def benchmark_log(self, model: str) -> Path:
        return worker_logs(self.run_dir / "benchmark") / f"{model}.log"

    @property
    def report_folder(self) -> Path:
        return self.run_dir / "report"

    @property
    def report_page(self) -> Path:
        return self.report_folder / "index.html"

    @property
    def report(self) -> Path:
        return self.report_folder / "report.json"

    @property
    def stages(self) -> Path:
        return self.run_dir / "stages"

    def record(self, stage: str) -> Path:
        return self.stages / f"{stage}.json"

    def ledger(self, stage: str) -> Path:
        """Finished and lost units of a stage, a line each."""
        return self.stages / f"{stage}.ledger.jsonl"

    @property
    def split(self) -> Path:
        """How the run is spread over nodes, where the job leaves that open."""
        return self.stages / ".split.json"

    @property
    def journal(self) -> Path:
        """What the run did and how far it is, a line each."""
        return self.stages / "progress.jsonl"

    @property
    def lock(self) -> Path:
        return self.stages / ".lock"

"""What compensation and its check sum and solve beside the forward, as `compensation/` does it.

D the model's width, F neurons of an expert, W those that it keeps, E experts of a layer, N = E W features of a layer.

| pass | of a routed token and expert | of every expert in the end, float64 |
|---|---|---|
| expert by expert (`moments.py`) | 2 F W, float32 | W^3 / 3 + 2 D W (3 W + F - W) |
| its check (`recheck_pass.py`), of S / E experts | 6 D F float32, 2 F^2 float64 | 2 W^3 / 3 + 2 D F W + 2 D W^2 |
| jointly, N to 8192 (`normal_equations.py`) | the first, 2 N (N + D) / k float64 | the first, N^2 (N / 3 + 2 D) / E |
| jointly, larger (`conjugate_gradients.py`) | the first, and W (2 W + 2 D + 4 D P) float32, P passes | the first |
| its check (`joint_recheck.py`) | 4 D F float32, 2 F^2 float64 | as the second, of all experts |
"""

from __future__ import annotations

from dataclasses import dataclass

from tenp_dist.checkpoint.facts import Facts
from tenp_dist.compensation.normal_equations import LARGEST
from tenp_dist.compensation.recheck_pass import SAMPLE

PASSES = 16  # of conjugate gradients, in the middle of what was measured
_DESCENT = 7  # float64 matrices like the kept W_down that they hold


@dataclass(frozen=True)
class Sums:
    """What a pass sums beside the forward.

    float32, float64: operations of a routed token and expert.
    solve: float64 operations of every expert, once the tokens are through.
    held: bytes of every expert meanwhile.
    """

    float32: float = 0.0
    float64: float = 0.0
    solve: float = 0.0
    held: int = 0


NOTHING = Sums()


def apart(facts: Facts, kept: int) -> Sums:
    """Narrow experts solved one by one. kept: neurons of each, W."""
    neurons, hidden = facts.intermediate_size, facts.hidden_size
    solve = kept**3 / 3 + 2.0 * hidden * kept * (3 * kept + neurons - kept)
    return Sums(2.0 * neurons * kept, 0.0, solve, 4 * neurons * kept)


def apart_checked(facts: Facts, kept: int) -> Sums:
    """The check of a sample."""
    neurons, hidden = facts.intermediate_size, facts.hidden_size
    share = min(1.0, SAMPLE / facts.num_experts)
    solve = 2 / 3 * kept**3 + 2.0 * hidden * kept * (neurons + kept)
    gram = 2.0 * neurons**2
    return Sums(6.0 * hidden * neurons * share, gram * share, solve * share, int(8 * neurons**2 * share))


def joint(facts: Facts, kept: int) -> Sums:
    """A layer as one system, which starts from experts solved one by one."""
    hidden, experts, first = facts.hidden_size, facts.num_experts, apart(facts, kept)
    features = experts * kept
    if 8 * features**2 <= LARGEST:
        added = 2.0 * features * (features + hidden) / facts.top_k
        solve = features**2 * (features / 3 + 2.0 * hidden) / experts
        return Sums(first.float32, added, first.solve + solve, first.held + 8 * features**2 // experts)
    descent = kept * (2.0 * kept + 2.0 * hidden + 4.0 * hidden * PASSES)
    return Sums(first.float32 + descent, 0.0, first.solve, first.held + 8 * kept * (_DESCENT * hidden + kept))


def joint_checked(facts: Facts, kept: int) -> Sums:
    """The check of a whole layer."""
    neurons, hidden = facts.intermediate_size, facts.hidden_size
    solve = 2 / 3 * kept**3 + 2.0 * hidden * kept * (neurons + kept)
    return Sums(4.0 * hidden * neurons, 2.0 * neurons**2, solve, 8 * neurons**2)

"""The statistics by their definitions: the stock model in one piece, loops over experts, float64.

Shares no code with tenp_dist. The stock experts run (`eager`), hooks take what goes in and out, and every sum is
formed as METHODS and the TENP paper write it, the F x T x D tensor of single-neuron outputs included (Eq. 8-10).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from helpers.experts import WithoutGate, experts_by_definition

CHUNK = 64  # tokens whose F x D neuron outputs exist at once


class Tap:
    """Keeps the inputs of every experts call and the residual stream before its block."""

    def __init__(self, layer: torch.nn.Module, residual: str = "post_attention_layernorm"):
        self.calls: list[dict[str, torch.Tensor]] = []
        self.experts = _experts_of(layer)
        self._residual: torch.Tensor | None = None
        self._handles = [
            layer.get_submodule(residual).register_forward_pre_hook(self._before_norm),
            self.experts.register_forward_hook(self._after_experts),
            layer.register_forward_hook(self._after_layer, with_kwargs=True),
        ]

    def _before_norm(self, module, inputs):
        self._residual = inputs[0].reshape(-1, inputs[0].shape[-1]).double()

    def _after_experts(self, module, inputs, output):
        x, index, weights = inputs
        self.calls.append(
            {"x": x.double(), "index": index, "g": weights.double(), "h": self._residual, "r": output.double()}
        )

    def _after_layer(self, module, inputs, named, output):
        entered = inputs[0] if inputs else named["hidden_states"]
        left = output[0] if isinstance(output, tuple) else output
        self.calls[-1] |= {"entered": entered.double().flatten(0, 1), "left": left.double().flatten(0, 1)}

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()


def _experts_of(layer: torch.nn.Module) -> torch.nn.Module | None:
    """The routed experts of a layer, None if it is dense."""
    return next((module for name, module in layer.named_modules() if name.split(".")[-1] == "experts"), None)


def brute_force_statistics(
    model_folder: Path,
    batches: Sequence[tuple[torch.Tensor, torch.Tensor | None, int]],
    domains: int,
    residual: str = "post_attention_layernorm",
) -> dict[int, dict[str, torch.Tensor]]:
    """layer -> statistic -> float64 [N, E] or [N, E, F].

    batches: (tokens [B, S], mask [B, S] or None, domain). Padding (mask 0) counts for nothing.
    residual: module inside a layer whose input is the residual stream before the MoE block.
    """
    taps, activation = _tapped(model_folder, batches, residual)
    return {i: _layer_statistics(tap, batches, domains, activation) for i, tap in taps.items()}


def _tapped(model_folder: Path, batches, residual: str = "post_attention_layernorm") -> tuple[dict[int, Tap], str]:
    """A tap per MoE layer after the stock model saw the batches, and the activation's name."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    towers = hasattr(AutoConfig.from_pretrained(model_folder), "vision_config")
    model = (
        (AutoModelForImageTextToText if towers else AutoModelForCausalLM)
        .from_pretrained(model_folder, dtype=torch.float32, experts_implementation="eager", attn_implementation="eager")
        .eval()
    )
    decoder = getattr(model.base_model, "language_model", model.base_model)
    layers = {i: layer for i, layer in enumerate(decoder.layers) if _experts_of(layer) is not None}
    taps = {i: Tap(layer, residual) for i, layer in layers.items()}
    with torch.no_grad():
        for tokens, mask, _ in batches:
            model(tokens, attention_mask=None if mask is None else mask.long())
    for tap in taps.values():
        tap.close()
    config = model.config.get_text_config()
    return taps, getattr(config, "mlp_hidden_act", getattr(config, "hidden_act", "silu"))  # LFM2 has no key for it


@dataclass
class RoutedToken:
    """One token in one expert, all float64: weight g, activations m [F], output y [D], columns' norms [F] and
    <w_j, y> [F], input x, residual stream h and routed output r [D]."""

    g: float
    m: torch.Tensor
    y: torch.Tensor
    column: torch.Tensor
    along: torch.Tensor
    x: torch.Tensor
    h: torch.Tensor
    r: torch.Tensor


def routed_tokens(model_folder: Path, batches) -> dict[int, dict[tuple[int, int], list[RoutedToken]]]:
    """layer -> (domain, expert) -> the tokens routed there, one by one; batches without padding."""
    found: dict[int, dict[tuple[int, int], list[RoutedToken]]] = {}
    for layer, tap in _tapped(model_folder, batches)[0].items():
        experts = experts_by_definition(tap.experts)
        layer_tokens = found.setdefault(layer, {})
        for (_, _, domain), call in zip(batches, tap.calls, strict=True):
            for t, k in itertools.product(*map(range, call["index"].shape)):
                e, x = int(call["index"][t, k]), call["x"][t]
                down = experts[e].down
                m = experts[e].m(x)
                y = down @ m
                token = RoutedToken(
                    float(call["g"][t, k]), m, y, down.norm(dim=0), down.T @ y, x, call["h"][t], call["r"][t]
                )
                layer_tokens.setdefault((domain, e), []).append(token)
    return found


def _layer_statistics(tap: Tap, batches, domains: int, activation: str) -> dict[str, torch.Tensor]:
    experts = experts_by_definition(tap.experts)
    assert activation == ("relu2" if isinstance(experts[0], WithoutGate) else "silu")
    num_experts, width = len(experts), experts[0].down.shape[1]
    names_E = (
        "token_count", "gate_sum", "output_norm_sum", "output_norm_squared_sum",
        "gated_norm_sum", "expert_importance_sum", "easy_ep_sum",
    )  # fmt: skip
    names_EF = ("neuron_projection_sum", "neuron_l2_sum", "neuron_energy_sum", "neuron_contribution_max")
    out = {name: torch.zeros(domains, num_experts, dtype=torch.float64) for name in names_E}
    out |= {name: torch.zeros(domains, num_experts, width, dtype=torch.float64) for name in names_EF}
    pairs = ("coselection_count", "gated_norm_product_sum")
    out |= {name: torch.zeros(domains, num_experts, num_experts, dtype=torch.float64) for name in pairs}
    out |= {name: torch.zeros(domains, dtype=torch.float64) for name in ("layer_token_count", "block_influence_sum")}
    for (_, mask, domain), call in zip(batches, tap.calls, strict=True):
        valid = None if mask is None else mask.reshape(-1).bool()
        _add_pairs(out, domain, call, valid, experts)
        turned_T = 1 - torch.cosine_similarity(call["entered"], call["left"], dim=1)
        turned_T = turned_T if valid is None else turned_T[valid]
        out["layer_token_count"][domain] += len(turned_T)
        out["block_influence_sum"][domain] += turned_T.sum()
        for expert in range(num_experts):
            routed = (call["index"] == expert).any(dim=1)
            if valid is not None:
                routed &= valid
            rows = routed.nonzero().squeeze(1)
            for chunk in rows.split(CHUNK) if len(rows) else ():
                _add(out, domain, expert, chunk, call, experts[expert])
    return out


def _add_pairs(out: Mapping[str, torch.Tensor], domain: int, call, valid, experts) -> None:
    """Token by token, every pair of the experts that it went to, an expert with itself included."""
    for t in range(len(call["x"])):
        if valid is not None and not valid[t]:
            continue
        norms = {}
        for expert, g in zip(call["index"][t].tolist(), call["g"][t], strict=True):
            norms[expert] = g * experts[expert].y(call["x"][t]).norm()
        for i, j in itertools.product(norms, norms):
            out["coselection_count"][domain, i, j] += 1
            out["gated_norm_product_sum"][domain, i, j] += norms[i] * norms[j]


def _add(out: Mapping[str, torch.Tensor], domain: int, expert: int, rows, call, definition) -> None:
    down = definition.down
    x, h, r = call["x"][rows], call["h"][rows], call["r"][rows]
    g = (call["g"][rows] * (call["index"][rows] == expert)).sum(dim=1)
    m = definition.m(x)
    neuron_TFD = m[:, :, None] * down.T[None, :, :]  # Eq. 8: one neuron's own output
    y = neuron_TFD.sum(dim=1) + definition.bias
    norm = y.norm(dim=1)
    cosine = torch.nn.functional.cosine_similarity(x, y, dim=1, eps=0)
    moved = torch.nn.functional.cosine_similarity(h, h + r, dim=1, eps=0)
    projection = (neuron_TFD * y[:, None, :]).sum(dim=2) / (norm[:, None] + 1e-8)  # Eq. 9
    column = down.norm(dim=0)
    out["token_count"][domain, expert] += len(rows)
    out["gate_sum"][domain, expert] += g.sum()
    out["output_norm_sum"][domain, expert] += norm.sum()
    out["output_norm_squared_sum"][domain, expert] += (norm**2).sum()
    out["gated_norm_sum"][domain, expert] += (g * norm).sum()
    out["expert_importance_sum"][domain, expert] += (g * norm * (1 - cosine)).sum()
    out["easy_ep_sum"][domain, expert] += (g * norm * (1 - moved).clamp_min(0)).sum()
    out["neuron_projection_sum"][domain, expert] += projection.sum(dim=0)
    out["neuron_l2_sum"][domain, expert] += (m.abs() * column).sum(dim=0)
    out["neuron_energy_sum"][domain, expert] += ((g[:, None] * m) ** 2 * column**2).sum(dim=0)
    largest = out["neuron_contribution_max"][domain, expert]
    torch.maximum(largest, (g.abs()[:, None] * m.abs() * column).amax(dim=0), out=largest)


def brute_force_plan(
    statistics: Mapping[int, Mapping[str, torch.Tensor]], rho: float, alpha: float, slope: float
) -> dict[int, dict[int, list[int]]]:
    """layer -> expert -> kept neurons, by the paper's words and DESIGN's schedule, in plain Python.

    Equal experts per layer, every expert routed, alignment 1; exact for arguments of few decimals.
    """
    from fractions import Fraction

    rho, alpha, slope = (Fraction(str(value)) for value in (rho, alpha, slope))
    layers = sorted(statistics)
    _, num_experts = statistics[layers[0]]["token_count"].shape
    width = statistics[layers[0]]["neuron_l2_sum"].shape[2]
    total = num_experts * len(layers)
    whole = int(alpha * total)
    depth = [1 + slope * (2 * Fraction(i, max(len(layers) - 1, 1)) - 1) for i in range(len(layers))]
    shares = [whole * weight / sum(depth) for weight in depth]
    counts = [int(share) for share in shares]
    by_rest = sorted(range(len(layers)), key=lambda i: (shares[i] - counts[i], i), reverse=True)
    for i in by_rest[: whole - sum(counts)]:
        counts[i] += 1
    narrow = int((rho * total - whole) * width / (total - whole))
    plan: dict[int, dict[int, list[int]]] = {}
    for layer, count in zip(layers, counts, strict=True):
        tensors = statistics[layer]
        importance = sum(row / row.norm() for row in tensors["expert_importance_sum"])
        mean = tensors["neuron_projection_sum"] / tensors["token_count"].clamp_min(1)[:, :, None]
        norms = mean.norm(dim=2, keepdim=True)
        projection = torch.where(norms > 0, mean / norms.clamp_min(1e-300), torch.zeros_like(mean)).sum(dim=0)
        ranked = sorted(range(num_experts), key=lambda e: (-float(importance[e]), e))
        plan[layer] = {}
        for expert in range(num_experts):
            if expert in ranked[:count]:
                plan[layer][expert] = list(range(width))
            else:
                order = sorted(range(width), key=lambda j: (-float(projection[expert, j]), j))
                plan[layer][expert] = sorted(order[:narrow])
    return plan

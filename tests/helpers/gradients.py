"""Gradients of the stock model in one piece, by its own code and torch's backward: shares no code with tenp_dist."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch


@dataclass
class RoutedNeurons:
    """One expert over the tokens of one microbatch: activations m [n, F] and the gradient by them."""

    m_TF: torch.Tensor
    grad_TF: torch.Tensor


@dataclass
class PlainGradients:
    """Of one microbatch.

    loss: summed over predicted tokens.
    leaving: layer -> gradient by what left it, [B, S, D].
    embedded: gradient by what entered the first layer.
    change: layer -> what it added to what entered it.
    neurons: (layer, expert) -> what its tokens say.
    shared: layer -> what all tokens say of its shared experts' neurons.
    """

    loss: float
    leaving: dict[int, torch.Tensor]
    embedded: torch.Tensor
    change: dict[int, torch.Tensor] = field(default_factory=dict)
    neurons: dict[tuple[int, int], RoutedNeurons] = field(default_factory=dict)
    shared: dict[int, RoutedNeurons] = field(default_factory=dict)


def plain_gradients(model_folder: Path, batches, *, dtype=torch.float32) -> list[PlainGradients]:
    """batches: (tokens [B, S], mask [B, S] or None, domain). The loss is the sum of next-token NLL."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        model_folder, dtype=dtype, experts_implementation="eager", attn_implementation="eager"
    ).eval()
    taps = {i: _tap(layer) for i, layer in enumerate(model.model.layers)}
    return [_of_batch(model, taps, tokens, mask) for tokens, mask, _ in batches]


def _tap(layer) -> list:
    """Have a layer's experts note (expert, m) of every expert that runs; empty for a dense layer."""
    noted: list = []
    experts = next((m for name, m in layer.named_modules() if name.endswith(".experts")), None)
    if experts is not None:

        def forward(x, index, weights):
            out = torch.zeros_like(x)
            for e in range(experts.gate_up_proj.shape[0]):
                token, place = (index == e).nonzero(as_tuple=True)
                gate, up = (x[token] @ experts.gate_up_proj[e].T).chunk(2, dim=-1)
                m = torch.nn.functional.silu(gate) * up
                m.retain_grad()
                noted.append((e, token, m))
                out = out.index_add(0, token, weights[token, place, None] * (m @ experts.down_proj[e].T))
            return out

        experts.forward = forward
    return noted


def _of_batch(model, taps, tokens, mask) -> PlainGradients:
    states: dict[int, torch.Tensor] = {}
    entered: dict[int, torch.Tensor] = {}
    shared: dict[int, torch.Tensor] = {}
    hooks = []
    for i, layer in enumerate(model.model.layers):
        taps[i].clear()

        def leaves(module, inputs, output, i=i):
            states[i] = output[0] if isinstance(output, tuple) else output
            states[i].retain_grad()

        def enters(module, inputs, i=i):
            entered[i] = inputs[0].detach()

        def asked(module, inputs, i=i):
            inputs[0].retain_grad()
            shared[i] = inputs[0]

        for name, part in layer.named_modules():
            if name in ("mlp.shared_experts.down_proj", "mlp.shared_expert.down_proj"):
                hooks.append(part.register_forward_pre_hook(asked))
        hooks.append(layer.register_forward_pre_hook(enters))
        hooks.append(layer.register_forward_hook(leaves))
    embedded = model.get_input_embeddings()(tokens).detach().requires_grad_(True)
    logits = model(inputs_embeds=embedded, attention_mask=None if mask is None else mask.long()).logits
    for hook in hooks:
        hook.remove()
    nll = -torch.log_softmax(logits[:, :-1].float(), dim=-1).gather(2, tokens[:, 1:, None]).squeeze(2)
    if mask is not None:
        nll = nll[mask[:, 1:] & mask[:, :-1]]
    loss = nll.sum()
    loss.backward()
    valid = torch.ones_like(tokens, dtype=torch.bool).reshape(-1) if mask is None else mask.reshape(-1)
    neurons = {
        (i, e): RoutedNeurons(m.detach()[valid[token]], m.grad[valid[token]])
        for i, noted in taps.items()
        for e, token, m in noted
    }
    change = {i: s.detach() - entered[i] for i, s in states.items()}
    leaving = {i: s.grad for i, s in states.items()}
    of_shared = {
        i: RoutedNeurons(m.detach().flatten(0, -2)[valid], m.grad.flatten(0, -2)[valid]) for i, m in shared.items()
    }
    return PlainGradients(float(loss.detach()), leaving, embedded.grad, change, neurons, of_shared)

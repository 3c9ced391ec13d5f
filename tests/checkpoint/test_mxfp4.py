"""gpt-oss in MXFP4 is read as the bfloat16 model that transformers makes of it; its arithmetic number by number."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from helpers.mxfp4 import EXPERTS, HIDDEN, NEURONS, make_pair, nearest, quantised, stands_for
from tenp_dist.checkpoint import float4
from tenp_dist.checkpoint.index import open_index
from tenp_dist.checkpoint.reader import TensorReader
from tenp_dist.checkpoint.source import open_source
from tenp_dist.errors import NumericalError


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("mxfp4"))


def test_every_code_at_every_scale_is_transformers_own_number():
    """16 x 16 pairs of codes at all scales but 255, NaN. Infinite in both: 4 and 6 at 2^126, 2 to 6 at 2^127."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks = torch.arange(256, dtype=torch.uint8).view(16, 16).expand(255, 16, 16).contiguous()
    scales = torch.arange(255, dtype=torch.uint8)[:, None].expand(255, 16).contiguous()
    wanted = convert_moe_packed_tensors(blocks[None], scales[None])[0].T.contiguous()
    found = float4.values(blocks, scales)
    assert found.shape == (255, 512) and torch.equal(found.view(torch.int16), wanted.view(torch.int16))
    finite = torch.isfinite(wanted)
    assert torch.equal(found.double()[finite], stands_for(blocks, scales)[finite]) and int((~finite).sum()) == 384


def test_every_tensor_is_read_as_what_it_stands_for(pair):
    stored, plain = (open_index(folder) for folder in pair)
    assert set(stored.tensors) == set(plain.tensors)
    with TensorReader(stored) as found, TensorReader(plain) as wanted:
        for one, entry in plain.tensors.items():
            assert (stored.tensors[one].dtype, stored.tensors[one].shape) == (entry.dtype, entry.shape)
            assert found.raw(one) == wanted.raw(one), one
        name = "model.layers.1.mlp.experts.2.up_proj.weight"
        wide = torch.full((NEURONS, HIDDEN + 3), 9.0)
        found.into(name, wide[:, :HIDDEN])
        assert torch.equal(wide[:, :HIDDEN], wanted.tensor(name).float()) and bool((wide[:, HIDDEN:] == 9).all())
    assert "quantization_config" not in stored.config and stored.stored_as["quantization_config"]


def test_facts_know_both_sizes(pair):
    """17 bytes for 32 numbers, 4.25 bits each, where the plain one has 64."""
    facts, same = (open_source(folder).facts for folder in pair)
    on_disk = sum(tensor.nbytes for path in pair[0].glob("*.safetensors") for tensor in load_file(path).values())
    assert (facts.bytes.stored, facts.bytes.total, facts.parameters) == (on_disk, same.bytes.total, same.parameters)
    matrices = 2 * EXPERTS * 3 * NEURONS * HIDDEN
    assert same.bytes.stored - on_disk == matrices * 2 - matrices // 32 * 17


def test_transformers_reads_the_same_model(pair):
    from transformers import AutoModelForCausalLM

    found, wanted = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16) for folder in pair)
    states = found.state_dict(), wanted.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_rounding_by_hand():
    """Halves go to the code that is even: 0.25 to 0, 0.75 to 1, 1.25 to 1, 1.75 to 2, 2.5 to 2, 3.5 to 4, 5 to 4."""
    halves = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, 7.9, -0.26, -0.0, 0.0])
    found = float4.rounded(halves[None, None], torch.tensor([[127]]))[0, 0]
    assert found.tolist() == [0, 2, 2, 4, 4, 6, 6, 7, 7, 9, 8, 0]
    # largest 24 = 1.5 * 2^4: the scale is 2^(4 - 2), byte 129; 24 / 4 = 6
    assert float4.least_scales(torch.tensor([[24.0, 1.0], [0.0, 0.0], [31.0, 0.0], [2.0**-128, 0.0]])).tolist() == [
        129, 127, 129, 0,
    ]  # fmt: skip
    # 7 and 7: at scale 1 both are 6, off by 1; at scale 2 they are 3.5 and go to 4 * 2 = 8, off by 1: the lower stays.
    # 7.5 and 7.5: at scale 1 off by 1.5, at scale 2 they are 3.75 and go to 8, off by 0.5
    blocks, scales = float4.encode(torch.tensor([[7.0, 7.0], [7.5, 7.5]]), "x")
    assert scales.tolist() == [[127], [128]] and blocks[:, 0, 0].tolist() == [0x77, 0x66]
    assert blocks.shape == (2, 1, 16) and not blocks[:, :, 1:].any()


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(0, 9), st.integers(0, 70)),
    power=st.sampled_from([0, -120, 100]),
    seed=st.integers(0, 2**31),
)
def test_new_numbers_take_the_better_of_two_scales(shape, power, seed):
    generator = torch.Generator().manual_seed(seed)
    plain = (torch.randn(shape, generator=generator) * 2.0**power).bfloat16()
    plain[: shape[0] // 3, :32] = 0
    blocks, scales = float4.encode(plain, "x")
    assert torch.equal(float4.pack(float4.unpack(blocks)), blocks)
    whole = torch.nn.functional.pad(plain.double(), (0, -shape[1] % 32)).unflatten(1, (-1, 32)) if shape[1] else None
    for (row, group), scale in np.ndenumerate(scales.numpy()):
        values = whole[row, group]
        most = float(values.abs().max())
        if most == 0:
            assert scale == 127 and not blocks[row, group].any()
            continue
        least = max(int(np.frexp(most)[1]) - 3 + 127, 0)
        assert scale in (least, least + 1)
        lost = {}
        for one in (least, least + 1):
            codes = nearest(values / 2.0 ** (one - 127))
            got = stands_for((codes[::2] | codes[1::2] << 4)[None], torch.tensor([one]))
            lost[one] = float((got - values).square().sum()), codes
        assert lost[scale][0] == min(lost[least][0], lost[least + 1][0])
        assert torch.equal(float4.unpack(blocks)[row, 32 * group : 32 * group + 32], lost[scale][1])


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 8), st.integers(1, 4)),
    axis=st.sampled_from([0, 1]),
    clear=st.booleans(),
    spread=st.sampled_from([0, 1, 6]),
    share=st.sampled_from([0.1, 0.6, 0.95]),
    seed=st.integers(0, 2**31),
)
def test_lines_that_come_together_anew(shape, axis, clear, spread, share, seed):
    """Any lines: a group whose numbers had one scale keeps every byte; no other is farther off than by half a step, nor
    by more than at any other scale."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape[0], 32 * shape[1], generator=generator)
    weight *= torch.exp2(spread * torch.randn(shape[0], shape[1], generator=generator)).repeat_interleave(32, 1)
    blocks, scales = quantised(weight)
    values, codes = stands_for(blocks, scales), float4.unpack(blocks)
    had = scales.repeat_interleave(32, 1).long() + 1
    stay = torch.rand(values.shape[axis], generator=generator) < share
    stays = stay.numpy() if axis == 1 else stay.numpy()[:, None]

    def change(array):
        return array * stays.astype(array.dtype) if clear else array.take(stay.nonzero().flatten().numpy(), axis)

    moved = float4.with_rows if axis == 0 else float4.with_columns
    new_blocks, new_scales = moved(blocks, scales, change)
    values, codes, had = (torch.from_numpy(change(one.numpy())) for one in (values, codes, had))
    got, got_codes = stands_for(new_blocks, new_scales), float4.unpack(new_blocks)
    assert got_codes.shape[1] == -(-values.shape[1] // 32) * 32 and not got[:, values.shape[1] :].any()
    for (row, group), scale in np.ndenumerate(new_scales.numpy()):
        inside = slice(32 * group, min(32 * group + 32, values.shape[1]))
        of = {int(one) - 1 for one in had[row, inside].tolist() if one}
        if len(of) < 2:
            assert torch.equal(got_codes[row, inside], codes[row, inside]) and int(scale) == (of.pop() if of else 127)
            continue
        wanted, best = values[row, inside], np.inf
        lost = float((got[row, inside] - wanted).square().sum())
        for one in range(max(min(of) - 3, 0), max(of) + 2):
            tried = nearest(wanted / 2.0 ** (one - 127))
            size = (
                torch.where(tried < 8, 1.0, -1.0).double()
                * torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6]).double()[(tried % 8).long()]
            )
            best = min(best, float((size * 2.0 ** (one - 127) - wanted).square().sum()))
        assert lost <= best * (1 + 1e-12), (of, scale)


def test_nan_is_not_encoded():
    with pytest.raises(NumericalError, match="MXFP4"):
        float4.encode(torch.tensor([[1.0, float("nan")]]), "x")

"""Four-bit weights: what is packed comes out again, and what cannot be packed is refused."""

import pytest
import torch
from torch import Tensor

from kernels.weight4 import dequantised, packed, unpacked


def grid(outputs: int, inputs: int, group: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes, scales, zero points and minima."""
    generator = torch.Generator().manual_seed(outputs * inputs + group)
    groups = (outputs, -(-inputs // group))
    codes = torch.randint(0, 16, (outputs, inputs), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(0, 16, groups, generator=generator, dtype=torch.uint8)
    return codes, torch.rand(groups, generator=generator).half(), zeros, torch.randn(groups, generator=generator).half()


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize(("outputs", "inputs"), [(64, 128), (1, 1), (65, 129), (130, 576), (3, 97)])
def test_codes_scales_and_offsets_come_back_as_they_went_in(outputs: int, inputs: int, group: int) -> None:
    codes, scales, zeros, minima = grid(outputs, inputs, group)
    for offsets in ({}, {"zeros": zeros}, {"minima": minima}):
        back = unpacked(packed(codes, scales, group, **offsets))
        assert torch.equal(back[0], codes)
        assert torch.equal(back[1], scales)
        expected = next(iter(offsets.values()), None)
        assert back[2] is None if expected is None else torch.equal(back[2], expected)


def test_each_kind_says_what_its_weights_are() -> None:
    codes, scales, zeros, minima = grid(5, 70, 32)
    of = torch.arange(70) // 32
    code, scale = codes.double(), scales.double()[:, of]
    assert torch.equal(dequantised(packed(codes, scales, 32)), scale * (code - 8))
    assert torch.equal(dequantised(packed(codes, scales, 32, zeros=zeros)), scale * (code - zeros.double()[:, of]))
    expected = scale * code + minima.double()[:, of]
    assert torch.equal(dequantised(packed(codes, scales, 32, minima=minima)), expected)


def test_mxfp4_is_a_table_times_a_power_of_two() -> None:
    codes = torch.arange(64, dtype=torch.uint8).remainder(16).view(1, 64)
    scales = torch.tensor([[127, 120]], dtype=torch.uint8)
    weight = packed(codes, scales, 32)
    assert all(torch.equal(one, other) for one, other in zip(unpacked(weight)[:2], (codes, scales), strict=True))
    values = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    expected = torch.tensor([*values, *(-value for value in values)] * 2, dtype=torch.float64)
    assert torch.equal(dequantised(weight)[0], torch.cat((expected, expected / 128)))
    with pytest.raises(ValueError, match="MXFP4 has groups of 32 and no offsets"):
        packed(codes, scales[:, :1], 64)


def test_the_filling_of_the_last_tiles_weighs_nothing() -> None:
    codes, scales, zeros, minima = grid(3, 33, 32)
    for offsets in ({}, {"zeros": zeros}, {"minima": minima}):
        weight = packed(codes, scales, 32, **offsets)
        assert weight.words.shape == (1, 1, 64, 32)
        scale = weight.scales[0, 0]
        assert not scale[2:].any() and not scale[:, 3:].any()
        if "minima" in offsets:
            assert not weight.offsets[0, 0, 2:].any() and not weight.offsets[0, 0, :, 3:].any()


def test_a_word_has_one_input_of_each_quarter_the_lowest_first() -> None:
    at = torch.arange(128)
    codes = (4 * (at // 32) + at % 4).to(torch.uint8).view(1, 128)
    weight = packed(codes, torch.ones(1, 1), 128)
    assert weight.words.dtype == torch.int16
    words = [hex(word & 0xFFFF) for word in weight.words[0, 0, 0].tolist()]
    assert words == ["0xc840", "0xd951", "0xea62", "0xfb73"] * 8


def test_what_does_not_fit_is_refused() -> None:
    codes, scales, zeros, minima = grid(4, 128, 64)
    with pytest.raises(ValueError, match="groups of 48 inputs cannot be packed; 32, 64, 128 can"):
        packed(codes, scales, 48)
    with pytest.raises(ValueError, match="not both"):
        packed(codes, scales, 64, zeros=zeros, minima=minima)
    with pytest.raises(ValueError, match=r"scales \(4, 2\) do not fit codes \(4, 128\) in groups of 32"):
        packed(codes, scales, 32)
    with pytest.raises(ValueError, match=r"codes lie in 0..15, these in 3..16"):
        packed(codes.clamp(min=3).masked_fill(codes == 15, 16), scales, 64)

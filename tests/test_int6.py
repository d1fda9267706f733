"""int6: the packed layout bit by bit, and what the row quantiser promises."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from klora.kernels.int6 import (
    Int6Weight,
    dequantize_int6_ref,
    pack_int6_ref,
    quantize_int6_ref,
    unpack_int6_ref,
)

SMALLEST_HALF = 2.0**-24


def gaussian(rows, columns, std=0.02, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * std


def documented_words(codes):
    """Three words of 16 codes, as the docstring states them, in Python integers."""
    fields = [code + 32 for code in codes]
    low = [sum((fields[8 * word + j] & 15) << 4 * j for j in range(8)) for word in (0, 1)]
    return [*low, sum((field >> 4) << 2 * j for j, field in enumerate(fields))]


def unsigned(packed):
    return [word % 2**32 for word in packed.flatten().tolist()]


class TestPacking:
    @given(st.lists(st.integers(-31, 31), min_size=1, max_size=100), st.integers(1, 4))
    @settings(deadline=None)
    def test_unpack_inverts_pack_at_every_width(self, row, rows):
        codes = torch.tensor([row] * rows, dtype=torch.int8)
        packed = pack_int6_ref(codes)
        assert packed.dtype == torch.int32
        assert packed.shape == (rows, 6 * math.ceil(len(row) / 32))
        assert torch.equal(unpack_int6_ref(packed, len(row)), codes)

    @given(st.lists(st.integers(-31, 31), min_size=32, max_size=32))
    @settings(deadline=None)
    def test_words_are_those_of_the_documented_layout(self, codes):
        packed = pack_int6_ref(torch.tensor(codes, dtype=torch.int8))
        assert unsigned(packed) == documented_words(codes[:16]) + documented_words(codes[16:])

    def test_each_place_has_six_bits_of_its_own(self):
        zeros = unsigned(pack_int6_ref(torch.zeros(32, dtype=torch.int8)))
        owned = set()
        for place in range(32):
            codes = torch.zeros(63, 32, dtype=torch.int8)
            codes[:, place] = torch.arange(-31, 32)
            packed = pack_int6_ref(codes)
            assert torch.equal(unpack_int6_ref(packed, 32), codes)
            changed = [unsigned(row) for row in packed]
            assert len({tuple(row) for row in changed}) == 63
            bits = {
                (word, bit)
                for row in changed
                for word in range(6)
                for bit in range(32)
                if (row[word] ^ zeros[word]) >> bit & 1
            }
            assert len(bits) == 6 and not bits & owned
            owned |= bits
        assert len(owned) == 192

    def test_padding_holds_code_zero(self):
        packed = pack_int6_ref(torch.tensor([[7]], dtype=torch.int8))
        assert unpack_int6_ref(packed, 32).tolist() == [[7] + [0] * 31]

    def test_leading_dimensions_and_strides(self):
        codes = torch.randint(-31, 32, (48, 3, 2), dtype=torch.int8).permute(1, 2, 0)
        assert torch.equal(unpack_int6_ref(pack_int6_ref(codes), 48), codes)

    @pytest.mark.parametrize("code", [32, -32, 127, -128])
    def test_other_codes_are_refused_by_value(self, code):
        codes = torch.zeros(2, 32, dtype=torch.int8)
        codes[1, 5] = code
        with pytest.raises(ValueError, match=f"a code is {code};"):
            pack_int6_ref(codes)

    @pytest.mark.parametrize(
        "codes", [torch.zeros(2, 32), torch.zeros(2, 0, dtype=torch.int8), torch.tensor(1, dtype=torch.int8)]
    )
    def test_other_tensors_are_refused(self, codes):
        with pytest.raises(ValueError, match="packing takes int8"):
            pack_int6_ref(codes)

    def test_unpack_wants_the_words_of_its_columns(self):
        packed = pack_int6_ref(torch.zeros(2, 32, dtype=torch.int8))
        for wrong, columns in ((packed, 33), (packed, 0), (packed.long(), 32), (packed[:, :5], 32)):
            with pytest.raises(ValueError, match="columns take int32"):
                unpack_int6_ref(wrong, columns)


class TestQuantizer:
    @given(st.integers(0, 2**31), st.floats(0.02, 2.0), st.floats(-4.0, 3.0), st.integers(1, 70))
    @settings(deadline=None)
    def test_error_is_half_a_step_where_not_clamped(self, seed, clip, exponent, columns):
        """Against the scale as stored: codes computed from the scale before its rounding to fp16 would miss this."""
        weight = gaussian(4, columns, 10.0**exponent, seed)
        codes, scale = quantize_int6_ref(weight, clip)
        step = scale.double()[:, None]
        error = (weight.double() - dequantize_int6_ref(codes, scale, torch.float64)).abs()
        clamped = weight.double().abs() > 31.5 * step
        assert (error[~clamped] <= (0.5 + 1e-5) * step.expand_as(error)[~clamped]).all()
        assert torch.equal(codes[clamped].float(), 31 * weight[clamped].sign())
        assert codes.abs().max() <= 31

    def test_scale_is_clip_times_rms_in_half_precision(self):
        weight = gaussian(8, 64) + 0.05
        _, scale = quantize_int6_ref(weight, 0.11)
        assert torch.equal(scale, (0.11 * weight.square().mean(1).sqrt()).half())

    def test_levels_do_not_depend_on_the_size_of_the_weights(self):
        """A floor under the scale would leave rows of small weights a handful of codes."""
        weight = gaussian(1, 4096, 1.0)
        expected, _ = quantize_int6_ref(weight, 0.11)
        assert expected.unique().numel() > 55
        for halvings in range(1, 11):
            codes, _ = quantize_int6_ref(weight * 2.0**-halvings, 0.11)
            assert torch.equal(codes, expected)

    def test_zero_rows_are_zero(self):
        weight = gaussian(3, 32)
        weight[1] = 0
        codes, scale = quantize_int6_ref(weight, 0.1)
        assert scale[1] == 0 and not codes[1].any() and codes[0].any()
        assert torch.equal(dequantize_int6_ref(codes, scale)[1], torch.zeros(32))

    @pytest.mark.parametrize("std", [1e-6, 1e-7, 4e-8])
    def test_rows_below_the_smallest_scale_keep_what_half_precision_can_hold(self, std):
        weight = gaussian(16, 256, std)
        codes, scale = quantize_int6_ref(weight, 0.01)
        assert (scale == SMALLEST_HALF).all()
        error = (weight.double() - dequantize_int6_ref(codes, scale, torch.float64)).abs()
        held = weight.double().abs() <= 31 * SMALLEST_HALF
        assert (error[held] <= 0.50001 * SMALLEST_HALF).all()
        assert codes.ne(0).any(dim=1).all()

    @pytest.mark.parametrize("std", [1e-12, 1e-30, 1e-44])
    def test_vanishing_rows_stay_finite(self, std):
        codes, scale = quantize_int6_ref(gaussian(4, 32, std), 0.1)
        assert not codes.any() and torch.isfinite(scale).all()

    def test_scales_beyond_half_precision_are_refused_by_row(self):
        weight = gaussian(3, 32)
        weight[2] = 1e6
        with pytest.raises(ValueError, match=r"row 2 needs the scale 1e\+05"):
            quantize_int6_ref(weight, 0.1)

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_weights_that_are_not_finite_are_refused(self, value):
        weight = gaussian(3, 32)
        weight[1, 4] = value
        with pytest.raises(ValueError, match="finite weights"):
            quantize_int6_ref(weight, 0.1)

    @pytest.mark.parametrize("clip", [0.0, -0.1, math.nan, math.inf])
    def test_impossible_clips_are_refused(self, clip):
        with pytest.raises(ValueError, match="positive number"):
            quantize_int6_ref(gaussian(2, 32), clip)

    @pytest.mark.parametrize("shape", [(32,), (2, 3, 32), (4, 0)])
    def test_other_shapes_are_refused(self, shape):
        with pytest.raises(ValueError, match=r"takes \[N, K\]"):
            quantize_int6_ref(torch.zeros(shape), 0.1)


class TestInt6Weight:
    def stored(self, columns):
        codes, scale = quantize_int6_ref(gaussian(8, columns), 0.1)
        return Int6Weight(pack_int6_ref(codes), scale, (8, columns)), codes, scale

    @pytest.mark.parametrize("columns", [1, 31, 64, 100])
    def test_dequantizes_to_scale_times_code(self, columns):
        stored, codes, scale = self.stored(columns)
        exact = codes.double() * scale.double()[:, None]
        assert torch.equal(stored.dequantize(torch.float64), exact)
        assert torch.equal(stored.dequantize().double(), exact), "16 significant bits are exact in fp32"
        assert torch.equal(stored.dequantize(torch.bfloat16), exact.bfloat16())

    def test_takes_three_quarters_of_a_byte_a_weight(self):
        stored, _, _ = self.stored(64)
        assert stored.nbytes == 8 * 64 * 3 // 4 + 8 * 2

"""int6: the packed layout bit by bit, and what the row quantiser promises."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from klora.kernels.int6 import (
    Int6Weight,
    dequantize_int6_ref,
    int6_linear,
    pack_int6_ref,
    pick_group_size,
    quantize_int6,
    quantize_int6_ref,
    reference,
    relative_error,
    unpack_int6_ref,
)
from torch import nn


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

    @pytest.mark.parametrize("clip", [0.11, None])
    @pytest.mark.parametrize("std", [1e-5, 1e-6, 1e-8, 1e-12])
    def test_the_error_does_not_depend_on_the_size_of_the_weights(self, std, clip):
        """fp16 scales round rows of 1e-6 to a few steps and lose those of 1e-9."""
        weight = gaussian(16, 256, 1.0)
        wanted = relative_error(weight, *quantize_int6_ref(weight, clip))
        codes, scale = quantize_int6_ref(weight * std, clip)
        assert scale.dtype == torch.float32
        assert relative_error(weight * std, codes, scale) == pytest.approx(wanted, rel=0.005)
        exact = codes.double() * scale.double()[:, None]
        assert torch.equal(dequantize_int6_ref(codes, scale).double(), exact), "11 bits of a scale are exact in fp32"

    def test_one_small_row_is_as_good_as_the_others(self):
        weight = gaussian(8, 256, 1.0)
        weight[3] *= 1e-7
        codes, scale = quantize_int6_ref(weight)
        alone = [relative_error(weight[row : row + 1], codes[row : row + 1], scale[row : row + 1]) for row in range(8)]
        assert max(alone) < 0.002

    @pytest.mark.parametrize("clip", [0.1, None])
    @pytest.mark.parametrize("std", [1e-30, 1e-44])
    def test_vanishing_rows_stay_finite(self, std, clip):
        weight = gaussian(4, 32, std)
        codes, scale = quantize_int6_ref(weight, clip)
        assert torch.isfinite(scale).all() and torch.isfinite(dequantize_int6_ref(codes, scale)).all()

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

    @pytest.mark.parametrize(
        ("weight", "match"),
        [
            (torch.zeros(2, 32, device="meta"), "on 'meta' and holds no values"),
            (torch.zeros(2, 32).int(), "torch.int32"),
        ],
    )
    def test_weights_without_values_are_refused(self, weight, match):
        with pytest.raises(ValueError, match=match):
            quantize_int6_ref(weight)

    @pytest.mark.parametrize("shape", [(32,), (2, 3, 32), (4, 0), (0, 32)])
    def test_other_shapes_are_refused(self, shape):
        with pytest.raises(ValueError, match=r"takes \[N, K\]"):
            quantize_int6_ref(torch.zeros(shape), 0.1)


def with_a_large_column(rows=64, columns=1024):
    weight = gaussian(rows, columns)
    weight[:, 5] *= 30
    return weight


def student_t(rows=64, columns=1024, degrees=3.0):
    torch.manual_seed(1)
    return torch.distributions.StudentT(degrees).sample((rows, columns)) * 0.02


def by_absmax(weight):
    """Relative squared error of the grid that reaches each row's largest weight, written independently."""
    step = weight.double().abs().amax(1, keepdim=True) / 31
    off = weight.double() - (weight.double() / step).round() * step
    return float(off.square().sum() / weight.double().square().sum())


class TestSearch:
    @pytest.mark.parametrize(
        "weight", [with_a_large_column(), student_t(), gaussian(64, 1024)], ids=["30x", "t", "gauss"]
    )
    def test_no_worse_than_a_fixed_clip_and_than_absmax(self, weight):
        found = relative_error(weight, *quantize_int6_ref(weight))
        assert found <= relative_error(weight, *quantize_int6_ref(weight, 0.11))
        assert found <= by_absmax(weight) * 1.002, "scales have 11 bits"

    @pytest.mark.parametrize(("weight", "most"), [(with_a_large_column(), 0.21), (student_t(), 0.11)], ids=["30x", "t"])
    def test_row_scales_serve_outliers(self, weight, most):
        """A clip of 0.11 gives 0.57 and 0.29 here."""
        x = torch.randn(32, weight.size(1), generator=torch.Generator().manual_seed(2))
        exact = x @ weight.T
        out = x @ quantize_int6(weight, None).dequantize().T
        assert (out - exact).norm() < most * exact.norm()

    @pytest.mark.parametrize(("weight", "most"), [(with_a_large_column(), 0.06), (student_t(), 0.05)], ids=["30x", "t"])
    def test_groups_where_they_pay(self, weight, most):
        """The output's error is 0.19 and 0.094 with the best scale of every row."""
        x = torch.randn(32, weight.size(1), generator=torch.Generator().manual_seed(2))
        exact = x @ weight.T
        rows, groups = quantize_int6(weight, None), quantize_int6(weight)
        assert rows.group_size is None and groups.group_size in (64, 128)
        assert groups.nbytes - rows.nbytes == 2 * 64 * (1024 // groups.group_size - 1)
        errors = [float((x @ matrix.dequantize().T - exact).norm() / exact.norm()) for matrix in (rows, groups)]
        assert errors[1] < most < 0.6 * errors[0]

    @pytest.mark.parametrize("columns", [64, 128, 256, 1024, 14336])
    def test_ordinary_weights_keep_one_scale_a_row(self, columns):
        uniform = torch.rand(16, columns, generator=torch.Generator().manual_seed(4)) - 0.5
        for weight in (gaussian(16, columns), uniform, torch.zeros(16, columns)):
            assert pick_group_size(weight) is None and quantize_int6(weight).group_size is None

    def test_the_rule_of_group_sizes(self):
        """The least squared error * (1 + 128 / group), each quantised on its own."""
        picked = set()
        for weight in (
            student_t(),
            with_a_large_column(),
            gaussian(64, 1024),
            student_t(degrees=5.0),
            student_t(64, 192),
        ):
            costs = {}
            for size in (None, 128, 64):
                if size is None or weight.size(1) % size == 0:
                    error = relative_error(weight, *quantize_int6_ref(weight, None, size))
                    costs[size] = error * (1 + 128 / (size or math.inf))
            picked.add(pick_group_size(weight))
            assert pick_group_size(weight) == min(costs, key=costs.get)
        assert picked == {None, 64, 128}

    def test_the_pick_weights_errors_as_the_search_does(self):
        weight, moment = with_a_large_column(), torch.ones(1024)
        moment[5] = 0.0
        assert pick_group_size(weight) == 64 and pick_group_size(weight, second_moment=moment) is None

    def test_the_pick_looks_at_rows_spread_over_the_matrix(self, monkeypatch):
        weight = torch.cat([gaussian(32, 1024), with_a_large_column(32)])
        monkeypatch.setattr(reference, "SAMPLE", 8 * 1024)
        assert pick_group_size(weight) == 64

    def test_a_fixed_clip_and_a_group_size_given_are_kept(self):
        weight = with_a_large_column()
        assert quantize_int6(weight, clip=0.11).group_size is None
        for size in (None, 32, 64, 128):
            assert quantize_int6(weight, size).group_size == size

    @pytest.mark.parametrize("value", [math.nan, 1e8])
    def test_the_pick_leaves_errors_to_the_quantiser(self, value):
        weight = gaussian(16, 256)
        weight[3] = value
        with pytest.raises(ValueError, match=r"finite weights|row 3 needs the scale"):
            quantize_int6(weight)

    def test_each_row_has_the_best_of_many_scales(self):
        """Against a fine grid of scales in float64: at most 6% of the squared error above the best."""
        weight = torch.cat([with_a_large_column(4), student_t(4), gaussian(4, 1024)])
        codes, scale = quantize_int6_ref(weight)
        w = weight.double()
        error = (w - dequantize_int6_ref(codes, scale, torch.float64)).square().sum(1)
        steps = w.abs().amax(1, keepdim=True) / 31 * torch.linspace(0.1, 1.1, 200, dtype=torch.float64)
        off = w[:, None] - (w[:, None] / steps[..., None]).round().clamp(-31, 31) * steps[..., None]
        assert (error <= 1.06 * off.square().sum(2).amin(1)).all()

    def test_a_second_moment_weights_the_errors(self):
        """Inputs that are always near zero do not matter, however large their weights."""
        weight, moment = with_a_large_column(), torch.ones(1024)
        moment[5] = 1e-8
        x = torch.randn(64, 1024, generator=torch.Generator().manual_seed(3)) * moment.sqrt()
        exact = x @ weight.T
        plain, aware = (
            (x @ quantize_int6(weight, None, second_moment=m).dequantize().T) - exact for m in (None, moment)
        )
        assert aware.norm() < 0.3 * plain.norm() and aware.norm() < 0.04 * exact.norm()
        assert relative_error(weight, *quantize_int6_ref(weight, second_moment=moment), moment) ** 0.5 == pytest.approx(
            float(aware.norm() / exact.norm()), rel=0.1
        )

    def test_groups_get_their_share_of_the_second_moment(self):
        weight, moment = with_a_large_column(8, 256), torch.ones(256)
        moment[5] = 0.0
        codes, scale = quantize_int6_ref(weight, None, 64, moment)
        first, first_scale = quantize_int6_ref(weight[:, :64], None, None, moment[:64])
        assert torch.equal(codes[:, :64], first) and torch.equal(scale[:, 0], first_scale)
        assert scale[:, 0].max() < 0.2 * quantize_int6_ref(weight, None, 64)[1][:, 0].max()
        assert torch.equal(scale[:, 1], quantize_int6_ref(weight[:, 64:128])[1])

    def test_the_scale_of_the_moment_does_not_matter(self):
        weight, moment = gaussian(8, 128), torch.rand(128) + 0.1
        for factor in (1e-20, 1e20):
            wanted, found = (quantize_int6_ref(weight, second_moment=m)[0] for m in (moment, moment * factor))
            assert torch.equal(found, wanted)

    def test_blocks_of_rows_do_not_show(self, monkeypatch):
        weight = student_t(9, 64)
        whole = quantize_int6_ref(weight)
        monkeypatch.setattr(reference, "CPU_BLOCK", 128)
        assert all(torch.equal(a, b) for a, b in zip(quantize_int6_ref(weight), whole, strict=True))

    @pytest.mark.parametrize(
        ("moment", "match"),
        [
            (torch.ones(31), r"has shape \[31\]; this weight takes \[32\]"),
            (torch.ones(32).neg(), "below 0"),
            (torch.full((32,), math.nan), "holds a NaN"),
        ],
    )
    def test_other_moments_are_refused(self, moment, match):
        with pytest.raises(ValueError, match=match):
            quantize_int6_ref(gaussian(2, 32), second_moment=moment)

    def test_a_moment_beside_a_fixed_clip_is_refused(self):
        with pytest.raises(ValueError, match=r"with clip=0.1; it weights the search"):
            quantize_int6_ref(gaussian(2, 32), 0.1, second_moment=torch.ones(32))

    @pytest.mark.parametrize("clip", [0.11, None])
    def test_a_parameter_leaves_no_graph(self, clip):
        matrix = quantize_int6(nn.Parameter(gaussian(16, 64)), clip=clip)
        assert not matrix.packed.requires_grad and not matrix.scale.requires_grad

    @pytest.mark.slow
    def test_made_in_inference_mode_it_trains_what_is_before_it(self):
        with torch.inference_mode():
            matrix = quantize_int6(gaussian(16, 64))
        x = torch.randn(3, 64, requires_grad=True)
        int6_linear(x, matrix, backend="triton").sum().backward()
        assert x.grad.any()


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

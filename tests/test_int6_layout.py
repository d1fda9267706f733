"""int6 tiles bit by bit, what groups and rows are quantised to, and what is refused as a weight."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from int6_weights import GROUPED, HALVED, documented_tiles, documented_words, layout_1, matrix
from klora.kernels.int6 import (
    Int6Linear,
    Int6Matrix,
    Int6Weight,
    pack_int6,
    pack_int6_ref,
    packed_shape,
    quantize_int6,
    quantize_int6_ref,
    unpack_int6,
)
from klora.kernels.int6.layout import from_layout_1

SMOLLM2 = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]
"""The linears of a layer of SmolLM2-135M, N x K."""


class TestTiles:
    @given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 2**31))
    @settings(deadline=None, max_examples=40)
    def test_unpack_inverts_pack_at_every_size(self, rows, columns, seed):
        codes = torch.randint(-31, 32, (rows, columns), generator=torch.Generator().manual_seed(seed)).to(torch.int8)
        packed = pack_int6(codes)
        assert packed.shape == packed_shape(rows, columns) and packed.is_contiguous()
        assert torch.equal(unpack_int6(packed, (rows, columns)), codes)

    def test_every_code_in_every_place(self):
        for code in range(-31, 32):
            codes = torch.arange(16 * 128).view(16, 128).remainder(63).add(code).remainder(63).sub(31).to(torch.int8)
            assert torch.equal(unpack_int6(pack_int6(codes), (16, 128)), codes)

    @pytest.mark.parametrize("shape", [(32, 256), (7, 100), *HALVED])
    def test_words_are_those_of_the_documented_layout(self, shape):
        codes = torch.randint(-31, 32, shape, dtype=torch.int8)
        unsigned = pack_int6(codes).long() % 2**32
        assert unsigned.tolist() == [documented_words(tile) for tile in documented_tiles(codes)]

    def test_the_last_inputs_take_no_more_than_they_did_and_half_of_it_in_whole_blocks(self):
        for rows in range(1, 300):
            for columns in (1, 40, 64, 65, 128, 192, 193, 576):
                tiles, padded = packed_shape(rows, columns)[0], -(-rows // 16) * -(-columns // 128)
                assert tiles <= padded and (tiles == padded or 0 < columns % 128 <= 64)
        assert packed_shape(1536, 576)[0] == 96 * 4 + 48 and packed_shape(128, 64)[0] == 4

    def test_the_linears_of_smollm2_take_less_than_0_4_of_bf16(self):
        dense = sum(2 * rows * columns for rows, columns in SMOLLM2)
        int6 = sum(matrix(*shape).nbytes for shape in SMOLLM2)
        assert int6 / dense == pytest.approx(0.3782, abs=5e-5)

    @pytest.mark.parametrize("shape", [(20, 128), *HALVED])
    def test_tiles_of_layout_1_become_these(self, shape):
        codes = torch.randint(-31, 32, shape, dtype=torch.int8)
        assert torch.equal(from_layout_1(layout_1(codes), shape), pack_int6(codes))

    def test_padding_holds_code_zero(self):
        for shape, padded in (((3, 5), (16, 64)), ((67, 69), (80, 128)), ((130, 130), (144, 192))):
            whole = unpack_int6(pack_int6(torch.full(shape, 7, dtype=torch.int8)), padded)
            assert whole.sum() == shape[0] * shape[1] * 7 and (whole[: shape[0], : shape[1]] == 7).all()

    @pytest.mark.parametrize("code", [32, -32, 127, -128])
    def test_other_codes_are_refused_by_value(self, code):
        codes = torch.zeros(2, 32, dtype=torch.int8)
        codes[1, 5] = code
        with pytest.raises(ValueError, match=f"a code is {code};"):
            pack_int6(codes)

    @pytest.mark.parametrize("codes", [torch.zeros(2, 32), torch.zeros(2, 0).to(torch.int8), torch.zeros(3)])
    def test_other_tensors_are_refused(self, codes):
        with pytest.raises(ValueError, match="packing takes int8"):
            pack_int6(codes)

    def test_packed_rows_become_the_same_weight(self):
        codes, scale = quantize_int6_ref(torch.randn(20, 70), 0.1)
        rows = Int6Weight(pack_int6_ref(codes), scale, (20, 70))
        tiles = Int6Matrix.from_rows(rows)
        assert torch.equal(tiles.codes(), codes) and torch.equal(tiles.dequantize(), rows.dequantize())


class TestQuantizer:
    @pytest.mark.parametrize(("rows", "columns", "group_size"), GROUPED)
    def test_a_group_is_quantised_like_a_row(self, rows, columns, group_size):
        weight = torch.randn(rows, columns)
        grouped = quantize_int6(weight, group_size)
        assert grouped.group_size == group_size
        codes, scale = quantize_int6_ref(weight.reshape(-1, group_size))
        assert torch.equal(grouped.codes().reshape(-1, group_size), codes)
        assert torch.equal(grouped.scale.flatten(), scale)
        exact = codes.double() * scale.double()[:, None]
        assert torch.equal(grouped.dequantize(torch.float64), exact.view(rows, columns))

    @pytest.mark.parametrize(("columns", "group_size"), [(96, 64), (64, 16), (64, 0), (64, 64.0), (64, "all")])
    def test_impossible_groups_are_refused(self, columns, group_size):
        with pytest.raises(ValueError, match=f"group_size={group_size} with K={columns}"):
            quantize_int6(torch.randn(4, columns), group_size)
        with pytest.raises(ValueError, match=f"group_size={group_size} with in_features={columns}"):
            Int6Linear(columns, 4, group_size=group_size)

    def test_bytes_of_a_weight(self):
        assert matrix(64, 256).nbytes == 64 * 256 * 3 // 4 + 2 * 64
        assert matrix(64, 256, 32).nbytes == 64 * 256 * 3 // 4 + 2 * 64 * 8


class TestMatrix:
    def test_parts_that_do_not_fit_are_refused(self):
        good = matrix(32, 128)
        with pytest.raises(ValueError, match="layout version 1; this klora reads 2"):
            Int6Matrix(good.packed, good.scale, good.shape, layout=1)
        with pytest.raises(ValueError, match="truncated"):
            Int6Matrix(good.packed[:1], good.scale, good.shape)
        with pytest.raises(ValueError, match="packed is torch.int64"):
            Int6Matrix(good.packed.long(), good.scale, good.shape)
        for scale in (good.scale[:5], good.scale.double(), good.scale[:, None].repeat(1, 3)):
            with pytest.raises(
                ValueError, match=r"take float16 or float32 \[32\] or \[32, 4\] or \[32, 2\] or \[32, 1\]"
            ):
                Int6Matrix(good.packed, scale, good.shape)
        with pytest.raises(ValueError, match="not both contiguous"):
            Int6Matrix(good.packed.mT.contiguous().mT, good.scale, good.shape)
        with pytest.raises(ValueError, match="truncated or not int6"):
            unpack_int6(good.packed[:, :2], (32, 128))

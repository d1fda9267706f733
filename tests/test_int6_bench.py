"""The int6 group of the benchmark: its gate, its ladder of rows, its peers' codes."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from klora.bench import int6 as bench
from klora.bench.entry import Variant
from klora.bench.gate import RedGate, check
from klora.bench.tolerance import relative_error
from klora.kernels.int6 import pick_config, pick_config_dx, quantize_int6


class TestBenchmark:
    @pytest.mark.parametrize("entry", bench.ENTRIES[:2], ids=lambda entry: entry.op)
    def test_the_gate_judges_every_number_of_rows_of_its_ladder(self, entry):
        shape = {**bench.GATE, "N": 32, "K": 64}
        inputs = entry.draw(shape, torch.device("cpu"), torch.float32, torch.Generator().manual_seed(0))
        assert tuple(len(out) for out in entry.variants[1].build(shape, "cpu", torch.float32)(*inputs)) == bench.LADDER
        assert len(check(entry, shape, torch.device("cpu"), torch.float32)["int6"].errors) == len(bench.LADDER)

    @pytest.mark.parametrize("kernel", ["warp", "tile", "wide", "dense"])
    def test_the_ladder_reaches_every_kernel(self, kernel):
        picks = [pick(M, 4096, 4096, torch.bfloat16) for pick in (pick_config, pick_config_dx) for M in bench.LADDER]
        assert kernel in {config.kernel for config in picks}

    @pytest.mark.parametrize("spoilt", range(7))
    def test_the_gate_of_packing_judges_every_shape(self, spoilt):
        """A quantiser that is wrong for one shape of matrix is found out, whichever of the layer's matrices has it."""
        (entry,) = (entry for entry in bench.ENTRIES if entry.op == "int6_packing")
        shape = bench._layer_sizes(entry.toy)[spoilt]

        def quantize(weight):
            matrix = quantize_int6(weight, clip=bench.CLIP)
            if tuple(weight.shape) == shape:
                matrix.packed.zero_()
            return matrix

        wrong = Variant("wrong", bench._packing(quantize), captures=False, is_ours=True)
        entry = dataclasses.replace(entry, variants=(*entry.variants, wrong))
        with pytest.raises(RedGate, match="wrong has error"):
            check(entry, entry.toy, torch.device("cpu"), torch.float32)

    def test_the_peers_codes_stand_for_the_weight(self):
        weight, x = torch.randn(48, 256), torch.randn(3, 256)
        exact = F.linear(x, weight)
        assert relative_error(bench.linear_int8(x, bench.quantize_int8(weight)), exact) < 0.01
        codes, scale, zero = bench.quantize_uint4(weight)
        dense = ((codes.view(-1, 128) - zero) * scale).view(48, 256)
        assert codes.max() == 15 and codes.min() == 0 and relative_error(F.linear(x, dense), exact) < 0.15

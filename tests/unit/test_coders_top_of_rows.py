"""The filtered top k against torch's, on products that are exact in float32 whatever their order."""

import pytest
import torch

from autointerp.coders.activations import TopK
from autointerp.coders.coder import Coder, CoderSpec
from autointerp.coders.top_of_rows import BLOCK_ROWS, SLICE, TopOfRows, is_worthwhile


def whole_numbers(*shape, high, seed):
    return torch.randint(-high, high + 1, shape, generator=torch.Generator().manual_seed(seed)).float()


def as_set(rows, latents, values):
    found = list(zip(rows.tolist(), latents.tolist(), values.tolist(), strict=True))
    assert len(found) == len(set(found))
    return set(found)


def by_torch(x, weight, bias, k):
    values, latents = (x @ weight.T + bias).topk(k, dim=1, sorted=False)
    kept = values > 0
    rows = torch.arange(len(x))[:, None].expand_as(latents)
    return as_set(rows[kept], latents[kept], values[kept])


class TestTopOfRows:
    # high = 1 gives a handful of different values, so that almost every row is tied at its k-th; 1000 hardly any.
    @pytest.mark.parametrize("high", [1, 4, 1000])
    @pytest.mark.parametrize("width", [SLICE, 2 * SLICE + 5, 3 * SLICE - 1])
    def test_equals_topk_with_its_choice_among_equals(self, high, width):
        x, weight = whole_numbers(40, 8, high=high, seed=1), whole_numbers(width, 8, high=high, seed=2)
        bias = whole_numbers(width, high=high, seed=3)
        found = TopOfRows(weight, bias, 7).find(x)
        assert as_set(*found) == by_torch(x, weight, bias, 7)

    @pytest.mark.parametrize("shift", [-30.0, -18.0, -10.0])
    def test_fewer_than_k_positive(self, shift):
        x, weight = whole_numbers(40, 8, high=2, seed=1), whole_numbers(SLICE + 9, 8, high=2, seed=2)
        bias = torch.full((SLICE + 9,), shift)
        expected = by_torch(x, weight, bias, 20)
        assert len(expected) < 40 * 20
        assert as_set(*TopOfRows(weight, bias, 20).find(x)) == expected

    @pytest.mark.parametrize("order", ["ascending", "descending", "one_group"])
    def test_latents_in_any_order(self, order):
        width, k = 3 * SLICE, 16
        bias = torch.arange(width).float()
        if order == "descending":
            bias = bias.flip(0)
        elif order == "one_group":  # the top k are neighbours in one group of the second slice
            bias = torch.zeros(width)
            bias[SLICE + 3 : 2 * SLICE : SLICE // 16] = torch.arange(16) + 1.0
        x, weight = torch.zeros(3, 2), torch.zeros(width, 2)
        assert as_set(*TopOfRows(weight, bias, k).find(x)) == by_torch(x, weight, bias, k)


def test_a_coder_uses_it_for_any_number_of_rows(monkeypatch):
    width, k, d = 64 * 5, 5, 4
    weight = whole_numbers(width, d, high=100, seed=1)
    spec = CoderSpec(format="test", source="made", digest="", width=width, d_in=d, d_out=d, activation="topk")
    coder = Coder(
        spec=spec, activation=TopK(k), encoder_LD=weight, encoder_bias_L=torch.ones(width), decoder_LE=weight,
        decoder_bias_E=whole_numbers(d, high=9, seed=4), subtract_decoder_bias=True,
    )  # fmt: skip
    assert is_worthwhile(coder.activation, width) and not is_worthwhile(TopK(k, signed=True), width)
    monkeypatch.setattr("autointerp.coders.coder.ACTS_PER_CHUNK", 2 * BLOCK_ROWS * k)
    x = whole_numbers(3 * BLOCK_ROWS + 1, d, high=9, seed=5)
    pieces = list(coder.encode_chunks(x))
    assert len(pieces) == 2
    found = set().union(*(as_set(acts.rows, acts.latents, acts.values) for acts in pieces))
    assert found == by_torch(x - coder.decoder_bias_E, weight, coder.encoder_bias_L, k)
    assert len(coder.encode(x[:0])) == 0

"""A coder small enough to check by hand, and what published formats make of it: shared by the tests of the formats."""

import pytest
import torch

# The recipe: dyadic numbers, exact in float32. d = 4, F = 8, two tokens.
D, F = 4, 8
X = torch.tensor([[((3 * t + 5 * i) % 7 - 3) / 2 for i in range(D)] for t in range(2)])
W_ENC = torch.tensor([[((2 * i + 3 * j + 1) % 9 - 4) / 4 for j in range(F)] for i in range(D)])
W_DEC = torch.tensor([[((5 * j + 2 * i + 2) % 7 - 3) / 4 for i in range(D)] for j in range(F)])
B_ENC = torch.tensor([(j % 3 - 1) / 8 + j / 256 for j in range(F)])
B_DEC = torch.tensor([((i % 2) * 2 - 1) / 8 for i in range(D)])
THRESHOLD = torch.tensor([0.25 + 0.125 * (j % 3) + j / 16 for j in range(F)])
W_SKIP = torch.tensor([[((o + 2 * i) % 3 - 1) / 4 for i in range(D)] for o in range(D)])

SUB = {1: 1.41016, 4: 1.42188, 7: 1.43359}
TOPK_ROW_1 = {1: 0.78516, 4: 0.79688, 7: 0.80859}
JUMP = [
    {1: 1.25391, 4: 1.26562, 7: 1.27734},
    {0: 0.875, 1: 0.62891, 3: 0.88672, 4: 0.64062, 6: 0.89844},
]


def as_rows(acts, num_rows=2):
    rows = [{} for _ in range(num_rows)]
    for row, latent, value in zip(acts.rows.tolist(), acts.latents.tolist(), acts.values.tolist(), strict=True):
        assert latent not in rows[row] and value != 0
        rows[row][latent] = value
    return rows


def check(coder, acts, outputs):
    found = coder.encode(X)
    assert found.values.dtype == torch.float32 and found.rows.dtype == found.latents.dtype == torch.int64
    for row, wanted in zip(as_rows(found), acts, strict=True):
        assert row == pytest.approx(wanted, abs=1e-5)
    assert coder.decode(found, X) == pytest.approx(torch.tensor(outputs).numpy(), abs=1e-5)
    dense = torch.zeros(2, F)
    dense[found.rows, found.latents] = found.values
    assert torch.equal(coder.encode_dense(X), dense)

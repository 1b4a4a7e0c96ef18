"""No coder ever makes an array of tokens x latents; what it holds at a time is bounded by its chunks."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from autointerp.coders.activations import Gated, GroupMax, JumpRelu, MatchingPursuit, Relu, TopK
from autointerp.coders.coder import _LATENTS_PER_PIECE, Coder, CoderSpec
from autointerp.coders.top_of_rows import BLOCK_ROWS, SLICE

WIDTH, D, TOKENS, K, ROWS = 20_000, 2, 200, 8, 20


class Largest(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that any operation gives."""

    def __init__(self):
        super().__init__()
        self.num_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.num_elements = max([self.num_elements, *sizes])
        return result


def make(activation):
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    spec = CoderSpec(format="test", source="made", digest="", width=WIDTH, d_in=D, d_out=D, activation=activation.name)
    decoder = torch.nn.functional.normalize(normal(WIDTH, D), dim=1)
    # So that few latents are active, whatever the rule.
    bias = torch.full((WIDTH,), -5.0)
    tensors = {"encoder_LD": normal(WIDTH, D), "encoder_bias_L": bias, "decoder_LE": decoder, "decoder_bias_E": normal(D)}
    return Coder(spec=spec, activation=activation, **tensors), normal(TOKENS, D)


@pytest.mark.parametrize(
    "activation",
    [
        TopK(K),
        TopK(K, signed=True),
        GroupMax(K),
        MatchingPursuit(residual_threshold=0.01, max_iterations=4, stop_on_repeat=True),
        Relu(),
        JumpRelu(torch.full((WIDTH,), 0.5)),
        Gated(torch.full((WIDTH,), -0.5), torch.ones(WIDTH), torch.zeros(WIDTH)),
    ],
    ids=lambda activation: activation.name,
)
def test_the_largest_tensor_is_a_chunk(monkeypatch, activation):
    coder, x = make(activation)
    latents = WIDTH if activation.needs_all_latents else _LATENTS_PER_PIECE
    assert latents <= WIDTH
    monkeypatch.setattr("autointerp.coders.coder.PIECE_BYTES", 4 * latents * ROWS)
    monkeypatch.setattr("autointerp.coders.coder.MAX_PIECE_BYTES", 4 * latents * ROWS)
    with Largest() as whole:
        coder.encode_dense(x)
    assert whole.num_elements == TOKENS * WIDTH, "the watch sees a dense array"
    with Largest() as seen:
        acts = coder.encode(x)
    chunk = BLOCK_ROWS * SLICE if activation == TopK(K) else ROWS * latents
    assert len(acts) > 0 and seen.num_elements <= max(chunk, 2 * len(acts), WIDTH * D)
    with Largest() as decoded:
        coder.decode(acts, x)
    assert decoded.num_elements <= max(len(acts) * D, ROWS * latents)


HOLES = """
import torch
from autointerp.coders.activations import JumpRelu
from autointerp.coders.coder import Coder, CoderSpec
from autointerp.jobs.ahead import ahead

def anonymous():
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))

torch.set_num_threads(1)
width, d = 131072, 16
spec = CoderSpec(format="test", source="made", digest="", width=width, d_in=d, d_out=d, activation="jumprelu")
rows = torch.nn.functional.normalize(torch.randn(width, d), dim=1)
coder = Coder(spec=spec, activation=JumpRelu(torch.full((width,), 2.8)), encoder_LD=rows, encoder_bias_L=torch.zeros(width),
              decoder_LE=rows, decoder_bias_E=torch.zeros(d))
batches = (list(coder.encode_chunks(torch.randn(2048, d))) for _ in range(8))
before, kept, num = anonymous(), [], 0
for chunks in ahead(batches, size=2):
    for acts in chunks:  # as a run's buffer does
        kept += [acts.latents.numpy().astype("uint64"), acts.values.numpy().copy()]
        num += len(acts)
print(anonymous() - before, sum(array.nbytes for array in kept) / 2**20, num)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_encoding_leaves_no_holes_in_memory():
    """Buffers freed between results that stay once cost many times what was kept, for wide coders of many active latents."""
    found = subprocess.run([sys.executable, "-c", HOLES], check=True, capture_output=True, text=True).stdout
    grown, kept, num = map(float, found.split())
    assert 200 < num / (8 * 2048) < 400, "a workload that had the holes"
    assert grown < 3 * kept + 150

"""Caching on a GPU against caching on the CPU; nothing to run where there is no GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from autointerp.demo import bundled
from autointerp.jobs.cache import cache
from autointerp.store.reader import open_store

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def test_a_gpu_finds_what_the_cpu_finds(tmp_path):
    stores = {}
    for device in ("cpu", "cuda"):
        settings = {
            "subject": str(bundled("model")),
            "corpus": {"source": "stdlib", "num_tokens": 16384},
            "coders": [{"name": "sae", "source": str(bundled("sae"))}],
            "out": tmp_path / device,
            "device": device,
            "dtype": "float32",
            "batch_tokens": 2048,
            "progress": False,
        }
        stores[device] = open_store(cache(settings)).coder("sae")
    counts = {device: coder.latents["count"] for device, coder in stores.items()}
    assert abs(counts["cpu"].sum() - counts["cuda"].sum()) <= 1e-3 * counts["cpu"].sum()
    for latent in np.argsort(counts["cpu"])[-20:].tolist():
        found = {
            device: dict(zip(*map(np.ndarray.tolist, coder.activations(latent)), strict=True))
            for device, coder in stores.items()
        }
        shared = found["cpu"].keys() & found["cuda"].keys()
        assert len(shared) >= 0.99 * max(map(len, found.values()))
        np.testing.assert_allclose(
            [found["cpu"][position] for position in shared], [found["cuda"][position] for position in shared], rtol=0.02
        )

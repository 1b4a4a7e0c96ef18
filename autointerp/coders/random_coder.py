"""The random control of a coder: a TopK autoencoder whose directions are drawn, not trained (arXiv 2410.13928, section G).

Width and number of active latents are the coder's, and so is what it reads. What explanations of such latents score is what
the data and the selection of windows alone give.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from autointerp.coders.activations import TopK
from autointerp.coders.coder import Coder
from autointerp.digest import digest, generator


def random_coder(coder: Coder, *, k: int, seed: int) -> Coder:
    """Return a TopK coder of as many latents on the same hookpoint: random unit decoder rows, the encoder their transpose.

    No bias. The draw depends on `seed` and on the digest of `coder`.
    """
    spec = coder.spec
    recipe = {"format": "random", "of": spec.digest, "width": spec.width, "d": spec.d_in, "seed": seed}
    rows = generator("random coder", seed, spec.digest).standard_normal((spec.width, spec.d_in), dtype=np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    decoder = torch.from_numpy(rows)
    reading = {"activation": "topk", "k": k, "seed": seed}
    if coder.inputs:
        reading["inputs"] = [rule.name for rule in coder.inputs]
    return Coder(
        spec=replace(
            spec,
            format="random",
            source=f"random-coder of {spec.source}",
            revision=None,
            digest=digest(recipe),
            d_out=spec.d_in,
            activation="topk",
            k=k,
            target=None,
            is_transcoder=False,
            reconstructs=False,
            reading=reading,
            l0=None,
            inferred={},
            notes=(),
            labels=(),
        ),
        encoder_LD=decoder,
        encoder_bias_L=torch.zeros(spec.width),
        decoder_LE=decoder,
        decoder_bias_E=torch.zeros(spec.d_in),
        activation=TopK(k),
        inputs=coder.inputs,
    )

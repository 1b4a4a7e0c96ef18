"""Makes ``delphi-cache`` beside this file with delphi's own cache writer.

Run once, in an environment of its own with eai-delphi==0.1.3, from the root of the repository:
    python tests/data/make_delphi_cache.py
Latents are planted: latent i of module layers.1 fires on every token of WORDS[i], latent i of layers.2.mlp on the token after it.
"""

import random
import shutil
from pathlib import Path

import torch
from delphi.config import CacheConfig
from delphi.latents.cache import LatentCache
from tokenizers import Tokenizer

ROOT = Path(__file__).parents[2]
OUT = Path(__file__).parent / "delphi-cache"
WORDS = (" self", " return", " import", " None", " for", " not")
FILLERS = (" x", " =", " (", " value", ",", " name", " +", ")", " list", " data", " 1", ":")
CONTEXTS, CTX_LEN, BATCH = 160, 32, 16


def tokens() -> tuple[torch.Tensor, list[int]]:
    tokenizer = Tokenizer.from_file(str(ROOT / "autointerp" / "demo" / "assets" / "model" / "tokenizer.json"))
    ids = {word: tokenizer.encode(word, add_special_tokens=False).ids for word in (*WORDS, *FILLERS)}
    assert all(len(found) == 1 for found in ids.values()), ids
    rng = random.Random(0)
    rows = []
    for _ in range(CONTEXTS):
        planted = rng.sample(WORDS, 2)
        row = [rng.choice(FILLERS) for _ in range(CTX_LEN)]
        for word in planted:
            for place in rng.sample(range(CTX_LEN), 3):
                row[place] = word
        rows.append([ids[word][0] for word in row])
    return torch.tensor(rows), [ids[word][0] for word in WORDS]


def main() -> None:
    all_tokens, planted = tokens()
    generator = torch.Generator().manual_seed(0)
    cache = LatentCache(None, {}, batch_size=BATCH)
    cache.width = len(WORDS)
    for number, batch in enumerate(all_tokens.split(BATCH)):
        here = torch.stack([batch == token for token in planted], dim=2).float()
        before = torch.nn.functional.pad(here, (0, 0, 1, 0))[:, :-1]
        for module, mask in (("layers.1", here), ("layers.2.mlp", before)):
            latents = mask * (0.5 + torch.rand(mask.shape, generator=generator))
            latents[mask == 0] = 5e-6  # below what delphi keeps
            if module == "layers.2.mlp" and number == 0:
                row, offset = (mask[:, :, 3] > 0).nonzero()[0].tolist()
                latents[row, offset, 3] = 70_000.0  # beyond float16
            cache.cache.add(latents, batch, number, module)
    cache.cache.save()
    shutil.rmtree(OUT, ignore_errors=True)
    cache.save_splits(2, OUT / "latents")
    settings = CacheConfig(
        batch_size=BATCH, cache_ctx_len=CTX_LEN, n_tokens=all_tokens.numel(), n_splits=2, dataset_repo="none"
    )
    cache.save_config(OUT / "latents", settings, "someone/planted")


main()

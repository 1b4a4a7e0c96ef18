"""Fixtures shared by all tests, and an environment without network or surprises."""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
for name in [name for name in os.environ if name.startswith("SLURM_") or name in ("OPENAI_API_KEY", "HF_TOKEN")]:
    del os.environ[name]

sys.path.insert(0, str(Path(__file__).parent.parent))  # "tests.tiny", also when pytest is started as a script

import pytest  # noqa: E402  the environment must be set before anything imports torch or transformers


@pytest.fixture(scope="session")
def tiny_subject(tmp_path_factory):
    """Folder of a random 3-layer Llama of width 32 with a byte-level tokenizer of 400 tokens."""
    from tests.tiny import tiny_subject

    return tiny_subject(tmp_path_factory.mktemp("subject"))


@pytest.fixture(scope="session")
def tiny_sae(tmp_path_factory):
    """Folder of a sparsify SAE for `tiny_subject` at layers.1: 64 latents, k 4."""
    from tests.tiny import tiny_sparsify

    return tiny_sparsify(tmp_path_factory.mktemp("sae"))


@pytest.fixture(scope="session")
def tiny_transcoder(tmp_path_factory):
    """Folder of a sparsify skip transcoder for `tiny_subject` at layers.1.mlp: 48 latents, k 3."""
    from tests.tiny import tiny_sparsify

    folder = tmp_path_factory.mktemp("transcoder")
    return tiny_sparsify(folder, width=48, k=3, hookpoint="layers.1.mlp", seed=1, skip=True, transcode=True)

"""Tiny models, tokenizers and coders for tests: random weights, real file formats."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM, PreTrainedTokenizerFast

TEXTS = [
    "def add(a, b):\n    return a + b\n\n\nclass Point:\n    def __init__(self, x, y):\n        self.x = x\n",
    "The quick brown fox jumps over the lazy dog. It was the best of times, it was the worst of times.\n",
    "import os\nfor name in os.listdir('.'):\n    if name.endswith('.py'):\n        print(name)\n",
    'Gr\u00fc\u00dfe aus K\u00f6ln! \u4f60\u597d\uff0c\u4e16\u754c \U0001f600\U0001f680\n',
]  # fmt: skip
TEMPLATE = "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"


def tiny_tokenizer(*, vocab_size: int = 400, bos: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on `TEXTS`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|bos|>", "<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 4, trainer)
    names = {"bos_token": "<|bos|>"} if bos else {}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        additional_special_tokens=["<|user|>", "<|assistant|>", "<|end|>"],
        **names,
    )
    fast.chat_template = TEMPLATE
    return fast


def tiny_model(*, d: int = 32, layers: int = 3, vocab_size: int = 400, seed: int = 0) -> LlamaForCausalLM:
    """A random Llama."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=d,
        intermediate_size=2 * d,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=1,
    )
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def tiny_subject(folder: Path, *, d: int = 32, layers: int = 3, bos: bool = True, seed: int = 0) -> Path:
    """Save a random Llama and its tokenizer as transformers does; return `folder`."""
    tokenizer = tiny_tokenizer(bos=bos)
    tiny_model(d=d, layers=layers, vocab_size=len(tokenizer), seed=seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_mamba(folder: Path, *, d: int = 32, layers: int = 3, seed: int = 0) -> Path:
    """Save a random Mamba and its tokenizer as transformers does; return `folder`."""
    tokenizer = tiny_tokenizer()
    torch.manual_seed(seed)
    config = MambaConfig(vocab_size=len(tokenizer), hidden_size=d, num_hidden_layers=layers, state_size=4, pad_token_id=1)
    model = MambaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith(("weight", "D")):  # what it remembers and for how long stays as it starts
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_sparsify(
    folder: Path, d: int = 32, width: int = 64, k: int = 4, *, hookpoint: str = "layers.1", seed: int = 0, skip: bool = False,
    transcode: bool = False, **config: object,
) -> Path:  # fmt: skip
    """Write a random sparsify coder to `folder`/`hookpoint`; return that folder."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    out = folder / hookpoint
    out.mkdir(parents=True, exist_ok=True)
    directions = torch.nn.functional.normalize(normal(width, d), dim=1)
    # A small step along the directions that fit best: it reconstructs a little, as `cache` wants of an SAE.
    tensors = {
        "encoder.weight": directions,
        "encoder.bias": 0.01 * normal(width),
        "W_dec": 0.2 * directions,
        "b_dec": 0.01 * normal(d),
    }
    if skip:
        tensors["W_skip"] = normal(d, d)
    save_file(tensors, out / "sae.safetensors")
    values = {"d_in": d, "num_latents": width, "k": k, "activation": "topk", "skip_connection": skip, "transcode": transcode}
    (out / "cfg.json").write_text(json.dumps(values | config))
    return out

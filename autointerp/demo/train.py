"""Train the bundled demo: a small Llama, two TopK SAEs and a skip transcoder, on Python's standard library.

Run as ``python -m autointerp.demo.train OUT``. Writes OUT/model (transformers), OUT/sae, OUT/sae-seed2 and
OUT/skip-transcoder (sparsify layout: one folder per hookpoint) and OUT/figures.json with the measured figures that the
model card quotes. The modules of ``subject.stdlib.HELD_OUT`` are kept out of training, and every figure is on them.

The SAE is TopK (arXiv 2406.04093) with its auxiliary loss for dead latents; the skip transcoder follows
arXiv 2501.18823. Hidden matrices of the subject are trained with Muon, the rest with AdamW.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from autointerp.subject.stdlib import HELD_OUT, module_of, stdlib_files, stdlib_root

# Shapes: B sequences, T tokens, D model width, L latents, K active latents, N tokens in a batch.

VOCAB_SIZE, CTX_LEN = 4096, 512
SPECIAL_TOKENS = ["<|bos|>", "<|eos|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
NUM_LATENTS, K, AUX_K, DEAD_AFTER_TOKENS = 2560, 24, 96, 250_000
CODERS = {  # name: (hookpoint folder, module, is transcoder, seed)
    "sae": ("layers.2", "model.layers.2", False, 0),
    "sae-seed2": ("layers.2", "model.layers.2", False, 1),
    "skip-transcoder": ("layers.2.mlp", "model.layers.2.mlp", True, 0),
}


def read_texts() -> tuple[list[str], list[str]]:
    """Return (training texts, held-out texts), one per file that decodes as UTF-8."""
    root, train, held = stdlib_root(), [], []
    for path in stdlib_files(include_tests=True):
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        relative = path.relative_to(root)
        is_test = "test" in relative.parts or "tests" in relative.parts
        if module_of(relative) not in HELD_OUT:
            train.append(text)
        elif not is_test:
            held.append(text)
    return train, held


def train_tokenizer(texts: list[str], out: Path) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", pair="<|bos|> $A $B", special_tokens=[("<|bos|>", 0)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        pad_token="<|pad|>",
        extra_special_tokens=["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
        model_max_length=8192,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    save_tokenizer(fast, out)
    return fast


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Save a tokenizer under the names that transformers 4 knows; 5 reads them too, and writes others."""
    tokenizer.save_pretrained(out)
    path = out / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    config["additional_special_tokens"] = config.pop("extra_special_tokens")
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def encode_texts(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> np.ndarray:
    """Return all texts as one uint16 array, each preceded by BOS."""
    encoded = tokenizer.backend_tokenizer.encode_batch(texts)
    return np.concatenate([np.array(item.ids, dtype=np.uint16) for item in encoded])


def sample_batch(tokens: np.ndarray, num_seqs: int, rng: np.random.Generator) -> Tensor:
    """Return random windows [B, CTX_LEN + 1], each made to start with BOS as the cache will feed them."""
    starts = rng.integers(0, len(tokens) - CTX_LEN - 1, num_seqs)
    batch = np.stack([tokens[s : s + CTX_LEN + 1] for s in starts]).astype(np.int64)
    batch[:, 0] = 0
    return torch.from_numpy(batch)


def new_model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=3,
        num_key_value_heads=3,
        head_dim=64,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        rms_norm_eps=1e-5,
    )
    return LlamaForCausalLM(config)


def lm_loss(model: LlamaForCausalLM, batch: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(input_ids=batch[:, :-1]).logits
    return F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())


def learning_rate(progress: float, decay_frac: float = 0.45) -> float:
    """Warm-up over 2%, constant, then linear decay over the last `decay_frac` of training (warm-up, stable, decay)."""
    return min(progress / 0.02, 1.0, max(0.0, (1.0 - progress) / decay_frac))


def train_model(
    tokens: np.ndarray, out: Path, *, num_tokens: int, snapshot_every_s: float, start_from: Path | None
) -> LlamaForCausalLM:
    """Train the subject; with `start_from`, go on from a snapshot of the constant phase and only decay."""
    model, rng = new_model(0), np.random.default_rng(0)
    if start_from:
        rng = np.random.default_rng(1)
        model.load_state_dict(LlamaForCausalLM.from_pretrained(start_from, dtype=torch.float32).state_dict())
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if not any(p is m for m in matrices)]
    optimizers: list[tuple[torch.optim.Optimizer, float]] = [
        (torch.optim.Muon(matrices, lr=0.02, weight_decay=0.05, momentum=0.95), 0.02),
        (torch.optim.AdamW(others, lr=4e-3, betas=(0.9, 0.95), weight_decay=0.0), 4e-3),
    ]
    num_seqs = 16
    num_steps = num_tokens // (num_seqs * CTX_LEN)
    start = last_snapshot = time.monotonic()
    running = 0.0
    for step in range(num_steps):
        scale = learning_rate((step + 1) / num_steps, 0.98 if start_from else 0.45)
        for optimizer, base in optimizers:
            optimizer.param_groups[0]["lr"] = base * scale
        loss = lm_loss(model, sample_batch(tokens, num_seqs, rng))
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, _ in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        running = 0.98 * running + 0.02 * loss.item() if step else loss.item()
        now = time.monotonic()
        if step % 50 == 0:
            rate = (step + 1) * num_seqs * CTX_LEN / (now - start)
            print(f"step {step}/{num_steps} loss {running:.3f} {rate:.0f} tok/s", flush=True)
        if now - last_snapshot > snapshot_every_s:
            save_model(model, out)
            last_snapshot = now
    save_model(model, out)
    return model


def save_model(model: LlamaForCausalLM, out: Path) -> None:
    copy = new_model(0).to(torch.bfloat16)
    copy.load_state_dict(model.state_dict())
    copy.save_pretrained(out)


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, tokens: np.ndarray) -> float:
    """Mean nats per token over the held-out tokens, in contexts of CTX_LEN that start with BOS."""
    total, count = 0.0, 0
    for start in range(0, len(tokens) - CTX_LEN, CTX_LEN * 16):
        chunk = tokens[start : start + CTX_LEN * 16]
        rows = chunk[: len(chunk) // CTX_LEN * CTX_LEN].reshape(-1, CTX_LEN).astype(np.int64)
        batch = torch.from_numpy(np.concatenate([np.zeros((len(rows), 1), dtype=np.int64), rows], axis=1))
        total += lm_loss(model, batch).item() * rows.size
        count += rows.size
    return total / count


def ngram_losses(train: np.ndarray, held: np.ndarray) -> dict[str, float]:
    """Held-out nats per token of unigram, bigram and trigram models, interpolated with fitted-on-nothing weights.

    The lower order is always mixed in (Jelinek-Mercer), with the weight that is best on the last 5% of `train`.
    """
    split = int(len(train) * 0.95)
    fit, dev = train[:split].tolist(), train[split:].tolist()
    uni = Counter(fit)
    bi = Counter(pairwise(fit))
    tri = Counter(zip(fit, fit[1:], fit[2:], strict=False))
    total = len(fit) + VOCAB_SIZE

    def probabilities(tokens: list[int]) -> np.ndarray:
        rows = []
        for a, b, c in zip(tokens, tokens[1:], tokens[2:], strict=False):
            p2 = bi[(b, c)] / uni[b] if uni[b] else 0.0
            p3 = tri[(a, b, c)] / bi[(a, b)] if bi[(a, b)] else 0.0
            rows.append(((uni[c] + 1) / total, p2, p3))
        return np.array(rows)

    dev_p, held_p = probabilities(dev), probabilities(held.tolist())
    grid = np.linspace(0.02, 0.98, 33)

    def loss(p: np.ndarray, lower: np.ndarray, weight: float) -> float:
        return float(-np.log((1 - weight) * lower + weight * p).mean())

    w2 = min(grid, key=lambda w: loss(dev_p[:, 1], dev_p[:, 0], w))
    dev2, held2 = ((1 - w2) * p[:, 0] + w2 * p[:, 1] for p in (dev_p, held_p))
    w3 = min(grid, key=lambda w: loss(dev_p[:, 2], dev2, w))
    return {
        "unigram": float(-np.log(held_p[:, 0]).mean()),
        "bigram": float(-np.log(held2).mean()),
        "trigram": loss(held_p[:, 2], held2, w3),
    }


class TopKCoder(nn.Module):
    """A TopK SAE, or with `is_transcoder` a skip transcoder, with sparsify's parameters and rules."""

    def __init__(self, d: int, *, is_transcoder: bool, seed: int) -> None:
        super().__init__()
        torch.manual_seed(1000 + seed)
        self.is_transcoder = is_transcoder
        self.encoder = nn.Linear(d, NUM_LATENTS)
        weight = F.normalize(torch.randn(NUM_LATENTS, d), dim=1)
        self.encoder.weight.data = weight.clone()
        self.encoder.bias.data.zero_()
        self.W_dec = nn.Parameter(torch.zeros_like(weight) if is_transcoder else weight.clone())
        self.b_dec = nn.Parameter(torch.zeros(d))
        self.W_skip = nn.Parameter(torch.zeros(d, d)) if is_transcoder else None

    def pre_acts(self, x_ND: Tensor) -> Tensor:
        return torch.relu(self.encoder(x_ND if self.is_transcoder else x_ND - self.b_dec))

    def forward(self, x_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return (reconstruction [N, D], acts [N, L] with at most K non-zeros a row, pre-activations [N, L])."""
        pre = self.pre_acts(x_ND)
        values, indices = pre.topk(K, dim=1, sorted=False)
        # Dense on purpose: at this width one matrix product beats a gather and its backward pass on a CPU.
        acts = torch.zeros_like(pre).scatter(1, indices, values)
        y = acts @ self.W_dec + self.b_dec
        return (y if self.W_skip is None else y + x_ND @ self.W_skip.T), acts, pre


@torch.no_grad()
def read_sites(model: LlamaForCausalLM, batch: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Return per module the (input, output) rows [N, D] float32, without the BOS position."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    modules = {module for _, module, _, _ in CODERS.values()}
    handles = []
    for name in modules:

        def hook(_module: nn.Module, args: Any, output: Any, name: str = name) -> None:
            out = output[0] if isinstance(output, tuple) else output
            seen[name] = tuple(t[:, 1:].float().flatten(0, 1) for t in (args[0], out))

        handles.append(model.get_submodule(name).register_forward_hook(hook))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.model(input_ids=batch)
    for handle in handles:
        handle.remove()
    return seen


def train_coders(model: LlamaForCausalLM, tokens: np.ndarray, *, num_tokens: int) -> dict[str, TopKCoder]:
    rng, coders = np.random.default_rng(1), {}
    d = model.config.hidden_size
    optimizers, silent = {}, {}
    for name, (_, _, is_transcoder, seed) in CODERS.items():
        coders[name] = TopKCoder(d, is_transcoder=is_transcoder, seed=seed)
        optimizers[name] = torch.optim.Adam(coders[name].parameters(), lr=1e-3, betas=(0.9, 0.99))
        silent[name] = torch.zeros(NUM_LATENTS)
    num_seqs = 8
    num_steps = num_tokens // (num_seqs * CTX_LEN)
    start = time.monotonic()
    for step in range(num_steps):
        scale = learning_rate((step + 1) / num_steps)
        sites = read_sites(model, sample_batch(tokens, num_seqs, rng)[:, :-1])
        report = []
        for name, (_, module, is_transcoder, _) in CODERS.items():
            coder, (x, out) = coders[name], sites[module]
            x, target = (x, out) if is_transcoder else (out, out)
            if step == 0:
                coder.b_dec.data = target.mean(0)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                prediction, acts, pre = coder(x)
            error = target - prediction.float()
            variance = (target - target.mean(0)).pow(2).sum()
            loss = error.pow(2).sum() / variance
            report.append(f"{name} {loss.item():.3f}")
            silent[name] += len(x)
            silent[name][(acts > 0).any(0)] = 0
            dead = silent[name] > DEAD_AFTER_TOKENS
            if dead.any():
                k_aux = min(AUX_K, int(dead.sum()))
                values, chosen = pre.masked_fill(~dead, 0).topk(k_aux, dim=1, sorted=False)
                aux = (torch.zeros_like(pre).scatter(1, chosen, values) @ coder.W_dec.to(pre.dtype)).float()
                loss = loss + (1 / 32) * (error.detach() - aux).pow(2).sum() / variance
                report[-1] += f" dead {int(dead.sum())}"
            loss.backward()
            nn.utils.clip_grad_norm_(coder.parameters(), 1.0)
            optimizers[name].param_groups[0]["lr"] = 1e-3 * scale
            optimizers[name].step()
            optimizers[name].zero_grad()
            if not is_transcoder:
                coder.W_dec.data = F.normalize(coder.W_dec.data, dim=1)
        if step % 50 == 0:
            rate = (step + 1) * num_seqs * CTX_LEN / (time.monotonic() - start)
            print(f"coder step {step}/{num_steps} {'; '.join(report)} {rate:.0f} tok/s", flush=True)
    return coders


def save_coder(coder: TopKCoder, out: Path, hookpoint: str) -> None:
    folder = out / hookpoint
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().to(torch.bfloat16).contiguous() for name, tensor in coder.state_dict().items()}
    save_file(tensors, folder / "sae.safetensors")
    config = {
        "d_in": coder.b_dec.numel(), "num_latents": NUM_LATENTS, "k": K, "activation": "topk",
        "normalize_decoder": not coder.is_transcoder, "expansion_factor": 32, "multi_topk": False,
        "skip_connection": coder.W_skip is not None, "transcode": coder.is_transcoder,
    }  # fmt: skip
    (folder / "cfg.json").write_text(json.dumps(config, indent=1) + "\n")


@torch.no_grad()
def coder_figures(model: LlamaForCausalLM, coder: TopKCoder, module: str, tokens: np.ndarray) -> dict[str, float]:
    """L0, FVU, dead share and loss recovered on held-out tokens, with the weights as they are saved (bfloat16).

    Loss recovered = (zero - spliced) / (zero - clean), where zero replaces the module's output by zeros.
    """
    for parameter in coder.parameters():
        parameter.data = parameter.data.to(torch.bfloat16).float()
    mode = {"value": "clean"}
    stats = {"error": 0.0, "l0": 0.0, "n": 0.0}
    fired = torch.zeros(NUM_LATENTS, dtype=torch.bool)
    sums: list[Tensor] = []

    def hook(_module: nn.Module, args: Any, output: Any) -> Any:
        out = output[0] if isinstance(output, tuple) else output
        if mode["value"] == "clean":
            return output
        x = (args[0] if coder.is_transcoder else out)[:, 1:].float().flatten(0, 1)
        target = out[:, 1:].float().flatten(0, 1)
        replacement = torch.zeros_like(out)
        replacement[:, 0] = out[:, 0]
        if mode["value"] == "spliced":
            with torch.autocast("cpu", enabled=False):
                prediction, acts, _ = coder(x)
            active = acts > 0
            fired.logical_or_(active.any(0))
            stats["error"] += (target - prediction).pow(2).sum().item()
            stats["l0"] += active.sum().item()
            stats["n"] += len(x)
            sums.append(torch.stack([target.sum(0), target.pow(2).sum(0)]))
            replacement[:, 1:] = prediction.view_as(replacement[:, 1:]).to(out.dtype)
        return (replacement, *output[1:]) if isinstance(output, tuple) else replacement

    handle = model.get_submodule(module).register_forward_hook(hook)
    losses = {}
    for name in ("clean", "zero", "spliced"):
        mode["value"] = name
        losses[name] = held_out_loss(model, tokens)
    handle.remove()
    total = torch.stack(sums).sum(0)
    variance = (total[1] - total[0].pow(2) / stats["n"]).sum().item()
    return {
        "l0": stats["l0"] / stats["n"],
        "fvu": stats["error"] / variance,
        "dead_frac": 1 - fired.float().mean().item(),
        "loss_spliced": losses["spliced"],
        "loss_zero_ablated": losses["zero"],
        "loss_recovered": (losses["zero"] - losses["spliced"]) / (losses["zero"] - losses["clean"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=float, default=30e6, help="tokens the subject is trained on")
    parser.add_argument("--coder-tokens", type=float, default=10e6, help="tokens the coders are trained on")
    parser.add_argument("--snapshot-every-s", type=float, default=math.inf, help="save the subject this often")
    parser.add_argument("--from-model", type=Path, help="skip the subject's training and take this folder's")
    parser.add_argument("--start-from", type=Path, help="go on from this folder's snapshot, decaying over --tokens")
    args = parser.parse_args()
    torch.set_num_threads(max(1, torch.get_num_threads()))
    random.seed(0)
    train_texts, held_texts = read_texts()
    args.out.mkdir(parents=True, exist_ok=True)
    model_folder = args.out / "model"
    if args.from_model:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(args.from_model)
        model = LlamaForCausalLM.from_pretrained(args.from_model, dtype=torch.float32)
        save_tokenizer(tokenizer, model_folder)
        save_model(model, model_folder)
    else:
        tokenizer = train_tokenizer(train_texts, model_folder)
    random.Random(0).shuffle(train_texts)
    train, held = encode_texts(tokenizer, train_texts), encode_texts(tokenizer, held_texts)
    print(f"{len(train)} training tokens, {len(held)} held out", flush=True)
    if not args.from_model:
        snapshot = args.snapshot_every_s
        model = train_model(
            train, model_folder, num_tokens=int(args.tokens), snapshot_every_s=snapshot, start_from=args.start_from
        )
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16).float()
    model.eval()
    figures: dict[str, Any] = {
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "training_tokens": int(args.tokens), "coder_training_tokens": int(args.coder_tokens),
        "distinct_training_tokens": len(train), "held_out_tokens": len(held),
        "held_out_loss": held_out_loss(model, held), "baselines": ngram_losses(train, held), "coders": {},
    }  # fmt: skip
    print(json.dumps(figures, indent=1), flush=True)
    coders = train_coders(model, train, num_tokens=int(args.coder_tokens))
    for name, (hookpoint, module, _, _) in CODERS.items():
        save_coder(coders[name], args.out / name, hookpoint)
        figures["coders"][name] = coder_figures(model, coders[name], module, held)
    (args.out / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures, indent=1), flush=True)


if __name__ == "__main__":
    main()

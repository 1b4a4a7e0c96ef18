"""A coder published for a tensor that no module gives out is cached through the rule that makes it."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from autointerp import open_store
from autointerp.cli.main import cli
from tests.tiny import TEXTS, tiny_sparsify, tiny_subject


@pytest.mark.parametrize(
    ("hook", "module"),
    [("blocks.1.ln2.hook_normalized", "layers.1.post_attention_layernorm@in"), ("blocks.1.hook_resid_post", "layers.1@out")],
)
def test_the_store_equals_a_plain_forward_pass(tmp_path, hook, module):
    subject = tiny_subject(tmp_path / "subject")
    coder = tiny_sparsify(tmp_path / "coder")
    (tmp_path / "corpus.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    arguments = ["cache", "--subject", subject, "--corpus", tmp_path / "corpus.jsonl", "--ctx-len", "32", "--force"]
    arguments += ["--coder", f"c={coder}@@{hook}", "--out", tmp_path / "store", "--set", "device=cpu"]
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.exception
    store = open_store(tmp_path / "store")
    record = json.loads((tmp_path / "store" / "coders" / "coder=c" / "coder.json").read_text())
    assert record["hookpoints"] == [f"model.{module}"]
    is_normed = "normalized" in hook
    assert record["reading"].get("inputs") == (["rms"] if is_normed else None)

    model, bos = AutoModelForCausalLM.from_pretrained(subject), AutoTokenizer.from_pretrained(subject).bos_token_id
    seen = []
    block = model.model.layers[1]
    if is_normed:
        handle = block.post_attention_layernorm.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    else:
        handle = block.register_forward_hook(lambda _module, _args, out: seen.append(out[0] if isinstance(out, tuple) else out))
    tensors = load_file(coder / "sae.safetensors")
    wanted = np.zeros((store.num_contexts * 32, 64), np.float32)
    for context, length in enumerate(store.context_lengths):
        tokens = store.tokens[context * 32 : context * 32 + length]
        seen.clear()
        with torch.no_grad():
            model(torch.tensor([[bos, *map(int, tokens)]]))
        x = seen[0][0, 1:]
        if is_normed:
            x = x / (x.pow(2).mean(1, keepdim=True) + model.config.rms_norm_eps).sqrt()
        pre = torch.relu((x - tensors["b_dec"]) @ tensors["encoder.weight"].T + tensors["encoder.bias"])
        top = pre.topk(4, dim=1)
        wanted[context * 32 : context * 32 + length] = torch.zeros_like(pre).scatter(1, top.indices, top.values).numpy()
    handle.remove()
    found = np.zeros_like(wanted)
    for latent, positions, values in store.coder("c").sweep():
        found[positions, latent] = values
    assert np.count_nonzero(wanted) > 100
    np.testing.assert_allclose(found, wanted, rtol=2e-3, atol=2e-3)

"""What the fork clt-training adds to sparsify's files; the numbers are in the parity cases."""

import json

import pytest
import torch
from safetensors.torch import save_file

from autointerp.coders.load import load_coder
from autointerp.errors import InputError, StoreError
from tests.coder_fixtures import B_DEC, B_ENC, W_DEC, W_ENC, D, F, X

PLAIN = {"encoder.weight": W_ENC.T.contiguous(), "encoder.bias": B_ENC, "W_dec": W_DEC, "b_dec": B_DEC}


def save(folder, tensors=PLAIN, **config):
    folder.mkdir(parents=True)
    save_file(tensors, folder / "sae.safetensors")
    (folder / "cfg.json").write_text(json.dumps({"d_in": D, "num_latents": F, "k": 3, "transcode": True} | config))
    return folder


def test_a_bias_behind_the_encoder_changes_what_is_decoded_and_not_what_is_active(tmp_path):
    shift = torch.linspace(-1, 1, F)
    coder, plain = load_coder(save(tmp_path / "a", PLAIN | {"post_enc": shift})), load_coder(save(tmp_path / "b"))
    acts = plain.encode_dense(X)
    assert torch.equal(coder.encode_dense(X), acts)
    assert torch.allclose(coder.decode(coder.encode(X), X), (acts + shift * (acts > 0)) @ W_DEC + B_DEC, atol=1e-6)
    assert coder.to("meta").decoded_shift_L.device.type == "meta"


def test_the_decoder_of_the_coder_s_own_layer(tmp_path):
    tensors = {name: value for name, value in PLAIN.items() if name not in ("W_dec", "b_dec")}
    tensors |= {"W_decs.0": W_DEC, "b_decs.0": B_DEC, "W_decs.1": -W_DEC, "b_decs.1": -B_DEC}
    coder = load_coder(save(tmp_path / "h.7.mlp", tensors, n_targets=2))
    assert torch.equal(coder.decoder_rows(), W_DEC) and "Writes to 2 layers" in coder.spec.notes[0]
    # The same tensor under both names is saved under one of them.
    first = {name: value for name, value in tensors.items() if not name.endswith(".0")} | {"W_dec": W_DEC, "b_dec": B_DEC}
    assert load_coder(save(tmp_path / "b" / "h.7.mlp", first, n_targets=2)).spec.digest == coder.spec.digest


@pytest.mark.parametrize("joint", ["concat", "per-layer", "group"])
def test_top_k_over_several_layers_is_refused(tmp_path, joint):
    with pytest.raises(InputError, match=f"coalesce_topk = '{joint}' takes the k largest over several layers at once"):
        load_coder(save(tmp_path / "a", coalesce_topk=joint))


def test_batch_top_k_needs_a_threshold(tmp_path):
    folder = save(tmp_path / "a", activation="batchtopk")
    with pytest.raises(InputError, match=r"keeps the largest over the whole batch, .* add \?threshold=NUMBER"):
        load_coder(folder)
    coder = load_coder(f"{folder}?threshold=0.5")
    pre = X @ W_ENC + B_ENC
    assert torch.allclose(coder.encode_dense(X), pre * (pre > 0.5), atol=1e-6)
    assert coder.spec.k is None and coder.spec.reading["threshold"] == 0.5


def test_a_scale_of_inputs_that_is_missing(tmp_path):
    with pytest.raises(StoreError, match="lacks the tensor 'in_norm'"):
        load_coder(save(tmp_path / "a", normalize_io=True))

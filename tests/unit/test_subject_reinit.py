"""The untrained twin: everything drawn anew, by the seed alone."""

from dataclasses import replace

import pytest
import torch

from autointerp.errors import InputError
from autointerp.subject.model import load_subject
from autointerp.subject.reinit import reinitialised


@pytest.fixture(scope="module")
def subject(tiny_subject):
    return load_subject(str(tiny_subject), device="cpu")


def test_every_matrix_is_drawn_anew_by_the_models_own_initialisation(subject):
    before = {name: tensor.clone() for name, tensor in subject.model.state_dict().items()}
    twin = reinitialised(subject, seed=0)
    weights = twin.model.state_dict()
    assert weights.keys() == before.keys() and type(twin.model) is type(subject.model)
    matrices = [name for name, tensor in weights.items() if tensor.ndim == 2]
    assert len(matrices) >= 2 + 3 * 7 and any("embed_tokens" in name for name in matrices)
    for name in matrices:
        # The fixture's weights have a standard deviation of 0.3; Llama's own initialisation draws 0.02.
        assert float(weights[name].std()) == pytest.approx(0.02, rel=0.15), name
        assert torch.isfinite(weights[name]).all()
    for name, tensor in subject.model.state_dict().items():
        assert torch.equal(tensor, before[name]), f"{name} of the subject itself changed"
    assert not twin.model.training and not any(p.requires_grad for p in twin.model.parameters())
    assert twin.tokenizer is subject.tokenizer and twin.weights_digest != subject.weights_digest


def test_the_seed_decides_and_nothing_else(subject):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = reinitialised(subject, seed=0).model.state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    again, other = (reinitialised(subject, seed=seed).model.state_dict() for seed in (0, 1))
    half = reinitialised(replace(subject, dtype="bfloat16"), seed=0).model.state_dict()
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name]) and torch.equal(tensor.to(torch.bfloat16), half[name])
        assert tensor.ndim < 2 or not torch.equal(tensor, other[name])


def test_quantised_weights_cannot_be_drawn_anew(subject):
    with pytest.raises(InputError, match="cannot be drawn anew while it is quantised"):
        reinitialised(replace(subject, quantization="8bit"), seed=0)

"""The bundled coders read wrongly, in the five classic ways; each function is a ``module:function`` coder source."""

from dataclasses import replace

import torch
from safetensors.torch import load_file

from autointerp import load_coder
from autointerp.demo import bundled

_BLOCK = "model.layers.2"


def _at(coder, hookpoint, target=None):
    return replace(coder, spec=replace(coder.spec, hookpoint=hookpoint, target=target))


def _gain():
    return load_file(next(bundled("model").glob("*.safetensors")))[f"{_BLOCK}.post_attention_layernorm.weight"].float()


def transposed_sae():
    """The encoder's numbers, taken for those of its transpose."""
    sae = load_coder(bundled("sae"))
    return replace(sae, encoder_LD=sae.encoder_LD.T.reshape(sae.encoder_LD.shape).contiguous())


def transposed_transcoder():
    coder = load_coder(bundled("skip-transcoder"))
    return replace(coder, encoder_LD=coder.encoder_LD.T.reshape(coder.encoder_LD.shape).contiguous())


def bias_twice_sae():
    """b_dec subtracted, and subtracted again."""
    sae = load_coder(bundled("sae"))
    return replace(sae, encoder_bias_L=sae.encoder_bias_L - sae.encoder_LD @ sae.decoder_bias_E)


def bias_from_transcoder():
    """b_dec subtracted where it never should be."""
    return replace(load_coder(bundled("skip-transcoder")), subtract_decoder_bias=True)


def pre_gain_transcoder():
    """The skip transcoder with the norm's gain folded in: it wants the norm's output before the gain."""
    coder, gain = load_coder(bundled("skip-transcoder")), _gain()
    return replace(coder, encoder_LD=coder.encoder_LD * gain, skip_ED=coder.skip_ED * gain)


def pre_gain_transcoder_read_right():
    from autointerp.coders.inputs import Rms

    right = _at(pre_gain_transcoder(), f"{_BLOCK}.post_attention_layernorm@in", f"{_BLOCK}.mlp@out")
    return right.reading_through(Rms(1e-5))


def norm_factor_missing_sae():
    """Trained on inputs a tenth as large, and given the subject's own."""
    sae, factor = load_coder(bundled("sae")), 0.1
    return replace(
        sae,
        encoder_LD=sae.encoder_LD / factor,
        decoder_LE=sae.decoder_LE * factor,
        decoder_bias_E=sae.decoder_bias_E * factor,
    )


def norm_factor_missing_transcoder():
    coder, factor = load_coder(bundled("skip-transcoder")), torch.tensor(0.1)
    return replace(coder, encoder_LD=coder.encoder_LD / factor, skip_ED=coder.skip_ED / factor)


def wrong_side_sae():
    """The block's input instead of its output."""
    return _at(load_coder(bundled("sae")), f"{_BLOCK}@in")


def wrong_side_transcoder():
    """The MLP's output instead of its input."""
    return _at(load_coder(bundled("skip-transcoder")), f"{_BLOCK}.mlp@out", f"{_BLOCK}.mlp@out")

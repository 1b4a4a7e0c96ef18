"""Simulation and surprisal with a real model in this process: every number against a plain forward pass of its own."""

import asyncio
from dataclasses import replace

import numpy as np
import pytest

from autointerp.llm import EngineConfig, LoggedEngine, ReplyLog, open_engine
from autointerp.protocols import Resources
from autointerp.records import Examples, Explanation, LatentExamples, TokenIds
from autointerp.scorers.simulation import Simulation, SimulationConfig
from autointerp.scorers.surprisal import Surprisal, SurprisalConfig
from tests.tiny_llm import write_chat_model

PROMPT = '''
description = "short"
answer = "slots"
variables = ["explanation"]
system = "Numbers from 0 to 10."
user = "Description: {{explanation}}"

[[turns]]
user = "Description: names"
assistant = """
for\\tunknown
 name\\t9
 in\\t0

self\\t1
.\\t0"""
'''


class Words:
    words = ["import", " os", "\n", "for", " name", " in", "unknown", "\t", " the", ""]

    def pieces(self, ids):
        return [self.words[i] for i in ids]

    def text(self, ids):
        return "".join(self.pieces(ids))

    def is_special(self, ids):
        return np.zeros(len(ids), bool)

    def __len__(self):
        return len(self.words)


def block(num, *, active):
    rng = np.random.default_rng(num + active)
    tokens = rng.integers(0, len(Words.words), (num, 12)).astype(np.uint32)
    return Examples(
        tokens=tokens,
        activations=(rng.random((num, 12)) * (tokens == 4) * active).astype(np.float32),
        lengths=np.full(num, 12, np.int32),
        positions=np.arange(num) * 12,
        documents=np.arange(num),
        quantiles=np.arange(num).astype(np.int16) if active else np.full(num, -1, np.int16),
        sources=("positive" if active else "random",) * num,
    )


def a_latent():
    empty = Examples.empty(12)
    return LatentExamples(
        coder="sae",
        latent=3,
        selection_id="s",
        status="ok",
        disjoint="document",
        density=0.1,
        max_activation=1.0,
        explain=empty,
        explain_statistics=empty,
        explain_negatives=empty,
        positives=block(5, active=True),
        negatives=block(4, active=False),
    )


EXPLANATION = Explanation(
    coder="sae", latent=3, explainer="e", explainer_id="e", selection_id="s", status="ok", text="names in loops"
)


class Recorder:
    """Passes requests on and keeps them."""

    def __init__(self, engine):
        self.engine, self.requests = engine, []
        self.id, self.capabilities, self.context_tokens = engine.id, engine.capabilities, engine.context_tokens

    async def complete(self, request, /):
        self.requests.append(request)
        return await self.engine.complete(request)

    async def tokenize(self, text, /):
        return await self.engine.tokenize(text)

    async def aclose(self):
        await self.engine.aclose()


def model_with_bos(folder):
    """A tiny chat model whose tokenizer puts BOS before every text, as those of Llama and Gemma do."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    write_chat_model(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    tokenizer.save_pretrained(folder)
    return folder


def simulation(folder, *, alternatives=400, **config):
    path = folder / "short.toml"
    path.write_text(PROMPT)
    return Simulation(SimulationConfig(prompt=str(path), alternatives=alternatives, **config))


def expected(model, tokenizer, request, *, num_tokens):
    """The predictions of one prompt, by the model itself: the last `num_tokens` lines of the ids, read by hand."""
    import torch

    ids = list(request.prompt.ids)
    assert ids[0] == tokenizer.bos_token_id
    text = tokenizer.decode(ids)
    assert text.rstrip("\n").endswith("\tunknown")
    hidden, tab = (tokenizer(word, add_special_tokens=False)["input_ids"] for word in ("unknown", "\t"))
    slots = [i for i in range(len(ids)) if ids[i : i + len(hidden)] == hidden and ids[i - len(tab) : i] == tab][-num_tokens:]
    with torch.inference_mode():
        probs = model(torch.tensor([ids])).logits[0].softmax(-1).numpy()
    levels = {i: tokenizer.decode([i]).strip() for i in range(probs.shape[1])}
    ten = len(tokenizer("10", add_special_tokens=False)["input_ids"]) == 1
    named = {str(level): level for level in range(11 if ten else 10)}
    found = []
    for slot in slots:
        mass = {i: probs[slot - 1, i] for i, text in levels.items() if text in named}
        found.append(sum(named[levels[i]] * p for i, p in mass.items()) / sum(mass.values()))
    return found


def scored(folder, scorer, latent, *, log, batch_size=1):
    """Return the result, and the engine with the requests it was sent."""

    async def main():
        recorder = Recorder(open_engine(f"hf:{folder}", EngineConfig(device="cpu", batch_size=batch_size)))
        logged = LoggedEngine(recorder, ReplyLog(log))
        try:
            return await scorer.score(latent, EXPLANATION, Resources(vocabulary=Words(), seed=0, engine=logged)), recorder
        finally:
            await logged.aclose()
            await recorder.aclose()

    return asyncio.run(main())


def test_predictions_are_those_of_a_plain_forward_pass(tmp_path):
    import transformers

    folder = model_with_bos(tmp_path / "tiny")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    scorer, latent = simulation(tmp_path), a_latent()

    result, recorder = scored(folder, scorer, latent, log=tmp_path / "replies.log")
    asked = [request for request in recorder.requests if isinstance(request.prompt, TokenIds)]
    assert len(asked) == 9 and len(recorder.requests) == 10
    by_number = {verdict.example_idx: verdict for verdict in result.verdicts}
    answers, truths = [], []
    for number, request in enumerate(asked):
        verdict = by_number[number]
        words = "".join(Words.words[t] or "\ufffd" for t in joined(latent)[number]).replace("\n", "\\n").replace("\t", "\\t")
        assert "".join(line.split("\t")[0] for line in tokenizer.decode(request.prompt.ids).split("\n")[-13:-1]) == words
        found = expected(model, tokenizer, request, num_tokens=12)
        assert verdict.answers == pytest.approx(found, abs=1e-4)
        answers += found
        truths += verdict.truths
    [headline] = [score for score in result.scores if score.is_headline]
    assert headline.value == pytest.approx(np.corrcoef(answers, truths)[0, 1], abs=1e-4)
    # From the log, without a single request.
    again, recorder = scored(folder, scorer, latent, log=tmp_path / "replies.log")
    assert not recorder.requests
    assert again == result


def joined(latent):
    return [*latent.positives.tokens, *latent.negatives.tokens]


@pytest.mark.parametrize("batch_size", [1, 8])
def test_information_values_are_those_of_a_plain_forward_pass(tmp_path, batch_size):
    """Nothing of one prompt, such as a cache of its prefix, is left for the next."""
    import torch
    import transformers

    folder = model_with_bos(tmp_path / "tiny")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    result, recorder = scored(folder, Surprisal(), a_latent(), log=tmp_path / "replies.log", batch_size=batch_size)
    found = {}
    for request in recorder.requests:
        if isinstance(request.prompt, TokenIds):
            ids, start = list(request.prompt.ids), request.prompt_logprobs.start
            before, window = tokenizer.decode(ids[:start]), tokenizer.decode(ids[start:])
            assert ids[0] == tokenizer.bos_token_id and before.endswith("\n")
            with torch.inference_mode():
                logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            is_generic = SurprisalConfig().generic in before.rpartition("Description: ")[2]
            found[window, is_generic] = sum(float(logprobs[i - 1, ids[i]]) for i in range(start, len(ids)))
    assert len(found) == 18
    for verdict, tokens in zip(result.verdicts, joined(a_latent()), strict=True):
        window = "".join(Words.words[t] for t in tokens)
        assert verdict.value == pytest.approx(found[window, False] - found[window, True], abs=1e-3)
    slow = [[(p.value > n.value) + (p.value == n.value) / 2 for n in result.verdicts[5:]] for p in result.verdicts[:5]]
    [headline] = [score for score in result.scores if score.is_headline]
    assert headline.value == pytest.approx(np.mean(slow))


def test_a_window_longer_than_the_context_is_too_long(tmp_path):
    folder = model_with_bos(tmp_path / "tiny")

    async def main():
        engine = open_engine(f"hf:{folder}", EngineConfig(device="cpu", context_tokens=60))
        latent = replace(a_latent(), negatives=block(1, active=False))
        result = await simulation(tmp_path).score(latent, EXPLANATION, Resources(vocabulary=Words(), seed=0, engine=engine))
        await engine.aclose()
        return result

    assert {verdict.status for verdict in asyncio.run(main()).verdicts} == {"too_long"}

"""Engines and embedders for tests that name theirs by ``module:Class``."""

import json
import re

import numpy as np

from autointerp.digest import generator
from autointerp.llm.fake import FakeEngine, prompt_text


class AlwaysYes(FakeEngine):
    """Says yes to every text of a prompt."""

    def __init__(self, config):
        super().__init__(self._yes, model="always-yes")

    def _yes(self, request):
        texts = re.findall(r"(?m)^Text \d+: ", prompt_text(request).rpartition("Description:")[2])
        return "1" if request.labels else json.dumps([1] * len(texts))


class Constant:
    """Embeds every text alike."""

    id = "constant"

    def embed(self, texts):
        return np.eye(1, 4, dtype=np.float32).repeat(len(texts), axis=0)


class Hashed:
    """Embeds every text anywhere."""

    id = "hashed"

    def embed(self, texts):
        rows = np.stack([generator(text).normal(size=8) for text in texts]).astype(np.float32)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

"""Engines for tests that name theirs by ``module:Class``."""

import json
import re

from autointerp.llm.fake import FakeEngine, prompt_text


class AlwaysYes(FakeEngine):
    """Says yes to every text of a prompt."""

    def __init__(self, config):
        super().__init__(self._yes, model="always-yes")

    def _yes(self, request):
        texts = re.findall(r"(?m)^Text \d+: ", prompt_text(request).rpartition("Description:")[2])
        return "1" if request.labels else json.dumps([1] * len(texts))

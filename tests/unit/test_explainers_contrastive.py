"""The contrastive explainer: which silent windows it shows, and that none of them is ever scored."""

from dataclasses import replace

import numpy as np
import pytest
from planted import ID, planted, resources, run
from test_examples_pools import CORPUS_OF_LATENTS

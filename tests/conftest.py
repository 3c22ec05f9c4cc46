"""Fixtures that many tests share: the golden checkpoint and its numbers (see tests/golden/README.md)."""

import json
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

# The same generated cases every time, on any machine: a commit passes or not, and not by luck or load. New cases are
# looked for with `make test ARGS="--hypothesis-profile=search"`.
settings.register_profile("same", derandomize=True, deadline=None)
settings.register_profile("search", max_examples=1000, deadline=None, print_blob=True)
settings.load_profile("same")

GOLDEN = Path(__file__).parent / "golden" / "ovis2_5"
_CACHE = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)  # not the user's; datasets looks when it is imported
os.environ.setdefault("HF_DATASETS_CACHE", _CACHE.name)


@pytest.fixture(scope="session")
def golden() -> Path:
    return GOLDEN


@pytest.fixture(scope="session")
def golden_cases() -> dict:
    return json.loads((GOLDEN / "cases.json").read_text())


@pytest.fixture(scope="session")
def golden_numbers():
    """(arrays of expected.npz, contents of expected.json)"""
    return np.load(GOLDEN / "expected.npz"), json.loads((GOLDEN / "expected.json").read_text())


@pytest.fixture(scope="session")
def golden_pair():
    import torch

    from ovisnb.model import load

    return load(GOLDEN / "checkpoint", dtype=torch.float32)


@pytest.fixture(scope="session")
def golden_model(golden_pair):
    return golden_pair[0]


@pytest.fixture(scope="session")
def golden_processor(golden_pair):
    return golden_pair[1]

"""Fixtures that many tests share: the golden checkpoint and its numbers (see tests/golden/README.md)."""

import json
from pathlib import Path

import numpy as np
import pytest

GOLDEN = Path(__file__).parent / "golden" / "ovis2_5"


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

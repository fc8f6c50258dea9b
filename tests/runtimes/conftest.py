"""Fixtures of the tests of the runtimes."""

import pytest
import torch

from divqat.data import load


@pytest.fixture(scope="session")
def digits():
    return load("digits")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)

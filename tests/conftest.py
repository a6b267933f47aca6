"""Every test starts from the same random numbers, whichever ran before it."""

import random

import numpy as np
import pytest
import torch


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)

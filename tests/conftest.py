"""Every test starts from the same random numbers, whichever ran before it; examples are the same in every run."""

import random

import numpy as np
import pytest
import torch
from hypothesis import settings

settings.register_profile("steady", derandomize=True, deadline=None)
settings.load_profile("steady")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)

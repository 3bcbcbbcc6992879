"""Set-up of every test: what runs here is tiny, and threads cost more than they bring."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before anybody reads it: BLAS under scikit-learn here, and all child processes

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--soak-steps", type=int, default=22, help="updates of a soak in test_numerics.py")
    parser.addoption("--kills", type=int, default=0, help="how often each run is killed in test_survival.py")


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)

"""What all tests share."""

import os

# The models here are tiny: more threads only wait for each other. Set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    """Tests keep nothing in the user's cache and take nothing from it."""
    os.environ["MOEPRUNE_CACHE"] = str(tmp_path_factory.mktemp("cache"))

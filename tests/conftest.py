"""Hooks of pytest. What the tests share lies in fixtures.py; which tests run where, in balance.py."""

from __future__ import annotations

import gc
import importlib

import pytest
from balance import pytest_addoption, pytest_collection_modifyitems, pytest_xdist_make_scheduler

__all__ = [
    "pytest_addoption",
    "pytest_collection_finish",
    "pytest_collection_modifyitems",
    "pytest_configure",
    "pytest_unconfigure",
    "pytest_xdist_make_scheduler",
]


def pytest_configure(config: pytest.Config) -> None:
    """Register the fixtures in each process that runs tests."""
    # With pytest-xdist this process only hands out tests: it does not wait eight seconds for torch and diffusers.
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        return
    config.pluginmanager.register(importlib.import_module("fixtures"), "fixtures of ppcl")


def pytest_collection_finish() -> None:
    """Leave what was imported out of every later garbage collection: two million objects that stay."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Let the interpreter collect everything as it ends."""
    gc.unfreeze()

"""Settings of all tests: uninitialised memory is poisoned, property tests repeat themselves in CI, Ctrl-C stops."""

import os
import signal

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile(
    "default", deadline=None, max_examples=25, derandomize="CI" in os.environ
)
hypothesis.settings.register_profile("short", deadline=None, max_examples=5, derandomize=True)
hypothesis.settings.load_profile("default")

# A shell lets what it runs in the background ignore Ctrl-C, which the tests of interrupted trainings press.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fills memory that torch.empty hands out, in Python and C++, with NaN: a result that nobody wrote is seen."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture
def set_threads():
    """`torch.set_num_threads`, undone after the test."""
    threads = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(threads)

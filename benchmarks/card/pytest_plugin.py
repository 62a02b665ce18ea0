"""For tests on a card: a failure is a finding at once, and a test that hangs or loses the GPU ends its process.

xdist replaces that by another, so that such a test costs only itself; without xdist the tests end there.
"""

import faulthandler
import json
import os
import sys

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--test-seconds", type=float, default=45, help="of one test, then its process ends")


def pytest_configure(config):
    # Where pytest's capturing does not reach: a hanging test's traceback.
    config.stash[STDERR] = os.fdopen(os.dup(sys.__stderr__.fileno()), "w")
    if not hasattr(config, "workerinput"):  # xdist's workers report to this process
        config.pluginmanager.register(Findings())


STDERR = pytest.StashKey()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    faulthandler.dump_traceback_later(
        item.config.getoption("--test-seconds"), exit=True, file=item.config.stash[STDERR]
    )
    try:
        result = yield
    finally:
        faulthandler.cancel_dump_traceback_later()
    if lost():
        os._exit(1)
    return result


def lost():
    """Whether an error of a kernel has made every further call of this process fail."""
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except Exception:
        return True
    return False


class Findings:
    def pytest_runtest_logreport(self, report):
        if not report.failed:
            return
        crash = getattr(report.longrepr, "reprcrash", None)
        error = crash.message if crash else str(report.longrepr)
        line = {"section": "tests", "name": report.nodeid, "error": " ".join(error.split())[:300]}
        print("\n" + json.dumps(line), flush=True)

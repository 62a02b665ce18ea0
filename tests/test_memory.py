"""The budget of what losses keep for their backward, and the memory that the CPU kernels hold."""

import gc
import os
import threading
import time

import pytest
import torch

import ssl_kernels
from ssl_kernels import _C, empty_cache, nt_xent_loss
from tests.helpers import random_rows, run_python, same_bits

BUDGET, HELD = 116 << 20, 128 << 20


@pytest.fixture(autouse=True)
def as_users_have_it(monkeypatch):
    """Memory that tests fill with NaN does not come from the kernels' own. Losses of other tests may still be alive."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    gc.collect()
    empty_cache()


def views(b, d=128, seed=0):
    return [random_rows(b, d, seed=2 * seed + view).requires_grad_() for view in range(2)]


def held():
    found = _C.held_bytes()
    assert found["kept"] + found["idle"] <= HELD + (1 << 20)
    return found


def test_losses_that_are_alive_share_one_budget():
    """Six that would keep 36 MB each: the fourth gets what is left, later ones nothing, with the same bits as alone."""
    inputs = [views(2048, seed=seed) for seed in range(6)]
    before = held()["kept"]
    expected, kept = [], []
    for pair in inputs:
        loss = nt_xent_loss(*pair)
        kept.append(held()["kept"] - before)
        expected.append((loss.detach(), torch.autograd.grad(loss, pair)))
        del loss
    assert min(kept) == max(kept) > 35e6

    losses, kept = [], []
    for pair in inputs:
        losses.append(nt_xent_loss(*pair))
        kept.append(held()["kept"] - before)
    assert kept[0] > 35e6 and kept[1] > 2 * 35e6
    assert BUDGET - 16e6 < before + kept[-1] <= BUDGET + 6 * 1024
    for loss, pair, (value, gradients) in zip(losses, inputs, expected, strict=True):
        assert same_bits(loss.detach(), value)
        for found, right in zip(torch.autograd.grad(loss, pair), gradients, strict=True):
            assert same_bits(found, right)
    del losses, loss
    assert held()["kept"] == before
    empty_cache()
    assert held()["idle"] == 0


def test_small_losses_count_too():
    pair = views(64, 32)
    before = held()["kept"]
    losses = [nt_xent_loss(*pair) for _ in range(3000)]  # of 49 KB each
    assert 110e6 < held()["kept"] < BUDGET + 3000 * 256 and held()["kept"] > before
    losses[0].backward()
    first = [x.grad.clone() for x in pair]
    for x in pair:
        x.grad = None
    losses[-1].backward()
    assert all(same_bits(x.grad, grad) for x, grad in zip(pair, first, strict=True))
    losses.clear()
    assert held()["kept"] == before


def test_compiled_losses_share_it_as_well():
    compiled = torch.compile(nt_xent_loss, fullgraph=True, backend="aot_eager", dynamic=True)
    found = []
    for others in (0, 4):
        alive = [nt_xent_loss(*views(2048)) for _ in range(others)]
        for b in (100, 700):
            pair = views(b, seed=1)
            found.append(torch.autograd.grad(compiled(*pair), pair))
        del alive
    for first, second in zip(found[:2], found[2:], strict=True):
        assert all(same_bits(a, b) for a, b in zip(first, second, strict=True))


def test_saved_tensors_that_are_offloaded_give_the_same_bits():
    pair = views(400)
    expected = torch.autograd.grad(nt_xent_loss(*pair), pair)
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda tensor: tensor):
        loss = nt_xent_loss(*pair)
    assert all(same_bits(a, b) for a, b in zip(torch.autograd.grad(loss, pair), expected, strict=True))


def test_what_is_resident_returns():
    """Of a process of its own: the peak with six losses alive, and what remains after empty_cache."""
    code = """
import gc, torch, ssl_kernels
torch.set_num_threads(1)

def resident(field="VmRSS"):
    with open("/proc/self/status") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field + ":"))

def views():
    return [torch.randn(2048, 128, requires_grad=True) for _ in range(2)]

ssl_kernels.nt_xent_loss(*views()).backward()
ssl_kernels.empty_cache()
before = resident()
inputs = [views() for _ in range(6)]
losses = [ssl_kernels.nt_xent_loss(*pair) for pair in inputs]
for loss in losses:
    loss.backward()
peak = resident("VmHWM")
del losses, loss, inputs
gc.collect()
after = resident()
ssl_kernels.empty_cache()
print(before, peak, after, resident())
"""
    if not os.path.exists("/proc/self/status"):
        pytest.skip("the system does not tell what is resident")
    before, peak, after, emptied = map(int, run_python(code, OMP_NUM_THREADS="1").split())
    inputs = 6 * 2 * 2 * 2048 * 128 * 4
    assert peak - before < HELD + inputs + 40e6
    assert after - before > 60e6
    assert emptied - before < 20e6


def test_nothing_to_empty_without_the_extension(monkeypatch):
    monkeypatch.setattr(ssl_kernels.backends, "extension", None)
    assert empty_cache() is None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_fork_while_other_threads_use_the_memory():
    """The child, whose other threads are gone, finds the memory unlocked."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    # Many idle blocks make a search among them, under the lock, long.
    blocks = [nt_xent_loss(*views(64, 32)) for _ in range(1500)]
    del blocks
    stop = threading.Event()

    def use():
        pair = views(64, 32)
        while not stop.is_set():
            nt_xent_loss(*pair)

    users = [threading.Thread(target=use) for _ in range(2)]
    for user in users:
        user.start()
    pair = views(64, 32)
    try:
        for _ in range(20):
            child = os.fork()
            if child == 0:
                loss = nt_xent_loss(*pair)
                os._exit(0 if loss.isfinite() else 1)
            assert exit_code(child) == 0
    finally:
        stop.set()
        for user in users:
            user.join()
        torch.set_num_threads(threads)


def exit_code(child):
    """Of a process, which is killed if it does not end."""
    for _ in range(2000):
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return None

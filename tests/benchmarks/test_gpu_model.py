"""The least times of docs/gpu.md: the bounds, and that the page is what the command makes."""

import json

import pytest

from benchmarks import gpu_model
from benchmarks.gpu_model import Card, Case, Work
from tests.gpu_emulation import build

CARD = Card("a card", multiprocessors=10, clock=1.0, tensor=1000, by_mma=0.5, special=10, memory=1.0)


def test_bounds_by_hand():
    work = Work(operations=100, wavefronts=0.5, sectors=2, special=3)
    seconds = work.seconds(CARD, 10**10)
    # 10¹⁰ entries over 10¹⁰ clocks of all multiprocessors in a second.
    assert seconds["tensor"] == pytest.approx(100 / 500) and seconds["shared"] == pytest.approx(0.5)
    assert seconds["L2"] == pytest.approx(2 * 32 / 64) and seconds["special"] == pytest.approx(3 / 10)


def test_a_library_and_its_memory_by_hand():
    seconds = Work(operations=100, memory=6, rate=0.8).seconds(CARD, 10**10)
    assert seconds["tensor"] == pytest.approx(100 / 800)
    assert seconds["memory"] == pytest.approx(6 * 10**10 / 0.9e12)


def test_plain_pytorch_by_hand():
    case = Case("a loss", 1000, 2000, 50, {}, products=3, passes=10)
    products = 3 * 2 * 2e6 * 50 / (0.8 * 1000 * 10 * 1e9)
    assert case.plain_seconds(CARD) == pytest.approx(products + 10 * 2 * 2e6 / 0.9e12)


def test_gradients_by_a_library_by_hand():
    """Coefficients of two bytes, written once and read for each gradient. Of the second one the float32 sums, read and
    written with every block of rows."""
    one, both = (gpu_model._by_library(64, gradients, 1024) for gradients in (1, 2))
    assert one == Work(2 * 64, memory=2 * 2, rate=0.8)
    assert both == Work(2 * 2 * 64, memory=2 * 3 + 2 * 4 * 64 / 1024, rate=0.8)


def test_the_times_name_what_binds():
    case = Case("a loss", 1000, 1000, 64, {"forward": Work(128, 9, 0, 0), "rest": Work(0)}, 3, 1)
    table = gpu_model.times_table([case], {"a loss": {"H200": "7"}}).splitlines()
    assert "(shared)" in table[2] and "plain PyTorch" in table[3] and "| 7 |" in table[4]


def test_every_bound_by_hand():
    case = Case("a loss", 1000, 1000, 64, {"forward": Work(128, 9), "rest": Work(0, special=2)}, 3, 1)
    table = gpu_model.bounds_table([case]).splitlines()
    assert [line.split("|")[1].strip() for line in table[2:]] == [
        f"a loss: {bound}, ms" for bound in ("tensor", "shared", "special")
    ]
    h200 = next(card for card in gpu_model.CARDS if card.name == "H200")
    column = [name.strip() for name in table[0].split("|")].index("H200")
    for line, (count, rate) in zip(table[2:], ((128, 4096 * 0.63), (9, 1), (2, 16)), strict=True):
        milliseconds = 1e3 * 1e6 * count / (rate * h200.multiprocessors * h200.clock * 1e9)
        assert float(line.split("|")[column]) == pytest.approx(milliseconds, rel=5e-3)


def test_what_a_card_measured_is_found(tmp_path):
    folder = tmp_path / "nvidia-h200"
    folder.mkdir()
    finding = {"section": "losses", "name": "clip N=65536 D=512 bfloat16"}
    finding["result"] = {"native": {"step_seconds": 0.125}}
    failed = {"section": "losses", "name": "nt_xent B=4096 D=128 bfloat16", "error": "OutOfMemoryError"}
    record = {"machine": {"gpu": "NVIDIA H200"}, "findings": [finding, failed]}
    (folder / "card.json").write_text(json.dumps(record))
    assert gpu_model.measurements(tmp_path) == {"CLIP, 65536 pairs, D = 512": {"H200": "125"}}


def test_only_the_tables_of_the_page_are_replaced():
    page = f"before\n{gpu_model.BEGIN}\nold\n{gpu_model.END}\nafter\n"
    assert (
        gpu_model.with_tables(page, "new") == f"before\n{gpu_model.BEGIN}\n\nnew\n\n{gpu_model.END}\nafter\n"
    )


@pytest.mark.slow
@pytest.mark.skipif(build.nvcc_path() is None, reason="needs nvcc")
def test_the_page_is_what_the_command_makes():
    page = gpu_model.PAGE.read_text()
    assert page == gpu_model.with_tables(page, gpu_model.tables())

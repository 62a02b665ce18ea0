"""CUDA kernels of `row_pairs`, as nvcc compiled them: parity with float64, traffic, machine code."""

import dataclasses
import itertools
import re
import subprocess

import pytest
import torch

from tests.cuda.launching import accumulation_dtype
from tests.cuda.row_pairs_calls import row_pairs_bwd, row_pairs_fwd
from tests.cuda.test_machine_code import ARCHITECTURES, cuobjdump, instructions, make_cubin, resource_report
from tests.gpu_emulation import nvcc_path
from tests.helpers import DTYPES
from tests.support.row_pairs import Call, check_results, random_call

__all__ = ["cuobjdump"]
SOURCE = "row_pairs.cu"
MEASURES = ("product", "distance")


def run(library, call, device, needs=(True, True, True), **options):
    """Values and gradients on the CPU, and the launches of both directions."""
    x, y, z = (None if rows is None else rows.to(device) for rows in (call.x, call.y, call.z))
    flags = (call.normalize, call.measure)
    (values, saved), launches = row_pairs_fwd(library, x, y, z, *flags, **options)
    upstream = call.cotangent.to(device)
    needs = (*needs[:2], needs[2] and z is not None)
    grads, more = row_pairs_bwd(library, upstream, x, y, z, saved, *flags, *needs, **options)
    found = [values, *grads[: len(call.operands)]]
    return [None if tensor is None else tensor.cpu() for tensor in found], launches + more


def check(library, gpu, call):
    found, launches = run(library, call, gpu.device)
    check_results(found, call, "cuda")
    return launches


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("measure, triplet", list(itertools.product(MEASURES, [False, True])))
@pytest.mark.parametrize("normalize", [True, False])
def test_matches_float64(library, gpu, dtype, measure, triplet, normalize):
    options = {"measure": measure, "triplet": triplet, "normalize": normalize}
    for n, d in ((1, 1), (9, 33), (19, 128)):
        check(library, gpu, random_call(n, d, dtype, **options))


# A lane holds 16 bytes of each operand, then 4 times that (half: twice), then a block has the row, then it is read
# twice.
WIDTHS = {
    torch.float64: (64, 66, 256, 258, 2048, 2050),
    torch.float32: (128, 132, 512, 516, 4096, 4100),
    torch.float16: (256, 264, 512, 520, 4096, 4104),
    torch.bfloat16: (253, 511, 513, 4095, 4097),
}


@pytest.mark.parametrize(
    "dtype, d", [(dtype, d) for dtype, widths in WIDTHS.items() for d in widths], ids=str
)
def test_every_width(library, gpu, dtype, d):
    check(library, gpu, random_call(3, d, dtype))
    check(library, gpu, random_call(2, d, dtype, triplet=False, measure="product"))


def test_strides(library, gpu):
    """Transposed rows, rows at an odd address, every other row, one row repeated."""
    call = random_call(10, 24)
    x = call.x.to(gpu.device)
    shifted = torch.zeros(10, 31, device=gpu.device)[:, 5:29].copy_(x)
    apart = torch.zeros(20, 24, device=gpu.device)[::2].copy_(x)
    for view in (x.T.contiguous().T, shifted, apart, x[:1].expand(10, 24)):
        found, _ = run(library, dataclasses.replace(call, x=view), gpu.device)
        check_results(found, dataclasses.replace(call, x=view.cpu()), "cuda")


def test_rows_padded_to_whole_vectors(library, gpu):
    call = random_call(9, 37)
    padded = [torch.zeros(9, 40)[:, :37].copy_(rows) for rows in call.operands]
    check(library, gpu, dataclasses.replace(call, **dict(zip("xyz", padded, strict=True))))


@pytest.mark.parametrize("measure", MEASURES)
def test_short_and_nan_rows(library, gpu, measure):
    call = random_call(6, 8, measure=measure)
    call.x[0] = 0
    call.y[1] = 0
    call.z[2] *= 3e-14
    check(library, gpu, call)
    call.y[4, 3] = torch.nan
    found, _ = run(library, call, gpu.device)
    for result in found:
        bad = result.isnan() if result.dim() == 1 else result.isnan().any(1)
        assert not bad[:4].any() and not bad[5]
    assert found[0][4].isnan()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [37, 128, 640])
def test_equal_rows_have_distance_and_gradient_zero(library, gpu, dtype, d):
    x = random_call(9, d, dtype).x
    found, _ = run(library, Call(x, x.clone(), None, True, "distance"), gpu.device)
    assert not any(result.any() for result in found)


def test_only_wanted_gradients_are_written(library, gpu):
    call = random_call(5, 12)
    everything, _ = run(library, call, gpu.device)
    for needs in itertools.product([False, True], repeat=3):
        found, _ = run(library, call, gpu.device, needs)
        for need, grad, expected in zip(needs, found[1:], everything[1:], strict=True):
            assert torch.equal(grad, expected) if need else grad is None


def test_every_schedule_gives_the_same_bits_and_can_be_captured(library, gpu):
    for d in (24, 640):
        results = []
        for options in ({}, {"seed": 1, "warp_races": True}, {"seed": 2, "warp_races": True}):
            if gpu.emulated:
                options = {**options, "capturing": True, "stream": 7}
            found, launches = run(library, random_call(11, d), gpu.device, **options)
            results.append(found)
            assert not gpu.emulated or {launch.stream for launch in launches} == {7}
        for other in results[1:]:
            assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("triplet", [False, True])
@pytest.mark.parametrize("d", [128, 512, 2048])
def test_kernels_move_what_their_header_says(library, gpu, dtype, triplet, d):
    """Sectors of 32 bytes within 10 % of the least."""
    if not gpu.emulated:
        pytest.skip("a card has no such counters")
    n, pairs = 16, 1 + triplet
    _, (forward, backward) = run(library, random_call(n, d, dtype, triplet=triplet), gpu.device)
    rows = n * d * dtype.itemsize // 32
    saved = n * pairs * 4 * accumulation_dtype(dtype).itemsize / 32
    value = n * 8 / 32
    reads, writes = forward.counters.global_load_sectors, forward.counters.global_store_sectors
    assert reads == (1 + pairs) * rows
    assert reads + writes <= 1.1 * ((1 + pairs) * rows + saved + value)
    reads, writes = backward.counters.global_load_sectors, backward.counters.global_store_sectors
    assert writes == (1 + pairs) * rows
    assert reads + writes <= 1.1 * (2 * (1 + pairs) * rows + saved + value)


# The machine code


@pytest.fixture(
    scope="module",
    params=[pytest.param(arch, marks=[] if arch == 90 else pytest.mark.slow) for arch in ARCHITECTURES],
    ids=lambda arch: f"sm_{arch}",
)
def cubin(request, cuobjdump, tmp_path_factory):
    if nvcc_path() is None:
        pytest.skip("nvcc is not here")
    cubin = make_cubin("row_pairs", request.param, tmp_path_factory.mktemp("cubin"))
    return lambda what: (
        subprocess.run([cuobjdump, what, cubin], capture_output=True, text=True, check=True).stdout
    )


def test_no_spills_and_two_blocks_a_multiprocessor(cubin):
    report = resource_report(cubin("--dump-resource-usage"), lambda name: "row_pairs" in name)
    assert len(report) == 48
    for name, usage in report.items():
        assert usage["STACK"] == usage["LOCAL"] == 0, name
        assert usage["REG"] <= 128, name


def test_vectors_are_read_and_written_16_bytes_at_a_time(cubin):
    code = instructions(cubin("-sass"), lambda name: "row_pairs" in name)
    vectors = {name: opcodes for name, opcodes in code.items() if re.search(r"Li[12]ELb1E", name)}
    assert len(vectors) == 24
    for name, opcodes in vectors.items():

        def total(prefix, opcodes=opcodes):
            return sum(count for opcode, count in opcodes.items() if re.match(prefix, opcode))

        assert total(r"LDG\.E\S*\.128") > 0, name
        assert total("LDL") == total("STL") == total("ATOM") == total("RED") == 0, name
        if "bwd" in name:
            assert total("STG") == total(r"STG\.E\S*\.128") > 0, name
        else:  # what there is of each row beside its elements
            assert total("LDG") == total(r"LDG\.E\S*\.128"), name

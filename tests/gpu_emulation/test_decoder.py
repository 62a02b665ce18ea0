"""What the emulator does not know is refused, by name, before anything runs."""

import numpy as np
import pytest

from tests.gpu_emulation import Module, PtxError
from tests.gpu_emulation.snippets import evaluate, kernel


def module(*lines, **options):
    return Module(kernel(list(lines), 1, 32, 80, **options))


@pytest.mark.parametrize(
    "statement, message",
    [
        ("frobnicate.b32 %t0, %t1;", "frobnicate.b32: unknown instruction"),
        ("tcgen05.wait::ld.sync.aligned;", "tcgen05.wait::ld.sync.aligned: unknown instruction"),
        ("add.frob.u32 %t0, %t1, %t2;", "add.frob.u32: modifier .frob is not implemented"),
        ("min.xorsign.abs.f32 %t0, %t1, %t2;", "modifier .xorsign is not implemented"),
        ("add.e4m3x2 %t0, %t1, %t2;", "add.e4m3x2: no type that is implemented"),
        ("cvt.rn.satfinite.e4m3x2.f32 %t0, %t1, %t2;", "cvt.rn.satfinite.e4m3x2.f32"),
        (
            "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%t0}, {%t1}, {%t2}, {%t3};",
            "m16n8k32.row.col.s32.s8.s8.s32",
        ),
        ("cp.async.bulk.commit_group;", "cp.async.bulk.commit_group: modifier .bulk is not implemented"),
        ("bar.red.popc.u32 %t0, 0, %p0;", "bar.red.popc.u32"),
        ("mov.u32 %t0, %envreg3;", "unknown name %envreg3"),
        ("add.u64 %t0, %t1, %t2;", "register %t0 does not have the size of the type"),
        ("add.u32 %t0, %t1;", "add.u32: 2 operands"),
        ("shfl.bfly.b32 %t0, %t1, 1, 31;", "only implemented with .sync"),
        ("ld.shared::cluster.u32 %t0, [%t1];", "modifier .shared::cluster is not implemented"),
        ("call strange, (p0);", "call of external function strange"),
    ],
)
def test_unknown_is_refused_by_name(statement, message):
    loaded = module("mov.u32 %t0, 1;", statement, f"@%p0 {statement}" if "call" not in statement else "")
    unsupported = loaded.kernels["snippet"].unsupported
    assert unsupported and all(message in line and line.startswith("line ") for line in unsupported)
    out = np.zeros(32, np.uint32)
    with pytest.raises(PtxError, match="has PTX that the emulator does not implement") as caught:
        loaded.launch("snippet", (1,), (32,), [out])
    assert message in str(caught.value) and not out.any()


def test_other_kernels_of_the_module_run():
    bad = kernel(["frobnicate.b32 %t0;"], 1, 32, 80, name="bad")
    good = kernel(["ld.param.u64 %q0, [p0];", "st.global.u32 [%q0], 5;"], 1, 1, 80, name="good")
    loaded = Module(bad + good.split(".address_size 64", 1)[1])
    out = np.zeros(1, np.uint32)
    loaded.launch("good", (1,), (1,), [out])
    assert out[0] == 5 and not loaded.kernels["good"].unsupported and loaded.kernels["bad"].unsupported


@pytest.mark.parametrize(
    "text, message",
    [
        ("mov.u32 %t0, 1", "expected ',' or ';'"),
        (".reg .b128 %wide;", "registers of type .b128 are not implemented"),
        (".strange 5;", "unknown directive"),
        ("@%nobody bra DONE;", "unknown predicate %nobody"),
        ("mov.u32 %t0, 0x12g;", "bad number '0x12g'"),
        ("/* never closed", "comment without an end"),
    ],
)
def test_parse_errors_name_the_line(text, message):
    with pytest.raises(PtxError, match=r"PTX line \d+: ") as caught:
        module("mov.u32 %t0, 1;", text)
    assert message in str(caught.value)


def test_listing_of_kernels():
    loaded = module(".shared .align 8 .b8 a[12];", ".shared .align 8 .b8 b[4];", ".local .b32 c[3];")
    described = loaded.kernels["snippet"]
    assert (described.parameters, described.shared, described.local) == (1, 20, 12)


def test_bad_launches():
    loaded = module("mov.u32 %t0, 1;")
    x = np.zeros(1)
    with pytest.raises(PtxError, match="no kernel nobody"):
        loaded.launch("nobody", (1,), (32,), [x])
    with pytest.raises(PtxError, match="takes 1 parameters, got 2"):
        loaded.launch("snippet", (1,), (32,), [x, x])
    with pytest.raises(PtxError, match="a block of 2048 threads"):
        loaded.launch("snippet", (1,), (2048,), [x])
    with pytest.raises(PtxError, match="shared memory of 300000 bytes"):
        loaded.launch("snippet", (1,), (32,), [x], shared=300000)
    with pytest.raises(ValueError, match="strides of at least 0"):
        loaded.launch("snippet", (1,), (32,), [np.zeros(4)[::-1]])


def test_scopes_of_registers_and_labels(gpu):
    """Inner blocks, as inline assembly makes them, hide outer names and have labels of their own."""
    inner = """
    {
        .reg .b32 %x;
        mov.u32 %x, 5;
        setp.gt.u32 %p0, %a0, 3;
        @%p0 bra HERE;
        mov.u32 %x, 9;
    HERE:
        add.u32 %d0, %d0, %x;
    }
    """
    body = ".reg .b32 %x; mov.u32 %x, 100; mov.u32 %d0, 0;" + inner + inner + "add.u32 %d0, %d0, %x;"
    found = evaluate(gpu, body, ["u32"], ("u32", np.arange(8)))
    assert found.tolist() == [118] * 4 + [110] * 4

"""What the emulator does not know is refused, by name, before anything runs."""

import re
from pathlib import Path

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


# Real instructions, in forms that the emulator gives no meaning to: statement, the modifier or operand it must name.
VARIANTS = """
    add.cc.u32 %t0, %t1, %t2;                               modifier .cc
    addc.u32 %t0, %t1, %t2;                                 addc.u32: unknown instruction
    add.u16x2 %t0, %t1, %t2;                                no type that is implemented
    add.rn.ftz.f16x2 %t0, %t1, %t2;                         modifier .ftz
    add.rz.f16x2 %t0, %t1, %t2;                             modifier .rz
    mad.lo.cc.u32 %t0, %t1, %t2, %t3;                       modifier .cc
    mad.hi.sat.s32 %t0, %t1, %t2, %t3;                      modifier .sat
    mul.hi.relu.u32 %t0, %t1, %t2;                          modifier .relu
    mul24.hi.u32 %t0, %t1, %t2;                             only implemented with .lo
    fma.rn.sat.f16x2 %t0, %t1, %t2, %t3;                    modifier .sat
    fma.rn.relu.bf16x2 %t0, %t1, %t2, %t3;                  modifier .relu
    fma.rn.oob.f16x2 %t0, %t1, %t2, %t3;                    modifier .oob
    min.relu.s32 %t0, %t1, %t2;                             modifier .relu
    min.NaN.xorsign.abs.f32 %t0, %t1, %t2;                  modifier .xorsign
    min.f32 %t0, %t1, %t2, %t3;                             4 operands
    abs.ftz.f16x2 %t0, %t1;                                 modifier .ftz
    dp2a.lo.u32.u32 %t0, %t1, %t2, %t3;                     unknown instruction
    dp4a.u32.b32 %t0, %t1, %t2, %t3;                        type is not implemented
    sqrt.approx.ftz.f64 %q0, %q1;                           only implemented with .approx.ftz or .rn
    rcp.rn.ftz.f64 %q0, %q1;                                only implemented with .approx.ftz or .rn
    ex2.approx.bf16x2 %t0, %t1;                             only implemented with .ftz
    ex2.approx.ftz.f16x2 %t0, %t1;                          modifier .ftz
    tanh.approx.ftz.f32 %t0, %t1;                           modifier .ftz
    lg2.approx.f16x2 %t0, %t1;                              type is not implemented
    add.u32 %t0, !%t1, %t2;                                 ! before an operand that is no predicate
    add.u32 %t0|%p0, %t1, %t2;                              a second destination
    lop3.or.b32 %t0|%p0, %t1, %t2, %t3, 0x11, %p1;          6 operands
    lop3.b64 %q0, %q1, %q2, %q3, 0x11;                      type is not implemented
    popc.b16 %t0, %t1;                                      type is not implemented
    shf.l.wrap.b64 %q0, %q1, %q2, %t0;                      type is not implemented
    prmt.b32.f4e %t0, %t1, %t2, %t3;                        modifier .f4e
    bfind.shiftamt.b32 %t0, %t1;                            type is not implemented
    setp.lt.ftz.f64 %p0, %q0, %q1;                          modifier .ftz
    setp.lt.and.f16x2 %p0|%p1, %t0, %t1, %p2;               modifier .and
    setp.lt.u32 !%p0, %t0, %t1;                             ! before a destination
    slct.ftz.u32.f32 %t0, %t1, %t2, %t3;                    modifier .ftz
    cvt.rn.relu.f16.f32 %t0, %t1;                           modifier .relu
    cvt.rn.satfinite.tf32.f32 %t0, %t1;                     modifier .satfinite
    cvt.rs.f16x2.f32 %t0, %t1, %t2, %t3;                    4 operands
    cvt.rm.f16.f32 %t0, %t1;                                modifier .rm
    cvt.rni.sat.f32.f32 %t0, %t1;                           modifier .sat
    cvt.rzi.ftz.s32.f64 %t0, %q0;                           modifier .ftz
    cvt.rn.sat.f32.s32 %t0, %t1;                            modifier .sat
    cvt.pack.sat.s8.s32.b32 %t0, %t1, %t2, %t3;             cvt.pack
    mov.b32 %t0, %clock_hi;                                 unknown name %clock_hi
    cvta.shared::cluster.u64 %q0, %q1;                      state space is not implemented
    isspacep.const %p0, %q0;                                state space is not implemented
    createpolicy.range.global.L2::evict_last.b64 %q0, [%q1], 1, 1;    only implemented with .fractional
    ld.mmio.relaxed.sys.global.u32 %t0, [%q0];              modifier .mmio
    ld.global.L1::sometimes.u32 %t0, [%q0];                 modifier .L1::sometimes
    ld.global.u32.unified %t0, [%q0];                       modifier .unified
    ld.global.u32 %t0, [%q0], %q1;                          3 operands
    ld.global.L2::cache_hint.u32 %t0, [%q0];                2 operands
    st.const.u32 [%q0], %t0;                                constant memory is only read
    st.async.weak.shared::cluster.u32 [%q0], %t0, [%q1];    st.async
    st.bulk.weak.shared.u64 [%q0], 64, 0;                   st.bulk
    discard.global.L2 [%q0], 128;                           unknown instruction
    prefetch.tensormap [%q0];                               prefetch.tensormap
    prefetch.global.L3 [%q0];                               only implemented with one of .L1 .L2
    atom.global.add.u32 %t0, [%q0], %t1, %q1;               4 operands
    atom.global.exch.b128 %q0, [%q1], %q2;                  no type that is implemented
    atom.const.add.u32 %t0, [%q0], %t1;                     constant memory is only read
    red.async.relaxed.cluster.global.add.u32 [%q0], %t0;    modifier .async
    multimem.ld_reduce.global.add.f32 %t0, [%q0];           unknown instruction
    cp.async.ca.shared.global [%t0], [%q0], 12;             copy of 12 bytes
    cp.async.cg.shared.global [%t0], [%q0], 8;              copy of 8 bytes
    cp.async.ca.shared::cluster.global [%t0], [%q0], 16;    destination is not shared
    cp.async.ca.shared.global [%t0], [%q0], 16, %t1, %t2;   5 operands
    cp.async.mbarrier.arrive.shared.b64 [%t0];              cp.async.mbarrier
    cp.reduce.async.bulk.global.shared.add.u32 [%q0], [%t0], 16;    cp.reduce
    bar.red.and.pred %p0, 0, %p1;                           bar.red
    barrier.cluster.arrive;                                 barrier.cluster
    mbarrier.init.shared.b64 [%t0], 1;                      unknown instruction
    fence.proxy.tensormap::generic.release.gpu;             modifier .proxy
    fence.mbarrier_init.release.cluster;                    modifier .mbarrier_init
    brx.idx %t0, HERE;                                      unknown instruction
    redux.sync.min.NaN.f32 %t0, %t1, -1;                    type is not implemented
    redux.sync.and.u32 %t0, %t1, -1;                        type is not implemented
    match.any.sync.b32 %t0|%p0, %t1, -1;                    a second destination
    shfl.sync.idx.b64 %q0, %q1, 0, 31, -1;                  type is not implemented
    vote.all.pred %p0, %p1;                                 only implemented with .sync
    ldmatrix.sync.aligned.m16n16.x1.trans.shared.b8 {%t0, %t1}, [%t2];     only implemented with .m8n8
    ldmatrix.sync.aligned.m8n8.x1.global.b16 {%t0}, [%q0];  state space is not implemented
    ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%t0}, [%t1];  registers do not fit the number of matrices
    mma.sync.aligned.m16n8k16.row.col.satfinite.f32.f16.f16.f32 {%t0, %t1, %t2, %t3}, {%t4, %t5, %t6, %t7}, \
        {%t8, %t9}, {%t10, %t11, %t12, %t13};               modifier .satfinite
    mma.sp.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%t0, %t1, %t2, %t3}, {%t4, %t5}, \
        {%t8, %t9}, {%t10, %t11, %t12, %t13}, %t14, 0;      6 operands
    mma.sync.aligned.m8n8k4.row.row.f32.f16.f16.f32 {%t0}, {%t1}, {%t2}, {%t3};    only implemented with .col
    mma.sync.aligned.m16n8k16.row.col.f32.f16.bf16.f32 {%t0}, {%t1}, {%t2}, {%t3};  mixed types
    wmma.load.a.sync.aligned.row.m16n16k16.shared.f16 {%t0}, [%t1];        registers do not fit the shape
    wgmma.mma_async.sp.sync.aligned.m64n8k32.f32.f16.f16 {%t0}, %q0, %q1, %t1, 0, 1, 1, 1, 0, 0;    wgmma.mma_async.sp
    wgmma.wait_group.sync.aligned;                          operand 0 is missing
"""


VARIANTS = [[part.strip() for part in line.split(";")] for line in VARIANTS.strip().splitlines()]


@pytest.mark.parametrize("statement, message", VARIANTS, ids=[variant[0].split()[0] for variant in VARIANTS])
def test_no_modifier_or_operand_is_passed_over(statement, message):
    loaded = module("HERE:", "mov.u32 %t0, 1;", statement + ";")
    (line,) = loaded.kernels["snippet"].unsupported
    assert message in line and line.startswith("line ")


@pytest.mark.parametrize(
    "directive, message",
    [
        (".maxntid 64", "a block of 96 threads, .maxntid allows 64"),
        (".maxntid 8, 4, 2", "a block of 96 threads, .maxntid allows 64"),
        (".reqntid 64", "a block of another shape than .reqntid asks for"),
        (".reqntid 96, 2, 1", "a block of another shape than .reqntid asks for"),
        (".reqnctapercluster 2, 1, 1", "directive .reqnctapercluster is not implemented"),
        (".explicitcluster", "directive .explicitcluster is not implemented"),
        ('.maxntid 96, 1, 1 .minnctapersm 2 .maxnreg 64 .pragma "nounroll";', None),
        (".reqntid 96", None),
    ],
)
def test_performance_directives(directive, message):
    text = kernel(["mov.u32 %t0, 1;"], 1, 96, 90).replace("(.param .u64 p0)", f"(.param .u64 p0) {directive}")
    if message is None:
        Module(text).launch("snippet", (1,), (96,), [np.zeros(1)])
    else:
        with pytest.raises(PtxError) as caught:
            Module(text).launch("snippet", (1,), (96,), [np.zeros(1)])
        assert message in str(caught.value)


INSTRUCTIONS = sorted((Path(__file__).parent / "emulator" / "instructions").glob("*.cpp"))


@pytest.mark.parametrize("file", INSTRUCTIONS, ids=lambda file: file.stem)
def test_every_instruction_cites_its_section_and_is_tested(file):
    text = file.read_text()
    head = text[: text.index("#include")]
    assert re.search(r"PTX ISA 9\.0, sections? 9\.7", head)
    opcodes = re.findall(r'\{"(\w+)"', text[text.index("_opcodes() {") :])
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    assert opcodes
    for opcode in opcodes:
        assert re.search(rf"\b{opcode}\b", head), f"{opcode} has no section"
        assert re.search(rf'\b{opcode}[.; ]|"{opcode}"', tests), f"{opcode} has no test"


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

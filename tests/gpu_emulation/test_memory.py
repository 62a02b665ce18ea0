"""Loads, stores and atomics: values, widths, state spaces, 64-bit addresses; and every check of memory.

One file, although a long one: the checks are held on the very accesses whose values are.
"""

import mmap

import numpy as np
import pytest

from tests.gpu_emulation import PtxError
from tests.gpu_emulation.snippets import at, launch

emulated_only = pytest.mark.usefixtures("emulated")


@pytest.fixture
def emulated(gpu):
    if not gpu.emulated:
        pytest.skip("a card does not notice")


# ---- Values.


@pytest.mark.parametrize("kind", ["u8", "s8", "u16", "s16", "u32", "s32"])
def test_loads_extend_to_the_register(gpu, kind):
    values = np.array([0, 1, 100, 127, 128, 200, 255, 2**15, 2**31 - 1, 2**31], np.uint64)
    values = values.astype(f"u{int(kind[1:]) // 8}").view(
        f"{'i' if kind[0] == 's' else 'u'}{int(kind[1:]) // 8}"
    )
    out = np.zeros(10, np.int64)
    lines = [
        *at("%b0", "%i", values.itemsize),
        f"ld.global.{kind} %q0, [%address];",
        *at("%b1", "%i", 8),
        "st.global.b64 [%address], %q0;",
    ]
    launch(gpu, lines, [values, out], threads=10)
    assert (out == values.astype(np.int64)).all()


@pytest.mark.parametrize(
    "elements, kind", [(2, "b8"), (2, "b16"), (4, "b16"), (2, "f32"), (4, "b32"), (2, "b64")]
)
def test_vectors(gpu, elements, kind):
    register = {"b8": "b16", "b16": "b16", "f32": "f32", "b32": "b32", "b64": "b64"}[kind]
    size = int(kind[1:]) // 8 * elements
    source = np.random.default_rng(0).integers(0, 256, 32 * size).astype(np.uint8)
    out = np.zeros_like(source)
    registers = ", ".join(f"%v{i}" for i in range(elements))
    lines = [
        f".reg .{register} %v<{elements}>;",
        *at("%b0", "%i", size),
        f"ld.global.v{elements}.{kind} {{{registers}}}, [%address];",
        *at("%b1", "%i", size),
        f"st.global.v{elements}.{kind} [%address], {{{registers}}};",
    ]
    launch(gpu, lines, [source, out])
    assert (out == source).all()


def test_hints_and_fences_leave_values_alone(gpu):
    source, out = np.arange(64, dtype=np.uint32), np.zeros(64, np.uint32)
    lines = [
        *at("%b0", "%i", 4),
        "prefetch.global.L2 [%address];",
        "prefetchu.L1 [%address];",
        "applypriority.global.L2::evict_normal [%address], 128;",
        "createpolicy.fractional.L2::evict_first.b64 %q1, 1.0;",
        "nanosleep.u32 1;",
        "ldu.global.u32 %t0, [%address];",
        "membar.gl;",
        "fence.acq_rel.gpu;",
        "pmevent 1;",
        *at("%b1", "%i", 4),
        "st.global.u32 [%address], %t0;",
        *(["griddepcontrol.wait;", "griddepcontrol.launch_dependents;"] if gpu.arch >= 90 else []),
        *(["setmaxnreg.inc.sync.aligned.u32 32;"] if gpu.arch == 90 and gpu.emulated else []),
        "exit;",
    ]
    launch(gpu, lines, [source, out])
    assert (out[:32] == source[:32]).all()


def test_shared_local_and_generic_memory(gpu):
    """Each thread writes shared and local memory and reads them back through generic addresses."""
    out, generic, spaces = np.zeros(64, np.uint32), np.zeros(64, np.uint32), np.zeros(64, np.uint32)
    lines = [
        ".shared .align 4 .b32 tile[64];",
        ".local .align 4 .b32 mine[2];",
        "mov.u32 %t0, tile;",
        "shl.b32 %t1, %i, 2;",
        "add.u32 %t0, %t0, %t1;",
        "st.shared.u32 [%t0], %i;",
        "mul.lo.u32 %t2, %i, 3;",
        "st.local.u32 [mine+4], %t2;",
        "bar.sync 0;",
        "xor.b32 %t1, %t1, 124;",  # the thread with the other lower five bits
        "mov.u64 %q0, tile;",
        "cvta.shared.u64 %q0, %q0;",
        "cvt.u64.u32 %q1, %t1;",
        "add.u64 %q0, %q0, %q1;",
        "ld.u32 %t3, [%q0];",
        "mov.u64 %q2, mine;",
        "cvta.local.u64 %q2, %q2;",
        "ld.u32 %t4, [%q2+4];",
        *at("%b0", "%i", 4),
        "st.global.u32 [%address], %t3;",
        *at("%b1", "%i", 4),
        "st.u32 [%address], %t4;",
        "isspacep.shared %p0, %q0;",
        "isspacep.local %p1, %q2;",
        "isspacep.global %p2, %address;",
        "selp.u32 %t5, 1, 0, %p0;",
        "@%p1 add.u32 %t5, %t5, 2;",
        "@%p2 add.u32 %t5, %t5, 4;",
        *at("%b2", "%i", 4),
        "st.global.u32 [%address], %t5;",
    ]
    launch(gpu, lines, [out, generic, spaces], threads=64)
    i = np.arange(64)
    assert (out == i ^ 31).all() and (generic == 3 * i).all() and (spaces == 7).all()


def test_dynamic_shared_memory_follows_the_static(gpu):
    out = np.zeros(32, np.uint32)
    lines = [
        ".shared .align 4 .b32 fixed[8];",
        "mov.u32 %t0, fixed;",
        "mov.u32 %t1, dynamic;",
        "mov.u32 %t2, %dynamic_smem_size;",
        "sub.u32 %t3, %t1, %t0;",
        "shl.b32 %t4, %i, 2;",
        "add.u32 %t4, %t4, %t1;",
        "st.shared.u32 [%t4], %t3;",
        "ld.shared.u32 %t5, [%t4];",
        "add.u32 %t5, %t5, %t2;",
        *at("%b0", "%i", 4),
        "st.global.u32 [%address], %t5;",
    ]
    launch(gpu, lines, [out], shared=128, module_scope=".extern .shared .align 16 .b8 dynamic[];")
    assert (out >= 128 + 32).all()


def test_module_variables(gpu):
    out = np.zeros(4, np.int32)
    scope = ".const .align 4 .s32 table[4] = {1, -2, 3, 0x10};\n.global .align 4 .f32 one = 0f3F800000;"
    lines = [
        "mov.u64 %q0, table;",
        *at("%q0", "%i", 4),
        "ld.const.s32 %t0, [%address];",
        *at("%b0", "%i", 4),
        "st.global.s32 [%address], %t0;",
    ]
    launch(gpu, lines, [out], threads=4, module_scope=scope)
    assert out.tolist() == [1, -2, 3, 16]


def test_calls_of_device_functions(gpu):
    scope = """
    .func (.param .b32 result) triple_plus(.param .b32 first, .param .b64 second)
    {
        .reg .b32 %r<4>;
        .reg .b64 %rd<2>;
        .reg .pred %p;
        ld.param.u32 %r0, [first];
        ld.param.u64 %rd0, [second];
        setp.gt.u32 %p, %r0, 3;
        mul.lo.u32 %r1, %r0, 3;
        @%p bra BIG;
        cvt.u32.u64 %r2, %rd0;
        add.u32 %r1, %r1, %r2;
        st.param.b32 [result], %r1;
        ret;
    BIG:
        st.param.b32 [result], %r1;
        ret;
    }
    """
    call = """
    {
        .param .b32 p0;
        .param .b64 p1;
        .param .b32 r0;
        st.param.b32 [p0], %t0;
        st.param.b64 [p1], 1000;
        call.uni (r0), triple_plus, (p0, p1);
        ld.param.b32 %t0, [r0];
    }
    """
    out = np.zeros(8, np.uint32)
    lines = ["mov.u32 %t0, %i;", call, call, *at("%b0", "%i", 4), "st.global.u32 [%address], %t0;"]
    launch(gpu, lines, [out], threads=8, module_scope=scope)
    once = lambda x: 3 * x + (1000 if x <= 3 else 0)  # noqa: E731
    assert out.tolist() == [once(once(i)) for i in range(8)]


@emulated_only
def test_addresses_have_64_bits(gpu):
    # 5 GiB of which only touched pages exist.
    memory = np.frombuffer(mmap.mmap(-1, 5 << 30), np.uint8)
    memory[(5 << 30) - 4 :].view(np.uint32)[0] = 42
    out = np.zeros(1, np.uint32)
    lines = [
        "mov.u64 %q0, 0x13ffffffc;",
        "add.u64 %q0, %b0, %q0;",
        "ld.global.u32 %t0, [%q0];",
        "ld.global.u32 %t1, [%q0+-4];",
        "add.u32 %t0, %t0, %t1;",
        "st.global.u32 [%b1], %t0;",
    ]
    launch(gpu, lines, [memory, out], threads=1, read_only=(0,))
    assert out[0] == 42


ATOMICS = {
    "add": lambda old, x: old + x,
    "min": min,
    "max": max,
    "and": lambda old, x: old & x,
    "or": lambda old, x: old | x,
    "xor": lambda old, x: old ^ x,
}


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64"])
@pytest.mark.parametrize("name", ATOMICS)
def test_integer_atomics(gpu, name, kind):
    bits = kind[1:]
    operand = f"b{bits}" if name in ("and", "or", "xor") else kind
    if (name, kind) == ("add", "s64"):
        operand = "u64"
    dtype = f"{'i' if kind[0] == 's' else 'u'}{int(bits) // 8}"
    values = np.random.default_rng(0).integers(0, 100, 64).astype(dtype)
    if kind[0] == "s":
        values -= 50
    total = np.array([7], dtype)
    register = "%t0" if bits == "32" else "%q0"
    lines = [
        *at("%b0", "%i", int(bits) // 8),
        f"ld.global.{kind} {register}, [%address];",
        f"red.global.{name}.{operand} [%b1], {register};",
    ]
    launch(gpu, lines, [values, total], threads=64)
    expected = 7
    for value in values.tolist():
        expected = ATOMICS[name](expected, value)
    assert total[0] == np.array(expected).astype(dtype)


@pytest.mark.parametrize("kind", ["f32", "f64", "f16"])
def test_floating_atomics(gpu, kind):
    dtype, size, register = {"f32": ("f4", 4, "f32"), "f64": ("f8", 8, "f64"), "f16": ("f2", 2, "b16")}[kind]
    values, total = np.arange(32).astype(dtype), np.array([0.5, 0.5], dtype)
    lines = [
        f".reg .{register} %v;",
        *at("%b0", "%i", size),
        f"ld.global.b{8 * size} %v, [%address];",
        f"red.global.add.{'noftz.' if kind == 'f16' else ''}{kind} [%b1], %v;",
    ]
    launch(gpu, lines, [values, total])
    assert total.tolist() == [496.5, 0.5]


def test_exchange_and_compare_and_swap(gpu):
    """Threads take tickets with inc and cas; every ticket is given once."""
    counters, tickets, swaps = np.zeros(3, np.uint32), np.zeros(64, np.uint32), np.zeros(64, np.uint32)
    lines = [
        "atom.global.inc.u32 %t0, [%b0], 1000;",
        *at("%b1", "%i", 4),
        "st.global.u32 [%address], %t0;",
        "atom.global.exch.b32 %t1, [%b0+4], %i;",
        "mov.u32 %t2, 0;",
        "AGAIN:",
        "add.u32 %t3, %t2, 1;",
        "atom.global.cas.b32 %t4, [%b0+8], %t2, %t3;",
        "setp.eq.u32 %p0, %t4, %t2;",
        "mov.u32 %t2, %t4;",
        "@!%p0 bra AGAIN;",
        *at("%b2", "%i", 4),
        "st.global.u32 [%address], %t4;",
    ]
    launch(gpu, lines, [counters, tickets, swaps], threads=64)
    assert sorted(tickets) == sorted(swaps) == list(range(64))
    assert counters[0] == counters[2] == 64 and counters[1] < 64


# ---- Checks.


@emulated_only
@pytest.mark.parametrize("offset, count", [(-4, 32), (4 * 32, 1), (4, 32)])
def test_out_of_bounds(gpu, offset, count):
    x = np.zeros(32, np.float32)
    lines = [
        *at("%b0", "%i", 4),
        f"ld.global.f32 %t0, [%address+{offset}];".replace("%t0", "%f"),
    ]
    with pytest.raises(
        PtxError, match=r"global memory read out of bounds: nearest is argument 0 [-+] \d+ of 128"
    ):
        launch(gpu, [".reg .f32 %f;", *lines], [x], threads=count)


@emulated_only
def test_misalignment(gpu):
    with pytest.raises(PtxError, match="misaligned 8-byte access"):
        launch(gpu, ["ld.global.b64 %q0, [%b0+4];"], [np.zeros(8, np.float32)])


@emulated_only
def test_read_only_buffer(gpu):
    with pytest.raises(PtxError, match="write to read-only buffer argument 0"):
        launch(gpu, ["st.global.u32 [%b0], 1;"], [np.zeros(1, np.uint32)], threads=1, read_only=(0,))


@emulated_only
def test_uninitialised_shared_memory(gpu):
    lines = [".shared .b32 tile[32];", "mov.u32 %t0, tile;", "ld.shared.u32 %t1, [%t0+8];"]
    with pytest.raises(PtxError, match="read of uninitialised shared memory, offset 8"):
        launch(gpu, lines, [])
    launch(gpu, lines, [], uninitialized=False)
    first_block_writes = [
        *lines[:2],
        "setp.eq.u32 %p0, %ctaid, 0;",
        "@%p0 st.shared.u32 [%t0+8], 1;",
        lines[2],
    ]
    launch(gpu, first_block_writes, [], threads=1)
    with pytest.raises(PtxError, match=r"read of uninitialised shared memory.*block \(1, 0, 0\)"):
        launch(gpu, first_block_writes, [], threads=1, grid=2)


@emulated_only
def test_shared_out_of_bounds(gpu):
    lines = [".shared .b32 tile[32];", "mov.u32 %t0, tile;", "st.shared.u32 [%t0+128], %i;"]
    with pytest.raises(PtxError, match="shared memory access out of bounds: offset 128 of 128"):
        launch(gpu, lines, [], threads=1)


@emulated_only
def test_message_says_where(gpu):
    lines = ["setp.eq.u32 %p0, %i, 37;", "@%p0 ld.global.b32 %t0, [%b0+4096];"]
    where = r"\[block \(0, 0, 0\), warp 1, lane 5, PTX line \d+: @%p0 ld.global.b32 %t0, \[%b0\+4096\]\]"
    with pytest.raises(PtxError, match=where):
        launch(gpu, lines, [np.zeros(64)], threads=64)


NEIGHBOUR = """
.shared .align 4 .b32 tile[64];
mov.u32 %t0, tile;
shl.b32 %t1, %i, 2;
add.u32 %t2, %t0, %t1;
st.shared.u32 [%t2], %i;
{between}
xor.b32 %t1, %t1, {distance};
add.u32 %t2, %t0, %t1;
ld.shared.u32 %t3, [%t2];
{after}
"""


WRITE_OWN = "shl.b32 %t1, %i, 2; add.u32 %t2, %t0, %t1; st.shared.u32 [%t2], 99;"


@emulated_only
@pytest.mark.parametrize("seed", range(4))
def test_race_between_warps(gpu, seed):
    lines = lambda between, after: [NEIGHBOUR.format(between=between, distance=128, after=after)]  # noqa: E731
    launch(gpu, lines("bar.sync 0;", ""), [], threads=64, seed=seed)
    launch(gpu, lines("bar.sync 0;", "bar.sync 0;" + WRITE_OWN), [], threads=64, seed=seed)
    with pytest.raises(PtxError, match=r"data race on shared memory|uninitialised"):
        launch(gpu, lines("", ""), [], threads=64, seed=seed)
    with pytest.raises(PtxError, match="data race on shared memory"):
        launch(gpu, lines("bar.sync 0;", WRITE_OWN), [], threads=64, seed=seed)


@emulated_only
def test_race_within_a_warp(gpu):
    lines = lambda between, after="": [NEIGHBOUR.format(between=between, distance=4, after=after)]  # noqa: E731
    sync = "bar.warp.sync 0xffffffff;"
    launch(gpu, lines("", WRITE_OWN), [])
    launch(gpu, lines(sync, sync + WRITE_OWN), [], warp_races=True)
    with pytest.raises(PtxError, match="read conflicts with an unordered write"):
        launch(gpu, lines(""), [], warp_races=True)
    with pytest.raises(PtxError, match="write conflicts with an unordered read"):
        launch(gpu, lines(sync, WRITE_OWN), [], warp_races=True)
    # All lanes read one word, and the last that read it writes it.
    broadcast = "ld.shared.u32 %t5, [%t0]; setp.eq.u32 %p0, %i, 31; @%p0 st.shared.u32 [%t0], 99;"
    with pytest.raises(PtxError, match="write conflicts with reads by other lanes"):
        launch(gpu, lines(sync, sync + broadcast), [], warp_races=True)


@emulated_only
def test_race_on_single_bytes(gpu):
    """Neighbouring bytes of a word belong to different threads: no race, until a whole word is read."""
    out = np.zeros(64, np.uint8)
    lines = ["cvt.u64.u32 %q0, %i;", "add.u64 %q0, %b0, %q0;", "st.global.u8 [%q0], %i;"]
    launch(gpu, lines, [out], threads=64)
    assert (out == np.arange(64)).all()
    last = [*lines, "setp.eq.u32 %p0, %i, 63;", "@%p0 ld.global.u32 %t0, [%b0];"]
    with pytest.raises(PtxError, match="data race on argument 0 memory"):
        launch(gpu, last, [out], threads=64)


@emulated_only
def test_race_between_blocks(gpu):
    x = np.zeros(4, np.uint32)
    lines = ["ld.global.u32 %t0, [%b0];", "add.u32 %t0, %t0, 1;", "st.global.u32 [%b0], %t0;"]
    launch(gpu, lines, [x], threads=1)
    with pytest.raises(PtxError, match="data race on argument 0 memory"):
        launch(gpu, lines, [x], threads=1, grid=2)
    launch(gpu, lines, [x], threads=1, grid=2, grid_races=False)
    read_then_write = [
        "ld.global.u32 %t0, [%b0];",
        "setp.eq.u32 %p0, %ctaid, 2;",
        "@%p0 st.global.u32 [%b0], 9;",
    ]
    with pytest.raises(PtxError, match="write conflicts with"):
        launch(gpu, read_then_write, [x], threads=1, grid=3)
    written_twice = ["st.global.u32 [%b0], %ctaid;"]
    with pytest.raises(PtxError, match="write conflicts with an unordered write"):
        launch(gpu, written_twice, [x], threads=1, grid=2)
    written_then_read = [
        "setp.eq.u32 %p0, %ctaid, 0;",
        "@%p0 st.global.u32 [%b0], 9;",
        "@!%p0 ld.global.u32 %t0, [%b0];",
    ]
    with pytest.raises(PtxError, match="read conflicts with an unordered write"):
        launch(gpu, written_then_read, [x], threads=1, grid=2)
    for lines in (written_twice, written_then_read):
        launch(gpu, lines, [x], threads=1, grid=2, grid_races=False)


@emulated_only
def test_writer_that_also_read_races_with_the_other_readers(gpu):
    """The last reader writes: its own reading must not hide that of another warp, or another block."""
    x = np.zeros(4, np.uint32)
    write = ["setp.eq.u32 %p0, %i, {writer};", "@%p0 st.global.u32 [%b0], 9;"]
    lines = ["ld.global.u32 %t0, [%b0];", "{between}", *write]
    fill = lambda **names: [line.format_map(names) for line in lines]  # noqa: E731
    launch(gpu, fill(writer=32, between="bar.sync 0;"), [x], threads=64)
    with pytest.raises(PtxError, match="write conflicts with an unordered read"):
        launch(gpu, fill(writer=32, between=""), [x], threads=64)
    with pytest.raises(PtxError, match="write conflicts with reads by other blocks"):
        launch(gpu, fill(writer=96, between="bar.sync 0;"), [x], threads=64, grid=2)


@emulated_only
def test_atomics_race_with_plain_writes_only(gpu):
    x = np.zeros(4, np.uint32)
    launch(gpu, ["red.global.add.u32 [%b0], 1;"], [x], threads=64, grid=2)
    assert x[0] == 128
    mixed = ["setp.eq.u32 %p0, %i, 40;", "red.global.add.u32 [%b0], 1;", "@%p0 st.global.u32 [%b0], 5;"]
    with pytest.raises(PtxError, match=r"plain write conflicts with an unordered atomic|atomic conflicts"):
        launch(gpu, mixed, [x], threads=64)


@emulated_only
def test_atomic_counter_may_be_reset_after_a_barrier(gpu):
    lines = [
        ".shared .b32 counter;",
        "setp.eq.u32 %p0, %i, 0;",
        "@%p0 st.shared.u32 [counter], 0;",
        "bar.sync 0;",
        "atom.shared.add.u32 %t0, [counter], 1;",
        "bar.sync 0;",
        "@%p0 st.shared.u32 [counter], 0;",
    ]
    launch(gpu, lines, [], threads=64)


@emulated_only
def test_equal_values_are_no_race(gpu):
    launch(gpu, ["st.global.u32 [%b0], 7;"], [np.zeros(1, np.uint32)], threads=64)
    with pytest.raises(PtxError, match="lanes 0 and 1 of one store write different values"):
        launch(gpu, ["st.global.u32 [%b0], %i;"], [np.zeros(1, np.uint32)], threads=2)


@emulated_only
@pytest.mark.parametrize("seed", range(3))
def test_named_barriers_order_only_those_who_pass(gpu, seed):
    """Warp 0 hands its word to warp 1 over barrier 1; warp 2 reads it without having passed."""
    lines = [
        ".shared .b32 word;",
        "setp.lt.u32 %p0, %i, 32;",
        "setp.ge.u32 %p1, %i, 64;",
        "@%p0 bra PRODUCER;",
        "@%p1 bra OTHER;",
        "bar.sync 1, 64;",
        "ld.shared.u32 %t0, [word];",
        "bra JOIN;",
        "PRODUCER: st.shared.u32 [word], 5;",
        "bar.arrive 1, 64;",
        "bra JOIN;",
        "OTHER: {other}",
        "JOIN: bar.sync 0;",
        "ld.shared.u32 %t1, [word];",
    ]
    fill = lambda other: [line.replace("{other}", other) for line in lines]  # noqa: E731
    launch(gpu, fill(""), [], threads=96, seed=seed)
    with pytest.raises(PtxError, match=r"data race on shared memory|uninitialised"):
        launch(gpu, fill("ld.shared.u32 %t2, [word];"), [], threads=96, seed=seed)


@emulated_only
def test_barrier_faults(gpu):
    with pytest.raises(PtxError, match="divergent barrier: executed by 16 of 32 lanes"):
        launch(gpu, ["setp.lt.u32 %p0, %i, 16;", "@%p0 bar.sync 0;"], [])
    with pytest.raises(PtxError, match=r"deadlock: warp 1 waits at a barrier|after some have exited"):
        launch(gpu, ["setp.lt.u32 %p0, %i, 32;", "@%p0 ret;", "bar.sync 0;"], [], threads=64)
    with pytest.raises(PtxError, match="more threads at the barrier"):
        launch(gpu, ["bar.sync 1, 48;"], [], threads=64)
    with pytest.raises(PtxError, match="threads of a barrier disagree"):
        launch(
            gpu, ["setp.lt.u32 %p0, %i, 32;", "@%p0 bar.sync 1, 64;", "@!%p0 bar.sync 1, 96;"], [], threads=64
        )


@emulated_only
def test_endless_loop(gpu):
    with pytest.raises(PtxError, match="instruction limit reached"):
        launch(gpu, ["LOOP: bra LOOP;"], [], instruction_limit=1000)


@emulated_only
@pytest.mark.parametrize("statement", ["trap;", "brkpt;"])
def test_trap(gpu, statement):
    with pytest.raises(PtxError, match="trap"):
        launch(gpu, [statement], [])


@emulated_only
def test_races_in_a_buffer_of_terabytes(gpu):
    """Only what is touched has a history."""
    memory = np.frombuffer(
        mmap.mmap(-1, 2**41, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000), np.int32
    )
    lines = [
        "ld.param.u64 %address, [p0];",
        "add.u64 %address, %address, 1099511627776;",
        "st.global.u32 [%address], %i;",
    ]
    launch(gpu, lines, [memory[: 2**39]], threads=1)
    with pytest.raises(PtxError, match="race"):
        launch(gpu, lines, [memory[: 2**39]], threads=64)

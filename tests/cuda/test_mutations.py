"""Every barrier, wait, mask and fence of the CUDA kernels is needed, every sign, index and lane that the table names is
right, and the checks notice where one is not."""

import re

import pytest

from tests.cuda import mutate
from tests.cuda.mutation import SOURCES, build, noticed_by

SAMPLE = {
    "contrastive: expectation: merge's fence of a warp",
    "sigmoid_pairs: walk: wait for the step's copies",
    "batch_hard: walk: commit of a step's copies",
    "queue_push: keys past the end",
    "queue_push: lane: sum of half a warp",
    "momentum_update: index: group that is stored",
    "mixup: walk: the first held aside",
    "cutmix: cutmix: held for this cycle only",
    "mixup_normalize: sign: mean",
    "mixup_cross_entropy: cross-entropy: barrier",
}
# Outside loops' heads: a barrier, wait or fence, in CUDA or PTX, and a comparison with the size of something.
SYNCHRONISATION = (
    r"__sync\w+\(|__threadfence\w*\(|copy_async_(?:commit|wait)(?:<[^;]*>)?\(\);"
    r"|cp\.async\.(?:commit|wait)_\w+|mbarrier|fence\.|membar|bar(?:rier)?\.sync"
)
SIZES = r"(?:\w+\.)*(?:count|rows|columns|features|width_|sources|targets|end|size|N|M|B|C|D|K)\b"
MASK = rf"[\w)\]] (?:<|<=|>|>=) {SIZES}"
KERNELS = sorted(
    path.relative_to(SOURCES).as_posix() for path in SOURCES.rglob("*.cuh") if path.name != "launcher.cuh"
)


def occurrences(pattern, text):
    """Spans of the pattern outside comments and heads of loops."""
    code = re.sub(r"//.*|\bfor \(.*", lambda left_out: " " * len(left_out[0]), text)
    return [match.span() for match in re.finditer(pattern, code)]


@pytest.mark.parametrize("what", [SYNCHRONISATION, MASK], ids=["barriers, waits and fences", "masks"])
@pytest.mark.parametrize("file", KERNELS)
def test_every_one_is_in_the_table(file, what):
    text = (SOURCES / file).read_text()
    spans = [mutation.changed_span() for _, mutation in mutate.MUTATIONS.values() if mutation.file == file]
    missing = [
        f"line {text.count(chr(10), 0, start) + 1}: {text[start:end]}"
        for start, end in occurrences(what, text)
        if not any(first < end and start < last for first, last in spans)
    ]
    assert not missing


def test_the_sample_has_every_kind():
    assert SAMPLE <= set(mutate.MUTATIONS)
    kinds = {mutation.kind for _, mutation in mutate.MUTATIONS.values()}
    assert kinds == {"barrier", "fence", "wait", "commit", "mask", "sign", "index", "lane"}
    assert {mutate.MUTATIONS[name][1].kind for name in SAMPLE} == kinds


def test_every_operation_has_a_sign_or_index_in_the_table():
    broken = {
        operation for operation, mutation in mutate.MUTATIONS.values() if mutation.kind in ("sign", "index")
    }
    assert broken == set(mutate.CHECKS)


@pytest.mark.slow
@pytest.mark.parametrize("operation", mutate.CHECKS)
def test_unharmed_kernels_pass_the_checks(nvcc, operation):
    assert noticed_by(mutate.CHECKS[operation], build(operation)) is None


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in SAMPLE else pytest.mark.slow) for name in mutate.MUTATIONS],
)
def test_mutation_is_noticed(nvcc, name):
    operation, mutation = mutate.MUTATIONS[name]
    found = noticed_by(mutate.CHECKS[operation], build(operation, mutation))
    assert (found is None) == bool(mutation.harmless), found

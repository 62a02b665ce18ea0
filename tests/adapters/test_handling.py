"""What programs do with the classes beside calling them: copy and pickle, derive, set attributes, load old states."""

import copy
import inspect
import pickle
import sys
import types
import warnings

import pytest
import torch
from torch import nn

from benchmarks.peers import Originals
from ssl_kernels import adapters
from ssl_kernels.adapters import _shared
from tests.adapters.uses import adapter, all_uses, largest_error


def rows(n=6, d=8, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def library_or_skip(library):
    try:
        return Originals(library)
    except ImportError as error:
        pytest.skip(f"the library is not installed (make test-peers installs all): {error}")


ADAPTED = sorted({(use.library, use.name) for use in all_uses() if adapter(use.library).ORIGINALS})
# (library, class): how it is made, and a call of it that does not depend on random numbers.
OBJECTS = {
    ("info_nce", "InfoNCE"): (lambda kind: kind(0.2, "none"), lambda f: f(rows(), rows(seed=1))),
    ("infonce", "InfoNCE"): (lambda kind: kind(0.2), lambda f: f(rows())),
    ("infonce", "SupervisedInfoNCE"): (lambda kind: kind(0.2), lambda f: f(rows(), torch.arange(6) % 2)),
    ("lightly", "NTXentLoss"): (lambda kind: kind(0.2, (12, 8)), lambda f: f(rows(), rows(seed=1))),
    ("lightly", "DCLLoss"): (lambda kind: kind(0.2), lambda f: f(rows(), rows(seed=1))),
    ("lightly", "DCLWLoss"): (lambda kind: kind(0.2, 0.4), lambda f: f(rows(), rows(seed=1))),
    ("lightly", "NegativeCosineSimilarity"): (lambda kind: kind(), lambda f: f(rows(), rows(seed=1))),
    ("lightly", "MemoryBankModule"): (lambda kind: kind((4, 8)), lambda f: f(rows(4), update=True)[1]),
    ("open_clip", "ClipLoss"): (lambda kind: kind(), lambda f: f(rows(), rows(seed=1), 2.0)),
    ("open_clip", "CoCaLoss"): (
        lambda kind: kind(1.0, 2.0),
        lambda f: sum(f(rows(), rows(seed=1), rows(12, 5).view(6, 2, 5), torch.ones(6, 2).long(), 2.0)),
    ),
    ("open_clip", "SigLipLoss"): (lambda kind: kind(), lambda f: f(rows(), rows(seed=1), 2.0, -1.0)),
    ("pytorch_metric_learning", "NTXentLoss"): (
        lambda kind: kind(0.2),
        lambda f: f(rows(), torch.arange(6) % 2),
    ),
    ("pytorch_metric_learning", "SupConLoss"): (
        lambda kind: kind(0.2),
        lambda f: f(rows(), torch.arange(6) % 2),
    ),
    ("pytorch_metric_learning", "TripletMarginLoss"): (
        lambda kind: kind(0.2),
        lambda f: f(
            rows(), torch.arange(6), (torch.tensor([0, 1]), torch.tensor([2, 3]), torch.tensor([4, 5]))
        ),
    ),
    ("timm", "Mixup"): (
        lambda kind: kind(prob=0.0, num_classes=6),
        lambda f: f(rows().view(6, 2, 2, 2), torch.arange(6))[1],
    ),
}


@pytest.mark.parametrize("library, name", ADAPTED, ids=[".".join(key) for key in ADAPTED])
def test_arguments_are_the_originals(library, name):
    """The same names, order and defaults; what is added is for keywords alone."""
    theirs, ours = (getattr(space, name) for space in (library_or_skip(library), adapter(library)))
    pairs = [(theirs, ours)]
    if isinstance(theirs, type):
        pairs = [(theirs.__init__, ours.__init__)]
        pairs += [(getattr(theirs, m), getattr(ours, m)) for m in ("forward",) if hasattr(theirs, m)]
        pairs += [(theirs.__call__, ours.__call__)] if not issubclass(theirs, nn.Module) else []
    for original, mine in pairs:
        kept = [
            (parameter.name, parameter.kind, parameter.default)
            for parameter in inspect.signature(mine).parameters.values()
            if parameter.name != "strict"
        ]
        expected = inspect.signature(original).parameters.values()
        assert kept == [(parameter.name, parameter.kind, parameter.default) for parameter in expected]


@pytest.mark.parametrize("library, name", OBJECTS, ids=[".".join(key) for key in OBJECTS])
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"]
)
def test_copies_and_pickles(library, name, copied):
    if library == "pytorch_metric_learning":
        library_or_skip(library)
    make, call = OBJECTS[library, name]
    torch.manual_seed(0)
    first = make(getattr(adapter(library), name))
    second = copied(first)
    assert type(second) is type(first)
    assert torch.equal(call(second), call(first))


@pytest.mark.parametrize("library, name", OBJECTS, ids=[".".join(key) for key in OBJECTS])
def test_an_object_pickled_as_the_original(library, name):
    """Under `patch` its class is found to be the adapter: the attributes must do."""
    space = library_or_skip(library)
    make, call = OBJECTS[library, name]
    torch.manual_seed(0)
    theirs = make(getattr(space, name))
    kind = getattr(adapter(library), name)
    mine = kind.__new__(kind)
    mine.__dict__.update(copy.deepcopy(theirs).__dict__)
    torch.testing.assert_close(call(mine), call(theirs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("library, name", OBJECTS, ids=[".".join(key) for key in OBJECTS])
def test_states_go_both_ways(library, name):
    space = library_or_skip(library)
    make, _ = OBJECTS[library, name]
    theirs, mine = make(getattr(space, name)), make(getattr(adapter(library), name))
    if not isinstance(theirs, nn.Module):
        pytest.skip("it has no state")
    assert mine.load_state_dict(theirs.state_dict()) == theirs.load_state_dict(mine.state_dict())
    learned = [buffer.shape for buffer in theirs.buffers()]
    assert [buffer.shape for buffer in mine.buffers()] == learned


HOOKS = [
    (adapters.open_clip.ClipLoss, "get_logits"),
    (adapters.open_clip.CoCaLoss, "get_ground_truth"),
    (adapters.open_clip.SigLipLoss, "_loss"),
    (adapters.lightly.DCLLoss, "_loss"),
    (adapters.timm.Mixup, "_params_per_batch"),
]


@pytest.mark.parametrize("kind, method", HOOKS, ids=lambda value: getattr(value, "__name__", value))
def test_a_method_that_is_never_called_is_refused(kind, method):
    with pytest.raises(TypeError, match=f"Derived: a subclass of this adapter must leave {method} alone"):
        type("Derived", (kind,), {method: lambda self: None})
    assert issubclass(type("Derived", (kind,), {"other": None}), kind)


def test_a_method_that_is_never_called_is_the_librarys(monkeypatch):
    """Of which a subclass with a forward of its own makes its loss."""
    module, package = types.ModuleType("open_clip.loss"), types.ModuleType("open_clip")

    class ClipLoss:
        def get_logits(self, x):
            return (self.rank, x)

    module.ClipLoss, package.loss = ClipLoss, module
    monkeypatch.setitem(sys.modules, "open_clip", package)
    monkeypatch.setitem(sys.modules, "open_clip.loss", module)
    monkeypatch.setattr(_shared, "_warned", set())

    class Mine(adapters.open_clip.ClipLoss):
        def forward(self, x):
            return self.get_logits(x)

    with pytest.warns(UserWarning, match="^ClipLoss.get_logits: open_clip.loss.ClipLoss itself runs$"):
        assert Mine(rank=3)(5) == (3, 5)
    assert adapters.open_clip.CoCaLoss(1.0, 1.0, rank=2).get_logits(7) == (2, 7)
    monkeypatch.setitem(sys.modules, "open_clip.loss", None)
    with pytest.raises(
        ImportError, match=r"ClipLoss\.get_logits: that is left to open_clip, which cannot be"
    ):
        Mine()(5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_temperature_of_one_element_leaves_a_number(dtype):
    labels, unit = torch.arange(6) % 3, nn.functional.normalize(rows(12), dim=1).view(6, 2, 8)

    def losses(temperature):
        weighted = adapters.lightly.DCLLoss(temperature, lambda x, y: (x - y).square().sum(1))
        yield weighted(rows(), rows(seed=1))
        yield adapters.lightly.DCLWLoss(temperature)(rows(), rows(seed=1))
        for mode in ("all", "one"):
            yield adapters.sup_contrast.SupConLoss(temperature, mode)(unit, labels)

    learned = torch.tensor([0.4], dtype=dtype, requires_grad=True)
    for found, expected in zip(losses(learned), losses(0.4), strict=True):
        torch.testing.assert_close(found, expected)
        assert torch.autograd.grad(found, learned)[0].shape == (1,)


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_info_nce_without_a_negative_reaches_all_its_inputs(paired, reduction):
    empty = torch.empty((6, 0, 8) if paired else (0, 8), requires_grad=True)
    temperature = torch.tensor([0.2], requires_grad=True)
    x, y = rows().requires_grad_(), rows(seed=1).requires_grad_()
    loss = adapters.info_nce.InfoNCE(temperature, reduction, "paired" if paired else "unpaired")(x, y, empty)
    assert torch.equal(loss, torch.zeros(6) if reduction == "none" else torch.tensor(0.0))
    for gradient in torch.autograd.grad(loss.sum(), (x, y, empty, temperature)):
        assert not gradient.any()
    with pytest.raises(ValueError, match=r"negative_keys must have shape \(.*0, 8\), got \(0, 7\)"):
        adapters.info_nce.info_nce(
            rows(), rows(), torch.empty(0, 7), negative_mode="paired" if paired else "unpaired"
        )


def test_a_captioners_cross_entropy_is_called_as_the_librarys():
    """Another module than `nn.CrossEntropyLoss` sees (N, C, L) logits; a list of losses has the labels' shape."""
    logits, labels = rows(12, 5).view(6, 2, 5), torch.arange(12).view(6, 2) % 5
    loss, seen = adapters.open_clip.CoCaLoss(3.0, 0.0), []

    def caption(module):
        loss.caption_loss = module
        return loss(rows(), rows(seed=1), logits, labels, 2.0)[1]

    for options in ({"reduction": "none"}, {"reduction": "sum"}, {}, {"weight": torch.arange(5.0)}):
        module = nn.CrossEntropyLoss(ignore_index=0, **options)
        torch.testing.assert_close(caption(module), 3 * module(logits.mT, labels))
    module.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape))
    caption(module)

    class Own(nn.CrossEntropyLoss):
        def forward(self, logits, labels):
            seen.append(logits.shape)
            return super().forward(logits, labels)

    caption(Own())
    assert seen == [(6, 5, 2), (6, 5, 2)]
    with pytest.raises(ValueError, match="batch_size"):
        loss(rows(), rows(seed=1), logits, labels.flatten(), 2.0)


def test_a_subclass_of_a_library_class_is_heard():
    library_or_skip("pytorch_metric_learning")
    from ssl_kernels.adapters.pytorch_metric_learning import NTXentLoss

    class Doubled(NTXentLoss):
        def _compute_loss(self, *arguments):
            found = super()._compute_loss(*arguments)
            found["loss"]["losses"] = 2 * found["loss"]["losses"]
            return found

    x, labels = rows(), torch.arange(6) % 3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(Doubled()(x, labels), 2 * NTXentLoss()(x, labels))


@pytest.mark.parametrize("bank", [0, (12, 8)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_lightlys_cross_entropy_reduces(bank, reduction):
    loss = adapters.lightly.NTXentLoss(0.2, bank)
    expected = loss(rows(), rows(seed=1))
    loss.cross_entropy = nn.CrossEntropyLoss(reduction=reduction)
    found = loss(rows(), rows(seed=1))
    assert found.shape == ((6 if bank else 12,) if reduction == "none" else ())
    found = found / (6 if bank else 12) if reduction == "sum" else found.mean()
    torch.testing.assert_close(found, expected)


def test_lightlys_bank_is_taken_as_it_is():
    """Rows that a program put there need not be of length 1."""
    loss = adapters.lightly.NTXentLoss(0.2, (12, 8))
    loss.memory_bank.bank.copy_(3 * rows(12, seed=2))
    x, y = (nn.functional.normalize(rows(seed=seed), dim=1) for seed in (0, 1))
    logits = torch.cat(((x * y).sum(1, keepdim=True), x @ loss.memory_bank.bank.T), 1) / 0.2
    torch.testing.assert_close(loss(x, y), nn.functional.cross_entropy(logits, torch.zeros(6).long()))


def test_lightlys_cross_entropy_is_listened_to():
    library_or_skip("lightly")
    loss, seen = adapters.lightly.NTXentLoss(0.2), []
    expected = loss(rows(), rows(seed=1))
    loss.cross_entropy.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape))
    torch.testing.assert_close(loss(rows(), rows(seed=1)), expected)
    assert seen == [(12, 11)]


@pytest.mark.parametrize("bank", [0, (12, 8)])
def test_lightlys_other_cross_entropies_run_lightly(bank):
    space = library_or_skip("lightly")
    values = []
    for kind in (adapters.lightly.NTXentLoss, space.NTXentLoss):
        torch.manual_seed(0)
        loss = kind(0.2, bank)
        loss.cross_entropy = nn.CrossEntropyLoss(label_smoothing=0.1)
        x = rows().requires_grad_()
        value = loss(x, rows(seed=1))
        values.append(([value.detach()], list(torch.autograd.grad(value, x))))
    assert largest_error(*values) < 1e-5


class _Cross(nn.CrossEntropyLoss):
    pass


class _Bank(adapters.lightly.MemoryBankModule):
    pass


@pytest.mark.parametrize(
    "part",
    [
        nn.CrossEntropyLoss(label_smoothing=0.1),
        nn.CrossEntropyLoss(weight=torch.ones(12)),
        nn.CrossEntropyLoss(ignore_index=0),
        _Cross(),
        _Bank(0),
    ],
    ids=["label_smoothing", "weight", "ignore_index", "derived cross_entropy", "derived memory_bank"],
)
def test_what_only_the_library_can_do_names_it_where_it_is_missing(part, monkeypatch):
    monkeypatch.setitem(sys.modules, "lightly.loss.ntx_ent_loss", None)
    monkeypatch.setitem(sys.modules, "lightly", None)
    loss = adapters.lightly.NTXentLoss(0.2)
    setattr(loss, "memory_bank" if isinstance(part, _Bank) else "cross_entropy", part)
    why = (
        "NTXentLoss: a cross_entropy or memory_bank of another kind: that is left to lightly, which cannot be"
    )
    with pytest.raises(ImportError, match=why):
        loss(rows(), rows(seed=1))


def test_horovod_is_asked_where_there_are_several_processes(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip.loss", None)
    monkeypatch.setitem(sys.modules, "open_clip", None)
    x, y = rows(), rows(seed=1)
    alone = adapters.open_clip.ClipLoss(use_horovod=True)(x, y, 2.0)
    assert torch.equal(alone, adapters.open_clip.ClipLoss()(x, y, 2.0))
    with pytest.raises(ImportError, match="ClipLoss: use_horovod: that is left to open_clip"):
        adapters.open_clip.ClipLoss(use_horovod=True, world_size=2)(x, y, 2.0)


def test_what_the_library_does_itself_is_said_once(monkeypatch):
    """And is the original's doing where `patch` has put the adapter in its place."""
    module = types.ModuleType("pretended_library")
    module.Loss = "the adapter"
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(_shared, "_warned", set())
    with pytest.warns(UserWarning, match="^Loss: such input: pretended_library.Loss itself runs$"):
        assert _shared.original("pretended_library", "Loss", "Loss: such input") == "the adapter"
    monkeypatch.setitem(_shared.originals, "the adapter", "the original")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _shared.original("pretended_library", "Loss", "Loss: such input") == "the original"


def test_lightlys_memory_bank_may_be_another():
    space = library_or_skip("lightly")

    class Backwards(space.MemoryBankModule):
        def forward(self, output, labels=None, update=False):
            output, bank = super().forward(output, labels, update)
            return output, -bank

    values = []
    for kind in (adapters.lightly.NTXentLoss, space.NTXentLoss):
        loss = kind(0.2)
        torch.manual_seed(0)
        loss.memory_bank = Backwards((12, 8))
        values.append(loss(rows(), rows(seed=1)))
    assert torch.equal(*values)


@pytest.mark.parametrize(
    "labels", [torch.arange(6) % 2 == 0, torch.arange(6) % 3 / 4, (torch.arange(6) % 3).int()]
)
def test_labels_of_any_dtype(labels):
    """Floating ones that an integer cannot tell apart too."""
    integers = torch.unique(labels, return_inverse=True)[1]
    unit = nn.functional.normalize(rows(), dim=1)[:, None]
    for loss, x in (
        (adapters.infonce.SupervisedInfoNCE(), rows()),
        (adapters.sup_contrast.SupConLoss(), unit),
    ):
        assert torch.equal(loss(x, labels), loss(x, integers))


@pytest.mark.parametrize(
    "make", [adapters.byol_pytorch.cosine_loss_fn, adapters.lightly.NegativeCosineSimilarity()]
)
def test_integers_are_left_to_torch(make):
    with pytest.raises(RuntimeError, match="float"):
        make(torch.ones(3, 4).long(), torch.ones(3, 4).long())


def test_messages_of_what_cannot_be():
    x, labels = rows(), torch.arange(6) % 2
    supervised = adapters.infonce.SupervisedInfoNCE
    with pytest.raises(ValueError, match=r"SupervisedInfoNCE: temperature must be finite and > 0, got 0"):
        supervised(0)(x, labels)
    with pytest.raises(ValueError, match=r"SupervisedInfoNCE: features must have shape .*, got \(0, 8\)"):
        supervised()(x[:0], labels[:0])
    with pytest.raises(ValueError, match=r"SupervisedInfoNCE: target must have shape \(6,\), got \(5,\)"):
        supervised()(x, labels[:5])
    with pytest.raises(ValueError, match="temperature must not be 0"):
        adapters.pytorch_metric_learning.nt_xent_of_pairs(x, labels, None, None, 0.0)
    with pytest.raises(ValueError, match=r"info_nce: temperature must be finite and > 0, got 0"):
        adapters.info_nce.info_nce(x, x, x[:0], 0.0)
    with pytest.raises(
        ValueError, match=r"logit_bias must be a number or have one element, got shape \(6,\)"
    ):
        adapters.open_clip.ClipLoss()(x, x, 1.0, torch.zeros(6))
    for processes in (adapters.open_clip.ClipLoss(world_size=2), adapters.open_clip.SigLipLoss(world_size=2)):
        with pytest.raises(ValueError, match="Loss: world_size must be the number of processes, 1, got 2"):
            processes(x, x, 1.0, 0.0)
    with pytest.raises(ValueError, match="clip_loss: text_features must have"):
        adapters.open_clip.ClipLoss()(x, rows(12), 1.0)
    with pytest.raises(ValueError, match="siglip_loss: text_features must have"):
        adapters.open_clip.SigLipLoss()(x, rows(12), 1.0, None)


def test_pairs_are_checked_before_the_processes_meet(monkeypatch):
    """Rows without a partner would be taken for those of another process."""
    monkeypatch.setattr(adapters.lightly, "world_size", lambda: 2)
    x, y = rows(), rows(12)
    for name in ("NTXentLoss", "DCLLoss", "DCLWLoss"):
        with pytest.raises(ValueError, match=r"Loss: out1 must have 6 rows as out0 has, got 12"):
            getattr(adapters.lightly, name)(0.2, gather_distributed=True)(x, y)
    clip = adapters.open_clip.ClipLoss(local_loss=True, world_size=2)
    for loss, bias in ((clip, ()), (adapters.open_clip.SigLipLoss(world_size=2), (-1.0,))):
        name = type(loss).__name__
        with pytest.raises(ValueError, match=f"{name}: text_features must have 6 rows .*, got 12"):
            loss(x, y, 2.0, *bias)
        with pytest.raises(ValueError, match=f"{name}: logit_scale must be .* of one element, got"):
            loss(x, x, torch.ones(2), *bias)


def test_one_process_gathers_nothing():
    """A sample without negatives is refused as without gather_distributed."""
    for name in ("DCLLoss", "DCLWLoss"):
        with pytest.raises(ValueError, match=r"^dcl_loss: .* at least 2"):
            getattr(adapters.lightly, name)(0.2, gather_distributed=True)(rows(1), rows(1))


@pytest.mark.parametrize("bias", [2.0, torch.tensor(2), torch.tensor([2.0]), torch.tensor(2.0).double()])
def test_clips_bias_changes_nothing(bias):
    loss = adapters.open_clip.ClipLoss()
    found = loss(rows(), rows(seed=1), 2.0, bias)
    assert torch.equal(found, loss(rows(), rows(seed=1), 2.0)) and found.dtype == torch.float32
    assert loss(rows(), rows(seed=1), 2.0, bias * float("inf")).isnan()


def test_a_loss_without_an_adapter_is_pointed_to_its_library():
    """As of `from ssl_kernels.adapters import pytorch_metric_learning as losses`."""
    with pytest.raises(
        AttributeError, match=r"it holds CrossBatchMemory, NTXentLoss, .* is imported from there$"
    ):
        adapters.pytorch_metric_learning.MultiSimilarityLoss  # noqa: B018
    assert not hasattr(adapters.sentence_transformers, "__wrapped__")

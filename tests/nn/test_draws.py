"""What the mixing modules draw: every distribution, in copies and in checkpoints."""

import copy
import itertools
import pickle

import numpy as np
import pytest
import torch
from scipy import special, stats

from ssl_kernels.nn import ManifoldMixup, Mixup
from ssl_kernels.nn.draws import Draws, beta, span_around, span_within

COUNT = 20000
CPU = torch.device("cpu")


def check_distribution(values, below, up_to, seed=0):
    """Kolmogorov-Smirnov of numbers with atoms: each is spread over the probability of its own value.

    Args:
        values: What was drawn.
        below, up_to: P(X < x) and P(X <= x) of each value.
    """
    place = np.random.default_rng(seed).random(len(values))
    spread = np.asarray(below) + place * (np.asarray(up_to) - np.asarray(below))
    assert stats.kstest(spread, "uniform").pvalue > 1e-3


def check_beta(drawn, alpha):
    """float32 of Beta(alpha, alpha): each number stands for all that is rounded to it."""
    numbers = drawn.numpy()
    assert numbers.dtype == np.float32 and ((numbers >= 0) & (numbers <= 1)).all()
    exact = numbers.astype(np.float64)
    least, most = ((exact + np.nextafter(numbers, np.float32(end)).astype(np.float64)) / 2 for end in (-1, 2))
    rounded = [np.clip(edge, 0, 1) for edge in (least, most)]
    check_distribution(exact, *(special.betainc(alpha, alpha, edge) for edge in rounded))


@pytest.mark.parametrize("alpha", [1e-4, 1e-3, 1e-2, 0.09, 0.1, 0.2, 1.0, 4.0, 1e3, 1e6])
def test_beta(alpha):
    """A small alpha gives 0 or 1 mostly, and 1/2 hardly ever."""
    check_beta(beta(alpha, 10 * COUNT, CPU, Draws(1)), alpha)
    for module in (Mixup(alpha, mode="sample", generator=2), Mixup(alpha, 1.0, switch_prob=0, generator=3)):
        x = torch.zeros(1, 1, 4, 4)
        size = COUNT if module.mode == "sample" else 500
        if module.mode == "sample":
            lam = module.draw(x.expand(size, -1, -1, -1)).lam
        else:
            lam = torch.cat([module.draw(x).lam for _ in range(size)])
        check_beta(lam, alpha)


@pytest.mark.parametrize("alpha", [1e-320, 1e-300, 1e300, 1.7e308])
def test_beta_at_the_ends_of_float64(alpha):
    drawn = beta(alpha, COUNT, CPU, Draws(1))
    if alpha > 1:
        assert (drawn == 0.5).all()
    else:
        assert drawn.unique().tolist() == [0, 1]
        assert drawn.mean().item() == pytest.approx(0.5, abs=0.02)


def test_cutmix_leaves_a_beta_distributed_area():
    """Where no border and no whole pixels come in between: λ as it was drawn, and the box's share at the centre."""
    module = Mixup(0, 0.6, mode="sample", correct_lam=False, generator=5)
    draw = module.draw(torch.zeros(1).expand(COUNT, 1, 4000, 4000))
    check_beta(draw.lam, 0.6)
    y0, y1, x0, x1 = draw.boxes.double().unbind(1)
    inside = (y0 > 0) & (y1 < 4000) & (x0 > 0) & (x1 < 4000)
    left = 1 - (y1 - y0) * (x1 - x0) / 4000**2
    assert inside.sum() > 2000
    torch.testing.assert_close(left[inside], draw.lam[inside].double(), rtol=0, atol=2e-3)


@pytest.mark.parametrize("shape", [(40, 60), (1, 60), (60, 1), (2, 60), (3, 3), (2, 2), (1, 2)])
def test_box_centres_and_sides(shape):
    """Every side and place of a box as the paper has them, against all that can be drawn."""
    alpha, corrected = 1.3, Mixup(0, 1.3, mode="sample", generator=6)
    draw = corrected.draw(torch.zeros(1).expand(COUNT, 1, *shape))
    rng = np.random.default_rng(7)
    area = 1 - rng.beta(alpha, alpha, COUNT)
    expected = []
    for size, other in (shape, shape[::-1]):
        side = np.ones(COUNT) if size == 1 else area if other == 1 else np.sqrt(area)
        length, middle = np.floor(size * side), rng.integers(size, size=COUNT)
        if size > 2:
            begin, end = middle - length // 2, middle + length // 2
        else:
            begin = np.where(length < size, middle, 0)
            end = begin + length
        expected += [begin.clip(0, size), end.clip(0, size)]
    found = draw.boxes.double().numpy().T
    rows = [*zip(found, expected, strict=True)]
    rows.append(
        (
            (found[1] - found[0]) * (found[3] - found[2]),
            (expected[1] - expected[0]) * (expected[3] - expected[2]),
        )
    )
    for ours, theirs in rows:
        assert stats.ks_2samp(ours, theirs).pvalue > 1e-3
        assert np.ptp(ours) == 0 or np.isin(ours, theirs).mean() > 0.99
    area = torch.tensor(rows[-1][0])
    torch.testing.assert_close(draw.lam.double(), 1 - area / (shape[0] * shape[1]), rtol=0, atol=1e-6)
    assert (area > 0).any()


def test_a_signal_is_cut_by_its_length():
    """(B, C, 1, L): the box has the full side of 1, and of the length what λ leaves."""
    module = Mixup(0, 0.8, mode="sample", correct_lam=False, generator=8)
    draw = module.draw(torch.zeros(1).expand(COUNT, 2, 1, 5000))
    y0, y1, x0, x1 = draw.boxes.double().unbind(1)
    cut = (y1 - y0) * (x1 - x0) > 0
    assert cut.float().mean() > 0.95 and (y0[cut] == 0).all() and (y1[cut] == 1).all()
    inside = (x0 > 0) & (x1 < 5000)
    torch.testing.assert_close((x1 - x0)[inside] / 5000, 1 - draw.lam[inside].double(), rtol=0, atol=1e-3)
    signal = torch.arange(6.0).view(6, 1, 1, 1).expand(6, 1, 1, 100).contiguous()
    draw = module.draw(signal)
    assert (draw.boxes[:, 1] == 1).any()


@pytest.mark.parametrize("options", [{}, {"cutmix_minmax": (0.2, 0.9)}])
def test_an_image_of_one_pixel_is_taken_in_full_or_left(options):
    module = Mixup(0, 1.0, mode="sample", generator=8, **options)
    draw = module.draw(torch.zeros(1).expand(COUNT, 1, 1, 1))
    pasted = draw.boxes[:, 1] * draw.boxes[:, 3] == 1
    assert torch.equal(draw.lam, (~pasted).float())
    share = 0.55**2 if options else 0.5
    assert pasted.float().mean().item() == pytest.approx(share, abs=0.015)


def uniform_on(values, count):
    values = np.asarray(values)
    assert values.min() == 0 and values.max() == count - 1
    check_distribution(values, values / count, (values + 1) / count)


@pytest.mark.parametrize("size, share", [(7, 0.5), (2, 0.5), (40, 0.33), (3, 1.0), (5, 0.01)])
def test_a_box_within_takes_every_place_alike(size, share):
    """The first and the last too."""
    place = Draws(9).uniform((COUNT,), CPU, torch.float64)
    begin, end = span_within(place, torch.full((COUNT,), share, dtype=torch.float64), size)
    length = max(1, int(size * share))
    assert (end - begin == length).all()
    uniform_on(begin, size - length + 1)


def test_a_box_around_takes_every_centre_alike():
    place = Draws(9).uniform((COUNT,), CPU, torch.float64)
    begin, end = span_around(place, torch.full((COUNT,), 3.99 / 12, dtype=torch.float64), 12)
    middle = torch.where(begin > 0, begin + 1, end - 1)
    assert ((end - begin)[(begin > 0) & (end < 12)] == 2).all()
    uniform_on(middle, 12)
    place = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    for size in (1, 2, 3, 7, 224, 4097):
        for span in (span_around, span_within):
            begin, end = span(place, torch.ones(2, dtype=torch.float64) / 2, size)
            assert ((begin >= 0) & (end <= size)).all()


def test_minmax_draws_sides_and_places():
    """Sides uniform between the two shares, each of its own; places uniform in what they leave."""
    draw = Mixup(0, 1.0, (0.1, 0.7), mode="sample", generator=4).draw(torch.zeros(1).expand(COUNT, 1, 50, 31))
    boxes = draw.boxes.numpy()
    sides = []
    for size, (begin, end) in zip((50, 31), (boxes[:, :2].T, boxes[:, 2:].T), strict=True):
        length, low, high = end - begin, 0.1 * size, 0.7 * size
        edges = [np.clip((edge - low) / (high - low), 0, 1) for edge in (length, length + 1)]
        check_distribution(length, *edges)
        places = size - length + 1
        assert (begin == size - length).any() and (begin == 0).any()
        check_distribution(begin, begin / places, (begin + 1) / places)
        assert abs(stats.spearmanr(length, begin / places).statistic) < 0.03
        sides.append(length)
    assert abs(stats.spearmanr(*sides).statistic) < 0.03


@pytest.mark.parametrize(
    "mode, batch", [("batch", 4), ("sample", 5), ("pair", 4), ("pair", 5), ("pair", 2), ("pair", 1)]
)
def test_every_permutation_and_every_matching_alike(mode, batch):
    orders = [
        order
        for order in itertools.permutations(range(batch))
        if mode != "pair" or [order[partner] for partner in order] == list(range(batch))
    ]
    if mode == "pair":  # all have a partner, one sample of an odd batch has not
        orders = [order for order in orders if sum(a == b for a, b in enumerate(order)) == batch % 2]
    module = Mixup(1.0, mode=mode, generator=12)
    x, rank = torch.zeros(batch, 1), {order: rank for rank, order in enumerate(orders)}
    uniform_on([rank[tuple(module._permutation(len(x), CPU).tolist())] for _ in range(4000)], len(orders))


def test_a_pair_shares_a_draw_that_no_other_pair_has():
    draw = Mixup(1.0, 1.0, mode="pair", generator=13).draw(torch.zeros(64, 1, 30, 30))
    assert torch.equal(draw.lam, draw.lam[draw.permutation])
    assert torch.equal(draw.boxes, draw.boxes[draw.permutation])
    assert len(draw.lam.unique()) == 32
    lam = torch.cat(
        [Mixup(0.7, mode="pair", generator=seed).draw(torch.zeros(2, 1)).lam[:1] for seed in range(2000)]
    )
    check_beta(lam, 0.7)


@pytest.mark.parametrize("prob, switch_prob", [(0.0, 0.5), (1.0, 0.0), (1.0, 1.0), (0.03, 0.97), (0.6, 0.25)])
@pytest.mark.parametrize("mode", ["batch", "sample"])
def test_shares_of_what_is_done(prob, switch_prob, mode):
    count = COUNT if mode == "sample" else 1000
    module = Mixup(1.0, 1.0, prob=prob, switch_prob=switch_prob, mode=mode, correct_lam=False, generator=2)
    x = torch.zeros(1).expand(COUNT if mode == "sample" else 1, 1, 600, 600)
    draws = [module.draw(x) for _ in range(1 if mode == "sample" else count)]
    lam, pixel_lam = (torch.cat([getattr(draw, name) for draw in draws]) for name in ("lam", "pixel_lam"))
    found = ((lam < 1) & (pixel_lam == 1)).sum().item(), (pixel_lam < 1).sum().item()
    for number, share in zip(found, (prob * switch_prob, prob * (1 - switch_prob)), strict=True):
        assert (
            number in (0, count) if share in (0, 1) else stats.binomtest(number, count, share).pvalue > 1e-3
        )
        assert share not in (0, 1) or number == share * count


def test_a_manifold_layer_is_drawn_as_often_as_the_others():
    model = torch.nn.Sequential(*[torch.nn.Identity() for _ in range(3)])
    module = ManifoldMixup(model, ["0", "1", "2"], generator=3)
    uniform_on([module._choice() for _ in range(4000)], 4)


# In copies and checkpoints


def module_of(kind, generator):
    torch.manual_seed(0)
    if kind == "mixup":
        return Mixup(0.5, 0.5, mode="sample", num_classes=3, generator=generator, inplace=False)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 4), torch.nn.Linear(4, 3))
    return ManifoldMixup(model, ["1", "2"], mode="sample", num_classes=3, generator=generator)


def outputs(module, count=6):
    x, target = torch.arange(96.0).view(6, 1, 4, 4), torch.arange(6) % 3
    parts = [part.flatten() for _ in range(count) for part in module(x, target)]
    return torch.cat(parts) if parts else None


def test_a_signal_is_cut_between_its_shares():
    draw = Mixup(0, 1.0, (0.2, 0.5), mode="sample", generator=8).draw(torch.zeros(1).expand(COUNT, 2, 1, 50))
    y0, y1, x0, x1 = draw.boxes.unbind(1)
    assert (y0 == 0).all() and (y1 == 1).all() and (x1 - x0).unique().tolist() == list(range(10, 25))
    torch.testing.assert_close(draw.lam, 1 - (x1 - x0) / 50)


GENERATORS = {"seed": lambda: 5, "generator": lambda: torch.Generator().manual_seed(5)}


@pytest.mark.parametrize("kind", ["mixup", "manifold"])
@pytest.mark.parametrize("generator", list(GENERATORS))
@pytest.mark.parametrize("before", [0, 3])
def test_a_resumed_run_goes_on(kind, generator, before):
    """From tensors alone; a Generator that was given goes on itself."""
    first = module_of(kind, GENERATORS[generator]())
    outputs(first, before)
    saved = {name: value.clone() for name, value in first.state_dict().items()}
    expected = outputs(first)
    for other in (6, torch.Generator().manual_seed(7)):
        resumed = module_of(kind, other)
        outputs(resumed, 2)
        resumed.load_state_dict(saved)
        assert torch.equal(outputs(resumed), expected)
        fresh = module_of(kind, 8)
        fresh.load_state_dict(saved)
        assert torch.equal(outputs(fresh), expected)
    first.load_state_dict(saved)
    assert torch.equal(outputs(first), expected)


@pytest.mark.parametrize("kind", ["mixup", "manifold"])
def test_checkpoints_without_draws_load(kind):
    module, plain = module_of(kind, 5), module_of(kind, None)
    assert not any("extra_state" in key for key in plain.state_dict())
    module.load_state_dict(plain.state_dict())
    assert torch.equal(outputs(module), outputs(module_of(kind, 5)))
    plain.load_state_dict(module.state_dict(), strict=False)
    with pytest.raises(RuntimeError, match="Missing key"):
        torch.nn.Sequential(module, torch.nn.Linear(1, 1)).load_state_dict({})


@pytest.mark.parametrize("state", [torch.zeros(3), torch.zeros(40, dtype=torch.uint8), None])
def test_a_foreign_state_is_refused(state):
    module = module_of("mixup", 5)
    with pytest.raises((ValueError, RuntimeError), match="Mixup: the state of a stream"):
        module.load_state_dict({"_extra_state": state})


@pytest.mark.parametrize("kind", ["mixup", "manifold"])
@pytest.mark.parametrize("generator", list(GENERATORS))
@pytest.mark.parametrize("before", [0, 3])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_go_on_apart(kind, generator, before, copied):
    module = module_of(kind, GENERATORS[generator]())
    outputs(module, before)
    twin = copied(module)
    expected = outputs(module)
    assert torch.equal(outputs(twin), expected)


def test_modules_that_share_a_generator_share_it_in_their_copies():
    generator = torch.Generator().manual_seed(5)
    pair = torch.nn.ModuleList([Mixup(generator=generator), Mixup(generator=generator)])
    x = torch.zeros(4, 1)
    twins = copy.deepcopy(pair), pickle.loads(pickle.dumps(pair))
    expected = [module.draw(x).lam[0].item() for module in pair]
    assert expected[0] != expected[1]
    for twin in twins:
        assert [module.draw(x).lam[0].item() for module in twin] == expected


def test_the_generator_that_was_given_is_the_one_that_is_drawn_from():
    generator = torch.Generator().manual_seed(5)
    module = Mixup(generator=generator)
    before = generator.get_state()
    module.draw(torch.zeros(4, 1))
    assert module.generator is generator and not torch.equal(generator.get_state(), before)
    seeded = Mixup(generator=np.int64(5))
    assert seeded.generator == 5
    first = seeded.draw(torch.zeros(4, 1))
    assert isinstance(seeded.generator, torch.Generator)
    seeded.generator = 5
    assert torch.equal(seeded.draw(torch.zeros(4, 1)).lam, first.lam)

"""Each method's loss of a batch and its gradients are those written out here, with options that are no defaults."""

import copy
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Beta

import ssl_kernels
from ssl_kernels import nn
from ssl_kernels.nn import DINOCenter
from ssl_kernels.recipes import engine, experiment
from ssl_kernels.recipes.methods import METHODS, find_method, options_of
from ssl_kernels.recipes.methods.clip import DIGITS, TEMPLATES
from ssl_kernels.recipes.views import Batch

N = 8
DATA = SimpleNamespace(channels=1, image_size=8, classes=10)
OPTIONS = {
    "simclr": {"temperature": 0.3},
    "moco": {"temperature": 0.3, "queue_size": 50, "momentum": 0.7},
    "mocov3": {"temperature": 0.3, "momentum": 0.7},
    "byol": {"momentum": 0.7},
    "simsiam": {},
    "swav": {"temperature": 0.3, "epsilon": 0.2},
    "dino": {"temperature": 0.3, "teacher_temperature": 0.2, "momentum": 0.7, "center_momentum": 0.6},
    "barlow": {"off_diagonal_weight": 0.1},
    "vicreg": {"invariance": 3.0, "variance": 2.0, "covariance": 5.0},
    "mae": {"hidden_part": 0.75},
    "supcon": {"temperature": 0.3},
    "triplet": {"margin": 0.35, "mining": "batch_hard"},
    "imix": {"temperature": 0.3, "alpha": 3.0},
    "mixco": {"temperature": 0.3, "alpha": 3.0, "weight": 0.6, "queue_size": 50, "momentum": 0.7},
    "clip": {"logit_scale": 5.0},
    "rotation": {},
    "jigsaw": {},
    "supervised": {"label_smoothing": 0.2},
    "mixup": {"alpha": 3.0},
    "cutmix": {"alpha": 3.0, "prob": 0.8},
    "manifold-mixup": {"alpha": 3.0},
}
REPEATS = ("width", "prototypes", "decoder_width")  # options that the shapes of the networks tell


def batches():
    """Three batches whose images, and whose crops, are all others."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        views, crops = (
            [torch.rand(N, 1, side, side, generator=generator) for _ in range(2)] for side in (8, 6)
        )
        yield Batch(
            views, crops, torch.randint(10, (N,), generator=generator).index_fill_(0, torch.arange(2), 3)
        )


def both_views(method, batch):
    return method.online(torch.cat([batch.views[0], batch.views[1]])).chunk(2)


def averaged_views(method, batch):
    with torch.no_grad():
        return method.average.module(torch.cat([batch.views[0], batch.views[1]])).chunk(2)


def cosines(x, y):
    return F.normalize(x, dim=1) @ F.normalize(y, dim=1).T


def simclr(method, batch, earlier):
    rows = torch.cat(both_views(method, batch))
    logits = cosines(rows, rows) / 0.3
    logits = logits.masked_fill(torch.eye(2 * N, dtype=torch.bool), -torch.inf)
    return F.cross_entropy(logits, torch.arange(2 * N).roll(N))


def moco(method, batch, earlier):
    """Each view against its partner's key and the keys of earlier batches."""
    queries, keys = both_views(method, batch), averaged_views(method, batch)
    loss = 0
    for query, key in (queries[0], keys[1]), (queries[1], keys[0]):
        logits = [cosines(query, key).diagonal()[:, None], *(cosines(query, rows) for rows in earlier)]
        loss = loss + F.cross_entropy(torch.cat(logits, 1) / 0.3, torch.zeros(N, dtype=torch.int64)) / 2
    earlier.extend(keys)
    return loss


def mocov3(method, batch, earlier):
    views = torch.cat([batch.views[0], batch.views[1]])
    queries, keys = method.predictor(method.online(views)).chunk(2), averaged_views(method, batch)
    pairs = (queries[0], keys[1]), (queries[1], keys[0])
    return sum(F.cross_entropy(cosines(*pair) / 0.3, torch.arange(N)) for pair in pairs) / 2


def byol(method, batch, earlier):
    views = torch.cat([batch.views[0], batch.views[1]])
    predictions, targets = method.predictor(method.online(views)).chunk(2), averaged_views(method, batch)
    pairs = (predictions[0], targets[1]), (predictions[1], targets[0])
    return sum((2 - 2 * cosines(*pair).diagonal()).mean() for pair in pairs) / 2


def simsiam(method, batch, earlier):
    z0, z1 = both_views(method, batch)
    predictions = method.predictor(torch.cat([z0, z1])).chunk(2)
    pairs = (predictions[0], z1.detach()), (predictions[1], z0.detach())
    return sum((2 - 2 * cosines(*pair).diagonal()).mean() for pair in pairs) / 2


def all_crops(method, batch):
    crops = method.online(torch.cat([batch.crops[0], batch.crops[1]])).chunk(2)
    return [*both_views(method, batch), *crops]


def swav(method, batch, earlier):
    return ssl_kernels.swav_loss(all_crops(method, batch), method.prototypes.weight, 0.3, epsilon=0.2)


def dino(method, batch, earlier):
    """Each crop against the teacher's views of its image but itself; the centre follows the teacher's logits."""
    if not earlier:
        earlier.append(DINOCenter(len(method.prototypes.weight), momentum=0.6))
    (center,) = earlier
    columns = method.average_prototypes.module.weight
    teachers = averaged_views(method, batch)
    students = [cosines(crop, method.prototypes.weight) / 0.3 for crop in all_crops(method, batch)]
    targets = [((cosines(view, columns) - center.center) / 0.2).softmax(1) for view in teachers]
    pairs = [(s, t) for s in range(4) for t in range(2) if s != t]
    loss = sum(-(targets[t] * students[s].log_softmax(1)).sum(1).mean() for s, t in pairs) / len(pairs)
    center.update_(list(teachers), columns)
    return loss


def barlow(method, batch, earlier):
    return ssl_kernels.barlow_twins_loss(*both_views(method, batch), off_diagonal_weight=0.1)


def vicreg(method, batch, earlier):
    weights = {"invariance": 3.0, "variance": 2.0, "covariance": 5.0}
    return ssl_kernels.vicreg_loss(*both_views(method, batch), **weights)


def mae(method, batch, earlier):
    """Sixteen patches of 2 x 2 pixels, of which four are seen."""
    (image,), encoder = batch.views, method.seer
    patches = torch.stack(
        [image[:, 0, r : r + 2, c : c + 2].flatten(1) for r in range(0, 8, 2) for c in range(0, 8, 2)], 1
    )
    order = torch.rand(N, 16).argsort(1)
    tokens = encoder.embedding(patches) + encoder.places
    seen = torch.stack([tokens[b, order[b, :4]] for b in range(N)])
    seen = method.decoder_embedding(encoder.norm(encoder.layers(seen)))
    drawn = [[method.hidden_token] * 16 for _ in range(N)]
    hidden = torch.ones(N, 16, dtype=torch.bool)
    for b, place in itertools.product(range(N), range(4)):
        drawn[b][order[b, place]] = seen[b, place]
        hidden[b, order[b, place]] = False
    drawn = torch.stack([torch.stack(rows) for rows in drawn]) + method.decoder_places
    pixels = method.pixels(method.decoder(drawn))
    target = (patches - patches.mean(2, keepdim=True)) / (patches.var(2, keepdim=True) + 1e-6).sqrt()
    return (pixels - target).square().mean(2)[hidden].mean()


def supcon(method, batch, earlier):
    labels = torch.cat([batch.labels, batch.labels])
    return ssl_kernels.sup_con_loss(torch.cat(both_views(method, batch)), labels, 0.3)


def triplet(method, batch, earlier):
    labels = torch.cat([batch.labels, batch.labels])
    rows = torch.cat(both_views(method, batch))
    return ssl_kernels.triplet_loss(rows, labels, 0.35, mining="batch_hard")


def mixed_inputs(batch):
    """(permutation, lam, mixed images) as the method draws them."""
    permutation, lam = torch.randperm(N), Beta(3.0, 3.0).sample((N,))
    share, image = lam[:, None, None, None], batch.views[0]
    return permutation, lam, share * image + (1 - share) * image[permutation]


def mixed_cross_entropy(logits, first, second, lam):
    each = [F.cross_entropy(logits, target, reduction="none") for target in (first, second)]
    return (lam * each[0] + (1 - lam) * each[1]).mean()


def imix(method, batch, earlier):
    permutation, lam, mixed = mixed_inputs(batch)
    queries, keys = method.online(torch.cat([mixed, batch.views[1]])).chunk(2)
    return mixed_cross_entropy(cosines(queries, keys) / 0.3, torch.arange(N), permutation, lam)


def mixco(method, batch, earlier):
    permutation, lam, mixed = mixed_inputs(batch)
    plain, blended = method.online(torch.cat([batch.views[0], mixed])).chunk(2)
    with torch.no_grad():
        keys = method.average.module(batch.views[1])
    columns = torch.cat([keys, *earlier])
    loss = F.cross_entropy(cosines(plain, columns) / 0.3, torch.arange(N))
    logits = cosines(blended, columns) / 0.3
    loss = loss + 0.6 * mixed_cross_entropy(logits, torch.arange(N), permutation, lam)
    earlier.append(keys)
    return loss


def clip(method, batch, earlier):
    """Captions of the labels; pairs of one label are no negatives of each other."""
    drawn = torch.randint(len(TEMPLATES), (N,))
    captions = [TEMPLATES[d].format(DIGITS[label]) for d, label in zip(drawn, batch.labels, strict=True)]
    codes = torch.tensor([[*text.encode(), *[0] * (32 - len(text))] for text in captions])
    tower = method.text
    texts = tower.projection(tower.layer(tower.character(codes) + tower.place).mean(1))
    logits = method.log_scale.exp() * cosines(method.online(batch.views[0]), texts)
    same = (batch.labels[:, None] == batch.labels) & ~torch.eye(N, dtype=torch.bool)
    logits = logits.masked_fill(same, -torch.inf)
    return (F.cross_entropy(logits, torch.arange(N)) + F.cross_entropy(logits.T, torch.arange(N))) / 2


def rotation(method, batch, earlier):
    turned = [batch.views[0]]
    for _ in range(3):
        turned.append(turned[-1].transpose(2, 3).flip(2))
    return F.cross_entropy(
        method.online(torch.cat(turned)), torch.tensor([turn for turn in range(4) for _ in range(N)])
    )


def jigsaw(method, batch, earlier):
    orders, corners = (
        list(itertools.permutations(range(4))),
        list(itertools.product((slice(4), slice(4, 8)), repeat=2)),
    )
    drawn, laid = torch.randint(24, (N,)), batch.views[0].clone()
    for image, whole, order in zip(laid, batch.views[0], drawn, strict=True):
        for place, tile in enumerate(orders[order]):
            image[:, *corners[place]] = whole[:, *corners[tile]]
    return F.cross_entropy(method.online(laid), drawn)


def supervised(method, batch, earlier):
    log_shares = method.online(batch.views[0]).log_softmax(1)
    target = F.one_hot(batch.labels, 10) * 0.8 + 0.2 / 10
    return -(target * log_shares).sum(1).mean()


def mixed_by(options):
    def loss(method, batch, earlier):
        images, (labels, permutation, lam) = nn.Mixup(mode="sample", **options)(
            batch.views[0].clone(), batch.labels
        )
        assert 0 < lam.min() < 1
        return mixed_cross_entropy(method.online(images), labels, labels[permutation], lam)

    return loss


def manifold_mixup(method, batch, earlier):
    """`nn.ManifoldMixup` mixes, over the first two stages."""
    assert method.mixing.module is method.online and method.mixing.layers == ("encoder.2", "encoder.5")
    assert method.mixing.mixup.mixup_alpha == 3.0 and method.mixing.mixup.mode == "sample"
    logits, (labels, permutation, lam) = method.mixing(batch.views[0], batch.labels)
    return mixed_cross_entropy(logits, labels, labels[permutation], lam)


EXPECTED = {
    "mixup": mixed_by({"mixup_alpha": 3.0}),
    "cutmix": mixed_by({"mixup_alpha": 0.0, "cutmix_alpha": 3.0, "prob": 0.8}),
    "manifold-mixup": manifold_mixup,
}


def gradients(method):
    return {name: each.grad for name, each in method.named_parameters() if each.requires_grad}


@pytest.mark.parametrize("name", METHODS)
def test_loss_and_gradients(name):
    """Of three batches, since queues and centres hold what earlier ones left; the averages are others than the online
    networks, and move towards them by the momentum."""
    kind, options = find_method(name), OPTIONS[name]
    defaults = options_of(kind)
    assert set(defaults) - set(REPEATS) == set(options) and all(
        defaults[each] != options[each] for each in options
    )
    settings = engine.Settings(name, "digits", 1, N, 1e-3, options=options)
    method = experiment.build_method(DATA, settings).train()
    generator = torch.Generator().manual_seed(1)
    for each, parameter in method.named_parameters():
        if each.startswith("average") or each.endswith(("token", "bias")):
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    expected, earlier = EXPECTED.get(name) or globals()[name], []
    other = copy.deepcopy(method)
    for step, batch in enumerate(batches()):
        batch = batch._replace(views=batch.views[: kind.views], crops=batch.crops[: kind.crops])
        before = copy.deepcopy(batch)
        torch.manual_seed(step)
        value = method(batch)
        torch.manual_seed(step)
        wanted = expected(other, before, earlier)
        torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-5)
        for each in (value, wanted):
            if each.requires_grad:
                each.backward()
        torch.testing.assert_close(gradients(method), gradients(other), rtol=1e-3, atol=1e-5)
        for one, same in zip([*batch.views, *batch.crops], [*before.views, *before.crops], strict=True):
            assert torch.equal(one, same)  # views may be another training's too
        moved = {each: value.clone() for each, value in method.named_parameters()}
        method.after_step()
        for each, value in method.named_parameters():
            online = each.replace("average_", "").replace("average.module", "online").replace("module.", "")
            share = 0.3 if each.startswith("average") else 0.0
            torch.testing.assert_close(value, moved[each].lerp(moved[online], share))
        other.load_state_dict(method.state_dict())


def test_captions_tell_the_order_of_letters():
    method = experiment.build_method(
        DATA, engine.Settings("clip", "digits", 1, N, 1e-3, options={"width": 16})
    )
    assert method.captions.shape == (10, len(TEMPLATES), 32)
    text, turned = method.captions[3, 0], method.captions[3, 0].clone()
    turned[:13] = text[:13].flip(0)
    alone = [method.text(each[None]) for each in (text, turned)]
    assert not torch.allclose(*alone, rtol=1e-3)
    torch.testing.assert_close(method.text(torch.stack([text, turned])), torch.cat(alone))


def test_the_scale_of_clip_stops_at_100_and_comes_back():
    """A step that leads beyond ends there, where the loss still has a gradient by it."""
    settings = engine.Settings("clip", "digits", 1, N, 1e-3, options={"logit_scale": 100.0})
    method = experiment.build_method(DATA, settings)
    for log_scale, expected in ((3.0, 3.0), (4.9, math.log(100))):
        method.log_scale.data.fill_(log_scale)
        method.after_step()
        assert method.log_scale.item() == pytest.approx(expected)
    batch = next(batches())
    method(batch._replace(views=batch.views[:1])).backward()
    assert method.log_scale.grad != 0


def test_captions_of_more_classes_than_digits_number_them():
    shape = SimpleNamespace(channels=1, image_size=8, classes=12)
    method = experiment.build_method(shape, engine.Settings("clip", "folder", 1, N, 1e-3))
    assert method.captions.shape == (12, len(TEMPLATES), 32)
    assert method.captions[11, 1].tolist() == [*b"class 11 in a picture", *[0] * 11]


@pytest.mark.parametrize("hidden_part, visible", [(0.001, 15), (0.35, 10), (0.6, 6), (0.65, 6), (0.999, 1)])
def test_an_autoencoder_sees_the_rest(hidden_part, visible):
    """Of 16 patches, to the nearest whole one; one at least, and not all."""
    settings = engine.Settings("mae", "digits", 1, N, 1e-3, options={"hidden_part": hidden_part})
    method = experiment.build_method(DATA, settings)
    assert method.visible == visible


def test_the_first_stages_of_a_resnet_are_mixed_too():
    shape = SimpleNamespace(channels=3, image_size=32, classes=2)
    method = experiment.build_method(shape, engine.Settings("manifold-mixup", "cifar10", 1, N, 1e-3))
    assert method.mixing.layers == ("encoder.layer1", "encoder.layer2")

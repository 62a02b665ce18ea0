import signal

import pytest
import torch
from torchvision.transforms import v2

from ssl_kernels.recipes.views import Augmentation, Batch, BatchViews, DatasetViews, ignore_interrupts

IMAGES = torch.rand(22, 1, 8, 8, generator=torch.Generator().manual_seed(0))


class LabelledImages(torch.utils.data.Dataset):
    def __len__(self):
        return len(IMAGES)

    def __getitem__(self, index):
        return IMAGES[index], 0


def make_views(kind, transform, seed=0, **options):
    source = (IMAGES, torch.zeros(len(IMAGES))) if kind is BatchViews else (LabelledImages(),)
    return kind(*source, Augmentation(transform), 8, seed, **options)


def all_views(views, epoch):
    return torch.stack([torch.stack(batch.views) for batch in views.epoch(epoch)])


both_kinds = pytest.mark.parametrize("kind", [BatchViews, DatasetViews])


@both_kinds
def test_an_epoch_shows_each_image_at_most_once(kind):
    views = make_views(kind, v2.Identity())
    shown = all_views(views, 0)
    assert shown.shape == (2, 2, 8, 1, 8, 8)  # 2 batches of 2 views; 6 of the 22 images are left out
    assert len(views) == 2
    assert torch.equal(shown[:, 0], shown[:, 1])
    assert not torch.equal(all_views(views, 1), shown)  # the next epoch has another order
    shown_images = {tuple(image.flatten().tolist()) for image in shown[:, 0].flatten(0, 1)}
    assert len(shown_images) == 16
    assert shown_images < {tuple(image.flatten().tolist()) for image in IMAGES}


@both_kinds
def test_views_depend_on_seed_and_epoch_alone(kind):
    noise = v2.GaussianNoise(sigma=0.1)
    views = make_views(kind, noise, seed=3)
    first = all_views(views, 1)
    all_views(views, 0)
    torch.rand(5)
    assert torch.equal(all_views(views, 1), first)
    assert torch.equal(all_views(make_views(kind, noise, seed=3), 1), first)
    assert not torch.equal(all_views(views, 2), first)
    assert not torch.equal(all_views(make_views(kind, noise, seed=4), 1), first)


@both_kinds
def test_each_epoch_draws_anew(kind):
    """Also for an image that comes at the same place again."""
    views = make_views(kind, lambda images: torch.zeros_like(images) + torch.rand(()))
    drawn = [all_views(views, epoch).unique() for epoch in range(3)]
    assert len(torch.cat(drawn).unique()) == sum(map(len, drawn))


@both_kinds
def test_views_from_a_batch_on_are_the_rest_of_the_epoch(kind):
    views = make_views(kind, v2.GaussianNoise(sigma=0.1))
    whole = [torch.stack(batch.views) for batch in views.epoch(3)]
    assert [torch.equal(torch.stack(batch.views), whole[1]) for batch in views.epoch(3, first=1)] == [True]
    assert list(views.epoch(3, first=2)) == []


@both_kinds
def test_views_leave_the_global_generator_alone(kind):
    views = make_views(kind, v2.GaussianNoise())
    torch.manual_seed(0)
    all_views(views, 0)
    drawn = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(3), drawn)


@both_kinds
def test_the_two_views_and_the_batches_are_transformed_differently(kind):
    added = all_views(make_views(kind, lambda images: torch.zeros_like(images) + torch.rand(())), 0)
    values = added[:, :, 0].flatten(2)[..., 0].flatten()
    assert len(values.unique()) == 4


def test_batch_views_draws_anew_for_each_group():
    """In crops as in views."""

    def constant(images):
        return images * 0 + torch.rand(())

    views = BatchViews(
        IMAGES, torch.zeros(len(IMAGES)), Augmentation(constant, 1, constant, 1), 8, 0, group=3
    )
    batch = next(views.epoch(0))
    for shown in (*batch.views, *batch.crops):
        values = shown.flatten(1)[:, 0]
        assert len(values.unique()) == 3  # 8 images: groups of 3, 3 and 2
        assert values[0] == values[2] != values[3]


def test_dataset_views_do_not_depend_on_the_workers():
    noise = v2.GaussianNoise(sigma=0.1)
    alone = all_views(make_views(DatasetViews, noise, workers=0), 0)
    assert torch.equal(all_views(make_views(DatasetViews, noise, workers=2), 0), alone)


@both_kinds
def test_crops_and_labels_come_with_the_views(kind):
    """As many of either as were asked for, and each image with its own label."""
    labels = torch.arange(len(IMAGES))

    class Labelled(LabelledImages):
        def __getitem__(self, index):
            return IMAGES[index], index

    augmentation = Augmentation(v2.Identity(), 1, lambda images: images[..., :4, :4], 3)
    source = (IMAGES, labels) if kind is BatchViews else (Labelled(),)
    for batch in kind(*source, augmentation, 8, 0).epoch(0):
        (view,) = batch.views
        assert torch.equal(view, IMAGES[batch.labels])
        assert len(batch.crops) == 3
        assert all(torch.equal(crop, view[..., :4, :4]) for crop in batch.crops)


def test_parts_of_a_batch_are_all_of_it():
    batch = Batch([IMAGES[:8], IMAGES[8:16]], [IMAGES[:8, :, :4], IMAGES[8:16, :, :4]], torch.arange(8))
    parts = batch.parts(3)
    assert [part.labels.tolist() for part in parts] == [[0, 1], [2, 3, 4], [5, 6, 7]]
    for kind in ("views", "crops"):
        for which, whole in enumerate(getattr(batch, kind)):
            assert torch.equal(torch.cat([getattr(part, kind)[which] for part in parts]), whole)


def test_images_take_a_dtype_and_labels_stay_whole_numbers():
    batch = Batch([IMAGES[:2]], [IMAGES[:2, :, :4]], torch.arange(2)).to("cpu", torch.float64)
    assert torch.equal(batch.views[0], IMAGES[:2].double()) and torch.equal(
        batch.crops[0], IMAGES[:2, :, :4].double()
    )
    assert torch.equal(batch.labels, torch.arange(2))


def test_a_worker_leaves_ctrl_c_to_the_main_process():
    before = signal.getsignal(signal.SIGINT)
    try:
        ignore_interrupts(0)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@both_kinds
def test_a_subset_is_one_view_of_each_of_its_images(kind):
    rows, labels = torch.tensor([3, 17, 5, 9]), torch.arange(len(IMAGES))

    class Labelled(LabelledImages):
        targets = labels.tolist()

        def __getitem__(self, index):
            return IMAGES[index], self.targets[index]

    source = (IMAGES, labels) if kind is BatchViews else (Labelled(),)
    views = kind(*source, Augmentation(v2.Identity(), 2, v2.Identity(), 1), 8, 0)
    assert torch.equal(views.labels, labels)
    part = views.subset(rows, 2, 1)
    assert torch.equal(part.labels, rows) and len(part) == 2
    shown = list(part.epoch(0))
    for batch in shown:
        (view,) = batch.views
        assert not batch.crops and torch.equal(view, IMAGES[batch.labels])
    assert sorted(torch.cat([batch.labels for batch in shown]).tolist()) == sorted(rows.tolist())

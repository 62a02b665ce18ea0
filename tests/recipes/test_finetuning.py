import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from ssl_kernels.recipes import data, evaluation, experiment, finetuning
from ssl_kernels.recipes.finetuning import finetune, linear_probe
from ssl_kernels.recipes.methods.supervised import Supervised
from ssl_kernels.recipes.views import Augmentation, DatasetViews
from tests.recipes.image_sets import write_folder


def test_more_labels_are_worth_more_and_the_encoder_stays():
    images = data.load_data("digits", 64, 0)
    encoder = experiment.build_encoder(images, 0, "supervised")
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    few, many = (finetune(encoder, images, part, seed=0, steps=60) for part in (0.005, 0.3))
    assert 0.1 < few < many
    assert many > 0.5
    assert finetune(encoder, images, 0.005, seed=0, steps=60) == few
    assert finetune(encoder, images, 0.005, seed=1, steps=60) != few
    torch.testing.assert_close(dict(encoder.state_dict()), before, rtol=0, atol=0)


def test_from_scratch_the_classifier_begins_at_random_and_learns():
    images = data.load_data("digits", 64, 0)
    encoder = experiment.build_encoder(images, 0, "supervised")
    probed, random = (
        finetune(encoder, images, 0.05, 0, steps=1, from_scratch=each) for each in (False, True)
    )
    assert probed > 0.3 > random
    assert finetune(encoder, images, 0.05, 0, steps=60, from_scratch=True) > 0.6


@pytest.mark.parametrize("from_scratch, rate", [(False, 1e-3), (True, 1e-2)])
def test_what_is_trained(from_scratch, rate, monkeypatch):
    """A copy of the encoder with a classifier, on the part of the labels, for as many steps; judged on held-out images.
    A probe sees views from beyond the last epoch of the training."""
    images = data.load_data("digits", 64, 0)
    encoder = experiment.build_encoder(images, 0, "supervised")
    trained, probed, heads = [], [], []
    monkeypatch.setattr(
        finetuning, "train", lambda trainings, views, title: trained.append((*trainings, views))
    )
    monkeypatch.setattr(
        finetuning,
        "_begin_at_probe",
        lambda *args, first: probed.append((args[0], args[2].seed, len(args[3]), first)),
    )
    for seed in (0, 4):
        accuracy = finetuning.finetune(encoder, images, 0.2, seed, steps=30, from_scratch=from_scratch)
        training, views = trained[-1]
        rows = evaluation.draw_part(images.views.labels, 0.2, seed)
        assert torch.equal(views.images, images.views.images[rows])
        assert torch.equal(views.labels, images.views.labels[rows])
        assert (views.batch_size, views.seed, len(views)) == (64, seed, 4)
        settings = training.settings
        assert (settings.epochs, settings.seed, settings.learning_rate) == (8, seed, rate)
        assert training.steps == 8 * 4
        network = training.method.online
        assert network.encoder is not encoder
        logits, labels = evaluation.extract_features(network, images.test)
        assert accuracy == (logits.argmax(1) == labels).double().mean().item()
        assert probed == ([] if from_scratch else [*probed[:-1], (network, seed, len(rows), 8)])
        heads.append(network.projection.weight)
    assert len(probed) == 2 * (not from_scratch) and not torch.equal(*heads)


def test_a_probe_sees_views_that_the_training_does_not(monkeypatch):
    images = data.load_data("digits", 64, 0)
    method = Supervised(experiment.build_encoder(images, 0, "supervised"), images)
    rows, seen, probed = torch.arange(900, 1100), [], []
    views = images.views.subset(rows, 64, 0)
    epoch = views.epoch

    def noting(number):
        for batch in epoch(number):
            seen.append(number)
            yield batch

    def linear_probe(features, labels, unlabelled):
        probed.append((features, labels, unlabelled))
        return torch.full((10, 64), 2.0), torch.full((10,), 3.0)

    monkeypatch.setattr(views, "epoch", noting)
    monkeypatch.setattr(finetuning, "linear_probe", linear_probe)
    finetuning._begin_at_probe(method.online, images, views, rows, first=7)
    one_pass = [7 + batch // 3 for batch in range(50)]
    assert seen == one_pass * 2  # for the statistics, and for the features
    ((features, labels, unlabelled),) = probed
    whole, _ = evaluation.extract_features(method.encoder, images.train)
    torch.testing.assert_close(unlabelled, whole)
    torch.testing.assert_close(features[:200], whole[rows])
    assert torch.equal(labels[:200], images.views.labels[rows])
    assert features.shape == (200 + 50 * 64, 64) and labels.shape == (200 + 50 * 64,)
    assert (method.online.projection.weight == 2).all() and (method.online.projection.bias == 3).all()


def test_batch_normalisation_takes_the_statistics_of_the_images():
    """Those that an encoder brings from elsewhere do not matter."""
    images = data.load_data("digits", 64, 0)
    encoder = experiment.build_encoder(images, 0, "supervised")
    own = finetune(encoder, images, 0.05, 0, steps=1)
    for name, buffer in encoder.named_buffers():
        if "running" in name:
            buffer.fill_(100.0)
    assert finetune(encoder, images, 0.05, 0, steps=1) == own


@pytest.mark.parametrize("classes", [2, 3])
def test_linear_probe_is_the_logistic_regression(classes):
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % classes
    features = 5 + torch.tensor([1.0, 20.0, 0.1, 0.0]) * torch.randn(60, 4, generator=random)
    features[:, 0] += labels
    rows = torch.arange(0, 60, 2) if classes == 3 else torch.arange(30)
    unlabelled = torch.cat([features, torch.tensor([4.0, 0.5, 2.0, 1.0]) * features])
    weight, bias = linear_probe(features[rows], labels[rows], unlabelled)
    standard = StandardScaler().fit(unlabelled.numpy())
    expected = LogisticRegression(max_iter=1000).fit(
        standard.transform(features[rows].numpy()), labels[rows].numpy()
    )
    probabilities = expected.predict_proba(standard.transform(features.numpy()))
    ours = (features @ weight.T + bias).softmax(1)
    torch.testing.assert_close(ours.double(), torch.from_numpy(probabilities).double(), rtol=0, atol=0.02)


def test_subsets_of_both_kinds_of_views_hold_the_chosen_images(tmp_path):
    digits = data.load_data("digits", 64, 0, crops=2)
    rows = torch.tensor([5, 2, 9, 700])
    (batch,) = digits.views.subset(rows, 4, seed=0).epoch(0)
    assert len(batch.views) == 1 and batch.crops == []
    assert sorted(batch.labels.tolist()) == sorted(digits.views.labels[rows].tolist())

    write_folder(tmp_path)
    dataset = ImageFolder(tmp_path)
    augmentation = Augmentation(v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]))
    views = DatasetViews(torch.utils.data.Subset(dataset, range(1, 24)), augmentation, 4, 0)
    assert torch.equal(views.labels, torch.tensor(dataset.targets)[1:24])
    (batch,) = views.subset(torch.tensor([0, 8, 16, 22]), 4, seed=0).epoch(0)
    assert sorted(batch.labels.tolist()) == [0, 1, 2, 2]

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn

from ssl_kernels.recipes import evaluation


def blobs(rows, seed):
    """Three overlapping classes in 6 dimensions, one feature a thousand times as wide as the others."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(rows) % 3
    features = torch.randn(rows, 6, generator=generator)
    features[torch.arange(rows), labels] += 2.0
    features[:, 5] *= 1000
    return features, labels


def test_knn_compares_directions_not_lengths():
    train = torch.tensor([[10.0, 0.0], [0.0, 1.0]])
    test = torch.tensor([[1.0, 0.4]])  # nearest in angle to the first, in distance to the second
    assert evaluation.knn_accuracy(train, torch.tensor([0, 1]), test, torch.tensor([0]), neighbours=1) == 1.0


def test_knn_takes_the_majority():
    train = torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, 0.2], [0.0, 1.0]])
    labels = torch.tensor([0, 1, 1, 0])
    test = torch.tensor([[1.0, 0.0]])
    assert evaluation.knn_accuracy(train, labels, test, torch.tensor([0]), neighbours=1) == 1.0
    assert evaluation.knn_accuracy(train, labels, test, torch.tensor([1]), neighbours=3) == 1.0


def test_knn_asks_five_unless_told_otherwise():
    """Of the nearest one, three and five rows most are of class 0, 0 and 1; of six and seven, 0 again."""
    train = torch.tensor([[1.0, distance / 10] for distance in range(7)])
    labels = torch.tensor([0, 0, 1, 1, 1, 0, 0])
    test = train[:1] * 3
    found = [
        evaluation.knn_accuracy(train, labels, test, torch.tensor([1]), *count)
        for count in ([], [1], [2], [3], [4], [7])
    ]
    assert found == [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]


def test_all_three_judges_are_asked():
    """By features on which they differ, and labels of the training rows that those of the test do not tell."""
    train, test = blobs(90, seed=0), blobs(300, seed=1)
    found = evaluation.evaluate_features(train, test)
    expected = (
        evaluation.knn_accuracy(*train, *test, neighbours=5),
        evaluation.linear_probe_accuracy(*train, *test),
        evaluation.few_label_accuracy(*train, *test, labels_per_class=5, draws=5),
    )
    assert (found.knn, found.linear, found.few) == expected and len(set(expected)) == 3


def test_knn_with_fewer_rows_than_neighbours():
    rows, labels = torch.eye(3), torch.tensor([0, 0, 1])
    assert evaluation.knn_accuracy(rows, labels, rows[:1], labels[:1], neighbours=5) == 1.0


def test_knn_solves_what_a_linear_probe_cannot():
    angle = torch.arange(400) * (2 * torch.pi / 400)
    rows = torch.stack([angle.cos(), angle.sin()], dim=1)
    labels = ((rows[:, 0] > 0) == (rows[:, 1] > 0)).long()  # opposite quadrants share a class
    split = rows[::2], labels[::2], rows[1::2], labels[1::2]
    assert evaluation.knn_accuracy(*split) > 0.95
    assert evaluation.linear_probe_accuracy(*split) < 0.65


def test_linear_probe_is_logistic_regression_on_standardised_rows():
    train, labels = blobs(90, seed=0)
    test, test_labels = blobs(300, seed=1)
    mean, deviation = train.mean(0), train.std(0, correction=0)
    probe = LogisticRegression(max_iter=1000).fit(((train - mean) / deviation).numpy(), labels.numpy())
    predicted = torch.tensor(probe.predict(((test - mean) / deviation).numpy()))
    expected = (predicted == test_labels).double().mean().item()
    assert 0.6 < expected < 0.99
    accuracy = evaluation.linear_probe_accuracy(train, labels, test, test_labels)
    assert accuracy == pytest.approx(expected, abs=1 / 300)


def test_linear_probe_does_not_depend_on_the_scale_of_a_feature():
    train, labels = blobs(90, seed=0)
    test, test_labels = blobs(300, seed=1)
    accuracy = evaluation.linear_probe_accuracy(train, labels, test, test_labels)
    scale = torch.tensor([1e-3, 1.0, 1e3, 1.0, 1.0, 1.0])  # regularisation would silence the first feature
    rescaled = evaluation.linear_probe_accuracy(train * scale, labels, test * scale, test_labels)
    assert rescaled == pytest.approx(accuracy, abs=1 / 300)


def test_few_label_accuracy_is_the_mean_over_the_draws():
    train, labels = blobs(90, seed=0)
    test, test_labels = blobs(300, seed=1)
    mean, deviation = train.mean(0), train.std(0, correction=0)
    train_rows, test_rows = ((rows - mean) / deviation for rows in (train, test))
    expected = []
    for draw in range(4):
        chosen = evaluation.draw_per_class(labels.numpy(), 1, seed=draw)
        probe = LogisticRegression(max_iter=1000).fit(train_rows[chosen].numpy(), labels[chosen].numpy())
        expected.append(probe.score(test_rows.numpy(), test_labels.numpy()))
    assert min(abs(each - np.mean(expected)) for each in expected) > 2 / 300
    accuracy = evaluation.few_label_accuracy(train, labels, test, test_labels, labels_per_class=1, draws=4)
    assert accuracy == pytest.approx(np.mean(expected), abs=1 / 300)


def test_draw_per_class_takes_as_many_of_each_class():
    labels = np.array([0] * 10 + [1] * 3 + [2] * 7)
    chosen = evaluation.draw_per_class(labels, 5, seed=0)
    assert len(set(chosen)) == len(chosen)
    assert np.bincount(labels[chosen]).tolist() == [5, 3, 5]
    assert chosen.tolist() == evaluation.draw_per_class(labels, 5, seed=0).tolist()
    assert chosen.tolist() != evaluation.draw_per_class(labels, 5, seed=1).tolist()


def test_extract_features_leaves_the_encoder_as_it_was():
    encoder = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout(0.9))
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    images = torch.randn(700, 2)
    features, labels = evaluation.extract_features(
        encoder, [(images[:400], torch.arange(400)), (images[400:], torch.arange(400, 700))]
    )
    # In evaluation mode a fresh batch norm divides by sqrt(1 + eps) and dropout does nothing.
    torch.testing.assert_close(features, images / (1 + 1e-5) ** 0.5)
    assert labels.tolist() == list(range(700))
    assert not features.requires_grad
    assert encoder.training and encoder[0].training
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, before[name])
    evaluation.extract_features(encoder.eval(), [(images, torch.arange(700))])
    assert not encoder.training


def test_calibration_error_is_the_gap_of_confidence_and_accuracy():
    """By hand: two samples of confidence 0.9, one of them right; one of 0.6, right."""
    logits = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6]]).log()
    labels = torch.tensor([0, 1, 1])
    expected = (2 * (0.9 - 0.5) + (1 - 0.6)) / 3
    assert evaluation.calibration_error(logits, labels) == pytest.approx(expected, abs=1e-6)
    assert evaluation.calibration_error(torch.tensor([[50.0, 0], [0, 50]]), torch.tensor([0, 1])) == 0
    assert evaluation.accuracy_of(logits, labels) == pytest.approx(2 / 3)
    # 0.61 and 0.65 lie in one of 15 bins, where one right and one wrong make up for each other.
    logits = torch.tensor([[0.61, 0.39], [0.65, 0.35]]).log()
    found = evaluation.calibration_error(logits, torch.tensor([0, 1]))
    assert found == pytest.approx((0.61 + 0.65 - 1) / 2, abs=1e-6)
    assert evaluation.calibration_error(logits, torch.tensor([0, 1]), bins=40) == pytest.approx(
        (0.39 + 0.65) / 2, abs=1e-6
    )


def test_a_part_of_the_labels_has_every_class():
    labels = torch.arange(3).repeat_interleave(torch.tensor([100, 17, 2]))
    rows = evaluation.draw_part(labels, 0.1, seed=0)
    assert torch.bincount(labels[rows]).tolist() == [10, 2, 1]
    assert len(rows.unique()) == 13
    assert torch.equal(evaluation.draw_part(labels, 0.1, seed=0), rows)
    assert not torch.equal(evaluation.draw_part(labels, 0.1, seed=1), rows)
    assert evaluation.draw_part(labels, 1.0, seed=0).sort().values.tolist() == list(range(119))


def test_noise_is_the_same_at_every_call():
    batches = [(torch.zeros(500, 1, 4, 4), torch.zeros(500))] * 2
    first, again = (
        torch.cat([images for images, _ in evaluation.with_noise(batches, 0.3)]) for _ in range(2)
    )
    assert torch.equal(first, again)
    assert first.std().item() == pytest.approx(0.3, rel=0.05)
    assert not torch.equal(*first.chunk(2))
    (other, _), *_ = evaluation.with_noise(batches, 0.3, seed=1)
    assert not torch.equal(other, first[:500])

import torch

from benchmarks import parity


def test_summary_sees_a_difference():
    original = torch.rand(3, 5, dtype=torch.float64)
    patched = original.clone()
    patched[1, 2] += 0.25
    said = parity.summary(original, patched)
    assert said["largest"] == 0.25 and abs(said["mean"] - 0.25 / 15) < 1e-12
    assert abs(said["spread"] - original.std(0).mean()) < 1e-12


def test_the_page_has_what_was_measured(tmp_path):
    training = parity.TRAININGS[0]
    curves = torch.rand(2, 4, dtype=torch.float64)
    parity.draw(training, curves, curves, tmp_path / "picture.png")
    costs = {"original": (2e-3, 4000), "patched": (1e-3, 1000)}
    said = parity.summary(curves, curves)
    page = parity.page([(training, said, costs, "picture.png")], 4, 2, "the machine")
    assert "2.00 (1.00)" in page and "4 (1)" in page and "0.0e+00 (0.0e+00)" in page
    assert "](picture.png)" in page and "4 steps, 2 seeds" in page and "the machine" in page
    assert (tmp_path / "picture.png").stat().st_size > 1000


def test_digits_are_images():
    images, labels = parity.digits()
    assert images.shape == (len(labels), 1, 8, 8) and 0 <= images.min() < images.max() <= 1


def test_every_training_is_on_the_page(tmp_path, monkeypatch):
    asked = []

    def curves(training, steps, seeds):
        asked.append((training.library, steps, seeds))
        return torch.rand(seeds, steps, dtype=torch.float64).expand(2, -1, -1)

    monkeypatch.setattr(parity, "curves", curves)
    monkeypatch.setattr(parity, "cost", lambda training: {"original": (1.0, 1), "patched": (1.0, 1)})
    monkeypatch.setattr(parity, "draw", lambda training, original, patched, path: path.touch())
    assert parity.main(["--steps", "5", "--seeds", "2", "--docs", str(tmp_path)]) == 0
    libraries = ["lightly", "open_clip", "sentence_transformers"]
    assert asked == [(library, 5, 2) for library in libraries]
    page = (tmp_path / "parity.md").read_text()
    for library in libraries:
        assert f"](parity-{library}.png)" in page and (tmp_path / f"parity-{library}.png").exists()
    assert "5 steps, 2 seeds" in page

"""The Inception extractor, on a weights file of the right architecture made here: the canonical one is a download."""

from __future__ import annotations

import csv
import pickle

import pytest
import torch
from conftest import error_line
from torch_fidelity import feature_extractor_inceptionv3
from torchmetrics.image.fid import NoTrainInceptionV3

import data
from scoring import inception
from scoring.inception import InceptionExtractor
from utils import ExpectedError


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of random weights that give features of some size."""
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    original = feature_extractor_inceptionv3.load_state_dict_from_url
    feature_extractor_inceptionv3.load_state_dict_from_url = lambda *args, **kwargs: {}
    load = torch.nn.Module.load_state_dict
    torch.nn.Module.load_state_dict = lambda self, state, **kwargs: None
    try:
        torch.manual_seed(0)
        network = feature_extractor_inceptionv3.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    finally:
        feature_extractor_inceptionv3.load_state_dict_from_url = original
        torch.nn.Module.load_state_dict = load
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture
def digits(mnist_dir):
    return data.load_digits("mnist", "test", mnist_dir).subset(3, "inception").images


def test_it_sees_what_torchmetrics_sees(weights, digits):
    """torchmetrics' wrapper of the network, fed with three equal channels, without the antialiasing that it adds."""
    features, probabilities = InceptionExtractor("cpu", weights)(digits)
    theirs = NoTrainInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], str(weights), antialias=False)
    expected, logits = theirs._torch_fidelity_forward(digits.repeat(1, 3, 1, 1))
    assert features.shape == (3, 2048) and features.std() > 1e-3
    assert torch.allclose(features, expected, rtol=1e-4, atol=1e-5)
    assert torch.allclose(probabilities, logits.softmax(1), atol=1e-5) and probabilities.shape == (3, 1008)


def test_only_uint8_is_scored(weights, digits):
    with pytest.raises(ValueError, match="uint8"):
        InceptionExtractor("cpu", weights)(digits.float())


class Code:
    def __reduce__(self):
        return exec, ("raise SystemExit('it ran')",)


@pytest.mark.parametrize("content", ["code", "text", "other", "nothing"])
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "weights.pth"
    if content == "code":
        path.write_bytes(pickle.dumps(Code()))
    elif content == "text":
        path.write_text("no weights")
    elif content == "other":
        torch.save({"fc.weight": torch.zeros(3)}, path)
    with pytest.raises(ExpectedError, match="does not hold the Inception weights"):
        InceptionExtractor("cpu", path)


def test_what_to_do_without_a_network_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(inception, "URL", (tmp_path / "nothing" / "weights-6726825d.pth").as_uri())
    path = tmp_path / "checkpoints" / "weights-6726825d.pth"
    with pytest.raises(ExpectedError, match="cannot be downloaded") as error:
        inception.canonical_weights()
    assert all(part in str(error.value) for part in (inception.URL, inception.SHA256_START, str(path)))
    path.write_text("another file")
    with pytest.raises(ExpectedError, match="not the canonical file"):
        inception.canonical_weights()


def test_evaluate_takes_it(weights, mnist_dir, run, tmp_path, fewer_digits, monkeypatch):
    """Of few digits, at a sixteenth of the network's pixels, so that it takes seconds."""
    fewer_digits(train=400, test=400)
    monkeypatch.setattr(feature_extractor_inceptionv3.FeatureExtractorInceptionV3, "INPUT_IMAGE_SIZE", 75)
    monkeypatch.setattr("evaluation.FLOOR_SUBSETS", 2)
    args = ["--models", "checkpoints/best_GAN_G.pt", "checkpoints/best_CGAN_G.pt", "--n", 200, "--seeds", 1]
    args += ["--extractor", "inception", "--data-dir", mnist_dir, "--out-dir", tmp_path]
    code, _, err = run("evaluate.py", *args, "--inception-weights", weights)
    assert code == 0, err
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert all(row["extractor"] == "inception" for row in rows)
    assert float(rows[2]["fid"]) > float(rows[0]["fid"]) > 0 and "label_accuracy" not in rows[0]
    code, _, err = run("evaluate.py", *args, "--inception-weights", tmp_path / "none.pth")
    assert code == 1 and "does not hold" in error_line(err)

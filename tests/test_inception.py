"""scoring/inception.py, with random weights in the right architecture, because the canonical weights are a download."""

from __future__ import annotations

import pickle
import socket

import pytest
import torch
from conftest import error_line, read_csv
from test_models import small
from torch_fidelity import feature_extractor_inceptionv3
from torchmetrics.image.fid import NoTrainInceptionV3

import data
from checkpoint import save_model
from files import ExpectedError
from scoring import inception, reference
from scoring.inception import InceptionExtractor, canonical_weights


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


def test_features_and_probabilities_are_those_of_torchmetrics(weights, digits):
    """torchmetrics is given three equal channels, and its antialiasing is switched off."""
    features, probabilities = InceptionExtractor("cpu", weights)(digits)
    theirs = NoTrainInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], str(weights), antialias=False)
    expected, logits = theirs._torch_fidelity_forward(digits.repeat(1, 3, 1, 1))
    assert features.shape == (3, 2048)
    assert features.std() > 1e-3
    assert torch.allclose(features, expected, rtol=1e-4, atol=1e-5)
    assert probabilities.shape == (3, 1008)
    assert torch.allclose(probabilities, logits.softmax(1), atol=1e-5)


def test_images_that_are_not_uint8_are_refused(weights, digits):
    with pytest.raises(ValueError, match="uint8"):
        InceptionExtractor("cpu", weights)(digits.float())


class Code:
    def __reduce__(self):
        return exec, ("raise SystemExit('it ran')",)


@pytest.mark.parametrize("content", ["code", "text", "other", "nothing"])
def test_a_file_without_the_weights_is_refused(tmp_path, content):
    path = tmp_path / "weights.pth"
    if content == "code":
        path.write_bytes(pickle.dumps(Code()))
    elif content == "text":
        path.write_text("no weights")
    elif content == "other":
        torch.save({"fc.weight": torch.zeros(3)}, path)
    with pytest.raises(ExpectedError, match=r"does not exist|does not hold the Inception weights"):
        InceptionExtractor("cpu", path)


@pytest.fixture
def canonical_path(tmp_path, monkeypatch):
    """Where the canonical weights are expected, while they cannot be downloaded."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(inception, "URL", (tmp_path / "nothing" / "weights-6726825d.pth").as_uri())
    return tmp_path / "checkpoints" / "weights-6726825d.pth"


def test_a_failed_download_says_which_file_to_put_where(canonical_path):
    with pytest.raises(ExpectedError, match="cannot be downloaded") as error:
        inception.canonical_weights()
    for part in (inception.URL, inception.SHA256_START, str(canonical_path)):
        assert part in str(error.value)


def test_another_file_in_place_of_the_canonical_weights_is_refused(canonical_path):
    canonical_path.parent.mkdir()
    canonical_path.write_text("another file")
    with pytest.raises(ExpectedError, match="not the canonical file"):
        inception.canonical_weights()


@pytest.fixture
def inception_evaluation(mnist_dir, tmp_path, fewer_digits, monkeypatch):
    """The arguments of an evaluation that takes seconds: few digits, and a sixteenth of the network's pixels.

    The model is an untrained class-conditional generator.
    """
    fewer_digits(train=300, test=200)
    monkeypatch.setattr(feature_extractor_inceptionv3.FeatureExtractorInceptionV3, "INPUT_IMAGE_SIZE", 75)
    monkeypatch.setattr(reference, "FLOOR_SUBSETS", 1)
    save_model(tmp_path / "untrained.pt", "cdcgan", small("cdcgan"), {})
    args = ["--models", tmp_path / "untrained.pt", "--n", 200, "--seeds", 1, "--data-dir", mnist_dir]
    return [*args, "--extractor", "inception", "--out-dir", tmp_path]


def test_evaluate_scores_with_the_inception_network(weights, inception_evaluation, run, tmp_path):
    code, _, err = run("evaluate.py", *inception_evaluation, "--inception-weights", weights)
    assert code == 0, err
    real, test, cgan = read_csv(tmp_path / "metrics.csv")
    assert [row["extractor"] for row in (real, test, cgan)] == ["inception"] * 3
    assert float(cgan["fid"]) > 2 * float(real["fid"]) > 0
    assert "label_accuracy" not in cgan, "this network does not know the digits"


def test_evaluate_refuses_a_missing_weights_file(inception_evaluation, run, tmp_path):
    code, _, err = run("evaluate.py", *inception_evaluation, "--inception-weights", tmp_path / "none.pth")
    assert code == 1
    assert "does not exist" in error_line(err)


def test_a_server_that_says_nothing_is_given_up(tmp_path, monkeypatch):
    seen = []

    def download(*_):
        seen.append(socket.getdefaulttimeout())
        raise TimeoutError("timed out")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    with pytest.raises(ExpectedError, match=r"cannot be downloaded \(timed out\)"):
        canonical_weights()
    assert seen == [30.0]
    assert socket.getdefaulttimeout() is None

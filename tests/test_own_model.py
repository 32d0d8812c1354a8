"""A new model: a config, a network, a line in models.py, and a short trainer."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from conftest import read_csv
from torch import nn

import models
from checkpoint import load_generator, save_model
from cli import ArgumentParser, add_training_flags, parse_training_args
from networks.checks import check_int, checked_labels, evaluating
from recipes.run import Run


@dataclasses.dataclass(frozen=True)
class TemplatesConfig:
    num_classes: int = 10

    def __post_init__(self):
        check_int(self, "num_classes", 1, 1000)


class Templates(nn.Module):
    """Each digit is its mean image with independent normal noise. A sample is the mean of `steps` draws."""

    SAMPLE_OPTIONS = ("steps",)

    def __init__(self, config: TemplatesConfig):
        super().__init__()
        self.config = config
        self.mean, self.log_std = (nn.Embedding(config.num_classes, 28 * 28) for _ in range(2))
        for weight in self.parameters():
            nn.init.zeros_(weight)

    def forward(self, z, labels):
        return (self.mean(labels) + self.log_std(labels).exp() * z).clamp(-1, 1).unflatten(1, (1, 28, 28))

    def negative_log_likelihood(self, images, labels):
        log_std = self.log_std(labels).clamp(-3, 3)
        return (log_std + 0.5 * ((images.flatten(1) - self.mean(labels)) / log_std.exp()).square()).mean()

    @torch.no_grad()
    def sample(self, n, labels=None, rng=None, *, steps=None, chunk_size=500, rows=slice(None)):
        labels = checked_labels(n, labels, self.config.num_classes, chunk_size)
        z = torch.randn(self.sample_options(steps=steps)["steps"], n, 28 * 28, generator=rng)
        labels = torch.randint(self.config.num_classes, (n,), generator=rng) if labels is None else labels
        with evaluating(self):
            return torch.stack([self(draw[rows], labels[rows]) for draw in z]).mean(0)

    def sample_options(self, with_labels=False, *, steps=None):
        return {"steps": 4 if steps is None else steps}

    def evaluations(self, *, steps):
        return steps


def train_templates(*argv: object) -> None:
    parser = ArgumentParser("Train the templates.")
    add_training_flags(parser)
    run = Run(parse_training_args(parser, [str(arg) for arg in argv], {}), "OWN", "own")
    model = models.build("templates").to(run.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=run.args.lr)

    def step(images, labels):
        loss = model.negative_log_likelihood(images, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return {"loss": loss.detach()}

    run.train(
        step,
        model=model,
        networks={"model": model},
        optimizers={"model": optimizer},
        rates={"lr": optimizer},
        exports={"": ("templates", model)},
    )


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setitem(models.MODELS, "templates", (TemplatesConfig, Templates))


def test_a_new_model_is_trained_resumed_and_drawn_by_the_scripts(registered, run, tmp_path):
    flags = ["--dataset", "digits", "--batch-size", 64, "--lr", 0.1, "--eval-samples", 200, "--device", "cpu"]
    train_templates(*flags, "--epochs", 4, "--out-dir", tmp_path / "whole")
    log = read_csv(tmp_path / "whole" / "reports" / "own_training_log.csv")
    assert float(log[-1]["fid"]) < float(log[0]["fid"])
    assert float(log[-1]["label_accuracy"]) > 0.15
    train_templates(*flags, "--epochs", 2, "--out-dir", tmp_path / "parts")
    train_templates("--resume", "--epochs", 4, "--out-dir", tmp_path / "parts")
    files = [tmp_path / folder / "checkpoints" / "best_OWN.pt" for folder in ("whole", "parts")]
    whole, parts = (load_generator(file).state_dict() for file in files)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)

    for options in ([], ["--steps", 64]):
        args = ["--model", files[0], "--digit", 3, "--outdir", tmp_path / f"digits{len(options)}", *options]
        code, _, err = run("inference.py", *args)
        assert code == 0, err
    pictures = [(tmp_path / folder / "digit_3.png").read_bytes() for folder in ("digits0", "digits2")]
    assert pictures[0] != pictures[1]
    code, _, err = run("infer.py", "--gan-model", files[0], "--n", 9, "--out", tmp_path / "a.png")
    assert code == 0, err


def test_a_new_model_is_scored_with_its_evaluations_and_options(registered, mnist_dir, run, tmp_path, fewer_digits):
    fewer_digits(train=600, test=200)
    save_model(tmp_path / "own.pt", "templates", models.build("templates"), {})
    args = ["--models", tmp_path / "own.pt", "--n", 200, "--seeds", 1, "--data-dir", mnist_dir, "--out-dir", tmp_path]
    code, out, err = run("evaluate.py", *args, "--steps", 3)
    assert code == 0, err
    assert f"to do: {200 * (3 + 3):,} network evaluations" in out
    rows = {row["model"]: row for row in read_csv(tmp_path / "metrics.csv")}
    for name in ("templates", "templates, by digit"):
        assert float(rows[name]["evaluations"]) == 3
        assert rows[name]["steps"] == "3"
        assert float(rows[name]["fid_ratio"]) > 1

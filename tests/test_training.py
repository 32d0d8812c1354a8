"""The loop, its callbacks in their order, the adversarial step, and a run that is resumed."""

from __future__ import annotations

import csv
import math
import os
import signal

import pytest
import torch
from conftest import ROOT, error_line
from test_models import small

import callbacks
from adversarial import LOSSES, MISMATCH_WEIGHT, GANStep, gradient_penalty
from checkpoint import load_generator, read_tensors
from training import Callback, StopSignals, TrainState, fit
from utils import ExpectedError, Interrupted, keyed_generator, write_csv


class Recorder(Callback):
    def __init__(self, name: str, events: list):
        self.name, self.events = name, events

    def after_step(self, state):
        self.events.append((self.name, "step", state.step))

    def after_epoch(self, state):
        self.events.append((self.name, "epoch", state.epoch))

    def at_rest(self, state):
        self.events.append((self.name, "rest", state.step))

    def on_end(self, state):
        self.events.append((self.name, "end", state.step))


def number_batches(count: int):
    return lambda epoch, start: [(torch.zeros(4), None)] * (count - start)


def loss_step(images, labels):
    return {"loss": torch.tensor(2.0)}


def test_fit_calls_everybody_in_order():
    events = []
    state = fit(loss_step, number_batches(2), 2, [Recorder("a", events), Recorder("b", events)], TrainState())
    one_epoch = [("step", 1), ("rest", 1), ("step", 2), ("rest", 2), ("epoch", 0), ("rest", 2)]
    assert events[:12] == [(name, hook, at) for hook, at in one_epoch for name in "ab"]
    assert events[-2:] == [("a", "end", 4), ("b", "end", 4)]
    assert (state.epoch, state.batch, state.step, state.images) == (2, 0, 4, 16)
    assert [row["epoch"] for row in state.log] == [1, 2] and state.log[0]["loss"] == 2.0


def test_fit_continues_in_the_middle_of_an_epoch():
    asked = []

    def batches(epoch, start):
        asked.append((epoch, start))
        return number_batches(5)(epoch, start)

    state = fit(loss_step, batches, 2, [], TrainState(epoch=0, batch=3, step=3, loss_sums={"loss": torch.tensor(6.0)}))
    assert asked == [(0, 3), (1, 0)] and state.step == 10 and state.log[0]["loss"] == 2.0


def test_fit_ends_with_its_callbacks_also_on_an_error():
    events = []
    with pytest.raises(ZeroDivisionError):
        fit(lambda *_: 1 / 0, number_batches(2), 1, [Recorder("a", events)], TrainState())
    assert events == [("a", "end", 0)]


def test_a_loss_that_is_not_finite_stops_the_run():
    with pytest.raises(ExpectedError, match="loss is not finite at step 3"):
        fit(lambda *_: {"loss": torch.tensor(math.nan)}, number_batches(3), 1, [], TrainState())


# --------------------------------------------------------------------------------------------------------------------
# Callbacks


def test_ema_follows_weights_and_buffers():
    network = small("dcgan")
    ema = callbacks.EMA(network, decay=0.9)
    average = {key: value.clone() for key, value in network.state_dict().items()}
    for step in range(1, 31):
        with torch.no_grad():
            for value in network.state_dict().values():
                value.add_(torch.rand_like(value.float()).to(value.dtype) + (not value.is_floating_point()))
        decay = min(0.9, (1 + step) / (10 + step))
        for key, value in network.state_dict().items():
            average[key] = decay * average[key] + (1 - decay) * value if value.is_floating_point() else value.clone()
        ema.after_step(TrainState(step=step))
    assert {"norm7a.norm.running_var", "norm7a.norm.num_batches_tracked"} <= average.keys()
    for key, value in ema.model.state_dict().items():
        assert torch.allclose(value, average[key], rtol=1e-4), key
    assert not ema.model.training and not any(p.requires_grad for p in ema.model.parameters())


def test_ema_without_decay_is_the_network():
    network = small("dcgan").train()
    ema = callbacks.EMA(network, decay=0.0)
    network(torch.randn(8, 100))  # moves the running statistics
    ema.after_step(TrainState(step=1))
    assert all(torch.equal(value, network.state_dict()[key]) for key, value in ema.model.state_dict().items())


def run_scored(fids, *hooks):
    """Run one-step epochs whose monitor reports `fids`."""
    scores = iter(fids)
    monitor = callbacks.FIDMonitor(lambda model: {"fid": next(scores)}, None, every=1, signals=StopSignals())
    return fit(loss_step, number_batches(1), len(fids), [monitor, *hooks], TrainState())


def test_early_stopping_waits_for_its_patience():
    state = run_scored([9, 8, 8.5, 8, 7, 7, 7.1, 7.2, 1, 1], callbacks.EarlyStopping(patience=3))
    assert state.epoch == 8 and state.best_fid == 7 and state.best_epoch == 5
    assert "3 scorings" in state.stop_reason and "epoch 5" in state.stop_reason
    assert run_scored([5, 4, 3, 2, 1], callbacks.EarlyStopping(patience=1)).epoch == 5


@pytest.mark.parametrize("row", [{}, {"fid": math.nan}, {"fid": math.inf}])
def test_early_stopping_raises_without_its_figure(row):
    with pytest.raises(RuntimeError, match="FID"):
        callbacks.EarlyStopping(patience=3).after_epoch(TrainState(row=row))


def test_scorings_may_be_rarer_than_epochs():
    scores = iter([5, 6, 6])
    monitor = callbacks.FIDMonitor(lambda model: {"fid": next(scores)}, None, every=2, signals=StopSignals())
    stopping = callbacks.EarlyStopping(patience=2, every=2)
    state = fit(loss_step, number_batches(1), 20, [monitor, stopping], TrainState())
    assert state.epoch == 6 and [row.get("fid") for row in state.log] == [None, 5, None, 6, None, 6]


def adam(lr: float = 1.0):
    return torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=lr)


def test_the_learning_rate_halves_on_a_plateau():
    optimizers = [adam(1.0), adam(0.1)]
    run_scored([5, 4, 4, 4, 3, 3], callbacks.ReduceLROnPlateau(optimizers, patience=2))
    assert [o.param_groups[0]["lr"] for o in optimizers] == [0.5, 0.05]
    falling = adam()
    run_scored([5, 4, 3, 2, 1], callbacks.ReduceLROnPlateau([falling], patience=1))
    assert falling.param_groups[0]["lr"] == 1.0


def test_the_plateau_counter_is_restored():
    optimizer = adam()
    first = callbacks.ReduceLROnPlateau([optimizer], patience=2)
    run_scored([4, 5], first)
    second = callbacks.ReduceLROnPlateau([optimizer], patience=3)  # a resumed run may have more of it
    second.load_state_dict(first.state_dict())
    run_scored([6], second)
    assert optimizer.param_groups[0]["lr"] == 1.0
    run_scored([6], second)
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_the_cosine_ends_at_zero():
    optimizer = adam(2.0)
    schedule = callbacks.CosineLR([optimizer], total_steps=4)
    seen = []
    for step in range(5):
        schedule.after_step(TrainState(step=step))
        seen.append(optimizer.param_groups[0]["lr"])
    assert seen == pytest.approx([2, 1 + math.sqrt(0.5), 1, 1 - math.sqrt(0.5), 0])


def test_checkpoints_are_written_when_they_should(tmp_path, capsys):
    (tmp_path / "best_GAN_G.pt").write_text("an older run")
    network = small("dcgan")
    writer = callbacks.CheckpointWriter(tmp_path, {"GAN_G": ("dcgan", network)}, save_every=2, meta={"flags": {}})
    run_scored([3, 2, 4], writer)
    assert (tmp_path / "best_GAN_G.previous.pt").read_text() == "an older run"
    assert "kept as" in capsys.readouterr().out
    best = load_generator(tmp_path / "best_GAN_G.pt")
    assert best.meta["epoch"] == 2 and best.meta["metrics"]["fid"] == 2 and "seconds" not in best.meta["metrics"]
    assert load_generator(tmp_path / "GAN_G_epoch_002.pt").meta["epoch"] == 2
    assert {path.name for path in tmp_path.iterdir()} == {
        "best_GAN_G.pt", "best_GAN_G.previous.pt", "GAN_G_epoch_002.pt"}  # fmt: skip


def test_the_gif_keeps_its_frames(tmp_path):
    from PIL import Image

    network = small("dcgan")
    gif = callbacks.ProgressGIF(tmp_path / "a.gif", network, seed=0, columns=2)
    run_scored([3, 2], gif)
    again = callbacks.ProgressGIF(tmp_path / "b.gif", network, seed=0, columns=2)
    again.load_state_dict(gif.state_dict())
    fit(loss_step, number_batches(1), 3, [again], TrainState(epoch=2))
    assert Image.open(tmp_path / "a.gif").n_frames == 3  # one before training, one an epoch
    assert Image.open(tmp_path / "b.gif").n_frames == 4
    assert torch.equal(again.frames[0], gif.frames[0])


def test_the_gif_of_a_conditional_model_has_a_row_for_each_class(tmp_path):
    class Flat(torch.nn.Module):  # draws the class as a grey level
        def sample(self, n, labels=None, rng=None):
            return (labels / 5 - 1).view(n, 1, 1, 1).expand(n, 1, 28, 28)

    gif = callbacks.ProgressGIF(tmp_path / "a.gif", Flat(), 0, columns=3, labels=torch.arange(10).repeat_interleave(3))
    gif.on_start(TrainState())
    cells = gif.frames[0][-10 * 30 :, 2:].reshape(10, 30, 3, 30)[:, :28, :, :28]
    expected = torch.arange(10) / 10 * 255
    assert torch.allclose(cells.float(), expected.view(10, 1, 1, 1).expand_as(cells), atol=0.5)


def test_the_log_leaves_missing_figures_empty(tmp_path):
    write_csv(tmp_path / "log.csv", [{"a": 1, "b": 0.123456789}, {"a": 2, "c": math.nan}])
    assert (tmp_path / "log.csv").read_text() == "a,b,c\n1,0.123457,\n2,,\n"


def test_a_state_that_is_not_finite_is_not_saved(tmp_path):
    """Losses alone do not tell: here they are fine, and a weight is not."""
    network = small("dcgan")
    saver = callbacks.StateSaver(tmp_path / "last.pt", {"generator": network}, {}, StopSignals())
    saver.save(TrainState())
    before = (tmp_path / "last.pt").read_bytes()
    with torch.no_grad():
        network.conv28.bias[0] = torch.inf
    with pytest.raises(ExpectedError, match=r"generator conv28.bias is not finite"):
        saver.save(TrainState())
    assert (tmp_path / "last.pt").read_bytes() == before


def test_signals_wait_for_rest_or_are_served_at_once():
    before = signal.getsignal(signal.SIGINT)
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received == signal.SIGTERM
        with pytest.raises(Interrupted), signals.at_once():
            pass
        with pytest.raises(KeyboardInterrupt):  # the second one does not wait
            os.kill(os.getpid(), signal.SIGINT)
    with StopSignals() as signals, pytest.raises(Interrupted), signals.at_once():
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


# --------------------------------------------------------------------------------------------------------------------
# The adversarial step


def make_step(loss: str, name: str = "dcgan", precision: str = "fp32", optimizer=torch.optim.Adam):
    generator, discriminator = small(name), small(f"{name}_discriminator", norm=LOSSES[loss].norm)
    optimizers = {"lr": optimizer(generator.parameters()), "d_lr": optimizer(discriminator.parameters())}
    return GANStep(generator, discriminator, optimizers, LOSSES[loss], TrainState(), 0, precision)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["dcgan", "cdcgan"])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_step_moves_both_networks(loss, name, precision):
    step = make_step(loss, name, precision)
    networks = (step.generator, step.discriminator)
    before = [{key: value.clone() for key, value in network.named_parameters()} for network in networks]
    losses = step(torch.rand(16, 1, 28, 28) * 2 - 1, torch.arange(16) % 10)
    assert set(losses) == {"loss_d", "loss_g"}
    assert all(loss.isfinite() and not loss.requires_grad for loss in losses.values())
    for old, network in zip(before, networks):
        moved = {key for key, value in network.named_parameters() if not torch.equal(old[key], value)}
        still = old.keys() - moved
        assert still <= ({"head.bias"} if loss != "bce" else set()), still  # it cancels out of a difference of logits


def reference_losses(kind: str, real: torch.Tensor, fake: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(discriminator's, generator's), from the papers' formulas."""
    if kind == "bce":
        bce = torch.nn.functional.binary_cross_entropy_with_logits
        one, zero = torch.ones_like(real), torch.zeros_like(real)
        return bce(real, one) + bce(fake, zero), bce(fake, one)
    if kind == "hinge":
        return (1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean(), -fake.mean()
    return -(real - fake).sigmoid().log().mean(), -(fake - real).sigmoid().log().mean()


@pytest.mark.parametrize("kind", LOSSES)
def test_the_losses_are_the_papers(kind):
    real, fake = torch.randn(64) * 2, torch.randn(64) * 2
    expected = reference_losses(kind, real, fake)
    assert torch.allclose(LOSSES[kind].discriminator(real, fake), expected[0], atol=1e-5)
    assert torch.allclose(LOSSES[kind].generator(real, fake), expected[1], atol=1e-5)


@pytest.mark.parametrize("kind", LOSSES)
def test_a_mismatch_costs_what_a_fake_does(kind):
    """The discriminator's loss but for the part of the real images, which it has once."""
    real, wrong = torch.randn(64) * 2, torch.randn(64) * 2
    expected = reference_losses(kind, real, wrong)[0]
    if kind != "relativistic":
        expected = expected - reference_losses(kind, real, torch.full((64,), -1e4))[0]
    assert torch.allclose(LOSSES[kind].mismatch(real, wrong), expected, atol=1e-5)


def test_wrong_labels_are_fakes_to_the_discriminator():
    step = make_step("relativistic", "cdcgan")
    step.state.step = 1  # a step without a penalty
    images, labels = torch.rand(16, 1, 28, 28) * 2 - 1, torch.arange(16) % 10
    noise = torch.randn(16, 100, generator=keyed_generator("cpu", 0, "noise", 1))
    with torch.no_grad():
        fake = step.generator(noise, labels)
        wrong_labels = step._wrong_labels(labels)
        asked = ((images, labels), (fake, labels), (images, wrong_labels))
        real, made, wrong = (step.discriminator(x, y) for x, y in asked)
    as_fakes = [reference_losses("relativistic", real, fakes)[0] for fakes in (made, wrong)]
    expected = as_fakes[0] + MISMATCH_WEIGHT * as_fakes[1]
    assert float(step(images, labels)["loss_d"]) == pytest.approx(float(expected), rel=1e-4)

    drawn = step._wrong_labels(torch.full((9000,), 3)).bincount(minlength=10)
    assert drawn[3] == 0 and all(abs(count - 1000) < 150 for i, count in enumerate(drawn.tolist()) if i != 3)


def test_the_gradient_penalty_of_a_known_function():
    """logit = w.x has the gradient w everywhere."""
    images, w = torch.randn(5, 1, 4, 4, requires_grad=True), torch.randn(16)
    assert gradient_penalty(images.flatten(1) @ w, images) == pytest.approx(float(w.square().sum()), rel=1e-5)


def test_the_update_is_the_textbook_one():
    """The step's gradients against the plain formulation: everything with gradients, two losses, two updates."""
    step, plain = make_step("bce", optimizer=torch.optim.SGD), make_step("bce", optimizer=torch.optim.SGD)
    plain.generator.load_state_dict(step.generator.state_dict())
    plain.discriminator.load_state_dict(step.discriminator.state_dict())
    images = torch.rand(8, 1, 28, 28) * 2 - 1
    step(images, torch.zeros(8, dtype=torch.int64))

    bce, one = torch.nn.functional.binary_cross_entropy_with_logits, torch.ones(8)
    noise = torch.randn(8, 100, generator=keyed_generator("cpu", 0, "noise", 0))
    fake = plain.generator(noise)
    plain.discriminator_optimizer.zero_grad()
    bce(plain.discriminator(images), one).backward()
    bce(plain.discriminator(fake.detach()), 0 * one).backward()
    plain.discriminator_optimizer.step()
    plain.generator_optimizer.zero_grad()
    bce(plain.discriminator(fake), one).backward()
    plain.generator_optimizer.step()
    for ours, theirs in ((step.generator, plain.generator), (step.discriminator, plain.discriminator)):
        for key, value in theirs.state_dict().items():
            assert torch.allclose(ours.state_dict()[key].float(), value.float(), atol=1e-4), key


@pytest.mark.parametrize("loss", LOSSES)
def test_one_pass_judges_as_two_would(loss):
    """Also by class; with BatchNorm each side must keep its own statistics."""
    step = make_step(loss, "cdcgan")
    real, fake, labels = torch.rand(8, 1, 28, 28), -torch.rand(8, 1, 28, 28), torch.arange(8)
    step.discriminator(real, labels), step.discriminator.eval()  # fixes the power iteration of spectral norm
    if loss == "bce":
        step.discriminator.train()
    both = step._judge(real, fake, labels[None])
    for together, images in zip(both, (real, fake)):
        assert torch.allclose(together[0], step.discriminator(images, labels), atol=1e-5)


# --------------------------------------------------------------------------------------------------------------------
# A whole run on the embedded digits, interrupted and resumed

FLAGS = ["--dataset", "digits", "--epochs", 3, "--width", 8, "--batch-size", 256, "--eval-samples", 200, "--device", "cpu"]


def training_file(folder):
    content = read_tensors(folder / "checkpoints" / "last_GAN.pt")
    content["state"] = {key: value for key, value in content["state"].items() if key not in ("seconds", "log")}
    return content


def same(a, b) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def log_rows(folder):
    with (folder / "reports" / "gan_training_log.csv").open() as file:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """The folder of an uninterrupted training on the embedded digits."""
    import runpy

    folder = tmp_path_factory.mktemp("whole")
    runpy.run_path(str(ROOT / "train_gan.py"))["main"]([*map(str, FLAGS), "--out-dir", str(folder)])
    return folder


def test_digits_train_end_to_end(whole_run):
    rows = log_rows(whole_run)
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert list(rows[0]) == [
        "epoch", "step", "images", "loss_d", "loss_g", "fid", "fid_ratio", "is", "is_std", "lr", "d_lr"]  # fmt: skip
    assert all(math.isfinite(float(value)) for row in rows for value in row.values())
    generator = load_generator(whole_run / "checkpoints" / "best_GAN_G.pt")
    best = min(rows, key=lambda row: float(row["fid"]))
    assert generator.meta["epoch"] == int(best["epoch"])
    assert generator.meta["flags"]["dataset"] == "digits" and "out_dir" not in generator.meta["flags"]
    assert (whole_run / "samples" / "gan_progress.gif").stat().st_size > 1000


@pytest.mark.parametrize("where", ["in the middle of an epoch", "while scoring"])
def test_an_interrupted_run_resumes_to_the_same_bits(where, whole_run, tmp_path, run, monkeypatch):
    import evaluation

    steps, scorings = [], []
    original_step, original_score = GANStep.__call__, evaluation.Scorer.__call__

    def stepping(self, *args):
        steps.append(1)
        if where == "in the middle of an epoch" and len(steps) == 8:
            os.kill(os.getpid(), signal.SIGINT)
        return original_step(self, *args)

    def scoring(self, *args):
        scorings.append(1)
        if where == "while scoring" and len(scorings) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original_score(self, *args)

    monkeypatch.setattr(GANStep, "__call__", stepping)
    monkeypatch.setattr(evaluation.Scorer, "__call__", scoring)
    code, _, err = run("train_gan.py", *FLAGS, "--out-dir", tmp_path)
    assert code == (130 if where == "in the middle of an epoch" else 143)
    assert "--resume --out-dir" in err
    assert len(log_rows(tmp_path)) == 1
    code, _, err = run("train_gan.py", "--resume", "--out-dir", tmp_path)
    assert code == 0, err
    assert log_rows(tmp_path) == log_rows(whole_run)
    assert same(training_file(tmp_path), training_file(whole_run))
    for name in ("checkpoints/best_GAN_G.pt", "checkpoints/best_GAN_D.pt", "samples/gan_progress.gif"):
        assert (tmp_path / name).read_bytes() == (whole_run / name).read_bytes()
    assert not list(tmp_path.rglob("*previous*"))


def test_resuming_says_what_it_cannot_do(whole_run, tmp_path, run):
    assert "no run to resume" in error_line(run("train_gan.py", "--resume", "--out-dir", tmp_path)[2])
    assert "larger --epochs" in error_line(run("train_gan.py", "--resume", "--out-dir", whole_run)[2])
    code, _, err = run("train_gan.py", "--resume", "--out-dir", whole_run, "--width", 16)
    assert code == 1 and "--width 16 differs" in error_line(err)

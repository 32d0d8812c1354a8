"""The loop and its callbacks in their order."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys

import pytest
import torch
from test_models import small

import callbacks
from checkpoint import load_generator
from loop import Callback, ProgressBar, StopSignals, TrainState, fit
from utils import ExpectedError, Interrupted, busy_seconds, write_csv


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

    state = fit(loss_step, batches, 2, [], TrainState(epoch=0, batch=3, step=3, loss_sums={"loss": 6.0}))
    assert asked == [(0, 3), (1, 0)] and state.step == 10 and state.log[0]["loss"] == 2.0


def test_fit_ends_with_its_callbacks_also_on_an_error():
    events = []
    with pytest.raises(ZeroDivisionError):
        fit(lambda *_: 1 / 0, number_batches(2), 1, [Recorder("a", events)], TrainState())
    assert events == [("a", "end", 0)]


def test_a_loss_that_is_not_finite_stops_the_run():
    with pytest.raises(ExpectedError, match="loss or its gradient is not finite at step 2"):
        losses = iter([1.0, math.nan, 2.0])
        fit(lambda *_: {"loss": torch.tensor(next(losses))}, number_batches(3), 1, [], TrainState())


def test_the_mean_loss_does_not_depend_on_when_it_is_fetched():
    losses = torch.rand(50).tolist()

    def mean(every: int) -> float:
        state = TrainState()
        for i, loss in enumerate(losses):
            state.count({"loss": torch.tensor(loss)}, 1)
            if i % every == 0:
                state.mean_losses()
        return state.mean_losses()["loss"]

    assert mean(1) == mean(7) == mean(50) == pytest.approx(sum(losses) / 50)


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


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"digits": 10, "variety": 0.9, "loss_d": 1.5}, ""),
        ({"digits": 3, "variety": 0.2, "loss_d": 1.5}, "mode collapse: only 3 of 10 digits are drawn"),
        ({"digits": 10, "variety": 0.31, "loss_d": 1.5}, "mode collapse: samples vary 31 % as much as real digits"),
        ({"digits": 10, "variety": 0.9, "loss_d": 0.01}, "dead discriminator: it knows every image, and its loss is zero"),
        ({"digits": 10, "variety": 0.9, "loss_d": 1.98}, "dead discriminator: it guesses"),
        ({"loss_d": 1.5}, ""),  # an epoch that is not scored
    ],
)
def test_the_watchdog_barks(row, expected):
    state = TrainState(row={"epoch": 1, **row})
    callbacks.Watchdog(guessing=2.0).after_epoch(state)
    assert state.row.get("warning", "") == expected
    state.log.append(state.row)
    for shown in (state.row, {"loss": 0.5}):  # at the end of the epoch, and all through the next one
        assert ("(" + expected + ")" in ProgressBar(1, 1)._figures(state, shown)) == bool(expected)
    assert expected == "" or expected not in ProgressBar(1, 1)._figures(state, {"epoch": 2, "loss": 0.5})


def test_the_watchdog_without_a_discriminator():
    state = TrainState(row={"digits": 10, "variety": 0.9, "loss": 0.0})
    callbacks.Watchdog().after_epoch(state)
    assert "warning" not in state.row


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


@pytest.mark.parametrize(
    ("warmup", "total", "expected"),
    [
        (0, 4, [2, 1 + math.sqrt(0.5), 1, 1 - math.sqrt(0.5), 0]),
        (4, None, [0.5, 1, 1.5, 2, 2]),
        (2, 4, [1, 1 + math.sqrt(0.5), 1, 1 - math.sqrt(0.5), 0]),
        (0, None, [2] * 5),
    ],
)
def test_the_learning_rate_follows_its_schedule(warmup, total, expected):
    optimizer = adam(2.0)
    schedule = callbacks.ScheduledLR([optimizer], warmup, total)
    seen = []
    for step in range(5):
        schedule.after_step(TrainState(step=step))
        seen.append(optimizer.param_groups[0]["lr"])
    assert seen == pytest.approx(expected)


@pytest.mark.parametrize(
    "cores, others, expected",
    [(2, 0.1, 2), (2, 0.4, 2), (2, 0.7, 1), (2, 2.0, 1), (8, 5.2, 3), (8, -0.1, 4), (2, math.nan, None)],
)
def test_threads_leave_cores_to_other_work(cores, others, expected, monkeypatch):
    """In ten seconds, of four threads, with a second of their own work in each."""
    readings = iter([(5.0, 100.0), (15.0, 110.0 + 10 * others)])
    clock = iter([0.0, 10.0, 10.0])
    monkeypatch.setattr(callbacks, "busy_seconds", lambda: next(readings))
    monkeypatch.setattr(callbacks.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(callbacks.os, "sched_getaffinity", lambda _: range(cores))
    threads = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    watch = callbacks.SharedCores()
    watch.on_start(TrainState())
    watch.after_step(TrainState())
    watch.on_end(TrainState())
    assert threads == ([expected] if expected else []) + [4]


@pytest.mark.skipif(not os.path.exists("/proc/stat"), reason="only Linux tells how busy its cores are")
def test_busy_seconds_count_this_process_and_others():
    own, everybody = busy_seconds()
    command = [sys.executable, "-c", "import time\nwhile time.process_time() < 0.5: pass"]
    subprocess.run(command, check=True)
    while busy_seconds()[0] < own + 0.2:
        pass
    now_own, now_everybody = busy_seconds()
    assert 0.2 <= now_own - own < 0.4
    assert now_everybody - everybody > 0.6  # 0.7, in ticks of a hundredth


def test_checkpoints_are_written_when_they_should(tmp_path):
    network = small("dcgan")
    writer = callbacks.CheckpointWriter(tmp_path, {"GAN_G": ("dcgan", network)}, save_every=2, meta={"flags": {}})
    run_scored([3, 2, 4], writer)
    best = load_generator(tmp_path / "best_GAN_G.pt")
    assert best.meta["epoch"] == 2 and best.meta["metrics"]["fid"] == 2 and "seconds" not in best.meta["metrics"]
    assert load_generator(tmp_path / "GAN_G_epoch_002.pt").meta["epoch"] == 2
    assert {path.name for path in tmp_path.iterdir()} == {"best_GAN_G.pt", "GAN_G_epoch_002.pt"}


def test_the_gif_keeps_its_frames(tmp_path):
    from PIL import Image

    network = small("dcgan")
    gif = callbacks.ProgressGIF(tmp_path / "a.gif", network, StopSignals(), seed=0, columns=2)
    state = run_scored([3, 2], gif)
    again = callbacks.ProgressGIF(tmp_path / "b.gif", network, StopSignals(), seed=0, columns=2)
    again.load_state_dict(gif.state_dict())
    fit(loss_step, number_batches(1), 3, [again], state)
    assert Image.open(tmp_path / "a.gif").n_frames == 3  # one before training, one an epoch
    assert Image.open(tmp_path / "b.gif").n_frames == 4
    assert torch.equal(again.frames[0], gif.frames[0])
    again.after_epoch(TrainState(epoch=2))  # an epoch that is closed again after an interruption
    assert len(again.frames) == 4


def test_the_gif_stops_at_once(tmp_path):
    """A signal while it samples leaves no frame; drawn again, the epoch has one."""
    with StopSignals() as signals:
        gif = callbacks.ProgressGIF(tmp_path / "a.gif", small("dcgan"), signals, seed=0, columns=2)
        gif.on_start(TrainState())
        gif.model.register_forward_hook(lambda *_: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(Interrupted):
            gif.after_epoch(TrainState())
        assert len(gif.frames) == 1


def test_the_gif_of_a_conditional_model_has_a_row_for_each_class(tmp_path):
    class Flat(torch.nn.Module):  # draws the class as a grey level
        def sample(self, n, labels, rng, darker):
            return (labels / 5 - 1 - darker).view(n, 1, 1, 1).expand(n, 1, 28, 28)

    labels = torch.arange(10).repeat_interleave(3)
    options = {"darker": 0.2}
    gif = callbacks.ProgressGIF(tmp_path / "a.gif", Flat(), StopSignals(), 0, columns=3, labels=labels, options=options)
    gif.on_start(TrainState())
    cells = gif.frames[0][-10 * 30 :, 2:].reshape(10, 30, 3, 30)[:, :28, :, :28]
    expected = ((torch.arange(10) - 1) / 10 * 255).clamp(min=0)
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
        os.kill(os.getpid(), signal.SIGTERM)  # a repeated SIGTERM, which some tools send, ends nothing half way
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL  # but Ctrl-C now ends the process, whatever it does
    with StopSignals() as signals, pytest.raises(Interrupted), signals.at_once():
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before

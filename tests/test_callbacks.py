"""callbacks.py: what happens beside the training steps."""

from __future__ import annotations

import math
import os
import signal

import pytest
import torch
from test_loop import loss_step, number_batches
from test_models import small

import callbacks
from callbacks import ProgressBar
from checkpoint import load_generator
from files import ExpectedError, Interrupted
from loop import StopSignals, TrainState, fit


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


def test_ema_with_decay_0_equals_the_network():
    network = small("dcgan").train()
    ema = callbacks.EMA(network, decay=0.0)
    network(torch.randn(8, 100))  # moves the running statistics
    ema.after_step(TrainState(step=1))
    assert all(torch.equal(value, network.state_dict()[key]) for key, value in ema.model.state_dict().items())


def run_scored(fids, *hooks):
    """Run epochs of one step, whose monitor reports these FIDs."""
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
        ({"loss_d": 1.5}, ""),  # an epoch without scoring
    ],
)
def test_the_watchdog_warns_in_log_and_progress_bar(row, expected):
    state = TrainState(row={"epoch": 1, **row})
    callbacks.Watchdog(guessing=2.0).after_epoch(state)
    assert state.row.get("warning", "") == expected
    state.log.append(state.row)
    for shown in (state.row, {"loss": 0.5}):  # at the end of the epoch, and during the next one
        assert ("(" + expected + ")" in ProgressBar(1, 1)._figures(state, shown)) == bool(expected)
    assert expected == "" or expected not in ProgressBar(1, 1)._figures(state, {"epoch": 2, "loss": 0.5})


def test_the_watchdog_ignores_the_loss_without_a_discriminator():
    state = TrainState(row={"digits": 10, "variety": 0.9, "loss": 0.0})
    callbacks.Watchdog().after_epoch(state)
    assert "warning" not in state.row


def test_early_stopping_stops_after_its_patience():
    state = run_scored([9, 8, 8.5, 8, 7, 7, 7.1, 7.2, 1, 1], callbacks.EarlyStopping(patience=3))
    assert state.epoch == 8
    assert state.best_fid == 7
    assert state.best_epoch == 5
    assert "3 scorings" in state.stop_reason
    assert "epoch 5" in state.stop_reason


def test_early_stopping_does_not_stop_while_the_fid_improves():
    assert run_scored([5, 4, 3, 2, 1], callbacks.EarlyStopping(patience=1)).epoch == 5


@pytest.mark.parametrize("row", [{}, {"fid": math.nan}, {"fid": math.inf}])
def test_early_stopping_raises_without_a_finite_fid(row):
    with pytest.raises(RuntimeError, match="FID"):
        callbacks.EarlyStopping(patience=3).after_epoch(TrainState(row=row))


def test_with_eval_every_2_every_second_epoch_is_scored():
    scores = iter([5, 6, 6])
    monitor = callbacks.FIDMonitor(lambda model: {"fid": next(scores)}, None, every=2, signals=StopSignals())
    stopping = callbacks.EarlyStopping(patience=2, every=2)
    state = fit(loss_step, number_batches(1), 20, [monitor, stopping], TrainState())
    assert state.epoch == 6
    assert [row.get("fid") for row in state.log] == [None, 5, None, 6, None, 6]


def adam(lr: float = 1.0):
    return torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=lr)


def test_the_learning_rate_halves_on_a_plateau():
    optimizers = [adam(1.0), adam(0.1)]
    run_scored([5, 4, 4, 4, 3, 3], callbacks.ReduceLROnPlateau(optimizers, patience=2))
    assert [o.param_groups[0]["lr"] for o in optimizers] == [0.5, 0.05]


def test_the_learning_rate_stays_while_the_fid_improves():
    optimizer = adam()
    run_scored([5, 4, 3, 2, 1], callbacks.ReduceLROnPlateau([optimizer], patience=1))
    assert optimizer.param_groups[0]["lr"] == 1.0


def test_a_resumed_run_continues_to_count_the_plateau():
    optimizer = adam()
    first = callbacks.ReduceLROnPlateau([optimizer], patience=2)
    run_scored([4, 5], first)
    second = callbacks.ReduceLROnPlateau([optimizer], patience=3)  # a resumed run may have another patience
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


def test_the_best_epoch_and_every_second_epoch_are_written(tmp_path):
    network = small("dcgan")
    writer = callbacks.CheckpointWriter(tmp_path, {"GAN_G": ("dcgan", network)}, save_every=2, meta={"flags": {}})
    run_scored([3, 2, 4], writer)
    best = load_generator(tmp_path / "best_GAN_G.pt")
    assert best.meta["epoch"] == 2
    assert best.meta["metrics"]["fid"] == 2
    assert "seconds" not in best.meta["metrics"], "equal runs give equal files"
    assert load_generator(tmp_path / "GAN_G_epoch_002.pt").meta["epoch"] == 2
    assert {path.name for path in tmp_path.iterdir()} == {"best_GAN_G.pt", "GAN_G_epoch_002.pt"}


def test_the_gif_of_a_resumed_run_keeps_its_frames(tmp_path):
    from PIL import Image

    network = small("dcgan")
    gif = callbacks.ProgressGIF(tmp_path / "a.gif", network, StopSignals(), seed=0, columns=2)
    state = run_scored([3, 2], gif)
    again = callbacks.ProgressGIF(tmp_path / "b.gif", network, StopSignals(), seed=0, columns=2)
    again.load_state_dict(gif.state_dict())
    fit(loss_step, number_batches(1), 3, [again], state)
    assert Image.open(tmp_path / "a.gif").n_frames == 3  # one before the training, and one for each epoch
    assert Image.open(tmp_path / "b.gif").n_frames == 4
    assert torch.equal(again.frames[0], gif.frames[0])
    again.after_epoch(TrainState(epoch=2))  # the end of an epoch is repeated after an interruption
    assert len(again.frames) == 4


def test_a_signal_while_the_gif_samples_leaves_no_frame(tmp_path):
    with StopSignals() as signals:
        gif = callbacks.ProgressGIF(tmp_path / "a.gif", small("dcgan"), signals, seed=0, columns=2)
        gif.on_start(TrainState())
        gif.model.register_forward_hook(lambda *_: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(Interrupted):
            gif.after_epoch(TrainState())
        assert len(gif.frames) == 1


def test_the_gif_of_a_conditional_model_has_a_row_for_each_class(tmp_path):
    class Flat(torch.nn.Module):  # draws each class in its own grey level
        def sample(self, n, labels, rng, darker):
            return (labels / 5 - 1 - darker).view(n, 1, 1, 1).expand(n, 1, 28, 28)

    labels = torch.arange(10).repeat_interleave(3)
    options = {"darker": 0.2}
    gif = callbacks.ProgressGIF(tmp_path / "a.gif", Flat(), StopSignals(), 0, columns=3, labels=labels, options=options)
    gif.on_start(TrainState())
    cells = gif.frames[0][-10 * 30 :, 2:].reshape(10, 30, 3, 30)[:, :28, :, :28]
    expected = ((torch.arange(10) - 1) / 10 * 255).clamp(min=0)
    assert torch.allclose(cells.float(), expected.view(10, 1, 1, 1).expand_as(cells), atol=0.5)


def test_a_state_with_a_weight_that_is_not_finite_is_not_saved(tmp_path):
    """Finite losses do not tell that."""
    network = small("dcgan")
    saver = callbacks.StateSaver(tmp_path / "last.pt", {"generator": network}, {}, StopSignals())
    saver.save(TrainState())
    before = (tmp_path / "last.pt").read_bytes()
    with torch.no_grad():
        network.conv28.bias[0] = torch.inf
    with pytest.raises(ExpectedError, match=r"generator conv28.bias is not finite"):
        saver.save(TrainState())
    assert (tmp_path / "last.pt").read_bytes() == before

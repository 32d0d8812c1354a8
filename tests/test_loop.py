"""loop.py: the training loop, its state, and the signals that stop it."""

from __future__ import annotations

import math
import os
import signal

import pytest
import torch

from files import ExpectedError, Interrupted
from loop import Callback, StopSignals, TrainState, fit


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


def test_fit_calls_each_hook_of_each_callback_in_order():
    events = []
    state = fit(loss_step, number_batches(2), 2, [Recorder("a", events), Recorder("b", events)], TrainState())
    one_epoch = [("step", 1), ("rest", 1), ("step", 2), ("rest", 2), ("epoch", 0), ("rest", 2)]
    assert events[:12] == [(name, hook, at) for hook, at in one_epoch for name in "ab"]
    assert events[-2:] == [("a", "end", 4), ("b", "end", 4)]
    assert (state.epoch, state.batch, state.step, state.images) == (2, 0, 4, 16)
    assert [row["epoch"] for row in state.log] == [1, 2]
    assert state.log[0]["loss"] == 2.0


def test_fit_continues_in_the_middle_of_an_epoch():
    starts = []

    def batches(epoch, start):
        starts.append((epoch, start))
        return number_batches(5)(epoch, start)

    state = fit(loss_step, batches, 2, [], TrainState(epoch=0, batch=3, step=3, loss_sums={"loss": 6.0}))
    assert starts == [(0, 3), (1, 0)]
    assert state.step == 10
    assert state.log[0]["loss"] == 2.0


def test_fit_calls_on_end_also_after_an_error():
    events = []
    with pytest.raises(ZeroDivisionError):
        fit(lambda *_: 1 / 0, number_batches(2), 1, [Recorder("a", events)], TrainState())
    assert events == [("a", "end", 0)]


def test_a_loss_that_is_not_finite_stops_the_run():
    losses = iter([1.0, math.nan, 2.0])
    with pytest.raises(ExpectedError, match="loss or its gradient is not finite at step 2"):
        fit(lambda *_: {"loss": torch.tensor(next(losses))}, number_batches(3), 1, [], TrainState())


def test_the_mean_loss_does_not_depend_on_when_losses_are_fetched():
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
# Signals


def test_a_signal_waits_until_the_training_is_at_rest():
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received == signal.SIGTERM
        with pytest.raises(Interrupted), signals.at_once():
            pass


def test_a_signal_inside_at_once_interrupts_immediately():
    with StopSignals() as signals, pytest.raises(Interrupted), signals.at_once():
        os.kill(os.getpid(), signal.SIGINT)


def test_a_second_sigterm_changes_nothing():
    with StopSignals() as signals:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received == signal.SIGTERM


def test_after_the_first_signal_ctrl_c_ends_the_process():
    with StopSignals():
        os.kill(os.getpid(), signal.SIGTERM)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL


def test_the_handlers_of_before_are_restored():
    before = signal.getsignal(signal.SIGINT)
    with StopSignals(), pytest.raises(Interrupted):
        os.kill(os.getpid(), signal.SIGINT)
        raise Interrupted(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before

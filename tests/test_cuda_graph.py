"""engine/cuda_graph.py: training steps replayed from CUDA graphs. Without a GPU, most tests are skipped."""

from __future__ import annotations

import contextlib
import gc
import os
import types
from unittest import mock

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import train_cgan
import train_diffusion
import train_gan
from data import Digits
from engine.cuda_graph import ORDINARY_CALLS, RecordedUpdate
from loop import TrainState
from recipes.ddpm import assemble as assemble_ddpm
from recipes.gan import PENALTY_EVERY
from recipes.gan import assemble as assemble_gan
from recipes.run import Run

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when a GPU is first used
CALLS = ORDINARY_CALLS + 6
KINDS = ["dcgan hinge", "dcgan bce", "dcgan relativistic", "cdcgan hinge", "cdcgan relativistic", "ddpm", "ddpm adam"]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(autouse=True)
def deterministic():
    """With the usual kernels, two equal trainings differ by more than a recording changes."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("device", "epochs", "compiler", "pays"),
    [("cuda", 50, "triton", True), ("cuda", 49, "triton", False), ("cuda", 50, None, False), ("cpu", 50, "triton", False)],
)
def test_a_long_training_on_a_gpu_is_compiled(device, epochs, compiler, pays, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: compiler)
    args = types.SimpleNamespace(epochs=epochs, batch_size=100)
    run = types.SimpleNamespace(args=args, batches_per_epoch=600, device=torch.device(device))
    assert Run._pays_to_compile(run) == pays


def make_step(kind: str, device: str, precision: str = "fp32", digits: int = 64):
    """(networks, step, images, labels) of a training with small networks: 64 of so many digits."""
    torch.manual_seed(0)
    images = torch.randint(0, 256, (digits, 1, 28, 28), dtype=torch.uint8).to(device)
    labels = (torch.arange(digits) % 10).to(device)
    state, device = TrainState(), images.device
    if kind.startswith("ddpm"):
        args = train_diffusion.parse_args(["--width", "8", *(["--muon-lr", "0"] if "adam" in kind else [])])
        network, _, step = assemble_ddpm(args, state, Digits(images, labels, "mnist"), precision)
        networks = [network]
    else:
        name, loss = kind.split()
        trainer = train_gan if name == "dcgan" else train_cgan
        args = trainer.parse_args(["--width", "8", "--loss", loss])
        named, _, step = assemble_gan(args, state, device, precision, name, 10 if name == "cdcgan" else 0)
        networks = list(named.values())
    return networks, step, images[:64].float() / 127.5 - 1, labels[:64]


def take(step, images, labels, calls: int = CALLS) -> list[dict[str, float]]:
    """The losses of so many steps. The learning rate falls in each."""
    losses = []
    for _ in range(calls):
        for optimizer in step.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] *= 0.9
        losses.append({name: float(loss) for name, loss in step(images, labels).items()})
        step.state.step += 1
    return losses


def test_a_cpu_records_no_graph():
    _, step, images, labels = make_step("dcgan hinge", "cpu")
    take(step, images, labels)
    assert not step.graph.active
    assert not step.graph._recordings


class Reads(TorchDispatchMode):
    """Notes where the tensors lie that are read while it is active, except those made meanwhile; and what reads them."""

    def __init__(self):
        super().__init__()
        self.made, self.read = set(), {}

    def __torch_dispatch__(self, operation, _types, args=(), kwargs=None):
        for place in self._places((args, kwargs)):
            if place not in self.made:
                self.read.setdefault(place, str(operation))
        results = operation(*args, **(kwargs or {}))
        self.made.update(self._places(results))
        return results

    def _places(self, tree) -> list[int]:
        return [t.untyped_storage().data_ptr() for t in pytree.tree_leaves(tree) if isinstance(t, torch.Tensor)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_reads_no_tensor_that_the_step_before_has_made(kind):
    """A recording would still read from its place in memory when the tensor is gone."""
    _, step, images, labels = make_step(kind, "cpu")
    found = {True: [], False: []}  # with a gradient penalty, if the loss has one, and without
    for number in range(3 * PENALTY_EVERY):
        step.state.step = number
        with Reads() as reads:
            step(images, labels)
        found[number % PENALTY_EVERY == 0].append(reads.read)
    for variant in found.values():
        assert variant[-1] == variant[-2]


@needs_gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_replayed_step_gives_what_an_ordinary_step_gives(kind, precision):
    networks, step, images, labels = make_step(kind, "cuda", precision)
    replayed = take(step, images, labels, 3 * CALLS)
    assert len(step.graph._recordings) == (2 if "relativistic" in kind else 1)
    others, ordinary_step, _, _ = make_step(kind, "cuda", precision)
    ordinary_step.graph.active = False
    ordinary = take(ordinary_step, images, labels, 3 * CALLS)
    tolerance = 1e-4 if precision == "fp32" else 2e-2
    for number, (ours, theirs) in enumerate(zip(replayed, ordinary)):
        assert ours == pytest.approx(theirs, rel=tolerance, abs=tolerance), number
    for ours, theirs in zip(networks, others):
        for key, value in theirs.state_dict().items():
            assert torch.allclose(ours.state_dict()[key].float(), value.float(), atol=10 * tolerance), key


@needs_gpu
@pytest.mark.parametrize("kind", KINDS)
def test_a_replayed_step_draws_new_noise_and_follows_the_learning_rate(kind):
    networks, step, images, labels = make_step(kind, "cuda")
    take(step, images, labels, 3 * CALLS)
    for optimizer in step.optimizers.values():
        optimizer.param_groups[0]["lr"] = 0.0
    before = [{key: value.clone() for key, value in network.named_parameters()} for network in networks]
    step.state.step = 1001  # without gradient penalty
    first, again = (take(step, images, labels, 1)[0] for _ in range(2))
    assert first != again  # other random numbers
    step.state.step = 1001
    assert take(step, images, labels, 1)[0] == pytest.approx(first, rel=0.02)  # spectral norms have moved a little
    for old, network in zip(before, networks):
        for key, value in network.named_parameters():
            assert torch.equal(value, old[key]), key


@needs_gpu
@pytest.mark.parametrize("kind", KINDS)
def test_a_replayed_step_still_works_after_the_cache_is_emptied(kind):
    """Other recordings empty the cache too."""
    losses = []
    for recorded in (True, False):
        _, step, images, labels = make_step(kind, "cuda", digits=60_000)
        step.graph.active = recorded
        losses.append(take(step, images, labels, 3 * CALLS))
        torch.cuda.empty_cache()
        losses[-1] += take(step, images, labels)
    for ours, theirs in zip(*losses):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-3)


@needs_gpu
@pytest.mark.parametrize("kind", KINDS)
def test_a_replayed_step_with_a_bad_batch_changes_no_weight(kind):
    networks, step, images, labels = make_step(kind, "cuda")
    take(step, images, labels, 3 * CALLS)
    before = [{key: value.clone() for key, value in network.state_dict().items()} for network in networks]
    losses = take(step, torch.full_like(images, torch.nan), labels, 1)[0]
    assert all(loss != loss for name, loss in losses.items() if name != "loss_g") and losses
    for old, network in zip(before[-1:], networks[-1:]):
        for key, value in network.state_dict().items():
            assert torch.equal(value, old[key]), key


def test_no_garbage_is_collected_while_a_graph_is_recorded(monkeypatch):
    """Without a GPU: the recording itself is left out, the update runs."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", mock.MagicMock)
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: contextlib.nullcontext())
    seen = []

    def update(_images, _variant):
        seen.append(gc.isenabled())
        return {}

    recorded = RecordedUpdate(update, torch.Generator(), {})
    recorded._record(torch.zeros(1), None)
    assert seen == [False]
    assert gc.isenabled()

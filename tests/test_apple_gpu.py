"""What an Apple GPU needs, looked at without one: no float64, only operations that PyTorch has for it, and no bf16."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchgen
import yaml
from conftest import error_line
from test_models import small
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import data
import train_cgan
import train_diffusion
import train_gan
from callbacks import EMA
from engine import distributed
from engine.guard import Guard
from files import UsageError
from loop import TrainState
from recipes import ddpm, gan
from recipes.gan import LOSSES
from utils import autocast, choose_device, has_bf16, resolve_precision, scoring_device

MPS = torch.device("mps")


class Watched(TorchDispatchMode):
    """Keeps the names of all operations, and of those that give float64."""

    def __init__(self):
        super().__init__()
        self.operations, self.double = set(), set()

    def __torch_dispatch__(self, operation, _types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        self.operations.add(operation)
        if any(isinstance(t, torch.Tensor) and t.dtype == torch.float64 for t in pytree.tree_leaves(result)):
            self.double.add(operation)
        return result


@pytest.fixture(scope="module")
def on_mps() -> dict[str, bool]:
    """Operation -> whether PyTorch lists a kernel for Apple's GPUs, or one made of other operations."""
    path = Path(torchgen.__file__).parent / "packaged" / "ATen" / "native" / "native_functions.yaml"
    found, delegates = {}, {}
    for entry in yaml.safe_load(path.read_text(encoding="utf-8")):
        name = entry["func"].partition("(")[0]
        keys = {key.strip() for names in entry.get("dispatch", {"Composite": ""}) for key in names.split(",")}
        found[name] = any("MPS" in key or "Composite" in key for key in keys)
        if "structured_delegate" in entry:
            delegates[name] = entry["structured_delegate"]
    assert not all(found.values())
    return found | {name: found[target] for name, target in delegates.items()}


def updates(name: str, digits: data.Digits, options: list[str]) -> Watched:
    """What two updates of a trainer do, with its EMA."""
    state = TrainState()
    if name == "ddpm":
        model, _, step = ddpm.assemble(train_diffusion.parse_args(["--width", "8", *options]), state, digits, "fp32")
    else:
        script, classes = (train_gan, 0) if name == "dcgan" else (train_cgan, 10)
        args = script.parse_args(["--width", "8", *options])
        networks, _, step = gan.assemble(args, state, torch.device("cpu"), "fp32", name, classes)
        model = networks["generator"]
    ema = EMA(model, 0.999)
    with Watched() as watched:
        for images, labels in data.epoch_batches(digits, 8, seed=0, epoch=0):
            state.count(step(images, labels), len(images))
            ema.after_step(state)
    return watched


RECIPES = [(name, ["--loss", loss]) for name in ("dcgan", "cdcgan") for loss in LOSSES]
RECIPES += [("ddpm", ["--prediction", prediction]) for prediction in ("v", "eps")]
SAMPLINGS = [
    ("dcgan", {}),
    ("cdcgan", {}),
    ("ddpm", {"guidance": 2.0}),
    ("ddpm", {"sampler": "ddpm"}),
    ("ddpm", {"eta": 0.0}),
]


def check(watched: Watched, on_mps: dict[str, bool]) -> None:
    assert len(watched.operations) > 5
    assert not watched.double
    names = {operation.name() for operation in watched.operations if operation.namespace == "aten"}
    assert not sorted(name for name in names if not on_mps[name.removeprefix("aten::")])


@pytest.mark.parametrize(("name", "options"), RECIPES)
def test_an_update_has_no_float64_and_no_operation_that_apple_gpus_lack(name, options, mnist_dir, on_mps):
    digits = data.load_digits("mnist", "train", mnist_dir).subset(16, "few")
    check(updates(name, digits, options), on_mps)


@pytest.mark.parametrize(("name", "options"), SAMPLINGS)
def test_sampling_has_no_float64_and_no_operation_that_apple_gpus_lack(name, options, on_mps):
    network = small(name)
    labels = None if name == "dcgan" else [3, 1, 4]
    with Watched() as watched:
        data.to_uint8(network.sample(3, labels, **options))
    check(watched, on_mps)


def test_scoring_has_float64_so_it_leaves_an_apple_gpu():
    from scoring import metrics

    with Watched() as watched:
        metrics.gaussian(torch.randn(10, 3))
    assert watched.double
    assert scoring_device(MPS) == torch.device("cpu")
    assert scoring_device(torch.device("cpu")) == torch.device("cpu")


def test_an_apple_gpu_is_used_where_pytorch_finds_one(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device("mps") == MPS
    assert choose_device("auto").type != "mps"
    with pytest.raises(UsageError, match="only cpu and cuda"):
        choose_device("mps", apple=False)


@pytest.mark.parametrize("script", ["infer.py", "train_gan.py"])
def test_an_apple_gpu_that_is_not_there_is_refused(script, run, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    code, _, err = run(script, "--device", "mps")
    assert code == 2
    assert "no Apple GPU" in error_line(err)


def test_an_apple_gpu_computes_in_fp32():
    assert resolve_precision("auto", MPS) == "fp32"
    assert not has_bf16(MPS)
    for refused in (resolve_precision, lambda name, device: autocast(device, name)):
        with pytest.raises(UsageError, match="--precision fp32"):
            refused("bf16", MPS)


def test_several_processes_on_an_apple_gpu_are_refused(monkeypatch):
    monkeypatch.setattr(distributed, "count", lambda: 2)
    with pytest.raises(UsageError, match="one process"):
        distributed.join(MPS)


@pytest.mark.parametrize(("number", "steps"), [(1.0, 1), (float("nan"), 0)])
def test_an_optimizer_that_ignores_the_flag_takes_no_step_that_is_not_finite(number, steps, monkeypatch):
    class Ignorant(torch.optim.SGD):
        heeds_found_inf = True
        taken = 0

        def step(self):
            self.taken += 1

    monkeypatch.setattr("engine.guard._ignores_flag", lambda device: True)
    optimizer = Ignorant([torch.zeros(1, requires_grad=True)], lr=1.0)
    Guard().step(torch.tensor(number), torch.tensor(1.0), optimizer)
    assert optimizer.taken == steps

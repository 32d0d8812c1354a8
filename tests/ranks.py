"""Not a test: test_distributed.py starts it as two processes, and each of them checks what both must have in common.

With the arguments of a script (`python tests/ranks.py evaluate.py ...`), it runs that script with fewer MNIST digits.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

import pytest
import torch
from test_gan import make_step
from test_models import small

import data
from cli import run_script
from engine import distributed
from files import is_first
from utils import keyed_generator


def images(n: int) -> torch.Tensor:
    return torch.rand(n, 1, 28, 28, generator=keyed_generator("cpu", "images")) * 2 - 1


def check_exchanges() -> None:
    mine = 3 if is_first() else 5
    assert distributed.count() == 2
    assert distributed.share(5) == (slice(0, 2) if is_first() else slice(2, 5))
    assert distributed.largest(mine) == 5
    assert distributed.total(mine) == 8
    assert distributed.of_first({"fid": mine}) == {"fid": 3}
    assert torch.equal(distributed.gather(torch.arange(10).view(5, 2)[distributed.share(5)]), torch.arange(10).view(5, 2))
    tensors = [torch.full((2, 3), float(mine)), torch.tensor(mine + 1.0, requires_grad=True)]
    distributed.average(tensors)
    assert (tensors[0] == 4).all()
    assert tensors[1] == 5


def check_samples() -> None:
    for name in ("dcgan", "cdcgan", "ddpm"):
        network = small(name).eval()
        alone = network.sample(7, None, torch.Generator().manual_seed(0))
        together = distributed.sample(network, 7, None, torch.Generator().manual_seed(0))
        assert (alone - together).abs().max() < 1e-5, name


def check_gan_steps() -> None:
    """Both processes have the same networks, statistics and losses, also after a bad batch in one of them."""
    for name in ("dcgan", "cdcgan"):
        for loss in ("bce", "hinge", "relativistic"):
            torch.manual_seed(0)
            step = make_step(loss, name)
            losses = [step(images(8), torch.arange(8)) for _ in range(2)]
            tensors = [*step.generator.state_dict().values(), *step.discriminator.state_dict().values()]
            check_alike([*(value for row in losses for value in row.values()), *tensors])
            before = {name: value.clone() for name, value in step.discriminator.state_dict().items()}
            bad = images(8)
            bad[0] = torch.nan  # in the first process's share
            assert step(bad, torch.arange(8))["loss_d"].isnan()
            for key, value in step.discriminator.state_dict().items():
                assert torch.equal(before[key], value), key
            check_alike(tensors)


def check_alike(tensors: list[torch.Tensor]) -> None:
    mine = torch.cat([tensor.detach().flatten().double() for tensor in tensors])
    first = torch.tensor(distributed.of_first(mine.tolist()), dtype=torch.float64)
    assert torch.equal(mine, first)


def run_with_fewer_digits(script: str, args: list[str]) -> None:
    load = data.load_digits
    sizes = {"train": 900, "test": 300}
    data.load_digits = lambda name, split, *others: load(name, split, *others).subset(sizes[split], split)
    run_script(lambda: runpy.run_path(str(ROOT / script))["main"](args))


def main() -> None:
    if sys.argv[1:]:
        run_with_fewer_digits(sys.argv[1], sys.argv[2:])
        return
    distributed.join(torch.device("cpu"))
    torch.manual_seed(0)  # of the networks
    check_exchanges()
    check_samples()
    check_gan_steps()
    if not is_first():
        os._exit(0)
    with pytest.raises(distributed.Left, match="another of the 2 processes has ended"):
        for _ in range(100):
            distributed.largest(0)
    print("all is well", flush=True)
    os._exit(0)  # gloo's thread may still hold a tensor, and aborts a process that needs the GIL while Python ends


if __name__ == "__main__":
    main()

"""Models that torch wraps for several devices or processes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import drawn
from torch import distributed, nn

from moreau_ext import MoreauGrad, ProximalGradient

X = drawn(4, 5)
SOLVER = ProximalGradient(num_samples=4, max_steps=5, tol=0.0)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.SiLU(), nn.Linear(8, 3)).eval()


@pytest.fixture
def one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")  # the machine may have no other
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def maps(model: Any) -> torch.Tensor:
    return MoreauGrad(model, rho=0.1, sigma=0.1, solver=SOLVER).attribute(X, [0, 2, 1, 1])


def test_data_parallel() -> None:
    """Without a GPU it calls the module; the maps have the same bits."""
    assert torch.equal(maps(nn.DataParallel(net()).eval()), maps(net()))


@pytest.mark.usefixtures("one_process")
def test_distributed_data_parallel() -> None:
    """As many calls as wanted: its reducer waits for no gradients of parameters."""
    model = nn.parallel.DistributedDataParallel(net())
    explainer = MoreauGrad(model.eval(), rho=0.1, sigma=0.1, solver=SOLVER)
    for _ in range(2):
        assert torch.equal(explainer.attribute(X, [0, 2, 1, 1]), maps(net()))
    assert all(p.grad is None for p in model.parameters())
    # It trains as before.
    model.train()(X).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_offloaded_weights() -> None:
    """As device_map="cpu" leaves them: each layer's parameters are there while it runs, and on "meta" otherwise."""
    model = net()
    for layer in model:
        real = dict(layer.named_parameters())
        away = {name: nn.Parameter(p.to("meta")) for name, p in real.items()}
        layer._parameters.update(away)
        layer.register_forward_pre_hook(lambda layer, _, real=real: layer._parameters.update(real))
        layer.register_forward_hook(lambda layer, *_, away=away: layer._parameters.update(away))
    assert all(p.is_meta for p in model.parameters())
    assert torch.equal(maps(model), maps(net()))
    assert all(p.is_meta for p in model.parameters())

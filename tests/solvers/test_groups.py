"""Group structures: who is with whom, in which memory order, and what is refused."""

from __future__ import annotations

import pytest
import torch

from moreau_ext import Labels, Pixels, Tiles
from moreau_ext.ops.layout import in_memory_order
from moreau_ext.solvers.groups import Groups

CPU = torch.device("cpu")


def labels(groups: Groups, *shape: int) -> torch.Tensor:
    return groups.labels(torch.Size(shape), CPU)


def test_tiles_have_ragged_edges_and_span_channels() -> None:
    made = labels(Tiles(2), 4, 3, 5, 3)
    assert made.shape == (1, 3, 5, 3)
    assert made[0, 0].tolist() == [[0, 0, 1], [0, 0, 1], [2, 2, 3], [2, 2, 3], [4, 4, 5]]
    assert torch.equal(made[0, 0], made[0, 2])
    assert labels(Tiles(100), 1, 3, 5, 3).unique().tolist() == [0]
    assert labels(Tiles((1, 3)), 1, 1, 2, 4).tolist() == [[[[0, 0, 0, 1], [2, 2, 2, 3]]]]
    assert labels(Tiles(4), 1, 2, 10).tolist() == [[[0] * 4 + [1] * 4 + [2] * 2] * 2]
    assert labels(Tiles(2), 1, 2, 4, 4, 4).unique().numel() == 8


def test_pixels_hold_the_channels_of_a_position() -> None:
    made = labels(Pixels(), 2, 3, 4, 5)[0]
    assert torch.equal(made[0].flatten(), torch.arange(20))
    assert torch.equal(made[0], made[2])
    tokens = labels(Pixels(channel_axis=-1), 2, 7, 16)[0]
    assert torch.equal(tokens[:, 0], torch.arange(7))
    assert torch.equal(tokens[:, 15], torch.arange(7))


def test_labels_broadcast() -> None:
    assert labels(Labels(torch.tensor([[5, 5], [-1, 8]])), 3, 2, 2, 2)[0, 1].tolist() == [[1, 1], [0, 2]]
    assert labels(Labels(torch.tensor([[0], [1], [1]])), 2, 3, 4)[0].tolist() == [[0] * 4, [1] * 4, [1] * 4]
    each = labels(Labels(torch.tensor([[9, 9, 1], [4, 5, 6]])), 2, 3)
    assert each.tolist() == [[1, 1, 0], [0, 1, 2]]


@pytest.mark.parametrize("groups", [Tiles(3), Pixels(), Labels(torch.arange(35).view(7, 5) // 4), Tiles(2, "sqrt")])
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_partition_lists_every_feature_once(groups: Groups, channels_last: bool) -> None:
    x = torch.zeros(2, 3, 7, 5)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    p = groups.partition(x, torch.float32)
    order, offsets = p.order[0].long(), p.offsets[0].long()
    assert torch.equal(order.sort().values, torch.arange(105))
    wanted = torch.empty_like(x)
    wanted[:] = groups.labels(x.shape, CPU)
    assert torch.equal(p.labels[0], in_memory_order(wanted)[0].int())
    for g in range(p.count):
        members = order[offsets[g] : offsets[g + 1]]
        assert (p.labels[0][members] == g).all()
        assert torch.equal(members, members.sort().values)
        size = len(members)
        assert float(p.weights[0, g]) == pytest.approx(size**0.5 if groups.weights == "sqrt" else 1.0)


def test_per_input_partitions_can_be_taken_apart() -> None:
    maps = torch.randint(0, 5, (4, 6))
    x = torch.zeros(4, 6)
    whole = Labels(maps).partition(x, torch.float32)
    some = whole.take(torch.tensor([2, 0]))
    assert torch.equal(some.labels, whole.labels[[2, 0]])
    shared = Labels(maps[0]).partition(x, torch.float32)
    assert shared.take(torch.tensor([1])) is shared


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: Tiles(0), ValueError, "size must be a positive integer"),
        (lambda: Tiles(2.0), ValueError, "size must be a positive integer"),
        (lambda: Tiles(()), ValueError, "size must be a positive integer"),
        (lambda: Tiles(2, "mean"), ValueError, "weights must be 'unit'"),
        (lambda: Labels(torch.rand(3)), TypeError, "must hold integers"),
        (lambda: Labels(torch.tensor([True])), TypeError, "must hold integers"),
        (lambda: labels(Tiles(2), 4, 10), ValueError, "Tiles needs a channel axis"),
        (lambda: labels(Pixels(), 4, 10), ValueError, "Pixels needs a channel axis"),
        (lambda: labels(Tiles((2, 2)), 4, 3, 10), ValueError, "2 entries"),
        (lambda: labels(Pixels(channel_axis=0), 4, 3, 10), ValueError, "channel_axis 0"),
        (lambda: labels(Pixels(channel_axis=3), 4, 3, 10), ValueError, "channel_axis 3"),
        (lambda: labels(Labels(torch.zeros(3, 7, dtype=torch.int64)), 2, 3, 8), ValueError, "does not fit inputs"),
        (lambda: labels(Labels(torch.zeros(5, 3, 8, dtype=torch.int64)), 2, 3, 8), ValueError, "does not fit inputs"),
    ],
)
def test_what_is_refused(make: object, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        make()

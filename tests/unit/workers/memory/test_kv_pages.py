"""Keys and values in pages that are mapped as the row grows: the bits of a plain allocation, and no page too many."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from headrace.helpers.fake_pages import PAGE, FakePages
from headrace.storage.device_pages import PagePool
from headrace.workers.memory.kv_blocks import KvBlocks, RowShape
from headrace.workers.memory.plan import Residence, Stretch

HBM = (Stretch(0, None, Residence.hbm),)


@pytest.fixture
def driver() -> FakePages:
    return FakePages(400)


@pytest.fixture
def blocks(driver: FakePages) -> Iterator[KvBlocks]:
    """Of two layers: a block of 8 tokens takes 2 x 1 x 8 x 4 x 32 x 4 bytes, two pages."""
    pool, kept = PagePool(driver, 64 * PAGE), KvBlocks("kv", None, None)
    kept.begin(RowShape(1, 30, 8, (4, 32), torch.float32, torch.device("cpu")), HBM, 0, 0, pool)
    yield kept
    kept.drop_all()
    kept.free()
    pool.close()
    assert driver.num_left == 400


def test_a_row_maps_pages_block_by_block_and_keeps_them_for_the_next_pass(blocks: KvBlocks, driver: FakePages) -> None:
    for index in range(3):
        blocks.new((0, index)).fill_(index)
        assert driver.num_maps == 2 * (index + 1)
    assert [float(blocks.get((0, index)).mean()) for index in range(3)] == [0, 1, 2]
    blocks.drop_all()
    blocks.new((0, 0)), blocks.new((0, 1))
    assert (driver.num_maps, driver.num_unmaps) == (6, 0)


def test_gradients_may_begin_with_the_last_block(blocks: KvBlocks, driver: FakePages) -> None:
    for index in (3, 0, 1):
        blocks.new((1, index)).fill_(index)
    assert driver.num_maps == 8, "the arena is mapped from its start"
    blocks.drop((1, 3))
    assert [float(blocks.get((1, index)).mean()) for index in (0, 1)] == [0, 1]


def test_rows_of_another_length_use_the_same_pages(blocks: KvBlocks, driver: FakePages) -> None:
    pool = blocks._pages
    for index in range(4):
        blocks.new((0, index))
    blocks.drop_all()
    blocks.begin(RowShape(2, 16, 4, (4, 32), torch.float32, torch.device("cpu")), HBM, 0, 1, pool)
    for index in range(4):
        assert blocks.new((0, index)).shape == (2, 2, 4, 4, 32)
    assert driver.num_maps == 8

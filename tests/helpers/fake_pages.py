"""A PageDriver over a process's own memory: no page is mapped, but every call is checked as a device would."""

from __future__ import annotations

import mmap

import torch

PAGE = 4096


class FakePages:
    """Ranges are anonymous memory, pages are numbers.

    Args:
        num_pages: that the device has.
    """

    page_bytes = PAGE

    def __init__(self, num_pages: int) -> None:
        self.num_left = num_pages
        self.ranges: dict[int, torch.Tensor] = {}
        self.mapped: dict[int, int] = {}  # address: page
        self.num_maps = self.num_unmaps = self._last = 0
        self.is_idle = True

    def reserve(self, num_bytes: int) -> int:
        assert num_bytes % PAGE == 0
        memory = torch.frombuffer(mmap.mmap(-1, num_bytes), dtype=torch.uint8)
        self.ranges[memory.data_ptr()] = memory
        return memory.data_ptr()

    def free_range(self, address: int, num_bytes: int) -> None:
        assert self.ranges.pop(address).numel() == num_bytes
        assert not any(address <= at < address + num_bytes for at in self.mapped), "pages are still mapped there"

    def create(self) -> int | None:
        if not self.num_left:
            return None
        self.num_left -= 1
        self._last += 1
        return self._last

    def destroy(self, page: int) -> None:
        assert page not in self.mapped.values(), "the page is still mapped"
        self.num_left += 1

    def map(self, address: int, pages: list[int]) -> None:
        for number, page in enumerate(pages):
            at = address + number * PAGE
            assert any(start <= at < start + len(memory) for start, memory in self.ranges.items())
            assert at not in self.mapped
            assert page not in self.mapped.values()
            self.mapped[at] = page
            self.num_maps += 1
        self.is_idle = False

    def unmap(self, address: int, num_pages: int) -> None:
        assert self.is_idle, "the device may still read them"
        for number in range(num_pages):
            del self.mapped[address + number * PAGE]
            self.num_unmaps += 1

    def wait(self) -> None:
        self.is_idle = True

    def tensor(self, address: int, num_bytes: int) -> torch.Tensor:
        assert address in self.mapped, "a driver does not know the device of an address with nothing behind it"
        return self.ranges[address][:num_bytes]

    def num_behind(self, address: int, num_bytes: int) -> int:
        """Pages mapped in the first bytes of a range."""
        return sum(address <= at < address + num_bytes for at in self.mapped)

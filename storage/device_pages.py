"""Memory of a device that grows in place: an address range is reserved once, and pages are mapped as it fills.

vAttention (ASPLOS 2025) does so for keys and values of inference. Attention reads one contiguous tensor, no kernel
knows of pages, and rows of any length share the same pages. The policy is here; a driver does what it says. No torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from headrace.storage.core.errors import DeviceBudgetExceeded

if TYPE_CHECKING:
    import torch


class PageDriver(Protocol):
    """Virtual memory of one device. Addresses and sizes are multiples of page_bytes."""

    page_bytes: int

    def reserve(self, num_bytes: int) -> int:
        """A range of addresses with nothing behind it."""

    def free_range(self, address: int, num_bytes: int) -> None:
        """Give a range back; nothing is mapped in it."""

    def create(self) -> Any | None:
        """A page of physical memory; None: the device has no room."""

    def destroy(self, page: Any) -> None:
        """Give a page back that is mapped nowhere."""

    def map(self, address: int, pages: list[Any]) -> None:
        """Put pages behind consecutive addresses."""

    def unmap(self, address: int, num_pages: int) -> None:
        """Take pages away. Everything that reads or writes them has ended."""

    def wait(self) -> None:
        """Until the device has done all that was asked of it."""

    def tensor(self, address: int, num_bytes: int) -> torch.Tensor:
        """The bytes of a range, uint8. The first page is mapped."""


class PageCounter(Protocol):
    """Is told what the pages take."""

    def beside(self, num_bytes: int) -> Any:
        """Count bytes until the result's `release()`. Raises when the budget has no room for them."""


class PagePool:
    """The pages of one device, shared by its arenas.

    A page that an arena no longer needs stays mapped until another arena finds the device full: mapping takes time,
    and the next pass needs it again.

    Args:
        range_bytes: of an arena's range of addresses: all that the device has costs nothing.
    """

    def __init__(self, driver: PageDriver, range_bytes: int, counter: PageCounter | None = None) -> None:
        self._driver, self._counter = driver, counter
        self.range_bytes = -(-range_bytes // driver.page_bytes) * driver.page_bytes
        self._free: list[Any] = []
        self._claims: list[Any] = []
        self._arenas: list[PageArena] = []

    @property
    def page_bytes(self) -> int:
        """Of one page."""
        return self._driver.page_bytes

    @property
    def num_pages(self) -> int:
        """Pages that exist, mapped or not."""
        return len(self._free) + sum(arena.num_mapped for arena in self._arenas)

    def arena(self) -> PageArena:
        """A new range of addresses, nothing mapped."""
        arena = PageArena(self, self._driver, self._driver.reserve(self.range_bytes))
        self._arenas.append(arena)
        return arena

    def take(self, count: int) -> list[Any]:
        """So many pages, all or none: unused ones, new ones, then those that other arenas hold and do not need.

        Raises:
            RuntimeError: the device has no room. DeviceBudgetExceeded: the budget has none.
        """
        is_over_budget = False
        if (missing := count - len(self._free)) > 0:
            try:
                self._create(missing)
            except DeviceBudgetExceeded:
                is_over_budget = True  # what other arenas do not need counts already
        if (missing := count - len(self._free)) > 0:
            self._reclaim(missing)
        if is_over_budget and (missing := count - len(self._free)) > 0:
            self._create(missing)
        if len(self._free) < count:
            # In the words of torch's allocator: whoever looks for a device that is full finds this one, too.
            raise RuntimeError(
                f"CUDA out of memory: keys and values need {count} pages of {self.page_bytes} bytes, and the device "
                f"has room for {len(self._free)}"
            )
        taken = self._free[-count:]
        del self._free[-count:]
        return taken

    def close(self) -> None:
        """Give all pages and ranges back. No tensor of an arena is used from here on."""
        self._driver.wait()
        for arena in self._arenas:
            self._free += arena._unmap_from(0)
            self._driver.free_range(arena.address, self.range_bytes)
        self._arenas.clear()
        for page in self._free:
            self._driver.destroy(page)
        self._free.clear()
        for claim in self._claims:
            claim.release()
        self._claims.clear()

    def _create(self, count: int) -> None:
        claim = None if self._counter is None else self._counter.beside(count * self.page_bytes)
        created: list[Any] = []
        while len(created) < count and (page := self._driver.create()) is not None:
            created.append(page)
        if claim is not None and len(created) < count:
            claim.release()
            claim = None if not created else self._counter.beside(len(created) * self.page_bytes)  # type: ignore[union-attr]
        if claim is not None:
            self._claims.append(claim)
        self._free += created

    def _reclaim(self, count: int) -> None:
        """Take unneeded pages, of the arena that has the most of them first."""
        self._driver.wait()
        for arena in sorted(self._arenas, key=lambda arena: arena.num_needed - arena.num_mapped):
            surplus = min(count, arena.num_mapped - arena.num_needed)
            if surplus > 0:
                self._free += arena._unmap_from(arena.num_mapped - surplus)
                count -= surplus


class PageArena:
    """One range of addresses, mapped from its start. Made by PagePool.arena.

    Args:
        address: where it starts.
    """

    def __init__(self, pool: PagePool, driver: PageDriver, address: int) -> None:
        self._pool, self._driver, self.address = pool, driver, address
        self._pages: list[Any] = []
        self.num_needed = 0

    @property
    def num_mapped(self) -> int:
        """Pages behind its first addresses."""
        return len(self._pages)

    def need(self, num_bytes: int) -> None:
        """The first so many bytes are used from here on: they are mapped. What lies behind them is not needed.

        Raises:
            RuntimeError: the device has no room, or the range. DeviceBudgetExceeded: the budget has none.
        """
        if num_bytes > self._pool.range_bytes:
            raise RuntimeError(f"CUDA out of memory: {num_bytes} bytes of one layer's keys and values")
        needed = -(-num_bytes // self._driver.page_bytes)
        missing = needed - len(self._pages)
        if missing > 0:
            before, self.num_needed = self.num_needed, len(self._pages)  # none of its own is taken away meanwhile
            try:
                pages = self._pool.take(missing)
            except BaseException:
                self.num_needed = before
                raise
            self._driver.map(self.address + len(self._pages) * self._driver.page_bytes, pages)
            self._pages += pages
        self.num_needed = needed

    def tensor(self, num_bytes: int) -> torch.Tensor:
        """Its first bytes, uint8, whether mapped or not; only mapped ones may be touched. The first page is mapped."""
        if not self._pages:
            self.need(1)
        return self._driver.tensor(self.address, num_bytes)

    def _unmap_from(self, first: int) -> list[Any]:
        taken = self._pages[first:]
        if taken:
            self._driver.unmap(self.address + first * self._driver.page_bytes, len(taken))
        del self._pages[first:]
        return taken

"""The batch behind the one that Lightning trains on, made ready once, and handed over when its turn comes."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from nusam.one_pass.looking_ahead import Ahead

__all__ = ["NextBatch"]


class NextBatch:
    """Looks one batch ahead of a fit loop's data fetcher.

    What Lightning does with a batch before ``on_train_batch_start`` (conversion of precision, the hooks around its
    transfer) is done as soon as the batch is looked at, and not again when its turn comes.

    Args:
        trainer: Lightning's.
        pl_module: what it fits.
    """

    def __init__(self, trainer: Any, pl_module: Any) -> None:
        self._trainer = trainer
        self._pl_module = pl_module
        self._item: tuple[Any, int, int] | None = None  # which is ready and waits

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside, Lightning leaves a batch alone that is ready."""
        strategy = self._trainer.strategy
        owners = [
            (strategy.precision_plugin, "convert_input", False),
            (self._pl_module, "_on_before_batch_transfer", False),
            (strategy, "batch_to_device", True),
        ]
        with ExitStack() as stack:
            for owner, name, is_last in owners:
                setattr(owner, name, self._once(getattr(owner, name), is_last))
                stack.callback(delattr, owner, name)
            yield

    def after(self) -> Any:
        """The batch that comes next, ready; None behind the last one."""
        fetcher = self._trainer.fit_loop._data_fetcher
        if fetcher is None:
            return None
        fetched = getattr(fetcher, "batches", [])
        if fetched:  # Lightning itself looks ahead where it does not know the loader's length
            fetched[0] = self._made_ready(fetched[0])
            return fetched[0][0]
        if fetcher.done:
            return None
        if not isinstance(fetcher.iterator, _Ready):
            fetcher.iterator = _Ready(fetcher.iterator, self._made_ready)
        item = fetcher.iterator.peek()
        return None if item is None else item[0]

    def saves_its_place(self) -> bool:
        """Whether a loader's state is saved, which would then be that of one batch ahead."""
        return bool(self._trainer.fit_loop._combined_loader._state_dicts())

    def _made_ready(self, item: tuple[Any, int, int]) -> tuple[Any, int, int]:
        if item is self._item:
            return item
        self._item = None
        batch, index, loader = item
        strategy = self._trainer.strategy
        batch = strategy.precision_plugin.convert_input(batch)
        batch = self._pl_module._on_before_batch_transfer(batch, dataloader_idx=0)
        batch = strategy.batch_to_device(batch, dataloader_idx=0)
        self._item = made = (batch, index, loader)
        return made

    def _once(self, make: Callable[..., Any], is_last: bool) -> Callable[..., Any]:
        def made(batch: Any, *args: Any, **options: Any) -> Any:
            item = self._item
            if item is None or batch is not item[0] or not self._trainer.training:
                return make(batch, *args, **options)
            if is_last:
                self._item = None  # its turn has come
            return batch

        return made


class _Ready(Ahead):
    """Batches of which one that was looked at is ready."""

    def __init__(self, batches: Iterator[Any], made_ready: Callable[[Any], Any]) -> None:
        super().__init__(batches)
        self._made_ready = made_ready

    def peek(self) -> Any:
        is_new = self._next is None
        item = super().peek()
        if is_new and item is not None and self._next is not None:
            item = self._made_ready(item)
            self._next = item, self._next[1]
        return item

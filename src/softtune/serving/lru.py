"""A cache bounded by the size of its values, least recently used ones evicted first. Knows nothing about adapters."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Container, Hashable, Iterator
from typing import Generic, Protocol, TypeVar


class HasSize(Protocol):
    """A value with a size, such as a tensor."""

    @property
    def nbytes(self) -> int:
        """Its size in bytes, which never changes."""
        ...


Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value", bound=HasSize)


class LRUCache(Generic[Key, Value]):
    """Values in memory by key, which are loaded on first use. Its user decides when to shrink it.

    Args:
        load: loads the value of a key.
        on_evict: called with each evicted value.
    """

    def __init__(self, load: Callable[[Key], Value], on_evict: Callable[[Value], None] = lambda value: None) -> None:
        self._load = load
        self._on_evict = on_evict
        self._values: OrderedDict[Key, Value] = OrderedDict()
        self.nbytes = 0
        """Size of all values in bytes."""

    def __iter__(self) -> Iterator[Key]:
        """The cached keys, least recently used first."""
        return iter(self._values)

    def __getitem__(self, key: Key) -> Value:
        """The value of a cached key, whose place in the order stays."""
        return self._values[key]

    def use(self, key: Key) -> Value:
        """The value of a key, loaded unless it is cached; the key is the most recently used one then."""
        if key not in self._values:
            value = self._load(key)
            self._values[key] = value
            self.nbytes += value.nbytes
        self._values.move_to_end(key)
        return self._values[key]

    def evict(self, key: Key) -> None:
        """Drop the value of a cached key."""
        value = self._values.pop(key)
        self.nbytes -= value.nbytes
        self._on_evict(value)

    def evict_one(self, keep: Container[Key] = ()) -> bool:
        """Evict the least recently used key that is not in ``keep``; False where there is none."""
        for key in self._values:
            if key not in keep:
                self.evict(key)
                return True
        return False

    def shrink(self, max_bytes: int, keep: Container[Key] = ()) -> None:
        """Evict least recently used keys that are not in ``keep`` until the values have ``max_bytes`` at most."""
        while self.nbytes > max_bytes and self.evict_one(keep):
            pass

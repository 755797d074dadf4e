"""What an LRU cache keeps is what a list of the keys in the order of their use keeps."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest

from softtune.serving.lru import LRUCache

SIZES = {key: 1 + number % 4 for number, key in enumerate("abcdefgh")}


@dataclass(frozen=True)
class Value:
    key: str

    @property
    def nbytes(self) -> int:
        return SIZES[self.key]


class Cached:
    """A cache of values, with the keys that it has loaded and evicted."""

    def __init__(self) -> None:
        self.loaded: list[str] = []
        self.evicted: list[str] = []
        self.cache: LRUCache[str, Value] = LRUCache(self._load, lambda value: self.evicted.append(value.key))

    def _load(self, key: str) -> Value:
        self.loaded.append(key)
        self.while_loading()
        return Value(key)

    def while_loading(self) -> None:
        """Do nothing."""


def test_a_value_is_loaded_once() -> None:
    own = Cached()
    values = [own.cache.use(key) for key in "abab"]
    assert own.loaded == ["a", "b"]
    assert values[0] is values[2] is own.cache["a"]
    assert own.cache.nbytes == SIZES["a"] + SIZES["b"]


def test_the_least_recently_used_go_first() -> None:
    own = Cached()
    for key in "abca":
        own.cache.use(key)
    assert own.cache["b"] == Value("b")  # which is no use
    assert list(own.cache) == ["b", "c", "a"]
    own.cache.shrink(SIZES["a"] + SIZES["c"])
    assert own.evicted == ["b"]
    own.cache.shrink(SIZES["a"] + SIZES["c"] - 1)
    assert own.evicted == ["b", "c"]
    own.cache.use("b")
    assert own.loaded == ["a", "b", "c", "b"]
    own.cache.shrink(0)
    assert (own.evicted, own.cache.nbytes, list(own.cache)) == (["b", "c", "a", "b"], 0, [])


def test_what_is_to_be_kept_is_never_evicted() -> None:
    own = Cached()
    for key in "abcd":
        own.cache.use(key)
    own.cache.shrink(0, keep={"a", "c"})
    assert (own.evicted, list(own.cache)) == (["b", "d"], ["a", "c"])
    assert own.cache.nbytes == SIZES["a"] + SIZES["c"]
    assert not own.cache.evict_one(keep={"a", "c"})
    assert own.cache.evict_one(keep={"a"})
    assert own.evicted == ["b", "d", "c"]


def test_what_is_not_cached_cannot_be_evicted_or_looked_up() -> None:
    own = Cached()
    assert not own.cache.evict_one()
    with pytest.raises(KeyError):
        own.cache.evict("a")
    with pytest.raises(KeyError):
        _ = own.cache["a"]
    assert (own.loaded, own.evicted, own.cache.nbytes) == ([], [], 0)


def test_what_cannot_be_loaded_leaves_nothing_behind() -> None:
    def fail(key: str) -> Value:
        raise OSError("the file is gone")

    cache: LRUCache[str, Value] = LRUCache(fail)
    for _ in range(2):
        with pytest.raises(OSError, match="the file is gone"):
            cache.use("a")
    assert (list(cache), cache.nbytes) == ([], 0)


def test_loading_may_evict(monkeypatch: pytest.MonkeyPatch) -> None:
    own = Cached()
    own.cache.use("a")
    monkeypatch.setattr(own, "while_loading", lambda: own.cache.shrink(0))
    own.cache.use("b")
    assert (list(own.cache), own.evicted, own.cache.nbytes) == (["b"], ["a"], SIZES["b"])


@pytest.mark.parametrize("seed", range(5))
def test_any_order_of_uses_is_that_of_a_list(seed: int) -> None:
    draw, own = random.Random(seed), Cached()
    order: list[str] = []
    for _ in range(300):
        key, keep = draw.choice([*SIZES]), draw.sample([*SIZES], draw.randint(0, 3))
        if draw.random() < 0.6:
            own.cache.use(key)
            order = [*(other for other in order if other != key), key]
        else:
            max_bytes = draw.randint(0, 20)
            own.cache.shrink(max_bytes, keep)
            for other in [other for other in order if other not in keep]:
                if sum(SIZES[one] for one in order) > max_bytes:
                    order.remove(other)
        assert list(own.cache) == order
        assert own.cache.nbytes == sum(SIZES[one] for one in order)
    assert len(own.loaded) == len(own.evicted) + len(order)

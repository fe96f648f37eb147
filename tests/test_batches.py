"""Prefetching: the same items in the same order, a bounded number ahead, and errors where they belong."""

import itertools
import threading
import time

import pytest

from aymen_gpt.training.batches import Prefetch


def test_items_come_in_order_and_end():
    with Prefetch(iter(range(50))) as ready:
        assert list(ready) == list(range(50))
        assert list(ready) == []


def test_only_so_many_are_made_ahead():
    made = []
    with Prefetch((made.append(i) or i for i in itertools.count()), depth=3) as ready:
        assert next(ready) == 0
        deadline = time.monotonic() + 10
        while len(made) < 5 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.2)  # nothing more comes
        assert made == [0, 1, 2, 3, 4]  # one taken, three waiting, one in the maker's hand


def test_an_error_is_raised_where_its_item_would_have_come():
    def items():
        yield 1
        raise ValueError("the disk is gone")

    with Prefetch(items()) as ready:
        assert next(ready) == 1
        for _ in range(2):
            with pytest.raises(ValueError, match="the disk is gone"):
                next(ready)


def test_leaving_ends_the_thread_though_items_wait():
    before = threading.active_count()
    with Prefetch(itertools.count()) as ready:
        next(ready)
        assert threading.active_count() == before + 1
    assert threading.active_count() == before

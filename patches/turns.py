"""Whose turn it is: one `generate()` of a model at a time, whatever threads and models call each other."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from ..kv.manager import CacheManager

_turns = threading.local()


@contextlib.contextmanager
def turn(manager: CacheManager) -> Iterator[None]:
    """One generate() of a model at a time."""
    held: list[CacheManager] = vars(_turns).setdefault("held", [])
    before = len(held)
    if before:
        _swap(held, manager)
    with manager.turn:
        if before:
            manager.turn.release()
        try:
            held.append(manager)
            yield
        finally:
            del held[before:]


def _swap(held: list[CacheManager], manager: CacheManager) -> None:
    """Takes one lock more. A thread that would wait for it lets go of those it has: somebody who has this one may wait
    for them. Between its forward passes, others may use their caches."""
    if manager.turn.acquire(blocking=False):
        return
    taken: list[CacheManager] = []
    for one in held:
        one.turn.release()
    try:
        for one in sorted((*held, manager), key=id):
            one.turn.acquire()
            taken.append(one)
    except BaseException:  # interrupted while it waits
        for one in taken:
            one.turn.release()
        for one in sorted(held, key=id):
            one.turn.acquire()
        raise

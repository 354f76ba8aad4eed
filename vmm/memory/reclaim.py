# SPDX-License-Identifier: GPL-2.0-or-later
"""What is done to a guest's pages for the host's sake: frozen, merged, put on disk, watched, brought in.

All of it under the same conditions: the guest is off the CPU and enters it with a flushed TLB (unless its
pages are only brought in); what it sees does not change.  Whoever runs the guest does it, in one piece, so
that no write comes between.  A page that is not as it was thought to be is left alone, which the answer says.

Pages on which the software monitor has a trace are neither dropped nor put on disk: they hold code or page
tables in use, and traces are on frames.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from vmm.memory.p2m import P2M
from vmm.memory.p2mbits import (
    DIRTY,
    FRAME_MASK,
    KIND_MASK,
    KIND_SHIFT,
    LOGGED,
    PRESENT,
    PRIVATE_BITS,
    SHARED_BITS,
    STORED,
    WRITABLE,
    Kind,
)
from vmm.memory.pool import PAGE_SHIFT

_KIND, _FRAME = np.uint64(KIND_MASK), np.uint64(FRAME_MASK)
_PRIVATE, _SHARED = np.uint64(Kind.PRIVATE << KIND_SHIFT), np.uint64(Kind.SHARED << KIND_SHIFT)
_SHIFT = np.uint64(PAGE_SHIFT)
#: pages compared at once: what they take beside the pool stays small
_PIECE = 1024


def _leaf(p2m: P2M) -> np.ndarray:
    return np.frombuffer(p2m.leaf, dtype=np.uint64)


def _frames(entries: np.ndarray) -> np.ndarray:
    return ((entries & _FRAME) >> _SHIFT).astype(np.int64)


def _told(p2m: P2M, pages: np.ndarray) -> None:
    """The entries of these pages changed."""
    if p2m.on_remap is None:
        p2m.version += 1
        return
    for page in pages.tolist():
        p2m.changed(page)


def _traced(p2m: P2M, pages: np.ndarray) -> np.ndarray:
    if not p2m.traced:
        return np.zeros(len(pages), dtype=bool)
    return np.isin(pages, np.fromiter(p2m.traced, dtype=np.int64))


def freeze(p2m: P2M, pages: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Make private pages shared ones, with this guest as the only owner: nobody writes their frames any more.

    The answer is the pages for which it was done, and their frames.
    """
    leaf = _leaf(p2m)
    entries = leaf[pages]
    good = (entries & _KIND) == _PRIVATE
    pages, entries = pages[good], entries[good]
    keep = np.uint64(~(KIND_MASK | WRITABLE | DIRTY) & (1 << 64) - 1)
    leaf[pages] = entries & keep | _SHARED
    _told(p2m, pages)
    return pages, _frames(entries)


def thaw(p2m: P2M, pages: np.ndarray, frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Make shared pages private ones again, if they still have these `frames`, which nobody else has.

    The answer is the pages for which it was done, and the frames of the others: the guest has let go of them.
    """
    leaf = _leaf(p2m)
    entries = leaf[pages]
    done = ((entries & _KIND) == _SHARED) & (_frames(entries) == frames)
    pages, entries = pages[done], entries[done]
    # somebody may wait for their next write
    held = _traced(p2m, pages) | p2m.logging
    leaf[pages] = entries & ~_KIND | _PRIVATE | np.where(held, np.uint64(DIRTY), np.uint64(DIRTY | WRITABLE))
    return pages, frames[~done]


def merge(p2m: P2M, pages: np.ndarray, frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Let private pages share `frames`, which nobody writes, where the contents are the same.

    The answer says for which of `pages` that was done, and which frames they let go of.
    """
    leaf, words = _leaf(p2m), np.frombuffer(p2m.pool.q, dtype=np.uint64).reshape(-1, 512)
    done = np.zeros(len(pages), dtype=bool)
    for start in range(0, len(pages), _PIECE):
        piece = slice(start, start + _PIECE)
        entries = leaf[pages[piece]]
        own = _frames(entries)
        same = (entries & _KIND) == _PRIVATE
        same[same] = (words[own[same]] == words[frames[piece][same]]).all(axis=1)
        done[piece] = same
    merged, targets = pages[done], frames[done]
    old = leaf[merged]
    leaf[merged] = (targets.astype(np.uint64) << _SHIFT | np.uint64(SHARED_BITS & ~PRESENT)
                    | old & np.uint64(LOGGED | PRESENT))
    _told(p2m, merged)
    return done, _frames(old)


def drop_zeros(p2m: P2M, pages: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Make private pages full of zeros absent ones, which read the same.

    The answer says for which of `pages` that was done, and which frames they let go of.
    """
    leaf, words = _leaf(p2m), np.frombuffer(p2m.pool.q, dtype=np.uint64).reshape(-1, 512)
    done = np.zeros(len(pages), dtype=bool)
    for start in range(0, len(pages), _PIECE):
        piece = slice(start, start + _PIECE)
        entries = leaf[pages[piece]]
        zero = ((entries & _KIND) == _PRIVATE) & ~_traced(p2m, pages[piece])
        zero[zero] = ~words[_frames(entries[zero])].any(axis=1)
        done[piece] = zero
    dropped = pages[done]
    old = leaf[dropped]
    leaf[dropped] = old & np.uint64(LOGGED)
    _told(p2m, dropped)
    return done, _frames(old)


def store(p2m: P2M, pages: np.ndarray, frames: np.ndarray, slots: np.ndarray) -> np.ndarray:
    """Let go of the frames of pages whose contents are in `slots`, if they are still the frozen `frames` and
    nobody wanted them meanwhile; slot 0 is that of all pages of zeros, which become absent ones.

    The answer says for which of `pages` that was done.
    """
    leaf = _leaf(p2m)
    entries = leaf[pages]
    done = (entries & _KIND) == _SHARED
    done &= (_frames(entries) == frames) & ((entries & np.uint64(PRESENT)) == 0) & ~_traced(p2m, pages)
    put = slots[done].astype(np.uint64)
    leaf[pages[done]] = (np.where(put == 0, put, put << _SHIFT | np.uint64(STORED))
                         | entries[done] & np.uint64(LOGGED))
    _told(p2m, pages[done])
    return done


def watch(p2m: P2M, pages: np.ndarray) -> None:
    """Take the present bit of pages with frames: those that are used get it back, the others are idle."""
    leaf = _leaf(p2m)
    entries = leaf[pages]
    good = ((entries & _KIND) == _PRIVATE) | ((entries & _KIND) == _SHARED)
    good &= ((entries & np.uint64(PRESENT)) != 0) & ~_traced(p2m, pages)
    watched = pages[good]
    leaf[watched] = entries[good] & ~np.uint64(PRESENT)
    _told(p2m, watched)


def install(p2m: P2M, pages: np.ndarray, frames: np.ndarray,
            slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Let pages that are in `slots`, each named once, have `frames` with the same contents for themselves;
    frame 0 is that of all pages of zeros, which become absent ones.

    The answer says for which of `pages` that was done, and which frames were not used: the guest has given
    these pages back.
    """
    leaf = _leaf(p2m)
    entries = leaf[pages]
    logged = np.uint64(LOGGED if p2m.logging else 0)
    done = (entries & ~np.uint64(LOGGED)) == (slots.astype(np.uint64) << _SHIFT | np.uint64(STORED))
    put = frames[done].astype(np.uint64)
    # pages may have been traced while they were away
    rights = np.where(_traced(p2m, pages[done]), np.uint64(PRIVATE_BITS & ~WRITABLE), np.uint64(PRIVATE_BITS))
    leaf[pages[done]] = np.where(put == 0, put, put << _SHIFT | rights) | logged
    return done, frames[~done & (frames != 0)]


def carry_out(what: str, p2m: P2M, pages: np.ndarray, frames: np.ndarray,
              slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One of the above by its name: freeze, thaw, merge, zeros, store, watch, install.

    The answer is the pages for which it was done, and the frames that came of it: those frozen, let go of,
    or not used by the guest.
    Raises ValueError for pages or frames that do not exist, or lists of unequal lengths.
    """
    if len(pages) and not 0 <= pages.min() <= pages.max() < p2m.pages:
        raise ValueError("a page beyond the guest's memory")
    if len(frames) and not (what != "install") <= frames.min() <= frames.max() < p2m.pool.frames:
        raise ValueError("a frame beyond the pool")
    return _BY_NAME[what](p2m, pages, frames, slots)


def _merge(p2m: P2M, pages: np.ndarray, frames: np.ndarray, _: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    done, freed = merge(p2m, pages, frames)
    return pages[done], freed


def _zeros(p2m: P2M, pages: np.ndarray, *_: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    done, freed = drop_zeros(p2m, pages)
    return pages[done], freed


def _store(p2m: P2M, pages: np.ndarray, frames: np.ndarray,
           slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return pages[store(p2m, pages, frames, slots)], _NONE


def _watch(p2m: P2M, pages: np.ndarray, *_: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    watch(p2m, pages)
    return _NONE, _NONE


def _install(p2m: P2M, pages: np.ndarray, frames: np.ndarray,
             slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    done, unused = install(p2m, pages, frames, slots)
    return pages[done], unused


_NONE = np.zeros(0, dtype=np.int64)
_BY_NAME: dict[str, Callable[[P2M, np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]] = {
    "freeze": lambda p2m, pages, *_: freeze(p2m, pages),
    "thaw": lambda p2m, pages, frames, _: thaw(p2m, pages, frames),
    "merge": _merge, "zeros": _zeros, "store": _store, "watch": _watch, "install": _install}

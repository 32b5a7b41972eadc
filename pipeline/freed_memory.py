"""Keep what a process frees for its own next pictures."""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc
LARGEST_KEPT = 256 << 20  # bytes of one block: a shard, all but the largest pictures
MOST_KEPT = 512 << 20  # bytes at the heap's end


def keep_freed_memory() -> bool:
    """From now on this process keeps most of what it frees; False where its C library (not glibc) can't be told so.

    Otherwise glibc hands large blocks back to the system at once, so that each unit's file is mapped anew, page by
    page: 48 page faults a picture and 3 % of the time where no network runs (RESULTS.md).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT) and mallopt(M_TRIM_THRESHOLD, MOST_KEPT))

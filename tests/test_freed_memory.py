"""A process that keeps what it frees doesn't ask the system for the same pages again."""

import multiprocessing
import resource

import numpy as np
import pytest

from pipeline.freed_memory import keep_freed_memory

BLOCK_BYTES = 64 << 20  # 16,384 pages, and beyond what glibc would keep by itself


def page_faults(keeps: bool) -> int:
    """Of the tenth block of memory that a process takes, writes and frees."""
    if keeps and not keep_freed_memory():
        return -1
    for _ in range(10):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        np.empty(BLOCK_BYTES, np.uint8).fill(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_a_block_that_was_freed_is_taken_again_without_a_page_fault() -> None:
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        plain, kept = pool.map(page_faults, [False, True], chunksize=1)
    if kept < 0:
        pytest.skip("needs glibc: this C library keeps what it likes")
    assert plain > 20 > kept, (plain, kept)  # with huge pages 64 MB are 32 faults

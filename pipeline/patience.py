"""Waiting for a store that is away, where giving up would cost hours of work.

One request is tried again by `storage` itself, for seconds. This begins after that, and takes minutes.
"""

import itertools
import logging
import time
from collections.abc import Callable
from typing import TypeVar

from pipeline.errors import StorageError
from pipeline.storage import ABOUT_THE_OBJECT

T = TypeVar("T")
logger = logging.getLogger("pipeline.patience")
# Of `annotate` between its passes over what the store made fail, each request having been retried. Who is more patient
# goes on with the last one
PAUSES_S = (10.0, 60.0)
# Less than the 30 minutes for which a training's ranks wait for each other, whatever a request takes
PATIENCE_S = 15 * 60.0


def waited_out(ask: Callable[[], T]) -> T:
    """What `ask` gives. While the service is at fault it is asked again after growing pauses, with a warning each time.

    Raises the StorageError that `ask` raises once PATIENCE_S have passed. One about the object is raised at once:
    waiting doesn't mend it.
    """
    began, away = time.monotonic(), False
    for pause_s in itertools.chain(PAUSES_S, itertools.repeat(PAUSES_S[-1])):
        try:
            answer = ask()
        except ABOUT_THE_OBJECT:
            raise
        except StorageError as error:
            if time.monotonic() - began + pause_s > PATIENCE_S:
                raise
            logger.warning("the store is away, and asked again in %.0f s: %s", pause_s, error)
            away = True
            time.sleep(pause_s)
        else:
            if away:
                logger.warning("the store is back after %.0f s", time.monotonic() - began)
            return answer
    raise AssertionError("the pauses never end")

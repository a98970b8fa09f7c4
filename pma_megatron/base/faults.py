"""Places where a test may make a rank fail: `PMA_MEGATRON_FAULT=stage:rank:action`.

Every stage that ranks agree on is one (`Comm.agree`), and what else calls `point`. Without the
variable a point costs one dictionary look-up. `pma_megatron.testing.faults` sets it.
"""

from __future__ import annotations

import os
import signal
import time

VARIABLE = "PMA_MEGATRON_FAULT"


class InjectedFault(RuntimeError):
    """Raised by a point that was told to raise."""


def point(stage: str, rank: int) -> None:
    """Fail here if the environment says so: raise, kill the process, or hang.

    Raises:
        InjectedFault: the action is `raise`.
    """
    wanted = os.environ.get(VARIABLE)
    if not wanted:
        return
    where, which, action = wanted.rsplit(":", 2)
    if where != stage or int(which) != rank:
        return
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "hang":
        time.sleep(3600)
    else:
        raise InjectedFault(f"injected at {stage} on rank {rank}")

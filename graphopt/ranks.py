"""The processes that share a model, and what they tell each other about it.

What ranks tell goes through the key-value store that ``torch.distributed`` was set up with, not through
collectives: it needs no device, cannot be taken for a collective of the model, and a rank that does not
answer can be named. Whoever waits does so no longer than the store's timeout, which is that of
``init_process_group``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import torch

from graphopt import _torch
from graphopt.errors import InputsError, UnevenRanksError

__all__ = ["Ranks", "Store", "ranks_of"]

AUTO, OFF = "auto", "off"


class Store(Protocol):
    """What is used of ``torch.distributed.Store``."""

    @property
    def timeout(self) -> timedelta: ...

    def set(self, key: str, value: str) -> Any: ...

    def get(self, key: str) -> bytes: ...

    def add(self, key: str, amount: int) -> int: ...

    def wait(self, keys: list[str], timeout: timedelta) -> None: ...

    def check(self, keys: list[str]) -> bool: ...

    def delete_key(self, key: str) -> bool: ...


@dataclass(frozen=True)
class Ranks:
    """The global ranks ``members`` that share a model, as seen by ``rank``."""

    members: tuple[int, ...]
    rank: int
    store: Store

    def exchange(self, what: str, said: Any) -> dict[int, Any]:
        """What each member said (plain JSON values), by rank.

        All members have to call this as often, in the same order. Raises ``UnevenRanksError`` where one
        does not in time, or is about something other than ``what``.
        """
        group = hashlib.sha256(repr(self.members).encode()).hexdigest()[:16]
        number = self.store.add(f"graphopt/{group}/count/{self.rank}", 1)
        keys = {member: f"graphopt/{group}/{number}/{member}" for member in self.members}
        self.store.set(keys[self.rank], json.dumps([what, said]))
        try:
            self.store.wait(list(keys.values()), self.store.timeout)
        except RuntimeError as error:
            silent = [member for member, key in keys.items() if not self.store.check([key])]
            raise UnevenRanksError(
                f"{ranks_text(silent)} did not tell {what} within {self.store.timeout.total_seconds():g} s",
                hint=self._hint,
            ) from error
        told = {member: json.loads(self.store.get(key)) for member, key in keys.items()}
        # Who is here has read what was said before.
        if number > 1:
            self.store.delete_key(f"graphopt/{group}/{number - 1}/{self.rank}")
        for member, (topic, _) in told.items():
            if topic != what:
                raise UnevenRanksError(
                    f"rank {member} tells {topic} where rank {self.rank} tells {what}",
                    hint=self._hint,
                )
        return {member: value for member, (_, value) in told.items()}

    @property
    def _hint(self) -> str:
        return f"all of {ranks_text(self.members)} have to optimize the same model, in the same order"


def ranks_of(model: torch.nn.Module, process_group: object) -> Ranks | None:
    """The ranks that have to agree on a plan of ``model``, ``None`` where this process decides alone.

    ``process_group``: ``"auto"`` finds those that the parameters are spread over (``DTensor``) or that a
    ``DistributedDataParallel`` in the model averages gradients over; a process group names its own;
    ``"off"`` finds none. Raises ``InputsError`` for anything else, and for a group that this process is
    not in.
    """
    if process_group == OFF:
        return None
    if process_group == AUTO:
        members = _torch.ranks_in(model)
    else:
        known = _torch.ranks_in_group(process_group)
        if known is None:
            raise InputsError(
                f"process_group is {process_group!r}: expected a torch.distributed process group, "
                '"auto" or "off"'
            )
        members = known
    if len(members) < 2 or _torch.runs_alone():
        return None
    rank = torch.distributed.get_rank()
    if rank not in members:
        raise InputsError(f"process_group holds {ranks_text(members)}: this process is rank {rank}")
    return Ranks(tuple(sorted(members)), rank, _torch.rank_store())


def ranks_text(ranks: Iterable[int]) -> str:
    """``[0, 1, 2, 5]`` -> ``"ranks 0-2, 5"``."""
    numbers = sorted(ranks)
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ("rank " if len(numbers) == 1 else "ranks ") + ", ".join(map(_run_text, runs))


def _run_text(run: Sequence[int]) -> str:
    return str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}"

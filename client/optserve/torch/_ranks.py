"""Ranks: the processes of `torch.distributed`, which run one script, and so do the same at the same place of it."""

from typing import TypeVar

import torch.distributed as dist

Fact = TypeVar("Fact")


def own_rank() -> int:
    """That of this process; 0 if it is not one of several."""
    return dist.get_rank() if _initialized() else 0


def of_all_ranks(fact: Fact) -> list[Fact]:
    """What each rank says, in their order, once all have come here; of a process that is not one of several, its own."""
    if not _initialized():
        return [fact]
    facts = [fact] * dist.get_world_size()
    dist.all_gather_object(facts, fact)
    return facts


def _initialized() -> bool:
    return bool(dist.is_available() and dist.is_initialized())

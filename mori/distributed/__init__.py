"""Device, ranks and precision; random state; signals; what to do when memory runs out."""

from mori.distributed.memory import BatchSize, out_of_memory
from mori.distributed.randomness import random_state, rng_state, set_random_state, set_rng_state, set_seed
from mori.distributed.ranks import (
    Runtime,
    for_children,
    lost_a_rank,
    restarted,
    restored_backends,
    start,
    tell_others,
    told_by_others,
)
from mori.distributed.signals import StopSignals

__all__ = [
    "BatchSize",
    "Runtime",
    "StopSignals",
    "for_children",
    "lost_a_rank",
    "out_of_memory",
    "random_state",
    "restarted",
    "restored_backends",
    "rng_state",
    "set_random_state",
    "set_rng_state",
    "set_seed",
    "start",
    "tell_others",
    "told_by_others",
]

"""Data-parallel training: several processes, each on its share of every batch, over MPI or NCCL."""

from .group import Group, RankError
from .launching import launched
from .over_mpi import mpi
from .over_nccl import nccl

__all__ = ["Group", "RankError", "launched", "mpi", "nccl"]

"""Data-parallel training: several processes, each on its share of every batch, over MPI or NCCL."""

from .group import Group, RankError, launched, mpi, nccl

__all__ = ["Group", "RankError", "launched", "mpi", "nccl"]

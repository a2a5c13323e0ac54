"""Artifacts of one rank of several: the process groups that a graph names, and those of the process that loads it.

A graph's collectives name their process group by a string that means something in the process that exported it only. The
manifest says which ranks are in each, and a process that loads the file puts in the names of its own groups.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import fx

from ..compat import functional_collectives, process_groups, resolve_process_group
from ..counted import counted
from ..errors import ArtifactError, RankError
from ..graph import arguments

NAMESPACE = "_c10d_functional"
#: Collectives that graphs of ours hold.
COLLECTIVES = ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor")


@dataclass(frozen=True)
class Ranks:
    """Which of several processes an artifact is for.

    Attributes:
        world: how many there are.
        groups: by the name that the graph has for it, the ranks in each process group, in order.
    """

    world: int
    rank: int
    groups: Mapping[str, tuple[int, ...]]

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.world}"


def ranks_of(graph: fx.Graph) -> Ranks | None:
    """What a graph was traced for; None if it has no collectives."""
    names = dict.fromkeys(_arguments(node)["group_name"] for node in _collectives(graph))
    groups = {name: tuple(dist.get_process_group_ranks(resolve_process_group(name))) for name in names}
    return Ranks(dist.get_world_size(), dist.get_rank(), groups) if groups else None


def join_group(ranks: Ranks, path: object) -> None:
    """Makes sure that this process is the rank that a file is for.

    The default process group is opened here if torchrun started the process and it has not done so.

    Raises:
        RankError: it is another one.
    """
    if not dist.is_initialized():
        if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            raise RankError(
                f"{path} is for {ranks}, and this is a process on its own. Start {ranks.world} with torchrun "
                f"--nproc-per-node {ranks.world}, each of which loads its own file."
            )
        dist.init_process_group()
    world, rank = dist.get_world_size(), dist.get_rank()
    if (world, rank) != (ranks.world, ranks.rank):
        raise RankError(
            f"{path} is for {ranks}, and this process is rank {rank} of {world}. Load the file of this rank, or export the "
            f"model again on {counted(world, 'rank')}."
        )


def bind(graph: fx.Graph, ranks: Ranks | None) -> None:
    """Puts the names of this process's groups in place of those in a file, and checks what the graph does with them.

    Raises:
        ArtifactError: the graph says other than the manifest.
        RankError: this process has no such group.
    """
    groups = {} if ranks is None else ranks.groups
    used = [(node, _arguments(node)) for node in _collectives(graph)]
    for _, given in used:
        name = given["group_name"]
        if type(name) is not str or name not in groups or given.get("reduce_op", "sum") != "sum":
            raise ArtifactError("its graph talks to other processes in a way that its manifest does not say")
        if given.get("group_size", len(groups[name])) != len(groups[name]):
            raise ArtifactError("its graph counts other ranks than its manifest does")
    if {given["group_name"] for _, given in used} != groups.keys():
        raise ArtifactError("its manifest names process groups that its graph does not")
    if not groups:
        return
    assert functional_collectives  # registers what a compiler needs to know of them
    mine = {tuple(dist.get_process_group_ranks(group)): group.group_name for group in reversed(process_groups())}
    for members in groups.values():
        if members not in mine:
            raise RankError(
                f"its ranks {', '.join(map(str, members))} talk to each other, and this process has no group of them. Make it "
                "on all ranks before: torch.distributed.new_group([...])."
            )
    for node, given in used:
        node.args = tuple((given | {"group_name": mine[groups[given["group_name"]]]}).values())
        node.kwargs = {}


def _collectives(graph: fx.Graph) -> Iterator[fx.Node]:
    for node in graph.nodes:
        if getattr(node.target, "namespace", "") == NAMESPACE and node.target._opname in COLLECTIVES:
            yield node


def _arguments(node: fx.Node) -> dict[str, Any]:
    """A collective's arguments by name, in order."""
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    return dict(zip(names, arguments(node), strict=False)) | dict(node.kwargs)

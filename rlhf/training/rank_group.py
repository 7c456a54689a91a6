"""All ranks of a training as one object.

Owns: starting the ranks and letting them meet, asking all of them the same or each for its share, and what every training does with
its ranks: save, load, export, close. Does not know what is learned. Talks to: the ranks, through their handles.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, TypeVar

from rlhf.cluster import Handle, Runtime, actor_name, compute_env, together
from rlhf.config.cluster import ClusterSettings


class Rank(Protocol):
    """One process of a training. All methods but `address` are collective: they return when all ranks have called them."""

    def address(self) -> tuple[str, int]:
        """Host and a free port for the ranks' rendezvous; asked of rank 0."""
        ...

    def setup(self, host: str, port: int) -> None:
        """Join the group and load the models."""
        ...

    def save(self, folder: str, tag: str) -> dict[str, str]:
        """Write this rank's part of a checkpoint to `folder/tag`. Returns its files' checksums, by the path inside."""
        ...

    def load(self, folder: str, tag: str) -> None:
        """Restore what `save` wrote."""
        ...

    def export(self, folder: str) -> None:
        """Write the result to `folder` on rank 0's machine."""
        ...

    def close(self) -> None:
        """Release the models and leave the group. Safe to call twice."""
        ...


AnyRank = TypeVar("AnyRank", bound=Rank)
Arguments = ParamSpec("Arguments")
Share = TypeVar("Share")
Result = TypeVar("Result")


class RankGroup(Generic[AnyRank]):
    """Made by `start_ranks`. All calls are collective over the ranks and wait at most the deadlines in `cluster`.

    Args:
        handles: of the ranks, in their order.
    """

    def __init__(self, handles: Sequence[Handle[AnyRank]], cluster: ClusterSettings):
        self.handles, self._cluster = tuple(handles), cluster

    def __len__(self) -> int:
        return len(self.handles)

    @property
    def first(self) -> Handle[AnyRank]:
        """Rank 0, for a question that is not collective."""
        return self.handles[0]

    def ask(
        self, method: Callable[Concatenate[AnyRank, Arguments], Result], *, deadline: float
    ) -> Callable[Arguments, Coroutine[Any, Any, tuple[Result, ...]]]:
        """A function that calls this method of every rank with the same arguments; awaited, it gives the results in the ranks' order.

        Raises (when awaited):
            DeadlineExpired, ActorDied: as `Handle.ask`; what a rank raises (see `together`).
        """

        async def asked(*args: Arguments.args, **kwargs: Arguments.kwargs) -> tuple[Result, ...]:
            return await together(*(handle.ask(method, deadline=deadline)(*args, **kwargs) for handle in self.handles))

        return asked

    def share(
        self,
        method: Callable[Concatenate[AnyRank, Share, Arguments], Result],
        shares: Sequence[Share],
        *,
        deadline: float,
    ) -> Callable[Arguments, Coroutine[Any, Any, tuple[Result, ...]]]:
        """As `ask`, but every rank gets its own share as the method's first argument."""

        async def asked(*args: Arguments.args, **kwargs: Arguments.kwargs) -> tuple[Result, ...]:
            pairs = zip(self.handles, shares, strict=True)
            return await together(
                *(handle.ask(method, deadline=deadline)(share, *args, **kwargs) for handle, share in pairs)
            )

        return asked

    async def save(self, folder: str, tag: str) -> dict[str, str]:
        """Write a DeepSpeed checkpoint to `folder/tag` (a folder that all ranks share). Returns the files' checksums, for
        `Checkpoints.complete`."""
        ranks = await self.ask(Rank.save, deadline=self._cluster.learn_deadline_s)(folder, tag)
        return {name: digest for written in ranks for name, digest in written.items()}

    async def load(self, folder: str, tag: str) -> None:
        """Restore a checkpoint that `save` wrote."""
        await self.ask(Rank.load, deadline=self._cluster.learn_deadline_s)(folder, tag)

    async def export(self, folder: str) -> None:
        """Write the result to `folder` on rank 0's machine."""
        await self.ask(Rank.export, deadline=self._cluster.learn_deadline_s)(folder)

    async def close(self) -> None:
        """Let the ranks release their models and leave their group."""
        await self.ask(Rank.close, deadline=self._cluster.startup_s)()


def start_ranks(
    runtime: Runtime,
    kind: Callable[Concatenate[int, Arguments], AnyRank],
    count: int,
    cluster: ClusterSettings,
) -> Callable[Arguments, Coroutine[Any, Any, RankGroup[AnyRank]]]:
    """A function that starts `count` ranks and waits until they have met and loaded their models.

    Args:
        kind: the ranks' class; the number of the rank is the first argument of its constructor, the function's are the others.
    """

    async def started(*args: Arguments.args, **kwargs: Arguments.kwargs) -> RankGroup[AnyRank]:
        env = compute_env(cluster, count)
        handles = [
            runtime.start(actor_name("policy", rank), kind, env=env)(rank, *args, **kwargs) for rank in range(count)
        ]
        group = RankGroup(handles, cluster)
        host, port = await group.first.ask(Rank.address, deadline=cluster.startup_s)()
        await group.ask(Rank.setup, deadline=cluster.startup_s)(host, port)
        return group

    return started

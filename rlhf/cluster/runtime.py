"""Starting actors: in Ray, or in this process."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Collection, Mapping
from typing import Any, ParamSpec, Protocol, TypeVar, runtime_checkable

from rlhf.cluster.calls import Handle, LocalHandle, RayHandle
from rlhf.cluster.devices import SHARED_BY, claim_threads
from rlhf.cluster.network import INTERFACES, LOOPBACK, choose_interfaces
from rlhf.cluster.own_ray import own_ray
from rlhf.cluster.placement import CannotPlace, Placement, place
from rlhf.cluster.reservation import Reservation, cluster_nodes
from rlhf.cluster.resources import ResourceRequest
from rlhf.cluster.signals import sigterm_kept_from_ray
from rlhf.cluster.worker_setup import job_environment
from rlhf.config.cluster import ClusterSettings, Role

Files = Mapping[Role, Mapping[str, str]]
Actor = TypeVar("Actor")
Arguments = ParamSpec("Arguments")
THIS_MACHINE = "this machine"
MOST_CALLS = 1_000_000
"""That an actor with asynchronous methods works on at once. Ray's own limit is 1,000: behind so many prompts new weights would wait."""


@runtime_checkable
class Closable(Protocol):
    """An actor that has something to end."""

    def close(self) -> Any: ...


class Runtime(Protocol):
    """A place where actors can be started."""

    local: bool

    def reserve(self, request: ResourceRequest) -> Placement | None:
        """Decide which actor runs where, and hold what it needs; to be called once, before the first `start`.

        Returns:
            Who runs where; None if everybody runs in this process.

        Raises:
            CannotPlace: the cluster does not have, or others hold, what is wanted.
            DeadlineExpired: a node does not start processes.
        """
        ...

    def check_files(self, files: Files) -> None:
        """Make sure that on every node the roles find the files they read.

        Args:
            files: role -> field of the settings -> absolute path.

        Raises:
            UserError: a node cannot read a file.
            DeadlineExpired: a node does not start processes.
        """
        ...

    def ask_nodes(self, roles: Collection[Role], question: Callable[..., Any], *args: Any) -> dict[str, Any]:
        """What `question(*args)` returns on each node where one of these roles has a place, by the node's address.

        Raises:
            DeadlineExpired: a node does not start processes.
        """
        ...

    def start(
        self, name: str, cls: Callable[Arguments, Actor], *, env: Mapping[str, str] | None = None
    ) -> Callable[Arguments, Handle[Actor]]:
        """A function that starts `cls` with its arguments under `name`: `start("policy-0", PolicyRank)(settings, 0, ...)`.

        The actor gets the seat that was reserved for this name; without a reservation it runs on any node, without a GPU. Its handle
        is there before the constructor has run; ask the actor whether it is ready.

        Args:
            cls: a class.
            env: environment variables the actor's process needs before its first import.
        """
        ...

    def stop(self) -> None:
        """End all actors started here and give back what was reserved."""
        ...


class RayRuntime:
    """Actors are Ray actors: on a cluster that is running, or on one started here for this run alone."""

    local = False

    def __init__(self, settings: ClusterSettings, actors: int):
        """
        Args:
            actors: how many will be started; a cluster of our own offers at least so many CPU slots, because the roles of
                a synchronous loop take turns on the cores.
        """
        import ray

        self._ray = ray
        self._settings = settings
        self._actors: list[Any] = []
        self._reservation: Reservation | None = None
        # A call that is given up, when a run is told to end, leaves results that nobody reads; Ray would print a traceback for each.
        os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": "warning", "runtime_env": job_environment()}
        with sigterm_kept_from_ray():
            if settings.address is None:
                own_ray(num_cpus=max(actors, os.cpu_count() or 1), **options)
            else:
                ray.init(address=settings.address, **options)

    def reserve(self, request: ResourceRequest) -> Placement:
        settings, nodes = self._settings, cluster_nodes()
        idle = [node.address for node in nodes if node.gpus]
        if settings.device == "auto" and not request.gpu and idle:
            raise CannotPlace(
                "`cluster.device`: auto means CPU here, because this process sees no usable GPU, but Ray knows of GPUs on "
                f"{', '.join(idle)}. Set `cluster.device` to cuda or cpu"
            )
        placement = place(request, nodes)
        self._reservation = Reservation(placement, settings.placement_deadline_s, settings.startup_s)
        return placement

    def check_files(self, files: Files) -> None:
        if self._reservation is not None and self._settings.address is not None:  # else there is only this machine
            self._reservation.check_files(files)

    def ask_nodes(self, roles: Collection[Role], question: Callable[..., Any], *args: Any) -> dict[str, Any]:
        if self._reservation is not None and self._settings.address is not None:
            return self._reservation.ask_nodes(roles, question, *args)
        return {THIS_MACHINE: question(*args)}

    def start(
        self, name: str, cls: Callable[Arguments, Actor], *, env: Mapping[str, str] | None = None
    ) -> Callable[Arguments, Handle[Actor]]:
        options: dict[str, Any] = {"num_cpus": 1}
        calls = {"max_concurrency": MOST_CALLS} if _is_async(cls) else {}
        variables = dict(env or {})
        if self._reservation is not None:
            options = self._reservation.options(name)
            variables |= self._reservation.env(name)
            if SHARED_BY in variables:
                variables[SHARED_BY] = str(len(self._reservation.placement.neighbours(name)))
        remote: Any = self._ray.remote(cls)  # to Ray's types a class and a function are two things

        def made(*args: Arguments.args, **kwargs: Arguments.kwargs) -> RayHandle[Actor]:
            actor = remote.options(**options, **calls, runtime_env={"env_vars": variables}).remote(*args, **kwargs)
            self._actors.append(actor)
            return RayHandle(name, actor)

        return made

    def stop(self) -> None:
        for actor in self._actors:
            self._ray.kill(actor)
        self._actors.clear()
        if self._reservation is not None:
            self._reservation.release()
            self._reservation = None
        self._ray.shutdown()


class LocalRuntime:
    """All roles in this process, one after the other: debug mode."""

    local = True

    def __init__(self) -> None:
        self._targets: list[Any] = []
        self._environment = {name: os.environ.get(name) for name in INTERFACES}
        choose_interfaces(LOOPBACK, several_nodes=False)

    def reserve(self, request: ResourceRequest) -> None:
        """Nothing to reserve: all roles share this process and its device."""

    def check_files(self, files: Files) -> None:
        """Nothing to check: there is only this machine."""

    def ask_nodes(self, roles: Collection[Role], question: Callable[..., Any], *args: Any) -> dict[str, Any]:
        return {THIS_MACHINE: question(*args)}

    def start(
        self, name: str, cls: Callable[Arguments, Actor], *, env: Mapping[str, str] | None = None
    ) -> Callable[Arguments, Handle[Actor]]:
        variables = dict(env or {})

        def made(*args: Arguments.args, **kwargs: Arguments.kwargs) -> LocalHandle[Actor]:
            claim_threads(variables)
            variables.pop(SHARED_BY, None)  # it concerns no process but this actor's, and that is the driver's
            os.environ.update(variables)
            target = cls(*args, **kwargs)
            self._targets.append(target)
            return LocalHandle(name, target)

        return made

    def stop(self) -> None:
        for target in reversed(self._targets):
            if isinstance(target, Closable):
                target.close()
        self._targets.clear()
        for name, value in self._environment.items():
            if value is None:
                os.environ.pop(name, None)


def _is_async(cls: Any) -> bool:
    return any(inspect.iscoroutinefunction(method) for _, method in inspect.getmembers(cls, inspect.isfunction))

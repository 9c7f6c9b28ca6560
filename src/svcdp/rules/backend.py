"""What all ways of capturing packets have in common: order, transaction, taking back."""

from __future__ import annotations

import abc
import contextlib
import logging
from collections.abc import Collection, Iterable, Mapping
from functools import partial
from typing import ClassVar

from svcdp.errors import SvcdpError
from svcdp.io.netns import NetNS, call_in
from svcdp.rules import hops, routes
from svcdp.rules.paths import Path, find_paths
from svcdp.rules.plan import CapturePlan, Element, Hop, Item
from svcdp.rules.sysctl import Guard, Sysctls, tracks_connections

__all__ = ["Backend", "KernelBackend"]

log = logging.getLogger(__name__)


class Backend(abc.ABC):
    """Makes a :class:`CapturePlan` true in the kernel, and takes it back.

    Everything of ours is recognised by its name, so a new process adopts or removes what a
    killed one left. Rules of others are neither flushed nor moved. Calls block; one thread at
    a time. Errors are :class:`svcdp.RulesError` and other :class:`svcdp.PlatformError`.
    """

    name: ClassVar[str]

    @abc.abstractmethod
    def apply(self, plan: CapturePlan) -> None:
        """Capture exactly what the plan says, whatever was captured before.

        If a step fails, everything is taken back: then nothing is captured. Unless something is in
        force that this object applied before: that stays, but for what the steps before changed.
        """

    @abc.abstractmethod
    def update(self, plan: CapturePlan, added: Collection[Item], removed: Collection[Item]) -> None:
        """Change what is captured: all of it, or, after an error, nothing.

        ``plan`` is what was applied; its items are not looked at. Marks and networks cannot
        be changed so: apply them. The cost follows the size of the change.
        """

    @abc.abstractmethod
    def fault(self) -> str:
        """Why what :meth:`apply` installed must be applied again; empty: it must not. What is
        captured is not looked at, so it costs the same whatever that is.
        """

    @abc.abstractmethod
    def refresh(self, plan: CapturePlan) -> None:
        """Follow the kernel's routes to the next hops of a plan."""

    @abc.abstractmethod
    def reroute(self, plan: CapturePlan) -> None:
        """Make the routes of a plan that was applied with other addresses of this host."""

    @abc.abstractmethod
    def paths(self, addresses: Iterable[str]) -> Mapping[str, Path]:
        """How packets reach these addresses from here; without those that have no route."""

    @abc.abstractmethod
    def remove(self) -> None:
        """Leave nothing of ours, also where a killed process left it."""

    @abc.abstractmethod
    def render(self, plan: CapturePlan) -> str:
        """What :meth:`apply` would do, for people. Changes nothing."""

    @abc.abstractmethod
    def show(self) -> str:
        """What is in the kernel because of us, for people. Empty: nothing."""


class KernelBackend(Backend):
    """What the backends share: the order of the steps, routes and sysctls.

    ``netns`` is the network namespace to act in; ``run_dir`` a folder in which the original
    values of sysctls survive a crash.
    """

    def __init__(self, netns: NetNS = None, run_dir: str = "/run/svcdp") -> None:
        self._netns = netns
        self._sysctls = Sysctls(run_dir)
        self._refused = ""  # what the kernel last said of next hops
        self._tracked = False  # what was last applied is for a host that tracks connections
        self._in_force = False  # something was applied, and not taken back

    # Processes that a thread starts are in its namespace, so the tools need no option for it.

    def apply(self, plan: CapturePlan) -> None:
        call_in(self._netns, partial(self._apply, plan))

    def update(self, plan: CapturePlan, added: Collection[Item], removed: Collection[Item]) -> None:
        call_in(self._netns, partial(self._update, _field(plan), added, removed))

    def fault(self) -> str:
        return call_in(self._netns, self._fault)

    def refresh(self, plan: CapturePlan) -> None:
        self._report(call_in(self._netns, partial(hops.refresh, plan.hops, _field(plan))))

    def reroute(self, plan: CapturePlan) -> None:
        call_in(self._netns, partial(routes.add, plan))

    def paths(self, addresses: Iterable[str]) -> Mapping[str, Path]:
        return call_in(self._netns, partial(find_paths, addresses))

    def remove(self) -> None:
        call_in(self._netns, self._remove)

    def render(self, plan: CapturePlan) -> str:
        return call_in(self._netns, partial(self._render, plan))

    def show(self) -> str:
        return call_in(
            self._netns,
            lambda: self._show() + hops.show() + routes.show() + self._sysctls.show(),
        )

    def _apply(self, plan: CapturePlan) -> None:
        try:
            # The guard is in force before what it makes up for is allowed.
            guard = self._sysctls.guard()
            self._install(plan, guard)
            self._tracked = guard.tracked
            routes.add(plan)
            self._report(hops.apply(plan.hops, _field(plan)))
            self._sysctls.apply()
        except BaseException:
            if not self._in_force:
                with contextlib.suppress(SvcdpError):  # the first error says why
                    self._remove()
            raise
        self._in_force = True

    def _update(
        self, field: hops.Field, added: Collection[Item], removed: Collection[Item]
    ) -> None:
        new_hops, old_hops = (
            [each for each in change if isinstance(each, Hop)] for change in (added, removed)
        )
        try:
            self._report(hops.add(new_hops, field))
            self._change(
                [each for each in added if isinstance(each, Element)],
                [each for each in removed if isinstance(each, Element)],
            )
        except BaseException:
            with contextlib.suppress(SvcdpError):  # the first error says why
                hops.remove(new_hops, field)
            raise
        hops.remove(old_hops, field)

    def _report(self, refused: str) -> None:
        """Log what the kernel says of next hops that it does not take, when it is news."""
        if refused and refused != self._refused:
            log.warning("a next hop cannot be reached", extra={"error": refused})
        self._refused = refused

    def _fault(self) -> str:
        if not self._is_called():
            return "somebody else removed them"
        if tracks_connections() and not self._tracked:
            return "connections are tracked now"
        return ""

    def _remove(self) -> None:
        self._in_force = False
        with contextlib.ExitStack() as steps:  # all of them, whatever fails; backwards
            # What is captured needs its routes, and what the sysctls allow needs the guard.
            steps.callback(routes.remove)
            steps.callback(hops.remove_all)
            steps.callback(self._uninstall)
            steps.callback(self._sysctls.restore)

    def _render(self, plan: CapturePlan) -> str:
        lines = [" ".join(argv) for argv in routes.commands(plan)]
        lines += hops.commands(plan.hops, _field(plan))
        lines += [
            f"sysctl -w net.ipv4.conf.{name.replace('/', '.')}={value} # was {original}"
            for name, (original, value) in self._sysctls.changes().items()
        ]
        return self._script(plan, self._sysctls.guard()) + "".join(f"{line}\n" for line in lines)

    @abc.abstractmethod
    def _install(self, plan: CapturePlan, guard: Guard) -> None:
        """Bring sets and rules into force."""

    @abc.abstractmethod
    def _uninstall(self) -> None:
        """Remove sets and rules, where there are any."""

    @abc.abstractmethod
    def _is_called(self) -> bool:
        """Whether packets still come to the rules."""

    @abc.abstractmethod
    def _change(self, added: Collection[Element], removed: Collection[Element]) -> None:
        """Change the sets' elements: all of it, or nothing."""

    @abc.abstractmethod
    def _script(self, plan: CapturePlan, guard: Guard) -> str:
        """What :meth:`_install` feeds to its tools."""

    @abc.abstractmethod
    def _show(self) -> str:
        """Sets and rules of ours in the kernel."""


def _field(plan: CapturePlan) -> hops.Field:
    return hops.Field(plan.hop_marks, plan.forward_mark)

"""Leases at a real API server: what it admits, and who wins."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from controlplane import ControlPlane

from svcdp.errors import SvcdpError
from svcdp.kube.client import Client
from svcdp.kube.leases import Lease

FOLDER = "/apis/coordination.k8s.io/v1/namespaces/default/leases"


def contend(
    plane: ControlPlane,
    work: Callable[[Callable[[str], Lease]], Coroutine[Any, Any, None]],
    namespace: str = "default",
) -> None:
    """``work`` is given what makes a contender for the Lease ``one``, by its identity."""

    async def main() -> None:
        client = Client(plane.kubeconfig())
        try:
            await work(
                lambda who: Lease(client, namespace, "one", who, 3600, {"svcdp.io/of": "test"})
            )
        finally:
            await client.close()

    asyncio.run(main())


def test_one_of_many_holds_it_and_leaves_it_to_another(plane: ControlPlane) -> None:
    async def work(contender: Callable[[str], Lease]) -> None:
        all_ = [contender(f"n{number}") for number in range(8)]
        for _ in range(2):  # made by one, then renewed by the same
            assert sum(await asyncio.gather(*(each.acquire() for each in all_))) == 1
        [first] = [each for each in all_ if each.is_held]
        plane.kubectl("annotate", "lease", "one", "some=body")
        assert await first.acquire()
        await first.release()
        assert plane.get(f"{FOLDER}/one")["spec"]["holderIdentity"] == ""
        assert sum(await asyncio.gather(*(each.acquire() for each in all_))) == 1
        [second] = [each for each in all_ if each.is_held]
        found = plane.get(f"{FOLDER}/one")
        assert found["metadata"]["labels"] == {"svcdp.io/of": "test"}
        assert found["spec"]["holderIdentity"] == second.identity
        assert found["spec"]["leaseTransitions"] == 1
        plane.kubectl("delete", "lease", "one")
        assert await second.acquire()

    contend(plane, work)


def test_without_a_namespace_there_is_an_error(plane: ControlPlane) -> None:
    async def work(contender: Callable[[str], Lease]) -> None:
        with pytest.raises(SvcdpError, match=r"cannot create the Lease one.*nowhere"):
            await contender("n1").acquire()

    contend(plane, work, "nowhere")

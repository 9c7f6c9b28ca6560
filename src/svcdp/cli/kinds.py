"""What ``svcdp get`` lists, and the columns of its tables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from svcdp.cli.printers import Column, Item, age, endpoint

__all__ = ["KINDS", "Kind"]

NAMESPACE = Column("NAMESPACE", lambda item: item["namespace"])


@dataclass(frozen=True)
class Kind:
    """What can be listed: how it is called and what a table shows of it."""

    plural: str
    singular: str
    short: str
    name: Callable[[Item], str]
    columns: tuple[Column, ...]
    namespaced: bool = True
    named: bool = True
    """Whether one asks for it by name."""

    def owner(self, item: Item) -> str:
        """The name by which one asks for it: a Service's, where several things are of one."""
        return str(item.get("service", "")).partition(":")[0] or self.name(item)

    def shown(self, *, namespaces: bool, wide: bool) -> list[Column]:
        """The columns of a table of one namespace or of all."""
        return [
            column
            for column in self.columns
            if (wide or not column.wide) and (namespaces or column is not NAMESPACE)
        ]

    def stable(self, item: Item) -> tuple[str, ...]:
        """What of an item counts as a change when it changes."""
        return tuple(str(column.cell(item)) for column in self.columns if not column.volatile)


def _age(item: Item) -> str:
    try:
        created = datetime.fromisoformat(item["creationTimestamp"] or "")
        return age((datetime.now(UTC) - created).total_seconds())
    except (ValueError, TypeError):
        return "<unknown>"  # a manifest that never was in a cluster has none


def _ports(item: Item) -> str:
    return ",".join(
        f"{port['port']}"
        + (f"-{port['lastPort']}" if port["lastPort"] else "")
        + (f":{port['nodePort']}" if port["nodePort"] else "")
        + f"/{port['protocol']}"
        for port in item["ports"]
    )


def _external(item: Item) -> str:
    """As kubectl has it (printers.go, getServiceExternalIP)."""
    if item["type"] == "ExternalName":
        return str(item["externalName"])
    balanced = sorted([*item["loadBalancerIPs"], *item["loadBalancerHostnames"]])
    found = ",".join([*balanced, *item["externalIPs"]])
    return found or ("<pending>" if item["type"] == "LoadBalancer" else "<none>")


def _selector(item: Item) -> str:
    return ",".join(f"{k}={v}" for k, v in sorted(item["selector"].items())) or "<none>"


_OPERATORS = {"In": "in", "NotIn": "notin"}


def _labels(selector: Item | None) -> str:
    """As kubectl prints label selectors (``metav1.FormatLabelSelector``)."""
    if selector is None:
        return "<none>"
    found = [(key, f"{key}={value}") for key, value in (selector["matchLabels"] or {}).items()]
    for each in selector["matchExpressions"] or ():
        key, operator = each["key"], each["operator"]
        text = "!" * (operator == "DoesNotExist") + key
        if operator in _OPERATORS:
            text = f"{key} {_OPERATORS[operator]} ({','.join(sorted(each['values'] or ()))})"
        found.append((key, text))
    return ",".join(text for _, text in sorted(found)) or "<none>"


def _place(address: str, port: str) -> Callable[[Item], str]:
    return lambda item: endpoint(item[address], item[port])


def _source(item: Item) -> str:
    if (item["source"], item["sourcePort"]) == (item["client"], item["clientPort"]):
        return "<client>"
    return endpoint(item["source"], item["sourcePort"])


KINDS = (
    Kind(
        "services",
        "service",
        "svc",
        lambda item: item["name"],
        (
            NAMESPACE,
            Column("NAME", lambda item: item["name"]),
            Column("TYPE", lambda item: item["type"]),
            Column("CLUSTER-IP", lambda item: next(iter(item["clusterIPs"]), "<none>")),
            Column("EXTERNAL-IP", _external),
            Column("PORT(S)", lambda item: _ports(item) or "<none>"),
            Column("AGE", _age, volatile=True),
            Column("SELECTOR", _selector, wide=True),
            Column("ENDPOINTS", lambda i: f"{i['endpointsReady']}/{i['endpoints']}", wide=True),
            Column("SCHEDULER", lambda i: ",".join(i["schedulers"]) or "<none>", wide=True),
        ),
    ),
    Kind(
        "endpoints",
        "endpoint",
        "ep",
        lambda item: f"{item['service']}/{endpoint(item['address'], item['port'])}",
        (
            NAMESPACE,
            Column("SERVICE", lambda item: item["service"]),
            Column("PROTO", lambda item: item["protocol"]),
            Column("VIRTUAL", _place("virtual", "virtualPort")),
            Column("ENDPOINT", _place("address", "port")),
            Column("WEIGHT", lambda item: item["weight"]),
            Column("ACTIVE", lambda item: item["active"], volatile=True),
            Column("INACTIVE", lambda item: item["inactive"], volatile=True),
            Column("METHOD", lambda item: item["method"], wide=True),
            Column("CONNECTIONS", lambda item: item["connections"], wide=True, volatile=True),
            Column("BYTES-IN", lambda item: item["bytesIn"], wide=True, volatile=True),
            Column("BYTES-OUT", lambda item: item["bytesOut"], wide=True, volatile=True),
        ),
    ),
    Kind(
        "pods",
        "pod",
        "po",
        lambda item: item["name"],
        (
            NAMESPACE,
            Column("NAME", lambda item: item["name"]),
            Column("READY", lambda item: "yes" if item["ready"] else "no"),
            Column("STATUS", lambda item: item["phase"] or "<unknown>"),
            Column("IP", lambda item: ",".join(item["ips"]) or "<none>"),
            Column("NODE", lambda item: item["node"] or "<none>"),
            Column("SERVICES", lambda item: ",".join(item["services"]) or "<none>"),
        ),
    ),
    Kind(
        "pools",
        "pool",
        "lbpool",
        lambda item: item["name"],
        (
            Column("NAME", lambda item: item["name"]),
            Column("ADDRESSES", lambda item: ",".join(item["addresses"])),
            Column("USED", lambda item: item["used"]),
            Column("FREE", lambda item: item["free"]),
            Column("AGE", _age, volatile=True),
            Column("AUTO-ASSIGN", lambda i: "yes" if i["autoAssign"] else "no", wide=True),
            Column("NAMESPACES", lambda i: ",".join(i["namespaces"]) or "<all>", wide=True),
            Column("SELECTOR", lambda i: _labels(i["serviceSelector"]), wide=True),
        ),
        namespaced=False,
    ),
    Kind(
        "connections",
        "connection",
        "conn",
        lambda item: "/".join(
            (
                item["protocol"],
                endpoint(item["client"], item["clientPort"]),
                endpoint(item["virtual"], item["virtualPort"]),
            )
        ),
        (
            Column("PROTO", lambda item: item["protocol"]),
            Column("CLIENT", _place("client", "clientPort")),
            Column("VIRTUAL", _place("virtual", "virtualPort")),
            Column("DESTINATION", _place("destination", "destinationPort")),
            Column("STATE", lambda item: item["state"]),
            Column("EXPIRES", lambda item: age(item["expiresIn"]), volatile=True),
            Column("SOURCE", _source, wide=True),
            Column("PACKETS", lambda item: item["packets"], wide=True, volatile=True),
        ),
        namespaced=False,
        named=False,
    ),
    Kind(
        "queues",
        "queue",
        "q",
        lambda item: item["queue"],
        (
            Column("QUEUE", lambda item: item["queue"]),
            Column("RECEIVED", lambda item: item["received"], volatile=True),
            Column("VERDICTS", lambda item: item["verdicts"], volatile=True),
            Column("WAITING", lambda item: item["waiting"], volatile=True),
            Column("DROPPED", lambda i: i["dropped_kernel"] + i["dropped_user"]),
            Column("ERRORS", lambda item: item["errors"]),
            Column("OVERRUNS", lambda item: item["overruns"], wide=True),
            Column("TRUNCATED", lambda item: item["truncated"], wide=True),
            Column("ANSWERS", lambda item: item["answers"], wide=True, volatile=True),
        ),
        namespaced=False,
        named=False,
    ),
)

"""kube-proxy's command line and configuration file (``kubeproxy.config.k8s.io/v1alpha1``), as
settings of ours. Pure.

What has no counterpart is a note if nothing is forwarded otherwise for it, else a ConfigError.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from svcdp.errors import ConfigError
from svcdp.node.values import IN_CLUSTER

__all__ = [
    "API_VERSION",
    "KIND",
    "WORDS",
    "Given",
    "Translation",
    "Word",
    "beside_file",
    "flatten",
    "parse",
    "translate",
]

API_VERSION = "kubeproxy.config.k8s.io/v1alpha1"
KIND = "KubeProxyConfiguration"

EVERYWHERE = ["0.0.0.0/0", "::/0"]
HEALTHZ_PORT, METRICS_PORT = 10256, 10249
DEBUG_VERBOSITY = 4

Kind = Literal["text", "switch", "number", "time", "list", "any"]


class Given(NamedTuple):
    """A value as it was given, and where."""

    value: Any
    origin: str


class Word(NamedTuple):
    """A setting of kube-proxy: its key in the file, its flag, and what becomes of it.

    ``unused``: why it changes nothing here; "": it is used. ``refused``: why it cannot be had.
    """

    key: str
    flag: str
    kind: Kind
    unused: str = ""
    refused: str = ""


class Translation(NamedTuple):
    """Values by the name of our setting, and what people should know of the rest."""

    given: dict[str, Given]
    notes: tuple[str, ...]


_CONNTRACK = "what is forwarded is exempt from the kernel's connection tracking"
_CLIENT = "the API server is asked for little, in JSON"
_RETRY = "what fails is tried again by syncRetry"
_MARKS = "marks are forwardMark and passMark"
_LOGS = "logs go to stderr, by logLevel and logFormat"
_WINDOWS = "this is Linux"
_ARP = "no interface of this node has the addresses of Services"

#: All words of kube-proxy 1.37, and some that older ones had.
WORDS = (
    Word("mode", "proxy-mode", "text"),
    Word("clientConnection.kubeconfig", "kubeconfig", "text"),
    Word("clientConnection.acceptContentTypes", "", "text", _CLIENT),
    Word("clientConnection.contentType", "kube-api-content-type", "text", _CLIENT),
    Word("clientConnection.qps", "kube-api-qps", "number", _CLIENT),
    Word("clientConnection.burst", "kube-api-burst", "number", _CLIENT),
    Word("hostnameOverride", "hostname-override", "text"),
    Word("bindAddress", "bind-address", "text"),
    Word("bindAddressHardFail", "bind-address-hard-fail", "switch", "it is an event, and retried"),
    Word("healthzBindAddress", "healthz-bind-address", "text"),
    Word("metricsBindAddress", "metrics-bind-address", "text"),
    Word("", "healthz-port", "number"),
    Word("", "metrics-port", "number"),
    Word("clusterCIDR", "cluster-cidr", "text"),
    Word("detectLocalMode", "detect-local-mode", "text"),
    Word("detectLocal.bridgeInterface", "pod-bridge-interface", "text"),
    Word("detectLocal.interfaceNamePrefix", "pod-interface-name-prefix", "text"),
    Word("nodePortAddresses", "nodeport-addresses", "list"),
    Word("", "masquerade-all", "switch"),
    Word("iptables.masqueradeAll", "", "switch"),
    Word("nftables.masqueradeAll", "", "switch"),
    Word("iptables.minSyncPeriod", "iptables-min-sync-period", "time"),
    Word("nftables.minSyncPeriod", "", "time"),
    Word("ipvs.minSyncPeriod", "ipvs-min-sync-period", "time"),
    Word("iptables.syncPeriod", "iptables-sync-period", "time", _RETRY),
    Word("nftables.syncPeriod", "", "time", _RETRY),
    Word("ipvs.syncPeriod", "ipvs-sync-period", "time", _RETRY),
    Word("iptables.masqueradeBit", "iptables-masquerade-bit", "number", _MARKS),
    Word("nftables.masqueradeBit", "", "number", _MARKS),
    Word("iptables.localhostNodePorts", "iptables-localhost-nodeports", "switch"),
    Word("ipvs.scheduler", "ipvs-scheduler", "text"),
    Word("ipvs.tcpTimeout", "ipvs-tcp-timeout", "time"),
    Word("ipvs.tcpFinTimeout", "ipvs-tcpfin-timeout", "time"),
    Word("ipvs.udpTimeout", "ipvs-udp-timeout", "time"),
    Word("ipvs.excludeCIDRs", "ipvs-exclude-cidrs", "list", "no rule of IPVS is touched"),
    Word("ipvs.strictARP", "ipvs-strict-arp", "switch", _ARP),
    Word("conntrack.maxPerCore", "conntrack-max-per-core", "number", _CONNTRACK),
    Word("conntrack.min", "conntrack-min", "number", _CONNTRACK),
    Word(
        "conntrack.tcpEstablishedTimeout", "conntrack-tcp-timeout-established", "time", _CONNTRACK
    ),
    Word("conntrack.tcpCloseWaitTimeout", "conntrack-tcp-timeout-close-wait", "time", _CONNTRACK),
    Word("conntrack.tcpBeLiberal", "conntrack-tcp-be-liberal", "switch", _CONNTRACK),
    Word("conntrack.udpTimeout", "conntrack-udp-timeout", "time", _CONNTRACK),
    Word("conntrack.udpStreamTimeout", "conntrack-udp-timeout-stream", "time", _CONNTRACK),
    Word("oomScoreAdj", "oom-score-adj", "number", "the Pod or the service manager sets it"),
    Word("configSyncPeriod", "config-sync-period", "time", "watches need no refreshing"),
    Word("enableProfiling", "profiling", "switch", "there is no profiler"),
    Word(
        "showHiddenMetricsForVersion", "show-hidden-metrics-for-version", "text", "none is hidden"
    ),
    Word("featureGates", "feature-gates", "any", "there are none"),
    Word("portRange", "proxy-port-range", "text", "kube-proxy does not use it either"),
    Word("logging.format", "logging-format", "text"),
    Word("logging.verbosity", "v", "number"),
    Word("logging.flushFrequency", "log-flush-frequency", "any", _LOGS),
    Word("logging.options", "", "any", _LOGS),
    Word("logging.vmodule", "vmodule", "any", _LOGS),
    Word("", "logtostderr", "switch", _LOGS),
    Word("", "alsologtostderr", "switch", _LOGS),
    Word("", "stderrthreshold", "text", _LOGS),
    Word("windowsRunAsService", "", "switch", _WINDOWS),
    Word("winkernel.enableDSR", "", "switch", _WINDOWS),
    Word("winkernel.forwardHealthCheckVip", "", "switch", _WINDOWS),
    Word("winkernel.networkName", "", "text", _WINDOWS),
    Word("winkernel.rootHnsEndpointName", "", "text", _WINDOWS),
    Word("winkernel.sourceVip", "", "text", _WINDOWS),
    Word("", "master", "text", refused="write the server's address into a kubeconfig"),
    Word("", "cleanup", "switch", refused="run `svcdp rules remove`"),
    Word("", "init-only", "switch", refused="nothing is to be done before: leave it out"),
    Word("", "write-config-to", "text", refused="`svcdp check` prints the configuration"),
)
_BY_KEY = {word.key: word for word in WORDS if word.key}
_BY_FLAG = {word.flag: word for word in WORDS if word.flag}
# Those that count beside a file.
_BESIDE_FILE = ("hostname-override", "v", "logging-format", "vmodule")

LOOPBACK = (ipaddress.ip_address("127.0.0.1"), ipaddress.ip_address("::1"))

# Modes whose kube-proxy serves node ports at all addresses unless told otherwise.
_MODES = {"": True, "iptables": True, "ipvs": True, "nftables": False}


def parse(arguments: Sequence[str]) -> tuple[str | None, dict[str, Given]]:
    """kube-proxy's command line: the file of ``--config``, and values by key. ConfigError."""
    file: str | None = None
    found: dict[str, Given] = {}
    rest = iter(arguments)
    for argument in rest:
        match = re.fullmatch(r"--?([A-Za-z][\w-]*?)(?:=(.*)|(?<=-v)(\d+))?", argument, re.S)
        if match is None:
            raise ConfigError(f"{argument!r} is no flag of kube-proxy")
        flag = match[1].replace("_", "-")
        value = match[2] if match[2] is not None else match[3]
        word = _BY_FLAG.get(flag)
        if word is None and flag != "config":
            raise ConfigError(f"kube-proxy has no flag --{flag}")
        if value is None:
            is_switch = word is not None and word.kind == "switch"
            value = "true" if is_switch else next(rest, None)
        if value is None:
            raise ConfigError(f"--{flag} needs a value")
        if word is None:
            file = value
        else:
            found[word.key or word.flag] = Given(_typed(word, value), f"flag --{flag}")
    return file, found


def beside_file(flags: Mapping[str, Given]) -> tuple[dict[str, Given], tuple[str, ...]]:
    """Of the flags those that count where there is a file, as kube-proxy has it, and notes."""
    kept: dict[str, Given] = {}
    notes: list[str] = []
    for key, given in flags.items():
        word = _BY_KEY.get(key) or _BY_FLAG[key]
        if word.flag in _BESIDE_FILE or word.refused:
            kept[key] = given
        else:
            notes.append(f"--{word.flag} does not count beside --config, as with kube-proxy")
    return kept, tuple(notes)


def flatten(data: Mapping[str, Any], origins: Mapping[str, str]) -> dict[str, Given]:
    """The values of a configuration file by key; ``origins`` of those at its top. ConfigError."""
    return {
        key: Given(value, origins[key.partition(".")[0]])
        for key, value in _leaves(data, origins, "")
    }


def _leaves(
    data: Mapping[str, Any], origins: Mapping[str, str], prefix: str
) -> Iterator[tuple[str, Any]]:
    for name, value in data.items():
        key = f"{prefix}{name}"
        where = origins[key.partition(".")[0]]
        if key in _BY_KEY:
            if _BY_KEY[key].kind == "switch" and not isinstance(value, bool | None):
                raise ConfigError(f"{key}: {value!r} is neither true nor false ({where})")
            yield key, value
        elif any(known.startswith(f"{key}.") for known in _BY_KEY):
            if not isinstance(value, dict | None):
                raise ConfigError(f"{key}: expected keys and values ({where})")
            yield from _leaves(value or {}, origins, f"{key}.")
        else:
            raise ConfigError(f"{key} is no setting of {KIND} ({where})")


def translate(words: Mapping[str, Given]) -> Translation:
    """Our settings for kube-proxy's ``words``, by key (by flag where there is no key).

    What kube-proxy does when nothing is said is said here. ConfigError.
    """
    notes: list[str] = []
    for key, given in words.items():
        word = _BY_KEY.get(key) or _BY_FLAG[key]
        if _is_unset(word, given.value):
            continue
        if word.refused:
            raise ConfigError(f"{key} ({given.origin}): {word.refused}")
        if word.unused:
            notes.append(f"{key} is ignored: {word.unused} ({given.origin})")
    return Translation(_Translator(words).result(), tuple(notes))


class _Translator:
    def __init__(self, words: Mapping[str, Given]) -> None:
        self._words = words
        self._mode = self._text("mode")
        if self._mode not in _MODES:
            known = ", ".join(filter(None, _MODES))
            raise ConfigError(f"mode {self._mode!r} is none of {known} ({self._origin('mode')})")
        self._section = self._mode or "iptables"

    def result(self) -> dict[str, Given]:
        """Our settings."""
        found: dict[str, Given] = {}

        def put(name: str, value: Any, key: str) -> None:
            found[name] = Given(value, self._origin(key))

        put(
            "kubeconfig",
            self._text("clientConnection.kubeconfig") or IN_CLUSTER,
            "clientConnection.kubeconfig",
        )
        name = self._text("hostnameOverride") or socket.gethostname()
        put("node_name", name.strip().lower(), "hostnameOverride")
        bind = self._bind_address()
        if bind and not bind.is_unspecified:
            put("primary_addresses", [str(bind)], "bindAddress")
        is_v6 = bind is not None and bind.version == 6
        anywhere, loopback = ("[::]", "[::1]") if is_v6 else ("0.0.0.0", "127.0.0.1")
        for setting, key, port_key, port, host in (
            ("healthz_bind_address", "healthzBindAddress", "healthz-port", HEALTHZ_PORT, anywhere),
            ("metrics_bind_address", "metricsBindAddress", "metrics-port", METRICS_PORT, loopback),
        ):
            put(setting, self._place(key, port_key, port, host), key)
        self._tell_local(put)
        addresses = self._list("nodePortAddresses")
        if not addresses:
            addresses = EVERYWHERE if _MODES[self._mode] else []
        put(
            "node_port_addresses",
            [] if addresses == ["primary"] else addresses,
            "nodePortAddresses",
        )
        own = f"{'nftables' if self._mode == 'nftables' else 'iptables'}.masqueradeAll"
        put("masquerade_all", bool(self._get("masquerade-all") or self._get(own)), own)
        if period := self._seconds(f"{self._section}.minSyncPeriod"):
            put("min_sync_period", period, f"{self._section}.minSyncPeriod")
        if self._section == "iptables":
            wanted = self._get("iptables.localhostNodePorts") is not False
            put(
                "localhost_node_ports",
                wanted and any(map(_holds_loopback, addresses)),
                "iptables.localhostNodePorts",
            )
        if self._section == "ipvs":
            self._as_ipvs(put)
        if self._text("logging.format") == "json":
            put("log_format", "json", "logging.format")
        if self._number("logging.verbosity") >= DEBUG_VERBOSITY:
            put("log_level", "debug", "logging.verbosity")
        return found

    def _tell_local(self, put: Any) -> None:
        mode = self._text("detectLocalMode") or "ClusterCIDR"
        put("detect_local_mode", mode, "detectLocalMode")
        if mode == "ClusterCIDR" and (cidrs := self._text("clusterCIDR")):
            put("pod_cidrs", cidrs.split(","), "clusterCIDR")
        if mode == "BridgeInterface":
            key = "detectLocal.bridgeInterface"
            put("pod_interface", self._text(key), key)
        if mode == "InterfaceNamePrefix" and (
            prefix := self._text("detectLocal.interfaceNamePrefix")
        ):
            put("pod_interface", f"{prefix}+", "detectLocal.interfaceNamePrefix")

    def _as_ipvs(self, put: Any) -> None:
        if scheduler := self._text("ipvs.scheduler"):
            put("scheduler", scheduler, "ipvs.scheduler")
        states = {"established": "tcpTimeout", "fin_wait": "tcpFinTimeout", "udp": "udpTimeout"}
        timeouts = [
            f"{state}={round(seconds, 3):.12g}"
            for state, name in states.items()
            if (seconds := self._seconds(f"ipvs.{name}"))
        ]
        if timeouts:
            put("timeouts", timeouts, "ipvs.tcpTimeout")

    def _place(self, key: str, port_key: str, port: int, host: str) -> str:
        if port_key in self._words:
            port = self._number(port_key)
            if not port:
                return ""
        text = self._text(key) or host
        is_bare_v6 = text.count(":") > 1 and not text.startswith("[")
        if is_bare_v6:
            return f"[{text}]:{port}"
        return text if re.search(r":\d+$", text) and not text.endswith("]") else f"{text}:{port}"

    def _bind_address(self) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
        text = self._text("bindAddress")
        try:
            return ipaddress.ip_address(text) if text else None
        except ValueError:
            where = self._origin("bindAddress")
            raise ConfigError(f"bindAddress: {text!r} is not an address ({where})") from None

    def _get(self, key: str) -> Any:
        return self._words[key].value if key in self._words else None

    def _origin(self, key: str) -> str:
        return self._words[key].origin if key in self._words else "kube-proxy's default"

    def _text(self, key: str) -> str:
        value = self._get(key)
        if not isinstance(value, str | None):
            raise ConfigError(f"{key}: {value!r} is not text ({self._origin(key)})")
        return value or ""

    def _number(self, key: str) -> int:
        value = self._get(key)
        if not isinstance(value, int | None):
            raise ConfigError(f"{key}: {value!r} is not a number ({self._origin(key)})")
        return value or 0

    def _list(self, key: str) -> list[str]:
        value = self._get(key) or []
        if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
            raise ConfigError(f"{key}: {value!r} is not a list of texts ({self._origin(key)})")
        return value

    def _seconds(self, key: str) -> float:
        try:
            return _seconds(self._get(key))
        except ValueError as error:
            raise ConfigError(f"{key}: {error} ({self._origin(key)})") from None


def _holds_loopback(cidr: str) -> bool:
    try:
        network = ipaddress.ip_network(cidr)
    except ValueError:  # another's to complain of
        return False
    return any(address in network for address in LOOPBACK)


def _typed(word: Word, text: str) -> Any:
    """The value that the text of a flag is. ConfigError."""
    if word.kind == "switch":
        if text.lower() not in ("1", "t", "true", "0", "f", "false"):
            raise ConfigError(f"--{word.flag}: {text!r} is neither true nor false")
        return text.lower() in ("1", "t", "true")
    if word.kind == "list":
        return [part.strip() for part in text.split(",") if part.strip()]
    if word.kind == "number":
        try:
            return float(text) if "." in text else int(text)
        except ValueError:
            raise ConfigError(f"--{word.flag}: {text!r} is not a number") from None
    return text


def _is_unset(word: Word, value: Any) -> bool:
    """As kube-proxy sees it: what is zero is the default."""
    if word.kind == "time":
        try:
            return not _seconds(value)
        except ValueError:
            return False
    return not value


_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_PART = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(ns|us|µs|ms|s|m|h)")


def _seconds(value: Any) -> float:
    """Of a duration as Go writes it, such as 1m30s. ValueError."""
    if value in (None, "", "0"):
        return 0.0
    if not isinstance(value, str) or _PART.sub("", value):
        raise ValueError(f"{value!r} is not a time such as 1m30s")
    return sum(float(number) * _UNITS[unit] for number, unit in _PART.findall(value))

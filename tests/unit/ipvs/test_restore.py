"""ipvsadm's lines as services: good ones, bad ones, and what the real one makes of the same."""

from __future__ import annotations

import json
from dataclasses import replace

import ipvsadm
import pytest

from svcdp import Dataplane, schedulers
from svcdp.errors import ConfigError
from svcdp.ipvs.names import NumericNames
from svcdp.ipvs.restore import parse
from svcdp.ipvs.save import save
from svcdp.types import DestinationSpec, ServiceSpec, SourceRule, TunnelSpec

SERVICE = "-A -t 192.0.2.10:80 -s rr"
SERVER = "-a -t 192.0.2.10:80 -r 10.0.0.1:80"
IPVS = {"rules": (SourceRule(on_empty="unreachable"),), "mh_table_size": 4093}


def one(text: str) -> ServiceSpec:
    (spec,) = ipvsadm.parse_text(text)
    return spec


@pytest.mark.parametrize(
    ("words", "fields"),
    [
        ("", {"scheduler": "wlc"}),
        ("-s twos", {"scheduler": "twos"}),
        ("-s sh -b sh-port,sh-fallback", {"scheduler_flags": ("sh-fallback", "sh-port")}),
        ("-s mh -b flag-2", {"scheduler_flags": ("mh-port",)}),
        ("-p", {"persistence": 360}),
        ("-p -s rr", {"persistence": 360, "scheduler": "rr"}),
        ("-p 300 -M 255.255.255.0", {"persistence": 300, "persistence_netmask": 24}),
        ("-M 255.255.255.255 -p 300", {"persistence": 300, "persistence_netmask": None}),
        ("-M 255.0.0.0", {"persistence_netmask": None}),
        ("--persistent=10 --netmask 128.0.0.0", {"persistence": 10, "persistence_netmask": 1}),
    ],
)
def test_services(words: str, fields: dict[str, object]) -> None:
    spec = one(f"-A -t 192.0.2.10:80 {words}")
    assert spec.key == ("192.0.2.10", 80, "tcp")
    wanted = {"scheduler": "wlc"} | IPVS | fields
    assert {name: getattr(spec, name) for name in fields} == fields
    if "scheduler_flags" not in fields:
        assert spec == ServiceSpec(*spec.key, **wanted)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("words", "key"),
    [
        ("-t 192.0.2.10:80", ("192.0.2.10", 80, "tcp")),
        ("-u 192.0.2.10:53", ("192.0.2.10", 53, "udp")),
        ("--sctp-service 192.0.2.10:9", ("192.0.2.10", 9, "sctp")),
        ("-t [2001:DB8::10]:80", ("2001:db8::10", 80, "tcp")),
        ("-t 192.0.2.10 -p", ("192.0.2.10", 0, "tcp")),
        ("-t 2001:db8::10 -p", ("2001:db8::10", 0, "tcp")),
        ("-f 5", ("0.0.0.0", 5, "fwmark")),
        ("-f 4294967295 -6", ("::", 4294967295, "fwmark")),
    ],
)
def test_keys(words: str, key: tuple[str, int, str]) -> None:
    assert one(f"-A {words}").key == key


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("-r 10.0.0.1:8080 -m", DestinationSpec("10.0.0.1", 8080)),
        ("-r 10.0.0.1 -m -w 0", DestinationSpec("10.0.0.1", 80, 0)),
        ("-r 10.0.0.1:0 -m", DestinationSpec("10.0.0.1", 80)),
        ("-r 10.0.0.1:80", DestinationSpec("10.0.0.1", 80, method="dr")),
        ("-r 10.0.0.1:8080 -g", DestinationSpec("10.0.0.1", 80, method="dr")),
        ("-r 10.0.0.1 -m -x 9 -y 5", DestinationSpec("10.0.0.1", 80, upper=9, lower=5)),
        ("-r 10.0.0.1 -i", TunnelSpec()),
        ("-r 10.0.0.1 -i --tun-type gre --tun-nocsum", TunnelSpec("gre")),
        ("-r 10.0.0.1 -i --tun-type gre --tun-csum", TunnelSpec("gre", checksum=True)),
        ("-r 10.0.0.1 -i --tun-type gue --tun-port 6080", TunnelSpec("gue", port=6080)),
        (
            "-r 10.0.0.1 -i --tun-type gue --tun-port 6080 --tun-remcsum",
            TunnelSpec("gue", port=6080, checksum=True),
        ),
    ],
)
def test_servers(words: str, wanted: DestinationSpec | TunnelSpec) -> None:
    if isinstance(wanted, TunnelSpec):
        wanted = DestinationSpec("10.0.0.1", 80, method="tunnel", tunnel=wanted)
    spec = one(f"{SERVICE}\n-a -t 192.0.2.10:80 {words}")
    assert spec.destinations == (wanted,)
    assert spec.mss_clamp == (wanted.method == "tunnel")


def test_servers_of_many_ports() -> None:
    text = "-A -f 5\n-a -f 5 -r 10.0.0.1 -m\n-a -f 5 -r 10.0.0.2:80 -m\n-a -f 5 -r 10.0.0.3:80 -g"
    assert [(each.address, each.port) for each in one(text).destinations] == [
        ("10.0.0.1", 0),
        ("10.0.0.2", 80),
        ("10.0.0.3", 0),
    ]
    text = "-A -t 192.0.2.10 -p\n-a -t 192.0.2.10 -r 10.0.0.1 -m"
    assert one(text).destinations == (DestinationSpec("10.0.0.1", 0),)


def test_a_tunnel_can_change_the_family() -> None:
    text = f"{SERVICE}\n-a -t 192.0.2.10:80 -r [fd00::1]:80 -i"
    assert one(text).destinations[0].address == "fd00::1"


def test_destinations_are_in_the_order_in_which_they_were_added() -> None:
    servers = [f"-a -t 192.0.2.10:80 -r 10.0.0.{n}:80 -m" for n in (3, 1, 2)]
    spec = one("\n".join([SERVICE, *servers]))
    assert [each.address for each in spec.destinations] == ["10.0.0.3", "10.0.0.1", "10.0.0.2"]


def test_edit_and_delete() -> None:
    lines = [
        "-A -t 192.0.2.10:80 -s sh -b sh-port -p 10",
        "-a -t 192.0.2.10:80 -r 10.0.0.1:80 -m -w 5 -x 9",
        "-a -t 192.0.2.10:80 -r 10.0.0.2:80 -m",
        "-a -t 192.0.2.10:80 -r 10.0.0.3:80 -m",
        "-A -t 192.0.2.11:80",
        "-E -t 192.0.2.10:80",
        "-e -t 192.0.2.10:80 -r 10.0.0.1:80 -w 7",
        "-d -t 192.0.2.10:80 -r 10.0.0.2",
        "-D -t 192.0.2.11:80",
    ]
    spec = one("\n".join(lines))
    assert (spec.scheduler, spec.scheduler_flags, spec.persistence) == ("wlc", (), None)
    assert spec.destinations == (
        DestinationSpec("10.0.0.1", 80, 7, "dr"),
        DestinationSpec("10.0.0.3", 80),
    )
    assert ipvsadm.parse_text("\n".join([*lines, "-C"])) == []


def test_on_what_is_there_already() -> None:
    old = ServiceSpec(
        "192.0.2.10",
        80,
        destinations=(DestinationSpec("10.0.0.1", 80, mark=7), DestinationSpec("10.0.0.2", 80)),
        timeouts=(("established", 5.0),),
        name="web",
    )
    other = replace(old, port=81)
    text = "-e -t 192.0.2.10:80 -r 10.0.0.1 -m -w 0\n-E -t 192.0.2.10:80 -s lc"
    changed, same = parse(text, NumericNames(), base=[old, other]).specs
    assert same == other
    drained = replace(old.destinations[0], weight=0)
    assert changed == replace(old, scheduler="lc", destinations=(drained, old.destinations[1]))


def test_timeouts_are_for_all_services() -> None:
    """Also for those to come: they are nobody's own."""
    text = "-A -t 192.0.2.10:80\n--set 0 50 30\n-A -u 192.0.2.10:80\n--set 100 0 0"
    specs, timeouts, _ = parse(text, NumericNames())
    assert timeouts == {"established": 100, "fin_wait": 50, "udp": 30}
    assert [spec.timeouts for spec in specs] == [(), ()]


def test_counters_are_zeroed() -> None:
    one, two = (("192.0.2.10", port, "tcp") for port in (80, 81))
    text = "-A -t 192.0.2.10:80\n-A -t 192.0.2.10:81\n"
    assert parse(f"{text}-Z -t 192.0.2.10:81", NumericNames()).zeroed == {two}
    assert parse(f"{text}--zero", NumericNames()).zeroed == {one, two}
    assert parse(f"{text}-Z\n-D -t 192.0.2.10:80", NumericNames()).zeroed == {two}
    with pytest.raises(ConfigError, match=r"line 1: there is no service 192\.0\.2\.10:80/tcp"):
        parse("-Z -t 192.0.2.10:80", NumericNames())


def test_names() -> None:
    text = ipvsadm.golden("saved-names.rules")
    assert parse(text, ipvsadm.GoldenNames()).specs == ipvsadm.specs("saved.rules")


def test_words_around() -> None:
    text = f"# director\n\n ipvsadm  {SERVICE}\t\n\n{SERVER} -m\r\n"
    assert one(text) == one(f"{SERVICE}\n{SERVER} -m")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("extra", "'extra': expected an option"),
        ("-", "'-': expected an option"),
        ("-t 192.0.2.11:80", "no command: expected one of -A -E -D -C -Z -a -e -d --set"),
        ("-A", "which service? Give -t, -u, --sctp-service or -f"),
        ("-A -a", "-a: there is a command already, --add-service"),
        ("-A=x", "'-=x': no option of what changes services"),
        ("--clear=x", "--clear=x: --clear takes no value"),
        ("--add-serv", "'--add-serv': no option of what changes services"),
        ("-A -t 192.0.2.11:80 -q", "'-q': no option of what changes services"),
        ("-A -t 192.0.2.11:80 more", "'more': expected an option"),
        ("-A -t 192.0.2.11:80 -s", "-s: its value is missing"),
        ("-A -t 192.0.2.11:80 -s rr -s rr", "-s: given twice, or in another way already"),
        ("-A -t 192.0.2.11:80 -u 192.0.2.11:80", "-u: given twice, or in another way already"),
        ("-A -t 192.0.2.11:80 -w 5", "--weight does not go with --add-service"),
        ("-A -t 192.0.2.11:80 --ops=1", "--ops=1: --ops takes no value"),
        (
            "-A -t 192.0.2.11:80 -s sh -b mh-port",
            "-b: sh has no flag 'mh-port': it has sh-fallback, sh-port",
        ),
        ("-A -t 192.0.2.11:80 -s rr -b flag-1", "-b: rr has no flag 'flag-1': it has none"),
        ("-A -t 192.0.2.11:80 -p 0", "-p: '0' is not a number from 1 to 2678400"),
        ("-A -t 192.0.2.11:80 -p 1e3", "-p: '1e3' is not a number from 1 to 2678400"),
        ("-A -t 192.0.2.11:80 -p -M 24", "-M: '24' is not like 255.255.255.0"),
        ("-A -t 192.0.2.11:80 -p -M 255.0.255.0", "-M: '255.0.255.0' is not ones, then zeros"),
        ("-A -t 192.0.2.11:80 -p -M 0.0.0.0", "-M: '0.0.0.0' is not ones, then zeros"),
        ("-A -t [::1]:80 -p -M 129", "-M: '129' is not a number from 1 to 128"),
        ("-A -t 192.0.2.11:80 -o", "-o is for UDP"),
        ("-A -t 192.0.2.11:80 --pe rtp", "--pe: 'rtp' is not sip"),
        (
            "-A -t 192.0.2.11:80 --pe sip -p",
            "192.0.2.11:80/tcp: persistence_engine sip needs udp and persistence",
        ),
        ("-A -t 192.0.2.11:80 -6", "-6 is for -f: put IPv6 addresses in brackets"),
        ("-A -f 0", "-f: '0' is not a number from 1 to 4294967295"),
        ("-A -f 0x5", "-f: '0x5' is not a number from 1 to 4294967295"),
        (
            "-A -t 192.0.2.11",
            "192.0.2.11:0/tcp: a service of all ports needs -p (or was a port forgotten?)",
        ),
        ("-A -t 192.0.2.11:", "'' is no port"),
        ("-A -t 192.0.2.11:65536", "port: '65536' is not a number from 0 to 65535"),
        ("-A -t 192.0.2.11:http", "'http' is no port"),
        ("-A -t 192.0.2:80", "'192.0.2' is no IPv4 address"),
        ("-A -t 192.0.2.010:80", "'192.0.2.010' is no IPv4 address"),
        ("-A -t www:80", "'www' is no IPv4 address"),
        ("-A -t :80", "'' is no IPv4 address"),
        ("-A -t [192.0.2.11]:80", "'192.0.2.11' is no IPv6 address"),
        ("-A -t [fe80::1%eth0]:80", "'fe80::1%eth0' is no IPv6 address"),
        ("-A -t [::1:80", "'[::1:80' is not like [2001:db8::1]:80"),
        ("-A -t [::1]80", "'[::1]80' is not like [2001:db8::1]:80"),
        ("-A -t 192.0.2.10:80", "192.0.2.10:80/tcp exists already"),
        ("-E -t 192.0.2.11:80", "there is no service 192.0.2.11:80/tcp"),
        ("-D -f 5", "there is no service fwmark 5 (IPv4)"),
        ("-a -t 192.0.2.11:80 -r 10.0.0.1:80", "there is no service 192.0.2.11:80/tcp"),
        ("-a -t 192.0.2.10:80", "which server? Give -r"),
        (SERVER, "192.0.2.10:80/tcp has the server 10.0.0.1:80 already"),
        ("-e -t 192.0.2.10:80 -r 10.0.0.2:80", "192.0.2.10:80/tcp has no server 10.0.0.2:80"),
        ("-d -t 192.0.2.10:80 -r 10.0.0.1:81", "192.0.2.10:80/tcp has no server 10.0.0.1:81"),
        (f"-e{SERVER[2:]} -m -g", "-g: given twice, or in another way already"),
        (f"-e{SERVER[2:]} -w -1", "-w: '-1' is not a number from 0 to 2147483647"),
        (f"-e{SERVER[2:]} -w ٣", "-w: '٣' is not a number from 0 to 2147483647"),
        (f"-e{SERVER[2:]} -y 20", "-y: 20 is above -x 0"),
        (f"-e{SERVER[2:]} -m --tun-type ipip", "--tun-type is for tunnels: give -i"),
        (
            f"-e{SERVER[2:]} -i --tun-type vxlan",
            "--tun-type: 'vxlan' is none of ipip, gue, gre",
        ),
        (f"-e{SERVER[2:]} -i --tun-type gue", "--tun-type gue needs --tun-port"),
        (
            f"-e{SERVER[2:]} -i --tun-type gue --tun-port 0",
            "--tun-port: '0' is not a number from 1 to 65535",
        ),
        (f"-e{SERVER[2:]} -i --tun-csum", "--tun-csum does not go with --tun-type ipip"),
        (
            f"-e{SERVER[2:]} -i --tun-type gre --tun-remcsum",
            "--tun-remcsum does not go with --tun-type gre",
        ),
        (
            "-a -t 192.0.2.10:80 -r [fd00::1]:80 -m",
            "192.0.2.10:80/tcp: destination 'fd00::1':"
            " address of the other IP family; masq needs one family",
        ),
        (
            "-a -t 192.0.2.10:80 -r 224.0.0.1 -m",
            "-r: 224.0.0.1 cannot be a server's: not unicast, or link-local",
        ),
        ("-L -n", "-L: changes no services: run `svcdp ipvs list`"),
        (
            "--start-daemon master",
            "--start-daemon: changes no services: start svcdp with --sync-role, --sync-interface"
            " and so on",
        ),
        ("-Z -r 10.0.0.1", "--real-server does not go with --zero"),
        ("--set 1 2", "--set needs three timeouts: tcp tcpfin udp"),
        ("--set 1 2 x", "--set: 'x' is not a number from 0 to 2678400"),
        ("--set 1 2 3 4", "'4': expected an option"),
    ],
)
def test_bad_lines(line: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ipvsadm.parse_text(f"{SERVICE}\n{SERVER}\n{line}\n")
    assert str(caught.value) == f"line 3: {message}"


def test_an_unknown_scheduler() -> None:
    """Those are known that Python programs registered, too."""
    with pytest.raises(ConfigError) as caught:
        ipvsadm.parse_text("-A -t 192.0.2.11:80 -s fast")
    assert str(caught.value) == f"line 1: -s: 'fast' is none of {', '.join(schedulers.names())}"


#: What ipvsadm takes, and saves in another way or worse than svcdp; and what it refuses.
DIFFERENCES = {
    # Netmasks that are none.
    "-A -t 192.0.2.10:80 -p 10 -M 255.0.255.0": None,
    "-A -t 192.0.2.10:80 -p 10 -M 24": None,
    "-A -t 192.0.2.10:80 -p 10 -M 0.0.0.0": None,
    # Marks are unsigned: -1 could not be read again.
    "-A -f 4294967295": "-A -f 4294967295 -s wlc\n",
    # SIP is UDP here, and calls are bound by persistence.
    "-A -t 192.0.2.10:80 --pe sip": None,
    "-A -u 192.0.2.10:80 --pe sip": None,
    "-A -t 192.0.2.10:80 --pe sip -p": None,
    # A flag that means nothing.
    "-A -t 192.0.2.10:80 -s rr -b flag-1": None,
    # A comment.
    "# comment": "",
    # Port 0 of a server is the service's own.
    "-A -t 192.0.2.10:80 -s wlc\n-a -t 192.0.2.10:80 -r 10.0.0.1:0 -m": (
        "-A -t 192.0.2.10:80 -s wlc\n-a -t 192.0.2.10:80 -r 10.0.0.1:80 -m -w 1\n"
    ),
    # No method but masq has a port.
    "-A -f 5 -s rr\n-a -f 5 -r 10.0.0.1:80 -g": ("-A -f 5 -s rr\n-a -f 5 -r 10.0.0.1:0 -g -w 1\n"),
    # Thresholds are lost when ipvsadm saves.
    "-A -t 192.0.2.10:80 -s wlc\n-a -t 192.0.2.10:80 -r 10.0.0.1:80 -m -x 65536": (
        "-A -t 192.0.2.10:80 -s wlc\n-a -t 192.0.2.10:80 -r 10.0.0.1:80 -m -w 1 -x 65536\n"
    ),
    "-A -t 192.0.2.10:80 -s wlc\n-a -t 192.0.2.10:80 -r 10.0.0.1:80 -m -x 65535 -y 65535": (
        "-A -t 192.0.2.10:80 -s wlc\n-a -t 192.0.2.10:80 -r 10.0.0.1:80 -m -w 1 -x 65535 -y 65535\n"
    ),
    # Brackets without a port.
    "-A -t [2001:db8::10]:80 -s rr\n-a -t [2001:db8::10]:80 -r [fd00::1] -m": (
        "-A -t [2001:db8::10]:80 -s rr\n-a -t [2001:db8::10]:80 -r [fd00::1]:80 -m -w 1\n"
    ),
    # Counters cannot be set back.
    # Linux 6.1 has no such scheduler.
    "-A -t 192.0.2.10:80 -s twos": "-A -t 192.0.2.10:80 -s twos\n",
    # Octal, short and hexadecimal addresses, and a sign.
    "-A -t 192.0.2.010:80": None,
    "-A -t 192.0.2:80": None,
    "-A -t 0xc000020a:80": None,
    "-A -t 192.0.2.10:+80": None,
}


@pytest.mark.parametrize(("text", "is_taken", "saved"), json.loads(ipvsadm.golden("commands.json")))
def test_as_ipvsadm(text: str, is_taken: bool, saved: str) -> None:
    wanted = DIFFERENCES.get(text, saved if is_taken else None)
    try:
        lines = save(parse(text, ipvsadm.GoldenNames()).specs)
    except ConfigError:
        assert wanted is None
    else:
        got = "".join(f"{line}\n" for line in lines)
        assert got == wanted


def test_differences_are_of_the_table() -> None:
    table = {
        text: (taken, saved) for text, taken, saved in json.loads(ipvsadm.golden("commands.json"))
    }
    for text, wanted in DIFFERENCES.items():
        taken, saved = table[text]
        assert wanted != (saved if taken else None)


def test_a_dataplane_takes_it() -> None:
    def with_source(spec: DestinationSpec) -> DestinationSpec:
        source = "fd00::ffff" if ":" in spec.address else "192.0.2.1"
        return replace(spec, tunnel=replace(spec.tunnel, source=source)) if spec.tunnel else spec

    specs = [
        replace(spec, destinations=tuple(map(with_source, spec.destinations)))
        for spec in ipvsadm.specs()
    ]
    dataplane = Dataplane(1024)
    dataplane.apply(specs)
    assert [each.spec for each in dataplane.services()] == sorted(specs, key=lambda s: s.key)

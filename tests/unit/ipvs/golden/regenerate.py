"""Makes the golden files anew: what ipvsadm prints on a kernel with IPVS, in user-mode Linux.

Needs the Debian packages user-mode-linux, ipvsadm, iproute2 and gcc. The same file runs on the
host and, as the first process, in the guest.
"""

from __future__ import annotations

import fcntl
import json
import os
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

HERE = Path(__file__).parent
sys.path += [str(HERE.parents[2] / "differential" / "kernel"), str(HERE.parents[2] / "support")]

#: Of services.rules, by the name of the file.
LISTINGS = {
    "list": "-n",
    "list-nosort": "-n --nosort",
    "list-names": "",
    "thresholds": "-n --thresholds",
    "persistent-conn": "-n --persistent-conn",
    "tun-info": "-n --tun-info",
    "stats": "-n --stats",
    "stats-names": "--stats",
    "rate": "-n --rate",
}
#: Of one service, with the numbers of counters.txt.
NUMBERS = {
    "numbers-list": "-n --nosort",
    "numbers-persistent-conn": "-n --nosort --persistent-conn",
    "numbers-stats": "-n --nosort --stats",
    "numbers-stats-exact": "-n --nosort --stats --exact",
    "numbers-rate": "-n --nosort --rate",
    "numbers-rate-exact": "-n --nosort --rate --exact",
}
CLIENT = "198.51.100.7"
VIRTUAL = "192.0.2.10"
CONNECTIONS = f"""
-A -t {VIRTUAL}:80 -s rr
-a -t {VIRTUAL}:80 -r 10.0.0.1:8080 -m
-A -t {VIRTUAL}:443 -s rr -p 100000
-a -t {VIRTUAL}:443 -r 10.0.0.1:443 -g
-A -u {VIRTUAL}:53 -s rr
-a -u {VIRTUAL}:53 -r 10.0.0.1:53 -m
-A --sctp-service {VIRTUAL}:9 -s rr
-a --sctp-service {VIRTUAL}:9 -r 10.0.0.1:9 -m
-A -t [2001:db8::10]:80 -s rr
-a -t [2001:db8::10]:80 -r [fd00::9]:8080 -m
-A -t 192.0.2.12:0 -s rr -p 60
-a -t 192.0.2.12:0 -r 10.0.0.2:0 -m
-A -f 5 -s rr -p 60
-a -f 5 -r 10.0.0.2:0 -m
-A -f 5 -6 -s rr -p 60
-a -f 5 -6 -r [fd00::9]:0 -m
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        library = folder / "counters.so"
        subprocess.run(["cc", "-shared", "-fPIC", "-o", library, HERE / "counters.c"], check=True)
        subprocess.run(
            [
                "linux.uml",
                "mem=512M",
                "rootfstype=hostfs",
                "rootflags=/",
                "rw",
                "con=null",
                "con0=null",
                f"uml_dir={folder}",
                f"init={sys.executable}",
                "--",
                __file__,
                folder,
            ],
            check=True,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=120,
        )
        files = json.loads((folder / "files.json").read_text())
        if isinstance(files, str):
            sys.exit(files)
        for file, text in files.items():
            (HERE / file).write_text(text)


# -- in the guest --------------------------------------------------------------------------------


def run(*command: str, text: str = "", check: bool = True, **environment: str) -> str:
    environment = {**os.environ, **environment}
    done = subprocess.run(command, input=text, text=True, capture_output=True, env=environment)
    if check and done.returncode:
        raise RuntimeError(f"{command}: {done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def ipvsadm(options: str, text: str = "", **environment: str) -> str:
    return run("ipvsadm", *options.split(), text=text, **environment)


def main_in_guest(folder: Path) -> None:
    import guest

    try:
        guest.boot()
        guest.load(iter(("tun",)))
        bind(HERE / "hosts", "/etc/hosts")
        Path("/run/nsswitch.conf").write_text("hosts: files\nservices: files\n")
        bind(Path("/run/nsswitch.conf"), "/etc/nsswitch.conf")
        device = network()
        files: object = {
            **listings(),
            **numbers(folder / "counters.so"),
            **commands(),
            **connections(device),
        }
    except Exception:
        files = traceback.format_exc()
    with (folder / "files.json").open("w") as file:
        json.dump(files, file)
        file.flush()
        os.fsync(file.fileno())
    guest.libc.reboot(0x4321FEDC)  # LINUX_REBOOT_CMD_POWER_OFF


def bind(file: Path, where: str) -> None:
    run("mount", "--bind", str(file), where)


def listings() -> dict[str, str]:
    ipvsadm("-R", (HERE / "services.rules").read_text())
    files = {f"{name}.txt": ipvsadm(f"-L {words}") for name, words in LISTINGS.items()}
    files["saved.rules"] = ipvsadm("-S -n")
    files["saved-names.rules"] = ipvsadm("-S")
    ipvsadm("-C")
    ipvsadm("-R", files["saved.rules"])
    files["restored.txt"] = ipvsadm("-L -n --nosort")
    ipvsadm("-C")
    return files


def numbers(library: Path) -> dict[str, str]:
    table = HERE / "counters.txt"
    servers = len(table.read_text().splitlines()) - 1
    ipvsadm("-A -t 192.0.2.10:80 -s wlc")
    for number in range(1, servers + 1):
        ipvsadm(f"-a -t 192.0.2.10:80 -r 10.0.0.{number}:80 -m")
    changed = {"LD_PRELOAD": str(library), "COUNTERS": str(table)}
    files = {f"{name}.txt": ipvsadm(f"-L {words}", **changed) for name, words in NUMBERS.items()}
    ipvsadm("-C")
    return files


def commands() -> dict[str, str]:
    """Of each text in commands.json: whether ipvsadm takes it, and what it saves then."""
    texts = [row[0] for row in json.loads((HERE / "commands.json").read_text())]
    rows = []
    for text in texts:
        done = subprocess.run(["ipvsadm", "-R"], input=f"{text}\n", text=True, capture_output=True)
        rows.append([text, done.returncode == 0, ipvsadm("-S -n")])
        ipvsadm("-C")
    lines = ",\n".join(json.dumps(row) for row in rows)
    return {"commands.json": f"[\n{lines}\n]\n"}


def network() -> int:
    """All is behind one interface, whose other end is the file returned. Packets to some of the
    director's addresses have the firewall mark 5.
    """
    run("ip", "tuntap", "add", "dev", "t0", "mode", "tun")
    device = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(device, 0x400454CA, struct.pack("16sH", b"t0", 0x1001))  # TUNSETIFF, IP packets
    Path("/proc/sys/net/ipv6/conf/t0/disable_ipv6").write_text("0")
    for address in ("192.0.2.10", "192.0.2.12", "192.0.2.13", "2001:db8::10", "2001:db8::13"):
        length = 128 if ":" in address else 32
        run("ip", "addr", "add", f"{address}/{length}", "dev", "t0", *["nodad"][: length // 128])
    run("ip", "link", "set", "t0", "up")
    for version in ("-4", "-6"):
        run("ip", version, "route", "add", "default", "dev", "t0")
    for name in ("ipv4.ip_forward", "ipv6.conf.all.forwarding"):
        Path("/proc/sys/net", name.replace(".", "/")).write_text("1")
    for name in ("all", "t0"):
        Path(f"/proc/sys/net/ipv4/conf/{name}/rp_filter").write_text("0")
    for command, address in {"iptables": "192.0.2.13", "ip6tables": "2001:db8::13"}.items():
        rule = f"-t mangle -A PREROUTING -d {address} -j MARK --set-mark 5"
        run(f"{command}-legacy", *rule.split())
    return device


def connections(device: int) -> dict[str, str]:
    import wire

    ipvsadm("-R", CONNECTIONS)

    def tcp(source: str, port: int, target: str, number: int, flags: str) -> None:
        os.write(device, wire.packet("tcp", source, port, target, number, flags))

    for port, more in enumerate(("", "s", "sa", "saf", "saF", "safF", "saR"), start=4001):
        tcp(CLIENT, port, VIRTUAL, 80, "S")
        for letter in more:
            flags = {"s": "SA", "a": "A", "f": "FA", "F": "FA", "R": "R"}[letter]
            if letter in "aFR":
                tcp(CLIENT, port, VIRTUAL, 80, flags)
            if letter in "sf":
                tcp("10.0.0.1", 8080, CLIENT, port, flags)
    tcp(CLIENT, 4010, VIRTUAL, 443, "S")
    tcp(CLIENT, 4010, VIRTUAL, 443, "A")
    tcp("198.51.100.200", 40011, "192.0.2.12", 12345, "S")
    tcp(CLIENT, 4012, "192.0.2.13", 999, "S")
    tcp("2001:db8:9:9:9:9:9:7", 4013, "2001:db8::10", 80, "S")
    tcp("2001:db8:9::7", 4014, "2001:db8::13", 80, "S")
    os.write(device, wire.packet("udp", CLIENT, 4015, VIRTUAL, 53))
    os.write(device, wire.packet("sctp", CLIENT, 4016, VIRTUAL, 9))
    while True:
        time.sleep(0.1)
        files = {"connections.proc": Path("/proc/net/ip_vs_conn").read_text()}
        files["connections.txt"] = ipvsadm("-L -c -n")
        files["connections-names.txt"] = ipvsadm("-L -c")
        if files["connections.proc"] == Path("/proc/net/ip_vs_conn").read_text():
            return files  # all of them in one second


if __name__ == "__main__":
    if os.getpid() == 1:
        main_in_guest(Path(sys.argv[1]))
    else:
        main()

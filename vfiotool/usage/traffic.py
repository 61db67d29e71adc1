"""Uses of an interface that need no address: sockets and programs on it, tc rules.

Source: net/packet/af_packet.c, net/core/net-procfs.c, net/can/proc.c; what tc and bound sockets
do is an observation (host/observe.py).
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable

from vfiotool.host.paths import (
    KERNELS,
    NET_TRAFFIC,
    PROC_APPLETALK,
    PROC_CAN,
    PROC_LLC,
    PROC_MULTICAST4,
    PROC_MULTICAST6,
    PROC_PACKET,
    PROC_PACKET_GENERATOR,
    PROC_PROTOCOLS,
    SYS_BLOCK,
    SYS_RDMA,
)
from vfiotool.usage.blocker import Blocker
from vfiotool.usage.links import read_graph
from vfiotool.usage.sight import Sight


def traffic_usage(host: Sight, address: str, carriers: Iterable[str]) -> list[Blocker]:
    """What takes packets straight from the interfaces `carriers`, or sends them some."""
    taps = host.once("packet sockets", _packet_sockets)
    can = host.once("can sockets", _can_receivers)
    traffic = read_traffic(host)
    kernels = host.once("kernel protocols", _kernel_protocols)
    rdma = host.once("rdma over interfaces", _rdma)
    aoe = host.once("disks over ethernet", _disks_over_ethernet)
    graph = read_graph(host)
    found = []
    for name in sorted(carriers):
        facts = traffic.get(name, [])
        for fact in facts:
            if fact.startswith(KERNELS):
                detail = f"{fact} over {name}"
                evidence = _TOLD_BY.get(fact.removeprefix(KERNELS), f"{NET_TRAFFIC} names {{}}")
                evidence = evidence.format(shlex.quote(name))
                found.append(Blocker("packet-socket", address, name, detail, evidence))
        sockets = [f for f in facts if f not in _RULES and not f.startswith(KERNELS)]
        if name in taps:
            detail = f"a program has a packet socket on {name}"
            evidence = f"{PROC_PACKET} has the index of {name}"
            found.append(Blocker("packet-socket", address, name, detail, evidence))
        elif name in kernels:
            detail = f"the kernel speaks a protocol straight over {name} ({kernels[name]})"
            tables = f"{PROC_PROTOCOLS}, {PROC_MULTICAST4} or {PROC_MULTICAST6}"
            evidence = f"{tables} names {name}"
            found.append(Blocker("packet-socket", address, name, detail, evidence))
        elif name in can:
            detail = f"a program receives the CAN frames of {name}"
            evidence = f"{PROC_CAN}/{can[name]} names {name}"
            found.append(Blocker("packet-socket", address, name, detail, evidence))
        elif sockets:
            detail = f"a program has a socket bound to {name} ({', '.join(sockets)})"
            evidence = f"ss --all --numeric dev {shlex.quote(name)}"
            found.append(Blocker("packet-socket", address, name, detail, evidence))
        elif name in graph.own and graph.own[name].has_xdp:
            detail = f"an XDP program sees the packets of {name} first"
            evidence = f"ip link show {shlex.quote(name)}"
            remedy = f"ip link set {shlex.quote(name)} xdp off"
            found.append(Blocker("packet-socket", address, name, detail, evidence, remedy))
        for disk in aoe.get(name, ()):
            detail = f"the disk {disk} is reached over {name} (ATA over Ethernet)"
            evidence = f"{SYS_BLOCK}/{disk}/netif names {name}"
            found.append(Blocker("packet-socket", address, name, detail, evidence))
        if name in rdma:
            detail = f"the RDMA device {rdma[name]} stands on {name}"
            evidence = f"{SYS_RDMA}/{rdma[name]} has no device of its own"
            remedy = f"rdma link delete {shlex.quote(rdma[name])}"
            found.append(Blocker("bridge-or-bond", address, rdma[name], detail, evidence, remedy))
        found += _rules(address, name, facts)
    return found


_RULES = ("filtered", "redirected", "programmed")
# By what is said in a row of the kernel's own (host/observe_net.py).
_TOLD_BY = {
    "forwards CAN frames": "cangw -L",
    "receives multicasts for a program": "ip maddress show dev {}",
    "has an LLC socket": f"{PROC_LLC} has the address of {{}}",
    "speaks AppleTalk": f"{PROC_APPLETALK} names {{}}",
    "sends generated packets (pktgen)": f"{PROC_PACKET_GENERATOR}/{{}}",
}


def _rules(address: str, name: str, facts: Iterable[str]) -> list[Blocker]:
    found = []
    if "redirected" in facts:
        detail = f"a tc rule of another interface sends packets to {name} (mirred)"
        evidence = "tc actions list action mirred"
        found.append(Blocker("traffic-rule", address, name, detail, evidence))
    elif "filtered" in facts:
        detail = f"tc filters take packets of {name}"
        evidence = f"tc filter show dev {shlex.quote(name)} ingress, egress"
        quoted = shlex.quote(name)
        remedy = f"tc filter del dev {quoted} ingress; tc filter del dev {quoted} egress"
        found.append(Blocker("traffic-rule", address, name, detail, evidence, remedy))
    elif "programmed" in facts:
        detail = f"BPF programs take packets of {name} (tcx)"
        evidence = f"bpftool net show dev {shlex.quote(name)}"
        found.append(Blocker("traffic-rule", address, name, detail, evidence))
    return found


def _packet_sockets(host: Sight) -> frozenset[str]:
    names = {item.index: item.name for item in read_graph(host).own.values()}
    found = set()
    # sk RefCnt Type Proto Iface R Rmem User Inode (net/packet/af_packet.c, packet_seq_show)
    for line in (host.read(PROC_PACKET) or "").splitlines()[1:]:
        words = line.split()
        if len(words) >= 5 and words[4].isdecimal():
            found.add(names.get(int(words[4]), ""))
    return frozenset(found)


# Where the interface's name begins (net/core/net-procfs.c, ptype_seq_show).
_NAME_AT = 5


def _kernel_protocols(host: Sight) -> dict[str, str]:
    """Interface -> what takes a protocol's packets of it alone in the kernel: TIPC, FCoE, …, and
    the routing of multicasts, which an interface with a link-local address alone can take part in.

    Left out are packet sockets, which a table of their own tells.
    """
    found: dict[str, str] = {}
    # Number, interface, counters (net/ipv4/ipmr.c, ipmr_vif_seq_show).
    for table in (PROC_MULTICAST4, PROC_MULTICAST6):
        for line in (host.read(table) or "").splitlines()[1:]:
            words = line.split()
            if len(words) > 2:
                found.setdefault(words[1], "multicast routing")
    for line in (host.read(PROC_PROTOCOLS) or "").splitlines()[1:]:
        name, _, rest = line[_NAME_AT:].partition(" ")
        handler = rest.strip()
        if name and not handler.startswith(("packet_", "tpacket_")):
            found.setdefault(name, handler)
    return found


def _rdma(host: Sight) -> dict[str, str]:
    """Interface -> the RDMA device that is made of it alone (rxe, siw), not one of a card's own.

    Source: Documentation/ABI/stable/sysfs-class-infiniband, gid_attrs/ndevs.
    """
    found: dict[str, str] = {}
    for device in host.listdir(SYS_RDMA):
        if "/virtual/" not in (host.readlink(f"{SYS_RDMA}/{device}") or ""):
            continue
        ports = f"{SYS_RDMA}/{device}/ports"
        for port in host.listdir(ports):
            name = host.read(f"{ports}/{port}/gid_attrs/ndevs/0")
            if name:
                found.setdefault(name, device)
    return found


def _disks_over_ethernet(host: Sight) -> dict[str, list[str]]:
    """Interface -> disks that it leads to (drivers/block/aoe/aoeblk.c, aoedisk_show_netif)."""
    found: dict[str, list[str]] = {}
    for disk in host.attached.block:
        names = host.read(f"{SYS_BLOCK}/{disk}/netif") if disk.startswith("etherd") else None
        for name in (names or "").split(","):
            found.setdefault(name, []).append(disk)
    return found


def _can_receivers(host: Sight) -> dict[str, str]:
    """Interface -> the list of receivers that names it (net/can/proc.c, can_print_rcvlist)."""
    found: dict[str, str] = {}
    for table in host.listdir(PROC_CAN):
        if table.startswith("rcvlist_"):
            for line in (host.read(f"{PROC_CAN}/{table}") or "").splitlines():
                words = line.split()
                if len(words) >= 6 and words[0] != "device":
                    found.setdefault(words[0], table)
    return found


def read_traffic(host: Sight) -> dict[str, list[str]]:
    """Interface (or VSOCK) -> what rules and sockets do with it, looked up once."""
    return host.once("traffic", _traffic)


def _traffic(host: Sight) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for fields in host.observed(NET_TRAFFIC):
        if len(fields) == 2:
            found.setdefault(fields[0], []).append(fields[1])
    return found

"""The one line that `show` prints of each capability; `--json` has all of its fields."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from vfiotool.devices.config.decode import Capability
from vfiotool.devices.config.layout import Value

_Fields = Mapping[str, Value]


def summary(capability: Capability) -> str:
    """What an operator wants to know of it; empty where only the name is known."""
    make = _SUMMARIES.get(capability.name)
    return "" if make is None or not capability.fields else make(capability.fields)


def speed(gts: object, width: object) -> str:
    """A link's speed and width; a code that stands for no speed is unknown, as lspci says."""
    if isinstance(gts, int | float):
        return f"{gts:g} GT/s x{'?' if width is None else width}"
    return f"speed unknown, width {'unknown' if width is None else f'x{width}'}"


def _part(fields: _Fields, name: str) -> _Fields:
    value = fields.get(name)
    return value if isinstance(value, dict) else {}


def _set(fields: _Fields) -> str:
    """The flags that are set, as words."""
    words = [name.replace("_", " ") for name, value in fields.items() if value is True]
    return ", ".join(words) or "none"


def _enabled(value: Value) -> str:
    return "enabled" if value else "disabled"


def _pcie(fields: _Fields) -> str:
    words = [str(fields["port_type"]).replace("-", " ")]
    link, status = _part(fields, "link_capabilities"), _part(fields, "link_status")
    if link:
        now = speed(status.get("speed_gts"), status.get("width"))
        best = speed(link["max_speed_gts"], link["max_width"])
        words.append(now if now == best else f"{now} of {best}")
    control = _part(fields, "device_control")
    if control:
        words.append(f"payload {control['max_payload_bytes']} B")
        words.append(f"read request {control['max_read_request_bytes']} B")
    if _part(fields, "device_capabilities").get("flr"):
        words.append("FLR")
    return ", ".join(words)


def _pm(fields: _Fields) -> str:
    kept = "kept" if fields["no_soft_reset"] else "lost"
    return f"{fields['power_state']}, state {kept} over D3hot"


def _sriov(fields: _Fields) -> str:
    enabled = _part(fields, "control").get("vfs")
    return (
        f"{fields['num_vfs']} of {fields['total_vfs']} VFs {_enabled(enabled)}, first at "
        f"+{fields['vf_offset']}, stride {fields['vf_stride']}"
    )


def _aer(fields: _Fields) -> str:
    errors = {**_part(fields, "uncorrectable_status"), **_part(fields, "correctable_status")}
    return f"errors seen: {_set(errors)}"


def _acs(fields: _Fields) -> str:
    return f"on: {_set(_part(fields, 'control'))}; can: {_set(_part(fields, 'capabilities'))}"


def _rebar(fields: _Fields) -> str:
    bars = fields["bars"]
    return (
        ", ".join(
            f"BAR {bar['bar']} {bar['size']} B" for bar in bars or () if isinstance(bar, dict)
        )
        if isinstance(bars, list)
        else ""
    )


_SUMMARIES: dict[str, Callable[[_Fields], str]] = {
    "pcie": _pcie,
    "pm": lambda f: (
        f"{f['power_state']}, soft reset {'not done' if f['no_soft_reset'] else 'done'}"
    ),
    "msi": lambda f: f"{_enabled(f['enabled'])}, {f['vectors_enabled']} of {f['vectors']} vectors",
    "msi-x": lambda f: f"{_enabled(f['enabled'])}, {f['vectors']} vectors in BAR {f['table_bar']}",
    "af": lambda f: "FLR" if f["flr"] else "",
    "vendor": lambda f: f"{f['length']} bytes",
    "subsystem": lambda f: f"{f['subsystem_vendor']}:{f['subsystem_device']}",
    "aer": _aer,
    "acs": _acs,
    "ari": lambda f: f"next function {_part(f, 'capabilities').get('next_function')}",
    "ats": lambda f: _enabled(_part(f, "control").get("enabled")),
    "pri": lambda f: _enabled(_part(f, "control").get("enabled")),
    "pasid": lambda f: _enabled(_part(f, "control").get("enabled")),
    "dsn": lambda f: str(f["serial"]),
    "sriov": _sriov,
    "rebar": _rebar,
    "vf-rebar": _rebar,
    "vsec": lambda f: f"id {f['id']}, {f['length']} bytes",
    "dvsec": lambda f: f"{f['vendor']}:{f['id']}, {f['length']} bytes",
    "dpc": lambda f: "triggered" if _part(f, "status").get("triggered") else "",
    "ltr": lambda f: f"snoop {f['max_snoop_ns']} ns, no snoop {f['max_no_snoop_ns']} ns",
}

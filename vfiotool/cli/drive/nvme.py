"""`nvme identify|read|write|bench|secondaries`: vfiotool's own NVMe driver on the command line."""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vfiotool.cli import candidates, output
from vfiotool.cli.context import DeviceArgument, area, examples, wants_json
from vfiotool.cli.drive import nvme_admin, nvme_blocks
from vfiotool.cli.drive.nvme_opening import LbaOption, NamespaceOption, controlled
from vfiotool.cli.drive.opening import BackendOption, seekable
from vfiotool.errors import Refused, Unsupported, UsageError

if TYPE_CHECKING:
    from vfiotool.drivers.nvme import Controller, Job, LoadReport

ShadowOption = Annotated[
    bool, typer.Option("--shadow-doorbells", help="Use them where the controller has them.")
]

app = area("Identify, read, write, manage and measure an NVMe disk from user space.")


@app.command("identify", epilog=examples("vfiotool nvme identify 0000:05:01.0"))
def identify(
    context: typer.Context,
    device: DeviceArgument,
    backend: BackendOption = "auto",
) -> None:
    """Show what the controller and its namespaces are."""
    with controlled(context, device, backend) as controller:
        told = controller.identity
        version = controller.registers.version.fields()
        found: dict[str, Any] = {
            "device": controller.device.name,
            "backend": controller.device.backend,
            "model": told.model,
            "serial": told.serial,
            "firmware": told.firmware,
            "version": f"{version['major']}.{version['minor']}.{version['tertiary']}",
            "controller_id": told.controller_id,
            "max_transfer_bytes": controller.max_transfer,
            "queue_pairs": controller.queue_limit,
            "volatile_write_cache": told.volatile_write_cache,
            "shadow_doorbells": told.doorbell_buffers,
            "virtualization_management": told.virtualization,
            "memory_buffer": _memory_buffer(controller),
            "namespaces": [_namespace(controller, nsid) for nsid in controller.namespaces()],
        }
    if wants_json(context):
        output.emit(found)
        return
    output.write(f"{found['model']}  serial {found['serial']}  firmware {found['firmware']}")
    output.write(
        f"  NVMe {found['version']}, {found['queue_pairs']} queue pairs, "
        f"{found['max_transfer_bytes']} bytes a command, through {found['backend']}"
    )
    if (buffer := found["memory_buffer"]) is not None:
        unusable = f"; not used here: {buffer['problem']}" if buffer["problem"] else ""
        output.write(
            f"  controller memory buffer of {buffer['size_bytes']} bytes in BAR {buffer['region']}"
            f" for {', '.join(buffer['holds']) or 'nothing'}{unusable}"
        )
    for disk in found["namespaces"]:
        total = disk["blocks"] * disk["block_bytes"]
        output.write(
            f"  namespace {disk['nsid']}: {disk['blocks']} blocks of {disk['block_bytes']} bytes"
            f" ({total / (1 << 20):.1f} MiB){_odd(disk)}"
        )


def _memory_buffer(controller: Controller) -> dict[str, Any] | None:
    buffer = controller.memory_buffer
    if buffer is None:
        return None
    return {
        "size_bytes": buffer.size_bytes,
        "region": buffer.region,
        "offset": buffer.offset,
        "holds": buffer.holds,
        "problem": buffer.problem,
    }


def _namespace(controller: Controller, nsid: int) -> dict[str, Any]:
    """What a namespace is; one that cannot be used here is listed with its reason."""
    from vfiotool.drivers.nvme import COMMAND_SETS, Namespace

    problem = None
    disk = Namespace(nsid, 0, 0)
    kind = controller.command_set(nsid)
    try:
        disk = controller.namespace(nsid)
        disk.refuse_metadata()
    except Unsupported as error:
        problem = error.message
    return {
        "nsid": nsid,
        "blocks": disk.blocks,
        "block_bytes": disk.block_bytes,
        "metadata_bytes": disk.metadata_bytes,
        "command_set": COMMAND_SETS.get(kind, str(kind)),
        "problem": problem,
    }


def _odd(disk: dict[str, Any]) -> str:
    zoned = ", zoned" if disk["command_set"] == "zoned" else ""
    if disk["problem"] is None:
        return zoned
    return f"{zoned}; not for nvme read, write and bench: {disk['problem']}"


@app.command(
    "read",
    epilog=examples(
        "vfiotool nvme read 05:01.0 --blocks 8 --output blocks.bin",
        "vfiotool nvme read 05:01.0 --output - | hexdump -C",
    ),
)
def read(
    context: typer.Context,
    device: DeviceArgument,
    target: Annotated[
        str,
        typer.Option(
            "--output",
            metavar="FILE",
            help="Where to; - for standard output.",
            autocompletion=candidates.files,
        ),
    ],
    lba: LbaOption = 0,
    blocks: Annotated[int, typer.Option("--blocks", metavar="N", help="How many.")] = 1,
    nsid: NamespaceOption = 1,
    backend: BackendOption = "auto",
) -> None:
    """Copy blocks of a namespace to a file."""
    if blocks < 1 or lba < 0:
        raise UsageError("--blocks is at least 1, --lba at least 0")
    if target == "-" and wants_json(context):
        raise UsageError("--json and the data cannot both go to standard output")
    with controlled(context, device, backend) as controller:
        disk = controller.namespace(nsid)
        queue = controller.create_queue()
        digest = hashlib.sha256()
        step = max(1, (8 << 20) // disk.block_bytes)
        with output.opened(target) as sink:
            for start in range(lba, lba + blocks, step):
                data = queue.read(disk, start, min(step, lba + blocks - start))
                digest.update(data)
                sink.write(data)
        name = controller.device.name
    if wants_json(context):
        told = {"device": name, "nsid": nsid, "lba": lba, "blocks": blocks}
        output.emit({**told, "block_bytes": disk.block_bytes, "sha256": digest.hexdigest()})


@app.command("write", epilog=examples("vfiotool nvme write 05:01.0 --input blocks.bin --lba 0"))
def write(
    context: typer.Context,
    device: DeviceArgument,
    source: Annotated[
        str,
        typer.Option(
            "--input",
            metavar="FILE",
            help="Where from; - for standard input.",
            autocompletion=candidates.files,
        ),
    ],
    lba: LbaOption = 0,
    nsid: NamespaceOption = 1,
    backend: BackendOption = "auto",
) -> None:
    """Copy a file onto blocks of a namespace, and flush. What was there is gone."""
    if lba < 0:
        raise UsageError("--lba is at least 0")
    with seekable(source) as file, controlled(context, device, backend) as controller:
        disk = controller.namespace(nsid)
        length = file.seek(0, os.SEEK_END)
        file.seek(0)
        if length % disk.block_bytes or lba * disk.block_bytes + length > disk.size_bytes:
            raise UsageError(
                f"{source} has {length} bytes: not whole blocks of {disk.block_bytes}, or beyond "
                f"the {disk.blocks} blocks of the namespace"
            )
        queue = controller.create_queue()
        digest = hashlib.sha256()
        at = lba
        while data := file.read(8 << 20):
            queue.write(disk, at, data)
            digest.update(data)
            at += len(data) // disk.block_bytes
        queue.flush(disk)
        name = controller.device.name
    if wants_json(context):
        told = {"device": name, "nsid": nsid, "lba": lba, "blocks": at - lba}
        output.emit({**told, "block_bytes": disk.block_bytes, "sha256": digest.hexdigest()})
    else:
        output.say(f"{at - lba} blocks written")


@app.command(
    "bench", epilog=examples("vfiotool nvme bench 05:01.0 --rw randread --bs 4k --iodepth 32")
)
def bench(
    context: typer.Context,
    device: DeviceArgument,
    rw: Annotated[
        str, typer.Option("--rw", help="read, write, rw, randread, randwrite or randrw.")
    ] = "randread",
    bs: Annotated[str, typer.Option("--bs", metavar="SIZE", help="Bytes a command.")] = "4k",
    iodepth: Annotated[int, typer.Option("--iodepth", metavar="N", help="In flight a queue.")] = 1,
    runtime: Annotated[float, typer.Option("--runtime", metavar="SECONDS", help="How long.")] = 5.0,
    number: Annotated[
        int, typer.Option("--number", metavar="N", help="End after N commands a queue.")
    ] = 0,
    queues: Annotated[int, typer.Option("--queues", metavar="N", help="Queue pairs.")] = 1,
    batch: Annotated[
        int, typer.Option("--batch", metavar="N", help="Send anew when N are done.")
    ] = 1,
    span: Annotated[
        str, typer.Option("--size", metavar="SIZE", help="The part used; 0: all.")
    ] = "0",
    rwmixread: Annotated[
        int, typer.Option("--rwmixread", metavar="PERCENT", help="Reads in rw, randrw.")
    ] = 50,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Of the random blocks.")] = 1,
    shadow: ShadowOption = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Let a load that writes destroy what is there.")
    ] = False,
    nsid: NamespaceOption = 1,
    backend: BackendOption = "auto",
) -> None:
    """Measure a namespace in the manner of fio. What writes needs --overwrite."""
    from vfiotool.drivers.nvme import bench as nvme_bench
    from vfiotool.virtio.exports import parse_size

    job = nvme_bench.Job(
        pattern=_pattern(rw),
        size_bytes=parse_size(bs, "--bs"),
        depth=iodepth,
        queues=queues,
        batch=batch,
        runtime_s=0.0 if number else runtime,
        limit=number,
        span_bytes=parse_size(span, "--size"),
        read_percent=rwmixread,
        seed=seed,
    )
    _refuse_writes(job, device, overwrite)
    with controlled(context, device, backend, shadow_doorbells=shadow) as controller:
        report = nvme_bench.run(controller, controller.namespace(nsid), job)
        told = {
            "device": controller.device.name,
            "backend": controller.device.backend,
            "nsid": nsid,
            "shadow_doorbells": shadow,
        }
    if wants_json(context):
        output.emit({**told, **nvme_bench.as_json(report, job)})
    else:
        _show(report, job)


def _refuse_writes(job: Job, device: str, overwrite: bool) -> None:
    if job.writes and not overwrite:
        raise Refused(
            f"--rw {job.pattern} would overwrite what is on {device}",
            hint="add --overwrite if nothing there is needed",
            device=device,
        )


def _pattern(text: str) -> str:
    from vfiotool.drivers.nvme import PATTERNS

    if text not in PATTERNS:
        raise UsageError(f"no pattern {text[:40]!r}", hint=f"one of {', '.join(PATTERNS)}")
    return text


def _show(report: LoadReport, job: Job) -> None:
    from vfiotool.drivers.nvme import PERCENTILES

    for name, ios in (("read", report.reads), ("write", report.writes)):
        if ios:
            rate = ios / report.elapsed_s
            output.write(
                f"{name}: {rate:,.0f} IOPS, {rate * job.size_bytes / (1 << 20):,.1f} MiB/s"
            )
    mean = report.latency_sum_ns / report.ios / 1000
    output.write(
        f"latency: min {report.latency_min_ns / 1000:.1f}, mean {mean:.1f}, "
        f"max {report.latency_max_ns / 1000:.1f} µs"
    )
    steps = (f"p{p:g} {report.percentile_ns(p) / 1000:.1f}" for p in PERCENTILES)
    output.write(f"         {', '.join(steps)} µs")
    output.write(
        f"doorbell writes: {report.tail_writes} + {report.head_writes} for {report.ios} commands"
    )


@app.command("secondaries", epilog=examples("vfiotool nvme secondaries 0000:05:01.0"))
def secondaries(
    context: typer.Context,
    device: DeviceArgument,
    backend: BackendOption = "auto",
) -> None:
    """List the controllers of this PF's VFs, and what each has been given."""
    from vfiotool.drivers.nvme import virtualization

    with controlled(context, device, backend) as controller:
        entries = virtualization.secondaries(controller)
        name = controller.device.name
    if wants_json(context):
        listed = [
            {
                "controller_id": entry.controller_id,
                "vf_number": entry.vf_number,
                "online": entry.online,
                "queues": entry.queues,
                "interrupts": entry.interrupts,
            }
            for entry in entries
        ]
        output.emit({"device": name, "secondary_controllers": listed})
        return
    rows = [
        [
            str(entry.controller_id),
            str(entry.vf_number),
            "online" if entry.online else "offline",
            str(entry.queues),
            str(entry.interrupts),
        ]
        for entry in entries
    ]
    output.table(("CONTROLLER", "VF", "STATE", "QUEUES", "INTERRUPTS"), rows)


# What manages a disk, and what works on blocks, is in files of its own and comes last in the help.
app.registered_commands += nvme_admin.app.registered_commands
app.registered_commands += nvme_blocks.app.registered_commands

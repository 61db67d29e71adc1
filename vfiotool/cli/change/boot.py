"""`boot enable|disable|status|run`: a policy at every boot."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from vfiotool.cli import candidates, output
from vfiotool.cli.change.changing import DEADLINE_S, DryRun, Timeout, check_seconds
from vfiotool.cli.context import area, examples, host_of, remember_done, wants_json
from vfiotool.errors import NotFound, Refused
from vfiotool.host.tree import read_only_root

app = area("Apply a policy at every boot.")


def _root(context: typer.Context) -> str:
    """`boot` changes this machine alone: its files, its systemd."""
    host = host_of(context)
    if not host.live:
        raise read_only_root(host.name)
    return "/"


@app.command(
    "enable",
    epilog=examples(
        "vfiotool boot enable policy.toml --dry-run",
        "vfiotool boot enable policy.toml",
        "vfiotool boot enable policy.toml --early",
    ),
)
def enable(
    context: typer.Context,
    policy: Annotated[
        str,
        typer.Argument(
            metavar="POLICY",
            help="The policy file; it is copied.",
            autocompletion=candidates.policies,
        ),
    ],
    early: Annotated[
        bool, typer.Option("--early", help="Bind devices inside the initramfs, by their ids.")
    ] = False,
    wait: Annotated[
        int,
        typer.Option(metavar="SECONDS", min=0, max=120, help="Longest wait for absent devices."),
    ] = 10,
    dry_run: DryRun = False,
) -> int:
    """Install what applies a policy at every boot."""
    from vfiotool.boot import enable as boot
    from vfiotool.boot import run as boot_run
    from vfiotool.policy.parse import read_policy

    host = host_of(context)
    rules = read_policy(policy)
    command = boot.own_command()
    places = boot.own_places(command)
    root = "/" if dry_run else _root(context)
    plan = boot.plan_enabling(host, root, rules, command, places, early=early, wait_s=wait)
    if not dry_run:
        boot.refuse_foreign_places((*places, *boot.called_as()))
        boot.enable(root, plan, command)
        remember_done(context, "the policy is enabled (to take it back: vfiotool boot disable)")
        _warn([f"{text} failed: run it" for text in boot_run.reload_managers()])
    if wants_json(context):
        output.emit(
            {
                "enabled": not dry_run,
                "dry_run": dry_run,
                "early": plan.early is not None,
                "files": [
                    {"path": f"/{file.path}", "link": file.link, "mode": f"{file.mode:o}"}
                    | ({"content": file.content} if dry_run else {})
                    for file in plan.files
                ],
                "notes": list(plan.notes),
                "next": list(plan.next),
            }
        )
        return 0
    for file in plan.files:
        output.write(f"{'would install' if dry_run else 'installed'} /{file.path}")
        if dry_run:
            text = f"-> {file.link}" if file.link is not None else file.content.rstrip("\n")
            output.write("\n".join(f"    {line}" for line in text.split("\n")))
    _warn(plan.notes)
    for text in plan.next:
        output.say(f"next: {text}")
    return 0


@app.command("disable", epilog=examples("vfiotool boot disable --dry-run", "vfiotool boot disable"))
def disable(
    context: typer.Context,
    changed_too: Annotated[
        bool, typer.Option("--changed-too", help="Also remove files that somebody has changed.")
    ] = False,
    dry_run: DryRun = False,
) -> int:
    """Remove what boot enable installed."""
    from vfiotool.boot import enable as boot
    from vfiotool.boot import run as boot_run

    root = _root(context)
    if dry_run:
        found = boot.read_status(root)
        removed = [path for path, state in found.files.items() if state == "ok"]
        kept = [path for path, state in found.files.items() if state == "changed"]
        images = bool(found.early)
    else:
        removed, kept, images = boot.disable(root, changed_too=changed_too)
        if removed:
            remember_done(context, "what boot enable installed is removed")
            _warn([f"{text} failed: run it" for text in boot_run.reload_managers()])
    following = boot.rebuild_commands(root) if images and removed else ()
    if kept and not changed_too and not dry_run:
        raise Refused(
            f"kept, as somebody changed it: {', '.join(f'/{path}' for path in kept)}",
            hint="look at it; to remove it as well: vfiotool boot disable --changed-too",
        )
    if wants_json(context):
        output.emit(
            {
                "removed": [f"/{path}" for path in removed],
                "kept": [f"/{path}" for path in kept],
                "dry_run": dry_run,
                "next": list(following),
            }
        )
        return 0
    for path in removed:
        output.write(f"{'would remove' if dry_run else 'removed'} /{path}")
    if not removed:
        output.write("nothing was installed")
    for text in following:
        output.say(f"next: {text}   (the initramfs still takes the devices)")
    return 0


@app.command("status", epilog=examples("vfiotool boot status"))
def status(context: typer.Context) -> int:
    """Show what is installed, and how the last boot went; exit code 1 if something is wrong."""
    from vfiotool.boot import enable as boot
    from vfiotool.boot import run as boot_run

    root = _root(context)
    found = boot.read_status(root)
    last = boot_run.read_record() if found.enabled else None
    unit = boot_run.unit_state() if found.enabled else None
    failed = last is not None and (last.get("error") or last.get("absent"))
    if wants_json(context):
        output.emit(
            {
                "enabled": found.enabled,
                "early": found.early,
                "command": list(found.command),
                "files": [{"path": f"/{name}", "state": how} for name, how in found.files.items()],
                "stale_images": [f"/{path}" for path in found.stale_images],
                "unit": unit,
                "last": last,
            }
        )
    else:
        _print_status(found, unit, last)
    return 1 if found.enabled and (failed or unit == "failed" or not found.in_order) else 0


def _print_status(found: Any, unit: str | None, last: dict[str, Any] | None) -> None:
    if not found.enabled:
        output.write("not enabled")
        return
    output.write(f"enabled{', early' if found.early else ''}; unit {unit or 'not known'}")
    for path, state in found.files.items():
        if state != "ok":
            output.write(f"/{path}: {state}")
    for path in found.stale_images:
        output.write(f"/{path}: older than the settings; rebuild it")
    if last is None:
        output.write("no run in this boot yet")
    elif last.get("error"):
        output.write(f"last run failed: {last['error'].get('message')}")
    else:
        output.write(f"last run: {len(last.get('steps', []))} steps")
    for text in (last or {}).get("absent", []):
        output.write(f"absent: {text}")


@app.command("run", epilog=examples("vfiotool boot run"))
def run(
    context: typer.Context,
    wait: Annotated[
        int, typer.Option(metavar="SECONDS", min=0, help="Longest wait for absent devices.")
    ] = 0,
    late: Annotated[
        str | None, typer.Option(metavar="DEVICE", help="The late device that is the occasion.")
    ] = None,
    timeout: Timeout = DEADLINE_S,
) -> int:
    """Apply the installed policy now (what the units call)."""
    from vfiotool.boot import run as boot_run
    from vfiotool.boot.places import POLICY
    from vfiotool.policy.parse import read_policy

    root = _root(context)
    try:
        policy = read_policy(f"{root}{POLICY}")
    except NotFound as error:
        raise NotFound(error.message, hint="vfiotool boot enable POLICY") from error
    check_seconds("--timeout", timeout)
    done = boot_run.run_policy(host_of(context), policy, wait_s=wait, timeout_s=timeout)
    if done.steps:
        remember_done(context, f"{len(done.steps)} steps are done (to revert them: vfiotool undo)")
    if wants_json(context):
        output.emit({"late": late, **done.as_json()})
        return 0
    occasion = f" (for {late})" if late else ""
    output.write(f"{len(done.steps)} steps done, {len(done.absent)} rules without device{occasion}")
    _warn([f"absent: {text}" for text in done.absent])
    return 0


def _warn(texts: list[str] | tuple[str, ...]) -> None:
    for text in texts:
        output.say(f"vfiotool: {text}")

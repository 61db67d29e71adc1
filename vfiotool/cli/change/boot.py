"""`boot enable|disable|status|run` and `import`."""

from __future__ import annotations

import os
import re
import stat
import sys
from pathlib import Path
from typing import Annotated, Any

from vfiotool.cli import output as render
from vfiotool.cli.change.changing import DEADLINE_S, DryRun, Timeout, check_seconds, print_line
from vfiotool.cli.declare import Argument, Commands, Context, Option
from vfiotool.errors import AnswerIsNo, NotFound, Refused, UsageError, from_oserror
from vfiotool.host.tree import read_only_root

_LARGEST_FOLDER = 10_000
_UUID_NAME = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")


def register(app: Commands) -> None:
    """Add this area's commands."""
    boot = Commands(help="Apply a policy at every boot.")
    boot.command("enable", help="Install what applies a policy at every boot.")(enable)
    boot.command("disable", help="Take all of it away again.")(disable)
    boot.command("status", help="Tell what is installed, and how the last boot went.")(status)
    boot.command("run", help="Apply the installed policy now (what the units call).")(run)
    app.add_typer(boot, name="boot")
    app.command("import", help="Turn another tool's settings into a policy.")(import_source)


def _root(context: Context) -> str:
    """`boot` changes this machine alone: its files, its systemd."""
    host = render.host(context)
    if not host.live:
        raise read_only_root(host.name)
    return "/"


def enable(
    context: Context,
    policy: Annotated[str, Argument(metavar="POLICY", help="The policy file; it is copied.")],
    early: Annotated[
        bool, Option("--early", help="Take devices inside the initramfs, by their ids.")
    ] = False,
    wait: Annotated[
        int,
        Option(metavar="SECONDS", min=0, max=120, help="Longest wait for absent devices."),
    ] = 10,
    dry_run: DryRun = False,
) -> int:
    from vfiotool.boot import enable as boot
    from vfiotool.boot import run as boot_run
    from vfiotool.policy.parse import read_policy

    host = render.host(context)
    rules = read_policy(policy)
    command = boot.own_command()
    places = boot.own_places(command)
    root = "/" if dry_run else _root(context)
    plan = boot.plan_enabling(host, root, rules, command, places, early=early, wait_s=wait)
    if not dry_run:
        boot.refuse_foreign_places(places)
        boot.enable(root, plan, command)
        _warn([f"{text} failed: run it" for text in boot_run.reload_managers()])
    if render.state(context).json:
        render.emit(
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
        print_line(f"{'would install' if dry_run else 'installed'} /{file.path}")
        if dry_run:
            text = f"-> {file.link}" if file.link is not None else file.content.rstrip("\n")
            print_line("\n".join(f"    {line}" for line in text.split("\n")))
    _warn(plan.notes)
    for text in plan.next:
        render.say(f"next: {text}")
    return 0


def disable(
    context: Context,
    changed_too: Annotated[
        bool, Option("--changed-too", help="Also remove files that somebody has changed.")
    ] = False,
    dry_run: DryRun = False,
) -> int:
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
            _warn([f"{text} failed: run it" for text in boot_run.reload_managers()])
    following = boot.rebuild_commands(root) if images and removed else ()
    if kept and not changed_too and not dry_run:
        raise Refused(
            f"kept, as somebody changed it: {', '.join(f'/{path}' for path in kept)}",
            hint="look at it; to remove it as well: vfiotool boot disable --changed-too",
        )
    if render.state(context).json:
        render.emit(
            {
                "removed": [f"/{path}" for path in removed],
                "kept": [f"/{path}" for path in kept],
                "dry_run": dry_run,
                "next": list(following),
            }
        )
        return 0
    for path in removed:
        print_line(f"{'would remove' if dry_run else 'removed'} /{path}")
    if not removed:
        print_line("nothing was installed")
    for text in following:
        render.say(f"next: {text}   (the initramfs still takes the devices)")
    return 0


def status(context: Context) -> int:
    from vfiotool.boot import enable as boot
    from vfiotool.boot import run as boot_run

    root = _root(context)
    found = boot.read_status(root)
    last = boot_run.read_record() if found.enabled else None
    unit = boot_run.unit_state() if found.enabled else None
    failed = last is not None and (last.get("error") or last.get("absent"))
    if render.state(context).json:
        render.emit(
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
        print_line("not enabled")
        return
    print_line(f"enabled{', early' if found.early else ''}; unit {unit or 'not known'}")
    for path, state in found.files.items():
        if state != "ok":
            print_line(f"/{path}: {state}")
    for path in found.stale_images:
        print_line(f"/{path}: older than the settings; rebuild it")
    if last is None:
        print_line("no run in this boot yet")
    elif last.get("error"):
        print_line(f"last run failed: {last['error'].get('message')}")
    else:
        print_line(f"last run: {len(last.get('steps', []))} steps")
    for text in (last or {}).get("absent", []):
        print_line(f"absent: {text}")


def run(
    context: Context,
    wait: Annotated[
        int, Option(metavar="SECONDS", min=0, help="Longest wait for absent devices.")
    ] = 0,
    late: Annotated[
        str | None, Option(metavar="DEVICE", help="The late device that is the occasion.")
    ] = None,
    timeout: Timeout = DEADLINE_S,
) -> int:
    from vfiotool.boot import run as boot_run
    from vfiotool.boot.texts import POLICY
    from vfiotool.policy.parse import read_policy

    root = _root(context)
    try:
        policy = read_policy(f"{root}{POLICY}")
    except NotFound as error:
        raise NotFound(error.message, hint="vfiotool boot enable POLICY") from error
    check_seconds("--timeout", timeout)
    done = boot_run.run_policy(render.host(context), policy, wait_s=wait, timeout_s=timeout)
    if render.state(context).json:
        render.emit({"late": late, **done.as_json()})
        return 0
    occasion = f" (for {late})" if late else ""
    print_line(f"{len(done.steps)} steps done, {len(done.absent)} rules without device{occasion}")
    _warn([f"absent: {text}" for text in done.absent])
    return 0


def _warn(texts: list[str] | tuple[str, ...]) -> None:
    for text in texts:
        render.say(f"vfiotool: {text}")


def import_source(
    context: Context,
    source: Annotated[
        str,
        Argument(metavar="SOURCE", help="A file, a folder, - for standard input, or text."),
    ],
    kind: Annotated[
        str | None, Option("--from", metavar="KIND", help="What wrote it, if not seen.")
    ] = None,
    node: Annotated[
        str | None, Option(metavar="NAME", help="Which node of a Proxmox cluster.")
    ] = None,
) -> int:
    from vfiotool.policy.importers import import_files

    origin, files = read_source(source)
    done = import_files(origin, files, kind, node=node)
    if render.state(context).json:
        render.emit(
            {
                "source": origin,
                "kind": done.kind,
                "policy": done.policy,
                "rules": [rule.as_json() for rule in done.rules],
                "leftovers": [item.as_json() for item in done.leftovers],
            }
        )
        return 1 if done.leftovers and not done.rules else 0
    for item in done.leftovers:
        render.say(f"vfiotool: not carried over: {item.where}: {item.what}: {item.why}")
    if done.leftovers and not done.rules:
        raise AnswerIsNo(f"nothing of {origin} could be carried over")
    sys.stdout.write(done.policy)
    return 0


def read_source(source: str) -> tuple[str, dict[str, str]]:
    """The name of a source and its files, path to text. Links in a folder are not followed.

    Raises NotFound, UsageError for a source that is too large, NotPermitted.
    """
    if source == "-":
        return "standard input", {"stdin": _decode("standard input", sys.stdin.buffer.read())}
    path = Path(source)
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        # A command line was given as it is: it has blanks or assignments and is no file.
        if " " in source.strip() or "=" in source:
            return "the command line", {"text": source}
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            raise from_oserror(f"read {source[:200]}", error) from error
        raise NotFound(f"there is no file or folder {source[:200]!r}") from error
    if stat.S_ISDIR(mode):
        return source, _read_folder(path)
    # mdevctl's folder names the parent, its file the UUID: one file alone needs both.
    parent = path.absolute().parent.name
    name = f"{parent}/{path.name}" if _UUID_NAME.fullmatch(path.name) else path.name
    return source, {name: _read_text(path)}


def _read_folder(folder: Path) -> dict[str, str]:
    files: dict[str, str] = {}
    for where, _, names in os.walk(folder, followlinks=False):
        for name in sorted(names):
            path = Path(where, name)
            if path.is_symlink() or not path.is_file():
                render.say(f"vfiotool: not carried over: {path}: not a regular file")
                continue
            files[str(path.relative_to(folder))] = _read_text(path)
            if len(files) > _LARGEST_FOLDER:
                raise UsageError(f"{folder} holds more than {_LARGEST_FOLDER} files")
    return files


def _read_text(path: Path) -> str:
    from vfiotool.policy.importers import LARGEST_BYTES

    try:
        with open(path, "rb") as file:
            return _decode(str(path), file.read(LARGEST_BYTES + 1))
    except OSError as error:
        raise from_oserror(f"read {path}", error) from error


def _decode(where: str, data: bytes) -> str:
    from vfiotool.policy.importers import LARGEST_BYTES

    if len(data) > LARGEST_BYTES:
        raise UsageError(f"{where} is larger than {LARGEST_BYTES >> 20} MiB")
    return data.decode("utf-8", "backslashreplace")

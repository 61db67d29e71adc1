"""Debian packages for the lab, fetched and unpacked into the cache, nothing installed.

apt is used with lists, cache and sources of its own, so that neither root nor a change to this
machine's apt configuration is needed. What the guests need and this machine lacks (QEMU, nvme-cli,
lvm2, …) is unpacked into one folder, the layer. QEMU is started from there, and guests see the
layer laid over this machine's root.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vfiotool.errors import KernelError, Unsupported
from vfiotool.lab import needs
from vfiotool.lab.kernels.cache import cache_root, digest, filled, locked, progress, verified

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
DEFAULT_MIRROR = "http://deb.debian.org/debian"
SECURITY_MIRROR = "http://deb.debian.org/debian-security"
APT_LIMIT_S = 900
RELIED_ON = "relied-on.json"

# The C library belongs to this machine's loader: a newer one beside it cannot be started.
NEVER_LAYERED = ("libc6", "libc-bin", "base-files", "libc6-dev", "libc-dev-bin")


@dataclass(frozen=True)
class Source:
    """One line's worth of an apt source: mirror and suite."""

    mirror: str
    suite: str

    def line(self) -> str:
        return f"deb [signed-by={KEYRING}] {self.mirror} {self.suite} main"


@functools.cache
def os_release() -> dict[str, str]:
    """This machine's os-release(5); empty where there is none."""
    try:
        text = Path("/etc/os-release").read_text(encoding="utf-8")
    except OSError:
        return {}
    pairs = (line.partition("=") for line in text.splitlines() if "=" in line)
    return {key: value.strip('"') for key, _, value in pairs}


def is_debian() -> bool:
    """Whether this is Debian, where packages can be fetched. Raises Unsupported, with all that is
    missing, on a Debian that lacks what fetching needs."""
    if os_release().get("ID") != "debian":
        return False
    needs.require("fetching Debian's packages", "lab")
    return True


def parse_mirror(text: str) -> str | None:
    """The first Debian mirror that a sources file names (`http://…/debian`), or None."""
    found = re.search(
        r"^(?:URIs:|deb)\s.*?(https?://\S*/debian)/?(?:\s|$)", text, flags=re.MULTILINE
    )
    return found.group(1) if found else None


def _mirror() -> str:
    folder = Path("/etc/apt")
    for file in [folder / "sources.list", *sorted(folder.glob("sources.list.d/*"))]:
        try:
            mirror = parse_mirror(file.read_text(encoding="utf-8", errors="replace"))
        except OSError:
            continue
        if mirror:
            return mirror
    return DEFAULT_MIRROR


class Apt:
    """apt-get with state of its own below the cache (`apt/<name>`), reading these suites only.

    With `bare` it takes nothing for installed: what is fetched is all that programs of another
    release need, their loader and C library too.
    """

    def __init__(
        self, name: str, codename: str, *, backports: bool = False, bare: bool = False
    ) -> None:
        self.folder = cache_root() / "apt" / name
        self.bare = bare
        mirror = _mirror()
        suites = [codename, f"{codename}-updates"] + [f"{codename}-backports"] * backports
        self.sources = [Source(mirror, suite) for suite in suites]
        self.sources.append(Source(SECURITY_MIRROR, f"{codename}-security"))
        self.archives = self.folder / "cache" / "archives"

    def _options(self) -> list[str]:
        folder = self.folder
        pairs = {
            "Dir::Etc::sourcelist": folder / "sources.list",
            "Dir::Etc::sourceparts": "/dev/null",
            "Dir::Etc::preferences": "/dev/null",
            "Dir::Etc::preferencesparts": "/dev/null",
            "Dir::State::lists": folder / "lists",
            "Dir::Cache": folder / "cache",
            "Debug::NoLocking": "1",
            # Dropping to the _apt user fails below a home directory that it cannot enter.
            "APT::Sandbox::User": "",
            "Acquire::Retries": "3",
            "Acquire::Languages": "none",
        }
        if self.bare:
            pairs["Dir::State::status"] = folder / "status"
        return [item for key, value in pairs.items() for item in ("-o", f"{key}={value}")]

    def _call(self, tool: str, *arguments: str, cwd: Path | None = None) -> str:
        command = [tool, *self._options(), *arguments]
        try:
            done = subprocess.run(
                command,
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=APT_LIMIT_S,
                env={**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"},
            )
        except subprocess.TimeoutExpired as error:
            raise KernelError(
                f"{tool} {arguments[0]} did not finish within {APT_LIMIT_S} s",
                hint="check the network, then try again",
            ) from error
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.startswith("E:")]
            raise KernelError(
                f"{tool} {' '.join(arguments[:4])} failed: {' '.join(lines) or done.stderr[-300:]}",
                hint=f"check the network and the mirror {self.sources[0].mirror}, then try again",
            )
        return done.stdout

    def update(self) -> None:
        """Fetch the package lists, unless this object's process did so already."""
        if self.folder in _updated:
            return
        # apt takes a file that is here already by its size: nothing of an earlier run is kept.
        shutil.rmtree(self.archives, ignore_errors=True)
        for part in (self.folder / "lists/partial", self.archives / "partial"):
            part.mkdir(parents=True, exist_ok=True)
        text = "".join(f"{source.line()}\n" for source in self.sources)
        (self.folder / "sources.list").write_text(text, encoding="utf-8")
        (self.folder / "status").write_text("", encoding="utf-8")
        progress(f"reading package lists ({', '.join(source.suite for source in self.sources)})")
        self._call("apt-get", "update")
        _updated.add(self.folder)

    def candidate(self, package: str) -> str | None:
        """The version that apt would take of `package`, None if it knows none."""
        policy = self._call("apt-cache", "policy", package)
        found = re.search(r"Candidate: (\S+)", policy)
        return found.group(1) if found and found.group(1) != "(none)" else None

    def depends(self, package: str) -> str:
        """The Depends field of `package`'s candidate."""
        version = self.candidate(package)
        if version is None:
            raise Unsupported(
                f"the mirror {self.sources[0].mirror} has no package {package}",
                hint="vfiotool lab kernels",
            )
        shown = self._call("apt-cache", "show", f"{package}={version}")
        found = re.search(r"^Depends: (.*)$", shown, flags=re.MULTILINE)
        return found.group(1) if found else ""

    def download(self, *packages: str, into: Path) -> list[Path]:
        """Fetch just these packages (not what they depend on); apt checks their signatures."""
        progress(f"fetching {', '.join(packages)}")
        into.mkdir(parents=True, exist_ok=True)
        before = set(into.glob("*.deb"))
        self._call("apt-get", "download", *packages, cwd=into)
        return sorted(set(into.glob("*.deb")) - before)

    def download_missing(self, *packages: str, release: str | None = None) -> list[Path]:
        """Fetch these packages and all that they need and this machine does not have."""
        progress(f"fetching {', '.join(packages)} and what they need")
        target = ["-t", release] if release else []
        self._call("apt-get", "install", "--no-install-recommends", "-d", "-y", *target, *packages)
        return sorted(self.archives.glob("*.deb"))


_updated: set[Path] = set()


def unpack(package: Path, into: Path, *members: str) -> None:
    """Unpack `members` (all when none is named) of a .deb; needs no root.

    A symbolic link to a directory in `into` stays: packages still ship `/lib/…` and `/sbin/…`.
    """
    into.mkdir(parents=True, exist_ok=True)
    reader = subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(package)], stdout=subprocess.PIPE)
    wanted = ["--wildcards", *members] if members else []
    command = ["tar", "-x", "--keep-directory-symlink", "--no-same-owner", "-C", str(into)]
    done = subprocess.run([*command, *wanted], stdin=reader.stdout, capture_output=True, text=True)
    assert reader.stdout is not None
    reader.stdout.close()
    if reader.wait() or done.returncode:
        raise KernelError(
            f"unpacking {package.name} failed: {done.stderr.strip()[-300:]}",
            hint=f"remove {package} and try again",
        )


def recipe() -> str:
    """What the layer is made from; another recipe is another layer."""
    names = " ".join(needs.packages_for("qemu") + needs.packages_for("guest"))
    return digest("layer 2", names, os_release().get("VERSION_CODENAME", ""))


def layer_folder() -> Path:
    return cache_root() / f"layer-{recipe()}"


@functools.cache
def layer() -> Path | None:
    """The folder with the lab's unpacked packages, made on first use; None off Debian.

    Raises Refused where others could have changed it, KernelError where it is damaged.
    """
    folder = layer_folder()
    if _is_complete(folder):
        return verified(folder)
    if not is_debian():
        return None
    with locked("layer"):
        if not _is_complete(folder):
            _make_layer(folder)
    return verified(folder)


def ready_layer() -> Path | None:
    """The layer if it has been made already; nothing is fetched. Raises as `layer` does."""
    folder = layer_folder()
    return verified(folder) if _is_complete(folder) else None


def _is_complete(folder: Path) -> bool:
    """Whether the layer has all that this machine lacks.

    What was installed here when the layer was made is not in it: once such a package has been
    removed from this machine, another layer is due.
    """
    try:
        relied_on = json.loads((folder / RELIED_ON).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        try:
            versions = json.loads((folder / "packages.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        relied_on = _supplied_here(versions)
    return all(need.is_here() for need in needs.needs() if need.package in relied_on)


def _supplied_here(versions: Mapping[str, str]) -> list[str]:
    """What guests need and the layer of these packages lacks: this machine has it installed."""
    return [name for name in needs.packages_for("qemu", "guest") if name not in versions]


def _make_layer(folder: Path) -> None:
    codename = os_release().get("VERSION_CODENAME", "bookworm")
    backports = codename == "bookworm"
    apt = Apt("host", codename, backports=backports)
    apt.update()
    # Two steps, since `-t` would take the guests' tools from backports as well.
    apt.download_missing(*needs.packages_for("guest"))
    files = apt.download_missing(
        *needs.packages_for("qemu"), release=f"{codename}-backports" if backports else None
    )
    chosen = [file for file in files if file.name.partition("_")[0] not in NEVER_LAYERED]
    progress(f"unpacking {len(chosen)} packages")
    with filled(folder) as partial:
        for name in ("bin", "sbin", "lib", "lib64"):
            (partial / "usr" / name).mkdir(parents=True)
            (partial / name).symlink_to(f"usr/{name}")
        for file in chosen:
            unpack(file, partial)
        for name in ("bin", "sbin", "lib", "lib64"):
            (partial / name).unlink()
        _relative_links(partial)
        versions = dict(file.name.split("_")[:2] for file in chosen)
        (partial / "packages.json").write_text(json.dumps(versions, indent=1, sort_keys=True))
        lacking = {need.package for need in needs.missing("qemu", "guest")}
        relied_on = [name for name in _supplied_here(versions) if name not in lacking]
        (partial / RELIED_ON).write_text(json.dumps(relied_on))
    shutil.rmtree(apt.archives, ignore_errors=True)


def _relative_links(folder: Path) -> None:
    """Turn the programs' absolute links within `folder`: depmod -> /bin/kmod works outside too."""
    for name in ("bin", "sbin"):
        for link in (folder / "usr" / name).iterdir():
            if link.is_symlink() and (aim := os.readlink(link)).startswith("/"):
                inside = folder / "usr" / aim.removeprefix("/usr").lstrip("/")
                if inside.exists():
                    link.unlink()
                    link.symlink_to(os.path.relpath(inside, link.parent))


def library_path(folder: Path) -> str:
    """LD_LIBRARY_PATH for a program that is started from the layer on this machine."""
    return ":".join(str(folder / "usr" / part) for part in ("lib/x86_64-linux-gnu", "lib"))


def find_tool(name: str) -> tuple[list[str], dict[str, str]] | None:
    """Command and environment of tool `name`, from this machine's PATH or else the layer."""
    if found := shutil.which(name, path=needs.search_path()):
        return [found], dict(os.environ)
    folder = layer()
    if folder is None:
        return None
    inside = ":".join(str(folder / "usr" / part) for part in ("bin", "sbin"))
    if found := shutil.which(name, path=inside):
        return [found], {**os.environ, "LD_LIBRARY_PATH": library_path(folder)}
    return None


def need_tool(name: str, package: str) -> tuple[list[str], dict[str, str]]:
    """As `find_tool`, or the error that names the package."""
    found = find_tool(name)
    if found is None:
        raise Unsupported(
            f"the lab needs {name}, which is not here",
            hint=f"install your distribution's {package} (Debian: apt-get install {package})",
        )
    return found

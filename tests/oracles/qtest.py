"""QEMU's own device tests (qos-test), built from Debian's source package; nothing is installed.

Packages are fetched into the lab's cache by apt folders of one's own, which check signatures: the
source and meson of Debian 13, what is linked with and ninja of this machine's release. The program
is run through the loader that came with them. Fetching takes a quarter of a minute, building four
minutes and 600 MB of room meanwhile.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from vfiotool.errors import Unsupported, VfiotoolError
from vfiotool.lab import needs
from vfiotool.lab.kernels import packages
from vfiotool.lab.kernels.cache import cache_root, digest, filled, locked, verified

RELEASE = "trixie"
LINKED = ("libglib2.0-dev", "zlib1g-dev", "ninja-build")
MESON = ("meson", "python3-pycotap")
# Nothing that is compiled here is an emulator: any target brings the test, this one least else.
OPTIONS = (
    "--target-list=avr-softmmu",
    "--without-default-features",
    "--enable-tools",
    "--enable-vhost-user",
    "--enable-vhost-user-blk-server",
    "--disable-install-blobs",
    "--disable-docs",
    "--disable-download",
)
TEST = "tests/qtest/vhost-user-blk-test.c"
# qemu-storage-daemon takes one range a request and refuses two; ours says that it takes sixteen
# (max_write_zeroes_seg, max_discard_seg), and the test does not ask. What it refuses for other
# reasons is expected of ours as well.
MARK = "More than one dwz is not supported"
THEIRS, OURS = "==, VIRTIO_BLK_S_UNSUPP", "==, VIRTIO_BLK_S_OK"
_LIBRARIES = "usr/lib/x86_64-linux-gnu"
_LIMIT_S = 3600


@dataclass(frozen=True)
class _SourceOf(packages.Source):
    """Where an apt source's source packages are."""

    def line(self) -> str:
        return super().line().replace("deb ", "deb-src ", 1)


class _SourceApt(packages.Apt):
    def fetch(self, package: str, into: Path) -> Path:
        """Fetch the upstream part of a source package."""
        self.update()
        into.mkdir(parents=True)
        self._call("apt-get", "source", "--download-only", package, cwd=into)
        found = sorted(into.glob("*.orig.tar.*"))
        if not found:
            raise Unsupported(f"the source package {package} has no upstream part")
        return found[0]


def _folder() -> Path:
    codename = packages.os_release().get("VERSION_CODENAME", "")
    return cache_root() / f"qtest-{digest('qtest 1', codename, RELEASE, *LINKED, *OPTIONS, OURS)}"


@functools.cache
def qos_test() -> list[str] | str:
    """The command that runs qos-test, made on first use, or why it cannot be had here."""
    folder = _folder()
    try:
        if not folder.is_dir():
            _check_machine()
            with locked("qtest"):
                if not folder.is_dir():
                    _make(folder)
        libraries = verified(folder) / _LIBRARIES
    except VfiotoolError as error:
        return f"qos-test cannot be had: {error.message}"
    return [*_loaded(libraries), str(folder / "usr/bin/qos-test")]


def _loaded(libraries: Path) -> list[str]:
    return [str(libraries / "ld-linux-x86-64.so.2"), "--library-path", str(libraries)]


def _check_machine() -> None:
    if os.uname().machine != "x86_64" or not packages.is_debian():
        raise Unsupported("it is built on x86-64 Debian only")
    lacking = [name for name in ("gcc", "xz") if not shutil.which(name, path=needs.search_path())]
    if lacking:
        raise Unsupported(f"no {' and no '.join(lacking)}")


def _make(folder: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=".qtest-", dir=cache_root()) as made:
        work = Path(made)
        source = _unpacked(work)
        _expect_ranges(source / TEST)
        linked, meson = _needed(work)
        built = _built(work, source, linked, meson)
        with filled(folder) as partial:
            libraries = partial / _LIBRARIES
            libraries.mkdir(parents=True)
            for library in (linked / _LIBRARIES).glob("*.so.*"):
                shutil.copy(library, libraries)
            (partial / "usr/bin").mkdir()
            shutil.copy(built, partial / "usr/bin")


def _unpacked(work: Path) -> Path:
    apt = _SourceApt("qtest-source", RELEASE, bare=True)
    apt.sources = [_SourceOf(source.mirror, source.suite) for source in apt.sources[:1]]
    archive = apt.fetch("qemu", work / "archive")
    _run(["tar", "-xf", str(archive), "--exclude=*/roms", "-C", str(work)], cwd=work)
    archive.unlink()
    return next(path.parent for path in work.glob("*/configure"))


def _expect_ranges(test: Path) -> None:
    before, mark, after = test.read_text(encoding="utf-8").partition(MARK)
    if THEIRS not in after:
        raise Unsupported(f"{TEST} is not what it was: {MARK!r} is not in it")
    test.write_text(before + mark + after.replace(THEIRS, OURS, 1), encoding="utf-8")


def _needed(work: Path) -> tuple[Path, Path]:
    """The folders with what is linked, and with meson."""
    linked, meson = work / "linked", work / "meson"
    for name in ("bin", "sbin", "lib", "lib64"):
        (linked / "usr" / name).mkdir(parents=True)
        (linked / name).symlink_to(f"usr/{name}")
    apt = packages.Apt("qtest", packages.os_release()["VERSION_CODENAME"], bare=True)
    apt.update()
    for file in apt.download_missing(*LINKED):
        packages.unpack(file, linked)
    apt = packages.Apt("qtest-meson", RELEASE, bare=True)
    apt.update()
    for file in apt.download(*MESON, into=work / "packages"):
        packages.unpack(file, meson)
    return linked, meson


def _built(work: Path, source: Path, linked: Path, meson: Path) -> Path:
    tools, build = work / "tools", work / "build"
    tools.mkdir()
    build.mkdir()
    for name, program in (("ninja", "ninja"), ("pkg-config", "pkgconf")):
        command = " ".join([*_loaded(linked / _LIBRARIES), str(linked / "usr/bin" / program)])
        write_script(tools / name, f'exec {command} "$@"')
    pkgconfig = (linked / _LIBRARIES / "pkgconfig", linked / "usr/share/pkgconfig")
    environment = {
        **os.environ,
        "PATH": f"{tools}:{meson}/usr/bin:{os.environ['PATH']}",
        "PKG_CONFIG_SYSROOT_DIR": str(linked),
        "PKG_CONFIG_LIBDIR": ":".join(str(path) for path in pkgconfig),
        "PYTHONPATH": str(meson / "usr/lib/python3/dist-packages"),
    }
    libraries = linked / _LIBRARIES
    flags = f"--extra-ldflags=-L{libraries} -Wl,-rpath-link,{libraries}"
    configure = [str(source / "configure"), f"--python={sys.executable}", *OPTIONS, flags]
    _run(configure, cwd=build, environment=environment)
    _run(["ninja", "tests/qtest/qos-test"], cwd=build, environment=environment)
    return build / "tests/qtest/qos-test"


def _run(command: list[str], cwd: Path, environment: dict[str, str] | None = None) -> None:
    done = subprocess.run(
        command,
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=_LIMIT_S,
    )
    if done.returncode:
        name = Path(command[0]).name
        raise Unsupported(f"{name} failed in {cwd}: {done.stdout.strip()[-600:]}")


def write_script(path: Path, line: str) -> None:
    """An executable shell script of one line."""
    path.write_text(f"#!/bin/sh\n{line}\n", encoding="utf-8")
    path.chmod(0o755)

"""What has to be compiled: the mdev samples for Debian's kernels, and the iommufd kernel.

Both come from Debian's linux-source packages. Nothing is installed: the headers' packages are
unpacked below the cache, where their absolute paths are set right.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from vfiotool.errors import KernelError, Unsupported
from vfiotool.lab import needs
from vfiotool.lab.kernels import packages
from vfiotool.lab.kernels.cache import cache_root, digest, filled, progress, verified
from vfiotool.lab.kernels.stored import fragment_key, run_depmod, store

HERE = Path(__file__).parent
SAMPLES = ("mtty", "mbochs", "mdpy")
SOURCE = {"6.1": "linux-source-6.1", "6.12": "linux-source-6.12"}
# What the samples need of the kernel's list; the rest is for a whole kernel.
FOR_SAMPLES = ("xz-utils", "make", "gcc")


def source_package(apt: packages.Apt, name: str) -> Path:
    """The .deb with the kernel's sources, kept for the other kernels that need it."""
    package = SOURCE[name]
    version = apt.candidate(package)
    folder = cache_root() / "sources" / digest(package, version or "")
    if not any(folder.glob("*.deb")):
        with filled(folder) as partial:
            apt.download(package, into=partial)
    return next(verified(folder).glob("*.deb"))


def unpack_source(package: Path, name: str, into: Path, *members: str) -> Path:
    """Unpack the source tree inside `package` (or the `members` of it) and return its folder."""
    inner = f"./usr/src/{SOURCE[name]}.tar.xz"
    progress(f"unpacking {package.name.split('_')[0]}")
    stages = [
        ["dpkg-deb", "--fsys-tarfile", str(package)],
        ["tar", "-xO", inner],
        ["tar", "-xJ", "-C", str(into)],
    ]
    stages[-1] += ["--wildcards", *(f"*/{member}" for member in members)] if members else []
    first = subprocess.Popen(stages[0], stdout=subprocess.PIPE)
    second = subprocess.Popen(stages[1], stdin=first.stdout, stdout=subprocess.PIPE)
    third = subprocess.run(stages[2], stdin=second.stdout, capture_output=True, text=True)
    if first.wait() or second.wait() or third.returncode:
        raise KernelError(
            f"unpacking the sources in {package.name} failed: {third.stderr[-300:]}",
            hint=f"remove {package} and try again",
        )
    return into / SOURCE[name]


def mdev_samples(apt: packages.Apt, name: str, release: str, target: Path) -> None:
    """Compile mtty, mbochs and mdpy for Debian's kernel `release` into the folder `target`.

    Raises Unsupported without a compiler, KernelError when the build fails.
    """
    lacking = [need for need in needs.missing("kernel") if need.package in FOR_SAMPLES]
    needs.refuse("building the mdev samples", lacking)
    source = source_package(apt, name)
    with tempfile.TemporaryDirectory(prefix="samples-", dir=cache_root()) as scratch:
        work = Path(scratch)
        folder = unpack_source(source, name, work, "samples/vfio-mdev/*")
        samples = folder / "samples/vfio-mdev"
        objects = " ".join(f"{sample}.o" for sample in SAMPLES)
        (samples / "Makefile").write_text(f"obj-m := {objects}\n", encoding="utf-8")
        headers = _headers(apt, release, work)
        progress(f"compiling {', '.join(SAMPLES)} for {release}")
        # Type information would need pahole, and nobody asks for it here.
        _make(headers, ["CONFIG_DEBUG_INFO_BTF_MODULES=", f"M={samples}", "modules"], work / "log")
        target.mkdir(parents=True)
        for sample in SAMPLES:
            shutil.copy(samples / f"{sample}.ko", target)


def _headers(apt: packages.Apt, release: str, work: Path) -> Path:
    """The kernel's headers, unpacked below `work`, with their absolute paths turned there."""
    package = f"linux-headers-{release}"
    wanted = [package]
    for needed in re.findall(r"linux-(?:headers|kbuild)-[^\s,(]+", apt.depends(package)):
        wanted.append(needed)
    for file in apt.download(*dict.fromkeys(wanted), into=work):
        packages.unpack(file, work)
    folder = work / "usr/src" / package
    makefile = folder / "Makefile"
    text = makefile.read_text(encoding="utf-8")
    makefile.write_text(text.replace("/usr/src/", f"{work}/usr/src/"), encoding="utf-8")
    for top in (work / "usr/src").iterdir():
        for link in top.iterdir():
            if link.is_symlink() and (aim := os.readlink(link)).startswith("/usr/"):
                link.unlink()
                link.symlink_to(f"{work}{aim}")
    return folder


def iommufd_kernel(target: Path) -> None:
    """Build the kernel with iommufd, VFIO character devices and the vDPA simulators.

    It lands complete in the folder `target`. Takes about five minutes on two cores. Raises
    Unsupported when a tool is missing, KernelError when the build fails (with its last lines).
    """
    if not packages.is_debian():
        raise Unsupported(
            "building the iommufd kernel needs Debian's apt and archive keys for its sources",
            hint="give a kernel image instead: vfiotool lab run --kernel PATH -- COMMAND",
        )
    needs.require("building the iommufd kernel", "kernel")
    apt = packages.Apt("kernels", "bookworm")
    apt.update()
    source = source_package(apt, "6.12")
    with tempfile.TemporaryDirectory(prefix="kernel-", dir=cache_root()) as scratch:
        tree = unpack_source(source, "6.12", Path(scratch))
        log = Path(scratch) / "log"
        _configure(tree, log)
        _make(tree, ["vmlinux", "modules"], log, "compiling the iommufd kernel")
        release = (tree / "include/config/kernel.release").read_text(encoding="ascii").strip()
        with filled(target) as partial:
            _strip(tree / "vmlinux", partial / "image")
            _make(tree, [f"INSTALL_MOD_PATH={partial}/install", "modules_install"], log)
            (partial / "install/lib/modules" / release).rename(partial / "modules")
            shutil.rmtree(partial / "install")
            for link in ("build", "source"):
                (partial / "modules" / link).unlink(missing_ok=True)
            # make's own depmod runs only where kmod is installed.
            run_depmod(partial / "modules", release)
            origin = source.name.removesuffix(".deb").replace("%3a", ":")
            store(partial, release, origin, key=fragment_key())
            shutil.copy(tree / ".config", partial / "config")


def _configure(tree: Path, log: Path) -> None:
    """tinyconfig plus the fragment; an option of the fragment that got lost is an error."""
    fragment = tree / "vfiotool.fragment"
    shutil.copy(HERE / "kernel.fragment", fragment)
    _make(tree, ["tinyconfig"], log)
    merge = ["scripts/kconfig/merge_config.sh", "-m", ".config", fragment.name]
    subprocess.run(merge, cwd=tree, check=True, capture_output=True)
    _make(tree, ["olddefconfig"], log)
    config = set((tree / ".config").read_text(encoding="utf-8").splitlines())
    wanted = fragment.read_text(encoding="utf-8").splitlines()
    lost = [line for line in wanted if re.match(r"CONFIG_\w+=[ym]", line) and line not in config]
    if lost:
        progress(f"options that this source does not take: {', '.join(lost)}")


def _strip(vmlinux: Path, image: Path) -> None:
    subprocess.run(["strip", "-o", str(image), str(vmlinux)], check=True)


def _make(tree: Path, targets: list[str], log: Path, title: str | None = None) -> None:
    """Run make in `tree`, output to `log`, files compiled counted on a terminal."""
    jobs = len(os.sched_getaffinity(0))
    # A surrounding make would hand its own job server and flags down.
    env = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    env.update(KBUILD_BUILD_TIMESTAMP="1970-01-01", KBUILD_BUILD_USER="lab", LC_ALL="C")
    env.update(KBUILD_BUILD_HOST="lab")
    # Debian's headers name the compiler that its kernel was built with; this machine has its own.
    command = ["make", "-C", str(tree), f"-j{jobs}", "CC=gcc", "HOSTCC=gcc", *targets]
    begin = time.monotonic()
    compiled = 0
    show = title is not None and sys.stderr.isatty()
    with (
        open(log, "a", encoding="utf-8", errors="replace") as out,
        subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as child,
    ):
        assert child.stdout is not None
        for line in child.stdout:
            out.write(line)
            compiled += line.lstrip().startswith("CC ")
            if show:
                passed = time.monotonic() - begin
                text = f"lab: {title}: {compiled} files, {passed:.0f} s"
                print(f"\r\x1b[2m{text}\x1b[0m\x1b[K", end="", file=sys.stderr, flush=True)
    if show:
        print(file=sys.stderr)
    if child.returncode:
        tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
        raise KernelError(f"make {targets[-1]} failed:\n" + "\n".join(tail))

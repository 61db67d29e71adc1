"""Debian's kernels, unpacked from their packages, with the mdev samples compiled beside them."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from vfiotool.errors import Unsupported
from vfiotool.lab.kernels import build, packages
from vfiotool.lab.kernels.bzimage import uncompressed
from vfiotool.lab.kernels.cache import filled, progress
from vfiotool.lab.kernels.stored import folder, run_depmod, store, trim_modules

PACKAGES = {"6.1": "linux-image-amd64", "6.12": "linux-image-6.12-amd64"}


def fetch(name: str) -> None:
    """Put Debian's kernel `name` into the cache. Raises Unsupported off Debian, KernelError."""
    if not packages.is_debian():
        raise Unsupported(
            f"fetching Debian's kernel {name} needs Debian's apt and archive keys",
            hint="give a kernel image instead: vfiotool lab run --kernel PATH -- COMMAND",
        )
    apt = packages.Apt("kernels", "bookworm")
    apt.update()
    depends = apt.depends(PACKAGES[name])
    found = re.search(r"linux-image-(\S+)", depends)
    assert found is not None
    release = found.group(1)
    with filled(folder(name)) as partial:
        [package] = apt.download(f"linux-image-{release}", into=partial)
        progress(f"unpacking {package.name}")
        packages.unpack(package, partial / "package")
        image = (partial / f"package/boot/vmlinuz-{release}").read_bytes()
        (partial / "image").write_bytes(uncompressed(image) or image)
        (partial / f"package/lib/modules/{release}").rename(partial / "modules")
        origin = package.name.removesuffix(".deb").replace("%3a", ":")
        package.unlink()
        subprocess.run(["rm", "-rf", str(partial / "package")], check=True)
        trim_modules(partial / "modules")
        notes = _add_samples(apt, name, release, partial / "modules")
        run_depmod(partial / "modules", release)
        store(partial, release, origin, notes=notes)


def _add_samples(apt: packages.Apt, name: str, release: str, modules: Path) -> tuple[str, ...]:
    try:
        build.mdev_samples(apt, name, release, modules / "extra")
    except Unsupported as error:
        again = f"then: vfiotool lab kernels --get {name} --update"
        return (f"no mdev samples: {error.message}; {error.hint}; {again}",)
    return ()

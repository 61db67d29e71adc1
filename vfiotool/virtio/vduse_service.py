"""A disk of an exports file as a VDUSE device: by the server's workers, with a thread of its own
for the kernel's messages."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable

from vfiotool.native.virtqueue import Worker
from vfiotool.virtio.block import BlockDisk
from vfiotool.virtio.vduse import Report, VduseDevice
from vfiotool.virtio.vduse_files import forget, log_path, save_disk

BLOCK = 2
ATTACHED_TO = {"virtio": "virtio_vdpa", "vhost": "vhost_vdpa"}


def attach(name: str, how: str, report: Report, failed: Callable[[], object]) -> None:
    """Put a device on the vDPA bus, from another process: the kernel asks this one meanwhile.
    `failed` is called, from another thread, if that cannot be done."""
    command = [sys.executable, "-I", "-m", "vfiotool", "vdpa", "add", name, "vduse"]
    command += ["--driver", ATTACHED_TO[how]]

    def run() -> None:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, check=False)
        if done.returncode:
            report(f"{name} was not attached: vdpa add ended with {done.returncode}")
            failed()

    threading.Thread(target=run, name="attach", daemon=True).start()


def end(device: VduseDevice, report: Report) -> None:
    """Give the device back; remove it, and what is kept of it, if it is on no bus."""
    device.close()
    if device.remove_unused():
        forget(device.name)
    else:
        report(
            f"{device.name} is still on the vDPA bus: its requests wait for the next server;"
            f" to remove it: vfiotool vdpa remove {device.name}"
        )


class VduseService:
    """Serves `disk` as the device `name`, from `begin` to `end`; `how` is virtio, vhost or none."""

    def __init__(self, name: str, disk: BlockDisk, how: str) -> None:
        self.name, self.disk, self.how = name, disk, how
        self._device: VduseDevice | None = None

    def begin(self, workers: list[Worker], report: Report) -> None:
        """Raises what VduseDevice does; nothing is served then."""
        self._report = report
        device = VduseDevice(
            self.name, self.disk, BLOCK, workers, log=log_path(self.name), report=report
        )
        save_disk(self.name, self.disk.settings)
        self._device = device
        self._thread = threading.Thread(target=self._run, name=f"vduse {self.name}")
        self._thread.start()
        if self.how != "none" and device.is_new:
            attach(self.name, self.how, report, int)

    def _run(self) -> None:
        assert self._device is not None
        try:
            self._device.run()
        except Exception as error:
            # A fault of ours is this device's alone.
            self._report(f"{self.name}: {error!r}")

    def resize(self) -> bool:
        """Take the size of what is behind it anew, and tell the driver; whether it changed."""
        return self._device is not None and self._device.resize()

    def end(self) -> None:
        """Serve it no more; the kernel's device stays if it is on the vDPA bus."""
        device, self._device = self._device, None
        if device is None:
            return
        device.stop()
        self._thread.join()
        end(device, self._report)

"""The C library's own tests under the sanitizers, and what the built extension promises."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.change.side_by_side import in_threads
from vfiotool.native import library as native

TESTS = Path(__file__).resolve().parents[1]
CEXT = TESTS.parent / "cext"
sys.path.insert(0, str(CEXT.parent))
from cext import build  # noqa: E402
from cext.build import build_with_fault_injection, build_with_sanitizers  # noqa: E402

SOURCES = ("ioctl", "vfio", "dma", "iommufd", "irq", "mapping", "interrupt", "mmio", "fork")
WARNINGS = ["-std=gnu11", "-Wall", "-Wextra", "-Werror", "-Wshadow", "-Wconversion"]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
def test_c_tests_pass_under_address_and_undefined_behaviour_sanitizers(tmp_path: Path) -> None:
    program = tmp_path / "native_test"
    command = ["gcc", *WARNINGS, "-O1", "-g", "-fno-sanitize-recover=all"]
    command += ["-fsanitize=address,undefined", "-DVT_FAULT_INJECTION", "-Wl,--wrap=ioctl"]
    command += [f"-I{CEXT}", "-o", str(program), str(CEXT / "tests" / "native_test.c")]
    command += [str(CEXT / "vfio" / f"{name}.c") for name in SOURCES] + ["-lpthread"]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    done = subprocess.run([program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def sanitizer_libraries() -> list[str]:
    """What a Python that was built without them has to load first."""
    names = ("libasan.so", "libubsan.so")
    ask = [["gcc", f"-print-file-name={name}"] for name in names]
    return [subprocess.run(a, capture_output=True, text=True).stdout.strip() for a in ask]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
def test_what_python_sees_of_c_holds_under_the_sanitizers() -> None:
    """Windows, events and queues through the very types that drivers use; leaks are not looked
    for, as the interpreter itself has some."""
    folder = build_with_sanitizers()
    environment = {
        **os.environ,
        "LD_PRELOAD": ":".join(sanitizer_libraries()),
        # Memory of a front end that shrinks raises SIGBUS, which is answered.
        "ASAN_OPTIONS": "detect_leaks=0:handle_sigbus=0",
        "PYTHONMALLOC": "malloc",
        # The import of plug-ins takes as long as the rest of the start.
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "VFIOTOOL_STRESS_ROUNDS": "200",
        "PYTHONPATH": f"{folder}:{TESTS.parent}",
    }

    def run(*arguments: str) -> str:
        # -P: the folder of the sources is not to come before that of the sanitized build.
        done = subprocess.run(
            [sys.executable, "-P", *arguments],
            capture_output=True,
            text=True,
            env=environment,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    where = run("-c", "from vfiotool.native import _library as n, _types as m; print(n, m)")
    assert where.count(str(folder)) == 2
    names = ("test_mmio", "test_events", "test_mapper", "test_handle", "test_interrupts")
    names += ("test_dma", "test_reach", "test_stress")
    windows = [str(TESTS / f"vfio/{name}.py") for name in names]
    names = ("drivers/nvme/test_controller.py", "virtio/test_vhost_user_blk.py")
    names += ("native/test_direct.py", "virtio/test_device.py", "virtio/test_device_classes.py")
    names += ("native/test_turn_lock.py", "native/test_queue_calls.py")
    names += ("native/test_shared_calls.py", "drivers/nvme/test_shared.py")
    queues = [str(TESTS / name) for name in names]
    options = ["-q", "-p", "no:cacheprovider", "--import-mode=importlib", "-o", "addopts="]
    # Without pytest's own path, which would put the unsanitized package before this one.
    options += ["-o", "pythonpath=", "-m", "not proof"]
    said = in_threads(lambda files: run("-m", "pytest", *options, *files), [windows, queues])
    assert all(" passed" in text for text in said)


def test_every_symbol_that_python_sees_begins_with_vt() -> None:
    sys.path.insert(0, str(CEXT.parent))
    from cext.build import HEADERS, declarations

    declared = "".join(declarations((CEXT / name).read_text()) for name in HEADERS)
    functions = re.findall(r"\b(\w+)\(", declared)
    assert functions
    assert [name for name in functions if not name.startswith("vt_")] == []


def test_ioctl_is_called_through_one_function() -> None:
    """Otherwise fault injection would miss it."""
    callers = [
        path.name
        for path in CEXT.glob("[!t]*/*.c")
        if re.search(r"(?<![\w_])ioctl\(", path.read_text()) and path.name != "ioctl.c"
    ]
    assert callers == []


def test_the_shipped_build_has_no_fault_injection() -> None:
    assert native.fault_set(1, errno.EIO) == -errno.ENOSYS
    native.Eventfd(native.eventfd())._close()


def test_the_test_build_has_it_and_is_made_once() -> None:
    folder = build_with_fault_injection()
    made = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.so")}
    assert sorted(made) == ["_library.abi3.so", "_types.abi3.so", "libvt_ioctl.so"]
    assert build_with_fault_injection() == folder
    assert {path.name: path.stat().st_mtime_ns for path in folder.glob("*.so")} == made
    assert b"fault_at" in (folder / "libvt_ioctl.so").read_bytes()


def test_tests_that_begin_together_build_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "BUILT", tmp_path)
    monkeypatch.setattr(build, "FAULT_BUILD", tmp_path / "fault-injection")
    building, second, made = threading.Lock(), threading.Event(), []

    def link(built: Path, sources: list[Path], flags: list[str]) -> None:
        if not building.acquire(blocking=False):
            second.set()
            return
        second.wait(0.05)  # what another builder would need to come in
        built.touch()
        made.append(built.name)
        building.release()

    monkeypatch.setattr(build, "_link", link)
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda _: build_with_fault_injection(), range(2)))
    assert not second.is_set()
    assert sorted(made) == ["_library.abi3.so", "_types.abi3.so", "libvt_ioctl.so"]


TOGETHER = """
import errno, sys
from tests.lab import faults_vfio
faults_vfio.load_test_build(sys.argv[1])
from vfiotool.native import library as native

class Space(native.Mapper):
    def _map_failed(self, result, address, iova, size):
        raise OSError(-result, "map")

space = Space()
space._aim(native.Handle(native.open_node("/dev/null")), None)
native.fault_set(3, errno.EXDEV)
native.open_node("/dev/null")
for expected in (errno.ENOTTY, errno.EXDEV, errno.ENOTTY):
    try:
        space.map(0, 0, 4096, read=True, write=True)
    except OSError as error:
        assert error.errno == expected, error
print(native.fault_set(0, 0))
"""


def test_the_calls_of_both_extensions_are_counted_together() -> None:
    command = [sys.executable, "-c", TOGETHER, build_with_fault_injection()]
    done = subprocess.run(command, capture_output=True, text=True, cwd=CEXT.parent, check=False)
    assert done.stdout == "4\n", done.stderr


def test_extensions_keep_to_the_stable_abi() -> None:
    package = Path(native.__file__).parent
    assert sorted(path.name for path in package.glob("_*.so")) == [
        "_library.abi3.so",
        "_types.abi3.so",
    ]


def test_an_error_of_the_kernel_names_operation_object_and_errno() -> None:
    result = native.open_node("/proc/self/no-such-node")
    failure = native.failed(result, "open a node", device="0000:00:02.0", hint="try again")
    assert failure.message == "open a node: No such file or directory (ENOENT)"
    assert (failure.device, failure.hint, failure.errno_name) == (
        "0000:00:02.0",
        "try again",
        "ENOENT",
    )
    assert native.failed(-errno.EACCES, "open").exit_code == 7
    assert native.failed(-errno.EBUSY, "open").exit_code == 5


def test_importing_the_library_needs_neither_typer_nor_rich() -> None:
    code = (
        "import sys, vfiotool.vfio; print(sorted({'typer', 'rich', 'pyudev'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

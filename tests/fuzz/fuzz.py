"""Fuzz one parser with atheris.

    python tests/fuzz/fuzz.py TARGET [libFuzzer options] [CORPUS…]
    python tests/fuzz/fuzz.py TARGET --every N [libFuzzer options] [CORPUS…]
    python tests/fuzz/fuzz.py TARGET --keep CORPUS

Without a corpus it starts from the target's seeds in a folder of its own; an empty corpus is
given them. Following branches takes most of the time: with `--every N` only every Nth input's are
followed (and those of a corpus), for volume once a corpus hardly grows. `--keep` makes the small
inputs of a corpus a regression test, which `tests/fuzz/test_corpus.py` replays: merge the corpus
first (`-merge=1 NEW OLD`), so that nothing stands in it twice. Targets: `tests/fuzz/targets.py`;
options: https://llvm.org/docs/LibFuzzer.html. An input that takes longer than `-timeout` seconds
counts as a hang.
"""

from __future__ import annotations

import base64
import gc
import json
import shlex
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from atheris import Fuzz, Setup, instrument_imports

if TYPE_CHECKING:
    from tests.fuzz.targets import Target

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parents[1]))

TARGET = sys.argv.pop(1) if len(sys.argv) > 1 else ""
_KEPT_BYTES = 400
_OURS = ("vfiotool", "tests")
# Branches of these lead the fuzzer nowhere: the reader of registers follows its tables, which took
# half of the time, and the others parse nothing.
_NOT_FOLLOWED = [
    "vfiotool.devices.config.layout",
    "vfiotool.errors",
    "vfiotool.host.host",
    "vfiotool.devices.details",
    "vfiotool.devices.as_json",
]


def keep(folder: Path) -> None:
    """Write a corpus' inputs of up to 400 bytes into one file, sorted."""
    inputs = sorted(path.read_bytes() for path in folder.iterdir())
    texts = [base64.b64encode(data).decode() for data in inputs if len(data) <= _KEPT_BYTES]
    (FOLDER / f"{TARGET}_corpus.json").write_text(json.dumps(texts, indent=0) + "\n")


def load(*, followed: bool) -> Target:
    """The target on modules of its own, whose branches lead the fuzzer or do not."""
    for name in [name for name in sys.modules if name.partition(".")[0] in _OURS]:
        del sys.modules[name]
    with instrument_imports(["vfiotool"], _NOT_FOLLOWED) if followed else nullcontext():
        from tests.fuzz.targets import TARGETS
        from vfiotool.devices.config import decode as capabilities
        from vfiotool.devices.config import header as capabilities_header
    # A remembered answer follows no branch. Where none is followed it may stay: what is remembered
    # has been run.
    for module in (capabilities, capabilities_header) if followed else ():
        for name, value in list(vars(module).items()):
            setattr(module, name, getattr(value, "__wrapped__", value))
    if TARGET not in TARGETS:
        raise SystemExit(__doc__)
    target: Target = TARGETS[TARGET]
    return target


def mixed(followed: Target, every: int, first: int) -> Callable[[bytes], None]:
    """The target's check; the branches of the `first` inputs and of every Nth are followed."""
    plain = load(followed=False)
    numbers = count()

    def check(data: bytes) -> None:
        number = next(numbers)
        (followed if number < first or number % every == 0 else plain).check(data)

    return check


def main() -> None:
    target = load(followed=True)
    arguments = sys.argv[1:]
    if arguments[:1] == ["--keep"]:
        keep(Path(arguments[1]))
        return
    every = int(arguments[1]) if arguments[:1] == ["--every"] else 1
    arguments = arguments[2:] if every > 1 else arguments
    corpora = [Path(argument) for argument in arguments if not argument.startswith("-")]
    if not corpora:
        corpora.append(Path(tempfile.mkdtemp(prefix=f"fuzz-{TARGET}-")))
        arguments.append(str(corpora[0]))
    if len(corpora) == 1 and not any(corpora[0].iterdir()):
        for number, seed in enumerate(target.seeds):
            (corpora[0] / f"seed-{number}").write_bytes(seed)
    # libFuzzer runs a corpus once or twice before it begins to change it.
    first = 2 * sum(1 for corpus in corpora for _ in corpus.iterdir()) + 2
    check = target.check if every == 1 else mixed(target, every, first)
    # What is there by now stays: the collector need not look at it each time.
    gc.freeze()
    defaults = ("-timeout=10", f"-max_len={target.max_bytes}")
    # `-merge` starts the fuzzer again by this name, through a shell.
    itself = shlex.join([sys.executable, __file__, TARGET])
    Setup([itself, *defaults, *arguments], check)
    Fuzz()


if __name__ == "__main__":
    main()

"""What a nested guest does with a disk that others share by ranges: blocks that name their writer,
their turn and their place, and fio with verification.
"""

from __future__ import annotations

import os
import shlex

MIB = 1 << 20
BLOCK = 4096
SIZE = 8 * MIB
# The last run's end is before FIO_AT.
TURNS, RUNS, RUN, APART = 3, 8, 8, 224
FIO_AT = 7 * MIB
# Runs of blocks that lie apart; a process takes long to start in there: few do.
_SCRIPT = """
for n in $(seq 100); do [ ! -b /dev/vda ] || break; sleep 0.1; done
[ $(cat /sys/block/vda/size) = SECTORS ]
echo ready
WAIT
for turn in TURNS; do
    awk -v turn=$turn 'BEGIN {
        for (run = 0; run < RUNS; run++)
            for (block = APART * run; block < APART * run + RUN; block++) {
                text = "NAME-" turn "-" block "\\n"
                while (length(text) < 4096) text = text text
                printf "%s", substr(text, 1, 4096) >"/tmp/run" run
            }
    }'
    for run in $(seq 0 LAST); do
        dd if=/tmp/run$run of=/dev/vda bs=4096 seek=$((run * APART)) conv=notrunc 2>/dev/null
    done
    sync
    echo 3 >/proc/sys/vm/drop_caches
    for run in $(seq 0 LAST); do
        dd if=/dev/vda bs=4096 skip=$((run * APART)) count=RUN 2>/dev/null | cmp - /tmp/run$run
    done
    echo turn $turn
done
"""
# fio is this guest's own, in its root over 9p; it has the disk's last two MiB, behind all runs.
FIO = (
    "--name=v --size=256k --bs=4k --rw=randwrite --direct=1 --verify=crc32c --verify_fatal=1 "
    "--verify_state_save=0"
)
ROOT_OPTIONS = (
    *("-fsdev", "local,id=root,path=/,security_model=none,multidevs=remap,readonly=on"),
    *("-device", "virtio-9p-pci,fsdev=root,mount_tag=root"),
)
_FIO = f"""
# A library of fio's has more zeroes than there is memory.
echo 1 >/proc/sys/vm/overcommit_memory
mkdir -p /root
mount -t 9p -o trans=virtio,version=9p2000.L,ro,cache=loose,msize=262144 root /root
mount -o bind /dev /root/dev
chroot /root /usr/bin/env LIBRARIES FIO {FIO} --ioengine=psync --thread --filename=/dev/vda \
    --offset=OFFSET --output-format=terse --terse-version=3 >/tmp/fio || {{ cat /tmp/fio; exit 1; }}
echo fio $(cut -d';' -f5,47 /tmp/fio)
"""


def content(name: str, turn: int, block: int) -> bytes:
    """What the block has that `name` wrote in this turn."""
    return (b"%s-%d-%d\n" % (name.encode(), turn, block) * 1000)[:BLOCK]


def blocks() -> list[int]:
    """The numbers of the blocks that a guest writes."""
    return [APART * run + number for run in range(RUNS) for number in range(RUN)]


def script(name: str, *, wait: bool = False, fio: str | None = None) -> str:
    """What a nested guest called `name` runs on its disk of SIZE; with `wait` it says `ready`, and
    begins when it is spoken to. `fio` is where this guest has it, if it is to run as well, which
    needs ROOT_OPTIONS."""
    words = {
        "WAIT": "read go" if wait else "",
        "TURNS": " ".join(map(str, range(1, TURNS + 1))),
        "RUNS": str(RUNS),
        "RUN": str(RUN),
        "APART": str(APART),
        "LAST": str(RUNS - 1),
        "SECTORS": str(SIZE // 512),
        "NAME": name,
    }
    text = _SCRIPT
    if fio is not None:
        libraries = f"LD_LIBRARY_PATH={os.environ.get('LD_LIBRARY_PATH', '')}"
        text += _FIO.replace("LIBRARIES", shlex.quote(libraries)).replace("FIO", fio)
        text = text.replace("OFFSET", str(FIO_AT))
    for word, value in words.items():
        text = text.replace(word, value)
    return text

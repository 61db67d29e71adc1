#!/bin/busybox sh
# The guest's first process: this machine's root over 9p, read-only, with the lab's packages and a
# tmpfs laid over it; then the lab's agent. lab.conf holds what the host wants, as shell variables.
B=/bin/busybox
$B mkdir -p /proc /sys /dev /host /layer /rw /root
$B mount -t proc proc /proc
$B mount -t sysfs sysfs /sys
$B mount -t devtmpfs devtmpfs /dev 2>/dev/null
. /lab.conf

die() {
    echo "lab: $*" >/dev/console
    $B poweroff -f
}

for module in $BOOT_MODULES; do
    $B insmod "/modules/$module" || die "cannot load $module"
done

options=trans=virtio,version=9p2000.L,msize=512000,cache=loose
$B mount -t 9p -o "ro,$options" root /host || die "cannot mount this machine's root over 9p"
lower=/host
if [ -n "$LAYER" ]; then
    $B mount -t 9p -o "ro,$options" layer /layer || die "cannot mount the lab's packages"
    lower=/layer:/host
fi
$B mount -t tmpfs -o "mode=0755,size=$RW_SIZE" rw /rw
$B mkdir -p /rw/upper /rw/work
$B mount -t overlay -o "lowerdir=$lower,upperdir=/rw/upper,workdir=/rw/work" root /root ||
    die "cannot lay the tmpfs over the root"

for place in proc sys dev; do
    $B mkdir -p "/root/$place"
    $B mount --move "/$place" "/root/$place"
done
$B mkdir -p /root/tmp /root/run /root/var/tmp
$B mount -t tmpfs -o "mode=0755,nosuid,nodev,size=$RW_SIZE" run /root/run
$B mount -t tmpfs -o "mode=1777,size=$RW_SIZE" tmp /root/tmp
state=/root/run/lab
$B mkdir -p $state/host $state/layer $state/rw $state/home
$B mount --move /host $state/host
[ -z "$LAYER" ] || $B mount --move /layer $state/layer
$B mount --move /rw $state/rw
$B cp /bin/busybox /agent.py /lab.conf /second.sh $state/

# Folders that the guest's own tmpfs hides (a clone below /tmp) come back as mounts of their own.
number=0
eval "set -- $HIDDEN"
for folder; do
    number=$((number + 1))
    $B mkdir -p "/root$folder" "$state/rw/upper$number" "$state/rw/work$number"
    $B mkdir -p "/tmp/lower$number"
    $B mount --bind "$state/host$folder" "/tmp/lower$number"
    $B mount -t overlay -o \
        "lowerdir=/tmp/lower$number,upperdir=$state/rw/upper$number,workdir=$state/rw/work$number" \
        "hidden$number" "/root$folder" || die "cannot carry in $folder"
done

# Folders shared for writing; the tag of each is its number.
number=0
eval "set -- $SHARED"
for folder; do
    number=$((number + 1))
    $B mkdir -p "/root$folder"
    $B mount -t 9p -o "rw,trans=virtio,version=9p2000.L,msize=512000,cache=none" \
        "share$number" "/root$folder" || die "cannot share $folder"
done

if [ -n "$MODULES" ]; then
    $B mkdir -p "/root/lib/modules/$RELEASE"
    $B mount --bind "$state/host$MODULES" "/root/lib/modules/$RELEASE"
fi
# The kernel's image where a machine has its own.
if [ -r "$state/host$IMAGE" ]; then
    $B mkdir -p /root/boot
    : >"/root/boot/vmlinuz-$RELEASE"
    $B mount --bind "$state/host$IMAGE" "/root/boot/vmlinuz-$RELEASE"
fi
exec $B switch_root /root /run/lab/busybox sh /run/lab/second.sh

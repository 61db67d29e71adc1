# The second half of the guest's start, inside the assembled root; process 1.
B=/run/lab/busybox
. /run/lab/lab.conf
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
export HOME=/run/lab/home

$B mkdir -p /dev/pts /dev/shm /dev/hugepages /dev/mqueue
$B mount -t devpts -o mode=0620,ptmxmode=0666 devpts /dev/pts
$B mount -t tmpfs -o mode=1777,nosuid,nodev shm /dev/shm
[ -e /dev/fd ] || $B ln -s /proc/self/fd /dev/fd
[ -e /dev/stdin ] || $B ln -s /proc/self/fd/0 /dev/stdin
[ -e /dev/stdout ] || $B ln -s /proc/self/fd/1 /dev/stdout
[ -e /dev/stderr ] || $B ln -s /proc/self/fd/2 /dev/stderr
$B mount -t debugfs debugfs /sys/kernel/debug 2>/dev/null
$B mount -t tracefs tracefs /sys/kernel/tracing 2>/dev/null
$B mount -t configfs configfs /sys/kernel/config 2>/dev/null
$B mount -t cgroup2 cgroup2 /sys/fs/cgroup 2>/dev/null
$B mkdir -p /run/lock
$B hostname lab
$B ip link set lo up 2>/dev/null || $B ifconfig lo up
$B rm -f /etc/mtab
$B ln -s /proc/self/mounts /etc/mtab

nvme_controllers() {
    for class in /sys/bus/pci/devices/*/class; do
        [ "$($B cat "$class")" != 0x010802 ] || echo "${class%/class}"
    done
}
nvme_is_probing() {
    for controller in $(nvme_controllers); do
        [ -e "$controller/driver" ] || return 0
    done
    return 1
}
# nvme probes in the background, side by side (PROBE_PREFER_ASYNCHRONOUS). One after another, its
# disks have the same names at each start: nvme0 is the first by address.
case " $LOAD " in *" nvme "*)
    echo 0 >/sys/bus/pci/drivers_autoprobe
    modprobe nvme
    for controller in $(nvme_controllers); do
        [ -e "$controller/driver" ] || echo "${controller##*/}" >/sys/bus/pci/drivers/nvme/bind
    done
    echo 1 >/sys/bus/pci/drivers_autoprobe
    tries=0
    while nvme_is_probing && [ $tries -lt 100 ]; do
        tries=$((tries + 1))
        $B sleep 0.05
    done
    ;;
esac
[ -z "$LOAD" ] || modprobe -a $LOAD

for port in /sys/class/virtio-ports/*; do
    [ "$($B cat "$port/name")" = vfiotool.lab ] && channel=/dev/${port##*/}
done
if [ -z "$channel" ]; then
    echo "lab: no channel to the host" >/dev/console
    $B poweroff -f
fi
"$PYTHON" -I -S /run/lab/agent.py "$channel" </dev/null >/dev/console 2>&1
echo "lab: the agent ended with $?" >/dev/console
$B poweroff -f

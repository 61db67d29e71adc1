#!/bin/busybox sh
# The first process of the small guest that `vm run` starts. It looks at every device behind the
# root ports that were asked for, reads from it without changing anything on it, and reports one
# line for each on the second serial port. trial.conf holds what the host wants.
B=/bin/busybox
$B mkdir -p /proc /sys /dev /tmp
$B mount -t proc proc /proc
$B mount -t sysfs sysfs /sys
$B mount -t devtmpfs devtmpfs /dev 2>/dev/null
$B mount -t tmpfs tmpfs /tmp 2>/dev/null
$B --install -s /bin
export PATH=/bin
. /trial.conf
stty -F "$REPORT" raw -echo 2>/dev/null
exec 3>"$REPORT"

say() {
    echo "$*" >&3
}

# Tells the host that all is said; the host ends the guest, whatever becomes of the power off.
finish() {
    say "end $1"
    sleep 1
    poweroff -f
}

for module in $MODULES; do
    insmod "/modules/$module" || echo "trial: cannot load $module"
done

# The driver of a disk has to be given time: nvme probes in the background, a disk appears later.
wait_for_disks() {
    tries=0
    until [ -n "$(disks_of "$1")" ] || [ $tries -ge "$2" ]; do
        tries=$((tries + 1))
        usleep 100000
    done
}

# With multipath the way to a namespace, which has no node, is nvme0c0n1, and its disk nvme0n1.
disks_of() {
    for disk in /sys/block/*; do
        case "$(readlink -f "$disk/device")/" in
        "$(readlink -f "$1")"/*)
            name=$(echo "${disk##*/}" | sed 's/^\(nvme[0-9]*\)c[0-9]*n/\1n/')
            [ ! -b "/dev/$name" ] || echo "$name"
            ;;
        esac
    done
}

interfaces_of() {
    for interface in "$1"/net/* "$1"/virtio*/net/*; do
        [ ! -e "$interface" ] || echo "${interface##*/}"
    done
}

driver_of() {
    [ ! -e "$1/driver" ] || basename "$(readlink "$1/driver")"
}

# Block 0 and the next 7: the same digest every time, and the same as the host's.
look_at_disk() {
    if dd if="/dev/$2" of=/tmp/head bs=4096 count=1 2>/tmp/error; then
        sum=$(sha256sum </tmp/head)
        say "disk $1 $2 $(cat "/sys/block/$2/size") ${sum%% *}"
    else
        say "failed $1 $2 $(tr '\n' ' ' </tmp/error)"
    fi
}

look_at_interface() {
    ip link set "$2" up 2>/dev/null || ifconfig "$2" up 2>/dev/null
    usleep 300000
    say "net $1 $2 $(cat "/sys/class/net/$2/address") $(cat "/sys/class/net/$2/operstate")"
}

# The first register of what has no driver, where /dev/mem gives it; from an I/O BAR, one byte.
look_at_registers() {
    number=0
    while read -r start end flags; do
        [ $number -lt 6 ] || break
        if [ "$start" != 0x0000000000000000 ] && [ "$end" != 0x0000000000000000 ]; then
            echo 1 >"$2/enable" 2>/dev/null
            if [ $((flags & 0x100)) -ne 0 ]; then
                value=$(dd if="$2/resource$number" bs=1 count=1 2>/dev/null | od -An -tx1)
                say "register $1 $number 8 ${value# }"
            elif [ -e /dev/mem ]; then
                say "register $1 $number 32 $(devmem "$start" 32 2>&1)"
            fi
            echo 0 >"$2/enable" 2>/dev/null
            return
        fi
        number=$((number + 1))
    done <"$2/resource"
}

look_at() {
    name=$1
    path=$2
    ids="$(cat "$path/vendor") $(cat "$path/device") $(cat "$path/class")"
    case "$(cat "$path/class")$(driver_of "$path")" in
    0x0108*) [ ! -e /sys/bus/pci/drivers/nvme ] || wait_for_disks "$path" 600 ;;
    0x01????) ;;
    0x01*) wait_for_disks "$path" 100 ;;
    esac
    driver=$(driver_of "$path")
    say "function $name ${path##*/} $ids ${driver:--}"
    for disk in $(disks_of "$path"); do look_at_disk "$name" "$disk"; done
    for interface in $(interfaces_of "$path"); do look_at_interface "$name" "$interface"; done
    [ -n "$driver" ] || look_at_registers "$name" "$path"
}

say "start $(uname -r)"
for port in $PORTS; do
    for path in "/sys/bus/pci/devices/$port"/*:*:*.*; do
        [ ! -e "$path/vendor" ] || look_at "$port/${path##*.}" "$path"
    done
done
code=0
if [ -n "$COMMAND" ]; then
    sh -c "$COMMAND" </dev/null >/tmp/output 2>&1
    code=$?
    while IFS= read -r line || [ -n "$line" ]; do say "output $line"; done </tmp/output
fi
finish $code

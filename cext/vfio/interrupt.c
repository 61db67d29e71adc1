#define _GNU_SOURCE
#include "vfio/interrupt.h"

#include <errno.h>
#include <poll.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "clock.h"
#include "vfio/ioctl.h"
#include "vfio/uapi_compat.h"

#define NS_A_SECOND 1000000000
/* The one that takes 64-bit times, on machines of either width. */
#ifdef SYS_ppoll_time64
#define VT_SYS_PPOLL SYS_ppoll_time64
#else
#define VT_SYS_PPOLL SYS_ppoll
#endif

int vt_irq_action(int device, uint32_t index, uint32_t start, uint32_t count, uint32_t action)
{
	struct vt_irq_set set = {
		.argsz = sizeof(set),
		.flags = VT_IRQ_DATA_NONE | action,
		.index = index,
		.start = start,
		.count = count,
	};

	return vt_ioctl(device, VT_VFIO_DEVICE_SET_IRQS, &set);
}

int vt_eventfd_take(int fd, uint64_t *signals)
{
	ssize_t got = read(fd, signals, sizeof(*signals));

	if (got == (ssize_t)sizeof(*signals))
		return 1;
	if (got >= 0)
		return -EIO;
	return errno == EAGAIN ? 0 : -errno;
}

/* 1 once `fd` is readable, 0 when no time is left, -errno. Asks the kernel itself: unlike the C
 * library, Linux writes back the time that is left, which saves every wait a look at the clock. */
static int sleep_until_readable(int fd, int64_t *left_ns)
{
	struct pollfd waiting = { .fd = fd, .events = POLLIN };
	struct {
		int64_t s, ns;
	} left = { *left_ns / NS_A_SECOND, *left_ns % NS_A_SECOND };
	long result = syscall(VT_SYS_PPOLL, &waiting, 1, *left_ns < 0 ? NULL : &left, NULL, 0);

	if (*left_ns >= 0)
		*left_ns = result ? left.s * NS_A_SECOND + left.ns : 0;
	return result < 0 ? -errno : result > 0;
}

int vt_eventfd_wait(int fd, int64_t *left_ns, uint64_t spin_ns, uint64_t *signals)
{
	int result = 0;

	if (spin_ns) {
		uint64_t end = vt_clock_ns() + spin_ns;

		do {
			result = vt_eventfd_take(fd, signals);
		} while (!result && vt_clock_ns() < end);
		if (*left_ns > 0)
			*left_ns = (uint64_t)*left_ns > spin_ns ? *left_ns - (int64_t)spin_ns : 0;
	}
	/* Again where another thread was faster. */
	while (!result && *left_ns) {
		result = sleep_until_readable(fd, left_ns);
		if (result > 0)
			result = vt_eventfd_take(fd, signals);
	}
	return result;
}

#define _GNU_SOURCE
#include "vfio/irq.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "vfio/ioctl.h"
#include "vfio/uapi_compat.h"

#define VT_IRQ_MAX 4096u
#define NS_A_SECOND 1000000000
/* The one that takes 64-bit times, on machines of either width. */
#ifdef SYS_ppoll_time64
#define VT_SYS_PPOLL SYS_ppoll_time64
#else
#define VT_SYS_PPOLL SYS_ppoll
#endif

static int set_eventfds(int device, uint32_t index, uint32_t start, uint32_t count,
			uint32_t action, const int32_t *fds)
{
	struct vt_irq_set *set;
	size_t data = sizeof(*fds) * (size_t)count;
	int result;

	if (count > VT_IRQ_MAX)
		return -EINVAL;
	set = calloc(1, sizeof(*set) + data);
	if (!set)
		return -ENOMEM;
	set->argsz = (uint32_t)(sizeof(*set) + data);
	set->flags = VT_IRQ_DATA_EVENTFD | action;
	set->index = index;
	set->start = start;
	set->count = count;
	memcpy(set->fds, fds, data);
	result = vt_ioctl(device, VT_VFIO_DEVICE_SET_IRQS, set);
	free(set);
	return result;
}

int vt_irq_assign(int device, uint32_t index, uint32_t start, const int32_t *fds, uint32_t count)
{
	return set_eventfds(device, index, start, count, VT_IRQ_TRIGGER, fds);
}

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

int vt_irq_unmask_fd(int device, uint32_t index, int32_t fd)
{
	return set_eventfds(device, index, 0, 1, VT_IRQ_UNMASK, &fd);
}

int vt_eventfd(void)
{
	int fd = vt_fault_point();

	if (fd)
		return fd;
	fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	return fd < 0 ? -errno : fd;
}

static uint64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
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
		uint64_t end = now_ns() + spin_ns;

		do {
			result = vt_eventfd_take(fd, signals);
		} while (!result && now_ns() < end);
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

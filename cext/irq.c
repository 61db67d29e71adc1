#define _GNU_SOURCE
#include "irq.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include "ioctl.h"
#include "uapi_compat.h"

#define VT_IRQ_MAX 4096u

static int set_irqs(int device, uint32_t index, uint32_t start, uint32_t count, uint32_t flags,
		    const int32_t *fds)
{
	struct vt_irq_set *set;
	size_t data = fds ? sizeof(int32_t) * (size_t)count : 0;
	int result;

	if (count > VT_IRQ_MAX)
		return -EINVAL;
	set = calloc(1, sizeof(*set) + data);
	if (!set)
		return -ENOMEM;
	set->argsz = (uint32_t)(sizeof(*set) + data);
	set->flags = flags;
	set->index = index;
	set->start = start;
	set->count = count;
	if (fds)
		memcpy(set->fds, fds, data);
	result = vt_ioctl(device, VT_VFIO_DEVICE_SET_IRQS, set);
	free(set);
	return result;
}

int vt_irq_assign(int device, uint32_t index, uint32_t start, const int32_t *fds, uint32_t count)
{
	return set_irqs(device, index, start, count, VT_IRQ_DATA_EVENTFD | VT_IRQ_TRIGGER, fds);
}

int vt_irq_action(int device, uint32_t index, uint32_t start, uint32_t count, uint32_t action)
{
	return set_irqs(device, index, start, count, VT_IRQ_DATA_NONE | action, NULL);
}

int vt_irq_unmask_fd(int device, uint32_t index, int32_t fd)
{
	return set_irqs(device, index, 0, 1, VT_IRQ_DATA_EVENTFD | VT_IRQ_UNMASK, &fd);
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

static int take(int fd, uint64_t *signals)
{
	ssize_t got = read(fd, signals, sizeof(*signals));

	if (got == (ssize_t)sizeof(*signals))
		return 1;
	if (got >= 0)
		return -EIO;
	return errno == EAGAIN ? 0 : -errno;
}

int vt_eventfd_wait(int fd, int timeout_ms, uint64_t spin_ns, uint64_t *signals)
{
	struct pollfd waiting = { .fd = fd, .events = POLLIN };
	int result;

	if (!timeout_ms || spin_ns) {
		result = take(fd, signals);
		if (result)
			return result;
	}
	if (spin_ns) {
		uint64_t end = now_ns() + spin_ns;

		do {
			result = take(fd, signals);
			if (result)
				return result;
		} while (now_ns() < end);
	}
	if (!timeout_ms)
		return 0;
	result = poll(&waiting, 1, timeout_ms);
	if (result < 0)
		return -errno;
	return result ? take(fd, signals) : 0;
}

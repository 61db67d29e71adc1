#define _GNU_SOURCE
#include "vfio/irq.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>

#include "vfio/ioctl.h"
#include "vfio/uapi_compat.h"

#define VT_IRQ_MAX 4096u

static int set_eventfds(int device, uint32_t index, uint32_t start, uint32_t count, uint32_t action,
			const int32_t *fds)
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

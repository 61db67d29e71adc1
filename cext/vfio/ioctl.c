#include "vfio/ioctl.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#ifdef VT_FAULT_INJECTION
static long fault_calls, fault_at;
static int fault_error;

int vt_fault_point(void)
{
	long call = __atomic_add_fetch(&fault_calls, 1, __ATOMIC_RELAXED);

	return fault_at && call == fault_at ? -fault_error : 0;
}

long vt_fault_set(long nth, int error)
{
	long seen = fault_calls;

	fault_calls = 0;
	fault_error = error;
	fault_at = nth;
	return seen;
}
#else
int vt_fault_point(void)
{
	return 0;
}

long vt_fault_set(long nth, int error)
{
	(void)nth;
	(void)error;
	return -ENOSYS;
}
#endif

int vt_ioctl(int fd, unsigned long request, void *argument)
{
	int result = vt_fault_point();

	if (result)
		return result;
	result = ioctl(fd, request, argument);
	return result < 0 ? -errno : result;
}

int vt_open(const char *path)
{
	int fd = vt_fault_point();

	if (fd)
		return fd;
	fd = open(path, O_RDWR | O_CLOEXEC);
	return fd < 0 ? -errno : fd;
}

int vt_close(int fd)
{
	return close(fd) ? -errno : 0;
}

int vt_info(int fd, unsigned long request, uint32_t base, uint32_t index_at, uint32_t index,
	    void *buffer, uint32_t size)
{
	uint32_t argsz = base;
	int result;

	if (size < base)
		return -EINVAL;
	/* The second round starts afresh: on a short buffer the kernel leaves flags behind. */
	for (int round = 0; round < 2; round++) {
		memset(buffer, 0, size);
		memcpy(buffer, &argsz, sizeof(argsz));
		if (index_at)
			memcpy((char *)buffer + index_at, &index, sizeof(index));
		result = vt_ioctl(fd, request, buffer);
		if (result < 0)
			return result;
		memcpy(&argsz, buffer, sizeof(argsz));
		if (argsz <= base || argsz > size)
			break;
	}
	if (argsz > INT32_MAX)
		return -EOVERFLOW;
	return (int)(argsz < base ? base : argsz);
}

/* One way into the kernel for the whole library, so that a test build can fail any call of it. */
#ifndef VT_IOCTL_H
#define VT_IOCTL_H

#include <stdint.h>

#include "vfio/handle.h"

/* ioctl(2) as this library calls it: the result if it is not negative, otherwise -errno. */
int vt_ioctl(int fd, unsigned long request, void *argument);
/* A whole-call passage for anything that is not an ioctl: 0, or -errno if it is to fail here. */
int vt_fault_point(void);

/* Info ioctls: `argsz` protocol of vfio.h. Zeroes `buffer` (`size` bytes), asks with `base` bytes,
 * asks again with what the kernel says it needs. `index_at` is where `index` goes (0 for none).
 * Returns the bytes that the kernel wants to give (which may exceed `size`: ask again with a
 * larger buffer) or -errno. */
int vt_info(int fd, unsigned long request, uint32_t base, uint32_t index_at, uint32_t index,
	    void *buffer, uint32_t size);

#endif

/* Signals by eventfd. */
#ifndef VT_VIRTIO_SIGNAL_H
#define VT_VIRTIO_SIGNAL_H

#include <stdint.h>
#include <unistd.h>

/* Add 1 to an eventfd that does not block; -1: to none. */
static inline void vt_signal(int fd)
{
	uint64_t one = 1;

	/* Full (EAGAIN) is as good as signalled; nothing else can be done about an error here. */
	if (fd >= 0 && write(fd, &one, sizeof(one)) < 0)
		return;
}

#endif

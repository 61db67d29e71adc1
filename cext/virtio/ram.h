/* What moves the bytes of a disk in memory, for block.c alone. */
#ifndef VT_VIRTIO_RAM_H
#define VT_VIRTIO_RAM_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/uio.h>

#include "virtio/disk.h"

/* Copy `length` bytes between the disk's byte `at` and segments, from byte `inside` of the first on;
 * both have as many. What was written is seen by others no later than what is stored after it. */
void vt_ram_copy(struct vt_disk *disk, uint64_t at, const struct iovec *segments, size_t inside,
		 uint64_t length, bool write);

/* Have the processor fetch what will be read: `length` bytes from the disk's byte `at` on, or the first
 * of them. */
void vt_ram_expect(const struct vt_disk *disk, uint64_t at, uint64_t length);

/* Make a range zeros, and give its pages back where they are whole. */
void vt_ram_clear(struct vt_disk *disk, uint64_t at, uint64_t length);

#endif

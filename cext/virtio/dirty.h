/* A log of the pages that a device writes, for a machine that is moved to another host while it runs
 * (QEMU docs/interop/vhost-user.rst, "Migration"): a bit for each 4096 bytes of guest addresses.
 *
 * The log is the front end's memory: a page that lies behind its end is not logged. Each vt_dirty
 * belongs to one thread; bits are set atomically, as queues share a log.
 */
#ifndef VT_VIRTIO_DIRTY_H
#define VT_VIRTIO_DIRTY_H

#include <stdbool.h>
#include <stdint.h>

#include "virtio/memory.h"
#include "virtio/ring.h"

struct vt_dirty_log {
	struct vt_memory *memory; /* holds the bitmap; NULL: nothing is logged */
	uint64_t at;              /* its `user` address there */
	uint64_t size;            /* bytes */
	bool ring;                /* the used ring is logged too, as lying at: */
	uint64_t ring_guest;
};

/* What one queue logs; all zeros: nothing. */
struct vt_dirty {
	struct vt_dirty_log log;
	uint8_t *bits;
};

/* Log as `wanted` says from now on; a reference on its memory is taken.
 * Return: 0, or -EFAULT if the log does not lie in its memory; nothing changes then. */
int vt_dirty_set(struct vt_dirty *dirty, const struct vt_dirty_log *wanted);

/* Give the reference back. */
void vt_dirty_end(struct vt_dirty *dirty);

/* Log `length` bytes at a guest address. */
void vt_dirty_range(struct vt_dirty *dirty, uint64_t guest, uint64_t length);

/* Log the first `written` bytes of what a chain of `memory` lets the device write. */
void vt_dirty_chain(struct vt_dirty *dirty, const struct vt_memory *memory,
		    const struct vt_chain *chain, const struct iovec *segments, uint64_t written);

/* Log what the ring's next completion writes: a used entry and the used index, or a descriptor. */
void vt_dirty_completion(struct vt_dirty *dirty, const struct vt_ring *ring);

#endif

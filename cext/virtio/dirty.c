#include "virtio/dirty.h"

#include <errno.h>

#define LOG_PAGE 4096u

int vt_dirty_set(struct vt_dirty *dirty, const struct vt_dirty_log *wanted)
{
	struct vt_memory *old = dirty->log.memory;
	uint8_t *bits = NULL;

	if (wanted->memory) {
		bits = vt_memory_user(wanted->memory, wanted->at, wanted->size, 1);
		if (!bits || !wanted->size)
			return -EFAULT;
		vt_memory_get(wanted->memory);
	}
	dirty->log = *wanted;
	dirty->bits = bits;
	vt_memory_put(old);
	return 0;
}

void vt_dirty_end(struct vt_dirty *dirty)
{
	vt_memory_put(dirty->log.memory);
	*dirty = (struct vt_dirty){ 0 };
}

void vt_dirty_range(struct vt_dirty *dirty, uint64_t guest, uint64_t length)
{
	uint64_t last;

	if (!dirty->bits || !length || guest + (length - 1) < guest)
		return;
	last = (guest + (length - 1)) / LOG_PAGE;
	for (uint64_t page = guest / LOG_PAGE; page <= last && page / 8 < dirty->log.size; page++)
		__atomic_or_fetch(&dirty->bits[page / 8], (uint8_t)(1u << page % 8),
				  __ATOMIC_RELAXED);
}

void vt_dirty_chain(struct vt_dirty *dirty, const struct vt_memory *memory,
		    const struct vt_chain *chain, const struct iovec *segments, uint64_t written)
{
	const struct iovec *writable = segments + chain->readable;

	for (uint32_t i = 0; dirty->bits && i < chain->writable && written; i++) {
		uint64_t guest = vt_memory_guest(memory, writable[i].iov_base);
		uint64_t length = writable[i].iov_len < written ? writable[i].iov_len : written;

		if (guest != UINT64_MAX)
			vt_dirty_range(dirty, guest, length);
		written -= length;
	}
}

void vt_dirty_completion(struct vt_dirty *dirty, const struct vt_ring *ring)
{
	uint64_t guest;

	if (!dirty->bits)
		return;
	/* A packed ring's descriptors are written; the address that is announced is another one's. */
	guest = vt_ring_used_guest(ring);
	if (guest != UINT64_MAX) {
		vt_dirty_range(dirty, guest, 16);
	} else if (dirty->log.ring) {
		vt_dirty_range(dirty, dirty->log.ring_guest, 4);
		vt_dirty_range(dirty, dirty->log.ring_guest + 4 + 8 * (uint64_t)vt_ring_used(ring),
			       8);
	}
}

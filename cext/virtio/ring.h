/* The device's side of a virtqueue, split or packed (Virtual I/O Device 1.2, sections 2.7, 2.8).
 *
 * A ring belongs to one thread at a time. Nothing that the driver wrote is trusted: indices,
 * descriptors and lengths are copied once and judged on the copy, and what breaks a rule breaks
 * this ring alone (`vt_ring_broken` says which rule). Used entries become visible together by
 * vt_ring_publish. A head is busy from its fetch to its completion; one that comes twice is the
 * driver's fault, so work in flight is bounded by the ring's size.
 */
#ifndef VT_VIRTIO_RING_H
#define VT_VIRTIO_RING_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/uio.h>

#include "virtio/memory.h"

/* Segments of one chain at most, after they were cut at the ends of regions: twice what QEMU's
 * devices let a driver use (seg_max 254), and room for a header. */
#define VT_CHAIN_SEGMENTS 1024u
#define VT_RING_SIZE 32768u

struct vt_ring;

/* Where a ring lies and how it is used. Addresses are the front end's (`user` of a region). */
struct vt_ring_layout {
	uint64_t descriptors; /* `size` of 16 bytes, aligned to 16 */
	uint64_t available;   /* aligned to 2; packed: the driver's event suppression, aligned to 4 */
	uint64_t used;        /* aligned to 4; packed: the device's event suppression */
	uint32_t size;        /* up to 32768; of a split ring a power of two */
	bool event_index;     /* VIRTIO_F_EVENT_IDX (29) was negotiated */
	bool indirect;        /* VIRTIO_F_INDIRECT_DESC (28) was negotiated */
	bool packed;          /* VIRTIO_F_RING_PACKED (34) was negotiated */
};

/* One request as the driver made it available. Its segments stand in the arena of the fetch:
 * first those that the device reads, then those that it writes. */
struct vt_chain {
	uint16_t head;          /* in a packed ring: the buffer's id */
	uint16_t readable;      /* segments */
	uint16_t writable;      /* segments */
	uint32_t first;         /* the index of its first segment in the arena */
	uint32_t readable_bytes;
	uint32_t writable_bytes;
};

/* Why a ring is broken, in words; NULL if it is not. */
const char *vt_ring_broken(const struct vt_ring *ring);

/* Make a ring on `memory`, of which it takes a reference, beginning at index `base`: of a packed
 * ring bits 0 to 14 are the next available place and bit 15 its wrap counter, bits 16 to 31 the next
 * used one's (as vhost-user has them).
 *
 * Return: 0; -EINVAL for a size or a base that no such ring has; -EFAULT for an address that
 * is not aligned or not within one region; -ENOMEM.
 */
int vt_ring_start(struct vt_memory *memory, const struct vt_ring_layout *layout, uint32_t base,
		  struct vt_ring **ring);

/* Keep an in-flight log at `at` (vt_log_size or vt_packed_log_size bytes of memory that stays mapped, aligned to 8), before
 * the first fetch. What the log says is in flight is fetched first, in its order, and the ring goes
 * on behind it, whatever `base` was.
 *
 * Return: the number of requests taken over; -EINVAL if the log is not this ring's; -ENOMEM. */
int vt_ring_set_log(struct vt_ring *ring, void *at);

/* Make a ring as vt_ring_start does and, where `log_memory` is not NULL, keep its in-flight log at the
 * `user` address `log_at` of that memory, of which the caller keeps a reference.
 * Return: 0; as vt_ring_start and vt_ring_set_log; -EFAULT also for a log that is not within one
 * region. No ring is left then. */
int vt_ring_begin(struct vt_memory *memory, const struct vt_ring_layout *layout, uint32_t base,
		  struct vt_memory *log_memory, uint64_t log_at, struct vt_ring **ring);

/* End a ring. Its busy heads are lost to the driver: drain first. `ring` may be NULL.
 * Return: the index of the next entry that was not fetched, for another start. */
uint32_t vt_ring_stop(struct vt_ring *ring);

/* Put another memory map under a ring between two calls. Chains fetched before keep pointing into
 * the old one, so the caller keeps a reference until they are complete.
 * Return: 0, or -EFAULT if the ring does not lie in `memory`; it is then broken. */
int vt_ring_set_memory(struct vt_ring *ring, struct vt_memory *memory);

/* Take up to `most` available chains; one acquire for all of them.
 *
 * `arena` has `room` segments, at least VT_CHAIN_SEGMENTS; a chain that no longer fits stays for
 * the next call.
 * Return: the number taken; 0 if nothing is available; -EPROTO if the ring is broken.
 */
int vt_ring_fetch(struct vt_ring *ring, struct vt_chain *chains, uint32_t most,
		  struct iovec *arena, uint32_t room);

/* How many chains are available and not fetched: a plain look, for polling. Of a packed ring: how
 * many there can be, if there is one. */
uint16_t vt_ring_waiting(const struct vt_ring *ring);

/* How many chains are fetched and not complete. */
uint32_t vt_ring_in_flight(const struct vt_ring *ring);

/* Complete a chain, of which `written` bytes were written. Not visible before vt_ring_publish.
 * Return: 0, or -EINVAL for a head that is not busy. */
int vt_ring_complete(struct vt_ring *ring, uint16_t head, uint32_t written);

/* The bytes of an in-flight log for such a ring. */
uint64_t vt_ring_log_size(const struct vt_ring_layout *layout);

/* The place in its ring of the used entry, or of a packed ring's descriptor, that vt_ring_complete
 * writes next. */
uint16_t vt_ring_used(const struct vt_ring *ring);

/* The guest address of the descriptor that vt_ring_complete overwrites next, for a log of written
 * pages. Return: it; UINT64_MAX of a split ring. */
uint64_t vt_ring_used_guest(const struct vt_ring *ring);

/* Make completions visible to a driver that looks. One that waits is not signalled before
 * vt_ring_publish has asked whether it wants to be. */
void vt_ring_show(struct vt_ring *ring);

/* Make completions visible. Return: whether the driver wants to be signalled for any that became
 * visible since the last call. */
bool vt_ring_publish(struct vt_ring *ring);

/* Ask for notifications. Return: whether chains became available meanwhile: fetch again then
 * instead of waiting. */
bool vt_ring_notify_on(struct vt_ring *ring);

/* Tell the driver that no notification is needed: a wish, which it may overlook. */
void vt_ring_notify_off(struct vt_ring *ring);

#endif

/* The in-flight log of a packed virtqueue (QEMU docs/interop/vhost-user.rst, "QueueRegionPacked").
 *
 * A used descriptor overwrites what the driver wrote, which may belong to a request that is still in
 * flight: the log keeps copies of the descriptors. Like inflight.h otherwise; what it says is the
 * front end's, and is checked.
 */
#ifndef VT_VIRTIO_PACKED_LOG_H
#define VT_VIRTIO_PACKED_LOG_H

#include <stdbool.h>
#include <stdint.h>

struct vt_packed_log;

/* A descriptor as the driver wrote it, in this machine's byte order. */
struct vt_packed_copy {
	uint64_t address;
	uint32_t length;
	uint16_t id, flags;
};

/* A place in the ring and the wrap counter that goes with it. */
struct vt_packed_place {
	uint16_t place;
	bool wrap;
};

/* The bytes that the log of one queue takes. */
uint64_t vt_packed_log_size(uint32_t queue_size);

/* Take up the log at `at` (vt_packed_log_size bytes, aligned to 8). `flags` is the word of flags of
 * the ring's first descriptor. `used` is where the ring goes on: as it was told for a log that nobody
 * has used yet, as the log says afterwards.
 *
 * `heads` (queue_size entries) receives the log's entries in flight, oldest first, and `slots` how
 * many descriptors they have together.
 * Return: their number; -EINVAL if the log is another queue's or contradicts itself; -ENOMEM. */
int vt_packed_log_take_up(void *at, uint32_t queue_size, const uint16_t *flags,
			  struct vt_packed_place *used, uint16_t *heads, uint32_t *slots,
			  struct vt_packed_log **log);

/* Forget the log's handle; its memory stays as it is. `log` may be NULL. */
void vt_packed_log_end(struct vt_packed_log *log);

/* The descriptors of an entry in flight. Return: their number; 0 if there are more than `room` or
 * the log contradicts itself. */
uint32_t vt_packed_log_chain(const struct vt_packed_log *log, uint16_t entry,
			     struct vt_packed_copy *copies, uint32_t room);

/* An entry in flight, of `count` descriptors, is the buffer `id` from now on. */
void vt_packed_log_adopt(struct vt_packed_log *log, uint16_t entry, uint32_t count, uint16_t id);

/* A chain was fetched, whose id is `id`. */
void vt_packed_log_mark(struct vt_packed_log *log, const struct vt_packed_copy *copies,
			uint32_t count, uint16_t id);

/* A buffer's used descriptor was written and is not visible yet; the next one goes to `used`. */
void vt_packed_log_batch(struct vt_packed_log *log, uint16_t id, struct vt_packed_place used);

/* All that was batched is visible. */
void vt_packed_log_publish(struct vt_packed_log *log);

#endif

/* The in-flight log of a split virtqueue: what was fetched and not completed, in memory that
 * outlives this process (QEMU docs/interop/vhost-user.rst, "Inflight I/O tracking").
 *
 * A head is marked before its request is looked at and cleared after its used entry is visible, so
 * that a back end that takes over after a crash does each request at least once and forgets none.
 * The log is the front end's memory: what it says is checked like anything that a driver writes.
 */
#ifndef VT_VIRTIO_INFLIGHT_H
#define VT_VIRTIO_INFLIGHT_H

#include <stdint.h>

struct vt_log;

/* The bytes that the log of one queue takes. */
uint64_t vt_log_size(uint32_t queue_size);

/* Take up the log at `at` (vt_log_size bytes, aligned to 8), whose ring's used index is `used`.
 *
 * A log that nobody has used yet is begun. In one that somebody has, the last batch, which may have
 * become visible without being cleared, is cleared if the used index says so.
 * `heads` (queue_size entries) receives the heads in flight, oldest first.
 * Return: their number; -EINVAL if the log is another queue's or contradicts itself; -ENOMEM.
 */
int vt_log_take_up(void *at, uint32_t queue_size, uint16_t used, uint16_t *heads,
		   struct vt_log **log);

/* Forget the log's handle; its memory stays as it is. `log` may be NULL. */
void vt_log_end(struct vt_log *log);

/* A head was fetched. */
void vt_log_mark(struct vt_log *log, uint16_t head);

/* A head's used entry was written and is not visible yet. */
void vt_log_batch(struct vt_log *log, uint16_t head);

/* The used index `used` is visible with all heads batched since the last call. */
void vt_log_publish(struct vt_log *log, uint16_t used);

#endif

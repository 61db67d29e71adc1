/* A virtqueue that its owner serves itself, request by request: what devices written in Python
 * stand on. It has the ring, the logs and the signal to the driver in one object; kicks are the
 * owner's to wait for.
 *
 * A queue belongs to one thread at a time. Requests may be completed in any order and any number of
 * fetches later; their segments point into the memory map that was there when they were fetched, of
 * which the owner keeps a reference.
 */
#ifndef VT_VIRTIO_DIRECT_H
#define VT_VIRTIO_DIRECT_H

#include <stdbool.h>
#include <stdint.h>

#include "virtio/dirty.h"
#include "virtio/memory.h"
#include "virtio/ring.h"

/* Requests of one fetch at most. */
#define VT_DIRECT_BATCH 64u
/* Numbers that vt_direct_fetch gives of each request: its head, its readable segments, its writable
 * segments, the index of the first of them in the table of segments, and the bytes of each kind. */
#define VT_DIRECT_FIELDS 6u

struct vt_direct;

struct vt_direct_settings {
	struct vt_memory *memory;     /* a reference is taken */
	struct vt_ring_layout layout;
	uint32_t base;                /* the next available entry */
	int call_fd;                  /* eventfd that the driver waits for; -1: none */
	struct vt_memory *log_memory; /* holds the in-flight log, or NULL; a reference is taken */
	uint64_t log_at;              /* its `user` address there */
	struct vt_dirty_log dirty;    /* a reference on its memory is taken */
};

/* Make a queue. `call_fd` is duplicated.
 * Return: 0, what vt_ring_start and vt_ring_set_log say, -EFAULT for a log that does not lie in its
 * memory, -EMFILE, -ENOMEM. */
int vt_direct_start(const struct vt_direct_settings *settings, struct vt_direct **queue);

/* End a queue. Requests that are not complete are lost to the driver unless there is a log.
 * Return: the next available entry (0 to 65535). */
uint32_t vt_direct_stop(struct vt_direct *queue);

/* Take up to `most` requests, and to VT_DIRECT_BATCH.
 *
 * `fields` has room for VT_DIRECT_FIELDS numbers of each. Segments stand in the queue's own table
 * (vt_direct_segments) until the next fetch: pairs of an address in this process and a length.
 * Return: the number taken, or -EPROTO if the ring is broken. */
int vt_direct_fetch(struct vt_direct *queue, uint32_t *fields, uint32_t most);

/* The table of segments, each two 64-bit numbers. It stays where it is as long as the queue. */
const uint64_t *vt_direct_segments(const struct vt_direct *queue);

/* How many segments the table has. */
uint32_t vt_direct_room(void);

/* Log `length` bytes at `address`, as a segment has it, as written, if that is logged at all. */
void vt_direct_wrote(struct vt_direct *queue, uint64_t address, uint64_t length);

/* Whether what is written is logged: vt_direct_wrote is due. */
bool vt_direct_logs(const struct vt_direct *queue);

/* Complete a request of which `written` bytes were written; visible after vt_direct_publish.
 * Return: 0, or -EINVAL for a head that is not in flight. */
int vt_direct_complete(struct vt_direct *queue, uint32_t head, uint32_t written);

/* Make completions visible and signal the driver if it wants that. */
void vt_direct_publish(struct vt_direct *queue);

/* Ask for kicks (`on`), or say that none is needed. Return: whether requests wait already. */
bool vt_direct_notify(struct vt_direct *queue, bool on);

/* Requests that are available and not fetched; a plain look. */
uint32_t vt_direct_waiting(const struct vt_direct *queue);

/* Requests that were fetched and are not complete. */
uint32_t vt_direct_in_flight(const struct vt_direct *queue);

/* Put another memory map under the queue. Return: 0; -EFAULT: it is then broken. */
int vt_direct_set_memory(struct vt_direct *queue, struct vt_memory *memory);

/* Signal another eventfd from now on, and once at once; -1: none. Return: 0 or -EMFILE. */
int vt_direct_set_call(struct vt_direct *queue, int call_fd);

/* Log what is written from now on, or nothing. Return: as vt_dirty_set. */
int vt_direct_set_dirty_log(struct vt_direct *queue, const struct vt_dirty_log *dirty);

/* Why the queue serves no more, in words; NULL while it does. */
const char *vt_direct_broken(const struct vt_direct *queue);

#endif

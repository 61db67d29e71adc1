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

/* Make a queue. `call_fd` is duplicated, and signalled once.
 * Return: 0, what vt_ring_start and vt_ring_set_log say, -EFAULT for a log that does not lie in its
 * memory, -EMFILE, -ENOMEM. */
int vt_direct_start(const struct vt_direct_settings *settings, struct vt_direct **queue);

/* End a queue. Requests that are not complete are lost to the driver unless there is a log.
 * Return: the next available entry (0 to 65535). */
uint32_t vt_direct_stop(struct vt_direct *queue);

/* Take up to `most` requests, and to VT_DIRECT_BATCH: `*chains` are theirs, and the segments of a
 * chain stand in `*segments` from its `first` on. Both are the queue's own, until the next fetch.
 * Return: the number taken, or -EPROTO if the ring is broken. */
int vt_direct_fetch(struct vt_direct *queue, uint32_t most, const struct vt_chain **chains,
		    const struct iovec **segments);

/* Complete a request of which `written` bytes were written; visible after vt_direct_publish. The
 * pages that were written are logged, if they are to be: `memory` is the map that was the queue's
 * when the request was fetched, `segments` are the chain's own.
 * Return: 0, or -EINVAL for a head that is not in flight. */
int vt_direct_complete(struct vt_direct *queue, const struct vt_memory *memory,
		       const struct vt_chain *chain, const struct iovec *segments,
		       uint32_t written);

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

/* What is called for each request or batch, for vfiotool.native._types: that is a library of its
 * own, which is not linked with this one. None of these waits. */
struct vt_direct_calls {
	int (*fetch)(struct vt_direct *, uint32_t, const struct vt_chain **,
		     const struct iovec **);
	int (*complete)(struct vt_direct *, const struct vt_memory *, const struct vt_chain *,
			const struct iovec *, uint32_t);
	void (*publish)(struct vt_direct *);
	bool (*notify)(struct vt_direct *, bool);
};

const struct vt_direct_calls *vt_direct_calls(void);

#endif

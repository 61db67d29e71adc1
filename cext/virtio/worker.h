/* Threads that serve virtqueues, without the interpreter's lock.
 *
 * A queue belongs to one worker; control (any other thread) hands it over, takes it back and changes
 * it by commands that return when the worker has done them. Queues that have work go round by deficit,
 * in the proportion of their shares' weights; one whose limits let it do nothing is left alone, its
 * notifications off, until its time comes. A worker sleeps in epoll while its queues
 * are idle. After work it looks at the rings itself for a while, which doubles when work came within it
 * and halves when none did, up to the worker's limit; 0 never looks. It does not look for a while after
 * work came only because another thread had taken its processor, nor after looks of all lengths found
 * nothing.
 */
#ifndef VT_VIRTIO_WORKER_H
#define VT_VIRTIO_WORKER_H

#include <stdbool.h>
#include <stdint.h>

#include "virtio/block.h"
#include "virtio/dirty.h"
#include "virtio/limits.h"
#include "virtio/memory.h"
#include "virtio/ring.h"

struct vt_worker;
struct vt_queue;

struct vt_worker_figures {
	uint64_t requests, batches, signals, kicks, sleeps;
};

struct vt_queue_settings {
	struct vt_memory *memory;     /* a reference is taken */
	struct vt_ring_layout layout;
	uint32_t base;                /* the next available entry */
	struct vt_disk *disk;         /* has to stay until the queue is stopped */
	struct vt_port *port;         /* of the worker, to the disk's controller; or NULL */
	struct vt_blk_mode mode;
	int kick_fd;                  /* eventfd that the driver writes; -1: none, the ring is polled */
	int call_fd;                  /* eventfd that the driver waits for; -1: none */
	bool call_is_vduse;           /* it is a VDUSE device instead, of which this is queue: */
	uint32_t call_index;
	int error_fd;                 /* eventfd that is written once when the queue breaks; or -1 */
	struct vt_memory *log_memory; /* holds the in-flight log, or NULL; a reference is taken */
	uint64_t log_at;              /* its `user` address there */
	struct vt_dirty_log dirty;    /* a reference on its memory is taken */
	struct vt_share *share;       /* its limits, or NULL; a reference is taken */
};

/* The clock of workers and of their limits: nanoseconds since the machine started. */
uint64_t vt_now_ns(void);

/* Start a thread. `poll_us` limits how long it looks at idle rings before it sleeps.
 * Return: 0 or a negative errno. */
int vt_worker_start(uint32_t poll_us, struct vt_worker **worker);

/* End a worker that has no queues. Return: 0, or -EBUSY. */
int vt_worker_stop(struct vt_worker *worker);

/* Have a worker use a port, for the queues whose disks are behind it. Return: 0, -ENOSPC for too
 * many, or what epoll_ctl says. */
int vt_worker_add_port(struct vt_worker *worker, struct vt_port *port);

/* Have a worker use a port no more. Return: 0, or -EBUSY while something is out. */
int vt_worker_remove_port(struct vt_worker *worker, struct vt_port *port);

/* vt_port_down, in the worker's thread. */
void vt_worker_port_down(struct vt_worker *worker, struct vt_port *port);

/* vt_port_up, in the worker's thread. */
void vt_worker_port_up(struct vt_worker *worker, struct vt_port *port, bool works);

/* Have queues that wait for their limits ask again: after limits were changed. */
void vt_worker_recheck(struct vt_worker *worker);

void vt_worker_figures(const struct vt_worker *worker, struct vt_worker_figures *figures);

/* Have a worker serve a queue. The descriptors are duplicated. Requests that the log says are in
 * flight are done first. The driver is signalled once, whether or not there is something to see.
 * Return: 0, what vt_ring_start and vt_ring_set_log say, -EFAULT for a log that does not lie in its
 * memory, -EMFILE. */
int vt_queue_start(struct vt_worker *worker, const struct vt_queue_settings *settings,
		   struct vt_queue **queue);

/* End a queue when its requests have ended, also those that wait for a disk. Return: the next available entry (0 to 65535). */
uint32_t vt_queue_stop(struct vt_queue *queue);

/* End a queue without waiting for its disk longer than it takes to cancel what was begun there: what
 * could be cancelled stays marked in the in-flight log, for whoever goes on with it. What the disk is
 * in the middle of is waited for, as it would come to the disk later than what is done next.
 * Without a log it is vt_queue_stop. Return: as vt_queue_stop. */
uint32_t vt_queue_suspend(struct vt_queue *queue);

/* Have another worker serve a queue from now on. Return: 0; or a negative errno, and the queue is
 * where it was: -EBUSY while it waits for its disk, -ENXIO if the worker has no port to that. */
int vt_queue_move(struct vt_queue *queue, struct vt_worker *worker);

/* Requests that the queue did since its start. */
uint64_t vt_queue_served(const struct vt_queue *queue);

/* Put another memory map under a running queue. Return: 0; -EFAULT: the queue is then broken. */
int vt_queue_set_memory(struct vt_queue *queue, struct vt_memory *memory);

/* Signal another eventfd from now on, and once at once; -1: none. Return: 0 or -EMFILE. */
int vt_queue_set_call(struct vt_queue *queue, int call_fd);

/* Log what is written from now on, or nothing. Return: 0, or -EFAULT if the log does not lie in its
 * memory; nothing is logged then. */
int vt_queue_set_dirty_log(struct vt_queue *queue, const struct vt_dirty_log *dirty);

/* Why the queue serves no more, in words; NULL while it does. */
const char *vt_queue_broken(struct vt_queue *queue);

#endif

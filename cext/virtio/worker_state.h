/* The inside of workers and their queues, for worker.c, serve.c and queue.c alone.
 *
 * All of a queue that runs belongs to its worker's thread. */
#ifndef VT_VIRTIO_WORKER_STATE_H
#define VT_VIRTIO_WORKER_STATE_H

#include <errno.h>
#include <pthread.h>

#include "virtio/worker.h"

#define VT_BATCH 64u
/* What a queue is given at first after it had nothing: a driver that sleeps is woken by the first of
 * it, and by the time that it runs there is more to do on both ends. */
#define VT_FIRST_STEP 16u
#define VT_ARENA (2u * VT_CHAIN_SEGMENTS)
#define VT_WORKER_PORTS 16u

struct vt_queue {
	struct vt_worker *worker;
	struct vt_ring *ring;
	struct vt_memory *memory, *log_memory;
	struct vt_disk *disk;
	struct vt_port *port;   /* of its worker, to its disk; or NULL */
	struct vt_blk_mode mode;
	int kick_fd, call_fd, error_fd;
	bool call_is_vduse;
	uint32_t call_index;
	struct vt_dirty dirty;
	const char *broken;
	struct vt_share *share; /* its limits, or NULL */
	struct vt_turn turn;
	int64_t credit;         /* what it may do before others have had their turn, in bytes */
	uint64_t served;        /* requests */
	bool awake;             /* the worker looks at it by itself */
	bool kicked;            /* that is why */
	bool parked;            /* its limits let it do nothing before: */
	uint64_t due;
	uint32_t size;
	uint32_t step;          /* what it is given at once, twice as much each time */
	uint64_t window_ns;     /* how long, after its last work */
	uint64_t worked_at;
	uint64_t look_at;       /* when it is looked at again, if that did harm; or 0 */
	uint32_t pending;       /* requests that wait for the disk: */
	struct vt_request *waiting;
	bool suspending;        /* those are cancelled, and left to the in-flight log */
	bool unpublished;       /* some of them have ended just now */
	struct vt_queue *next_finished;
	struct vt_command *leaving; /* waits for the last of them */
	struct vt_queue *next;  /* of the awake ones, or of the parked ones */
};

struct vt_command {
	int (*run)(struct vt_command *command);
	void *queue, *argument;
	int result;
	bool done;
	struct vt_command *next;
};

struct vt_worker {
	pthread_t thread;
	int epoll, mailbox, timer;
	uint64_t poll_ns;
	pthread_mutex_t lock;   /* of the commands */
	pthread_cond_t answered;
	struct vt_command *commands;
	uint32_t queues;        /* that it serves; the worker's own */
	bool ending;
	uint32_t awake_count;
	uint32_t since_events;  /* requests done since events were taken */
	uint64_t round_at;      /* when it last began a round over the awake ones */
	int64_t preemptions;    /* as they were counted last */
	struct vt_queue *awake, *parked;
	uint64_t due;           /* of the parked queue whose time comes first; UINT64_MAX: none */
	struct vt_io *io;       /* NULL where there is no io_uring */
	struct vt_port *ports[VT_WORKER_PORTS];
	uint32_t port_count;
	uint64_t port_at;       /* when one of them had an answer last */
	struct vt_worker_figures figures;
	struct iovec arena[VT_ARENA];
	struct vt_chain chains[VT_BATCH];
};

/* A command's result: it is answered later, by vt_worker_answer. */
#define VT_LATER INT32_MIN


/* Add 1 to a counter that other threads read. */
void vt_count(uint64_t *counter);

/* Signal a queue's driver. */
void vt_queue_signal(struct vt_queue *queue);

/* Have the worker run a command, and wait for its answer. Return: the command's result. */
int vt_worker_ask(struct vt_worker *worker, struct vt_command *command);

/* Give a command its answer, after which it is no more. */
void vt_worker_answer(struct vt_worker *worker, struct vt_command *command, int result);

/* Do one batch of what a queue has available, `most` requests of it at most; what has to wait for a
 * disk is begun. Return: how many requests were taken. */
uint32_t vt_serve(struct vt_worker *worker, struct vt_queue *queue, uint32_t most);

/* Go on with, or complete, the requests whose disk has answered. Return: whether there was one. */
bool vt_serve_finished(struct vt_worker *worker);

/* Take what controllers have answered, and tell them what was begun. */
void vt_attend_ports(struct vt_worker *worker);

/* Whether a controller is to be looked at rather than slept on: it was quick of late, or it signals
 * nothing. */
bool vt_watches_ports(struct vt_worker *worker);

/* For commands: have the worker look at a queue by itself from now on, or no more. */
void vt_queue_wake(struct vt_queue *queue);
void vt_queue_forget(struct vt_queue *queue);

/* End a queue's service: `why` is what vt_queue_broken says. */
void vt_queue_breaks(struct vt_queue *queue, const char *why);

#endif

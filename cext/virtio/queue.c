#define _GNU_SOURCE
#include "virtio/worker_state.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <unistd.h>

static void free_queue(struct vt_queue *queue)
{
	vt_ring_stop(queue->ring);
	vt_memory_put(queue->memory);
	vt_memory_put(queue->log_memory);
	vt_dirty_end(&queue->dirty);
	if (queue->share) {
		vt_share_leave(queue->share, &queue->turn);
		vt_share_put(queue->share);
	}
	if (queue->kick_fd >= 0)
		close(queue->kick_fd);
	if (queue->call_fd >= 0)
		close(queue->call_fd);
	if (queue->error_fd >= 0)
		close(queue->error_fd);
	free(queue);
}

/* Duplicate a descriptor that may be -1. Return: whether it could be. */
static bool keep(int fd, int *kept)
{
	*kept = fd < 0 ? -1 : fcntl(fd, F_DUPFD_CLOEXEC, 0);
	return fd < 0 || *kept >= 0;
}

static int run_set_dirty_log(struct vt_command *command)
{
	struct vt_queue *queue = command->queue;

	return vt_dirty_set(&queue->dirty, command->argument);
}

int vt_queue_set_dirty_log(struct vt_queue *queue, const struct vt_dirty_log *dirty)
{
	struct vt_dirty_log wanted = *dirty;
	struct vt_command command = { .run = run_set_dirty_log, .queue = queue, .argument = &wanted };

	return vt_worker_ask(queue->worker, &command);
}

static int run_start(struct vt_command *command)
{
	struct vt_queue *queue = command->queue;
	struct epoll_event event = { .events = EPOLLIN | EPOLLET, .data.ptr = queue };

	if (queue->kick_fd >= 0 &&
	    epoll_ctl(queue->worker->epoll, EPOLL_CTL_ADD, queue->kick_fd, &event))
		return -errno;
	queue->worker->queues++;
	/* What was made available before we came is announced by nobody. */
	queue->worked_at = vt_now_ns();
	queue->window_ns = queue->worker->poll_ns;
	queue->step = VT_FIRST_STEP;
	vt_queue_wake(queue);
	/* Who served it before may have ended between showing a completion and signalling it. */
	vt_queue_signal(queue);
	return 0;
}

int vt_queue_start(struct vt_worker *worker, const struct vt_queue_settings *settings,
		   struct vt_queue **queue)
{
	struct vt_command command = { .run = run_start };
	struct vt_queue *made = calloc(1, sizeof(*made));
	int result;

	*queue = NULL;
	if (!made)
		return -ENOMEM;
	made->worker = worker;
	made->disk = settings->disk;
	made->port = settings->port;
	made->size = settings->layout.size;
	made->mode = settings->mode;
	made->call_is_vduse = settings->call_is_vduse;
	made->call_index = settings->call_index;
	made->kick_fd = made->call_fd = made->error_fd = -1;
	made->memory = vt_memory_get(settings->memory);
	made->log_memory = settings->log_memory ? vt_memory_get(settings->log_memory) : NULL;
	if (settings->share)
		made->share = vt_share_get(settings->share);
	if (!keep(settings->kick_fd, &made->kick_fd) || !keep(settings->call_fd, &made->call_fd) ||
	    !keep(settings->error_fd, &made->error_fd)) {
		free_queue(made);
		return -EMFILE;
	}
	/* The driver's end decides whether its eventfds block; ours must not. */
	if (made->kick_fd >= 0)
		fcntl(made->kick_fd, F_SETFL, O_NONBLOCK);
	if (made->call_fd >= 0)
		fcntl(made->call_fd, F_SETFL, O_NONBLOCK);
	result = vt_ring_begin(made->memory, &settings->layout, settings->base,
			       made->log_memory, settings->log_at, &made->ring);
	if (!result)
		result = vt_dirty_set(&made->dirty, &settings->dirty);
	command.queue = made;
	if (!result)
		result = vt_worker_ask(worker, &command);
	if (result) {
		free_queue(made);
		return result;
	}
	*queue = made;
	return 0;
}

static int run_stop(struct vt_command *command)
{
	struct vt_queue *queue = command->queue;

	if (queue->kick_fd >= 0 && !queue->broken)
		epoll_ctl(queue->worker->epoll, EPOLL_CTL_DEL, queue->kick_fd, NULL);
	vt_queue_forget(queue);
	if (queue->pending) {
		if (queue->suspending && queue->worker->io && !queue->port)
			for (struct vt_request *one = queue->waiting; one; one = one->next)
				vt_io_cancel(queue->worker->io, one);
		/* Run again by whoever completes the last request. */
		queue->leaving = command;
		return VT_LATER;
	}
	queue->worker->queues--;
	return 0;
}

static int run_suspend(struct vt_command *command)
{
	struct vt_queue *queue = command->queue;

	command->run = run_stop;
	queue->suspending = queue->log_memory;
	return run_stop(command);
}

static uint32_t end(struct vt_queue *queue, int (*run)(struct vt_command *command))
{
	struct vt_command command = { .run = run, .queue = queue };
	uint32_t base;

	vt_worker_ask(queue->worker, &command);
	base = vt_ring_stop(queue->ring);
	queue->ring = NULL;
	free_queue(queue);
	return base;
}

uint32_t vt_queue_stop(struct vt_queue *queue)
{
	return end(queue, run_stop);
}

uint32_t vt_queue_suspend(struct vt_queue *queue)
{
	return end(queue, run_suspend);
}

/* A queue that waits for its disk stays: what it began belongs to the worker's ring. */
static int run_move_away(struct vt_command *command)
{
	struct vt_queue *queue = command->queue;

	return queue->pending ? -EBUSY : run_stop(command);
}

/* The port of a worker that stands for the queue's. Return: it, or NULL. */
static struct vt_port *port_there(const struct vt_queue *queue, const struct vt_worker *worker)
{
	for (uint32_t i = 0; i < worker->port_count; i++)
		if (vt_port_controller(worker->ports[i]) == vt_port_controller(queue->port))
			return worker->ports[i];
	return NULL;
}

int vt_queue_move(struct vt_queue *queue, struct vt_worker *worker)
{
	struct vt_command leave = { .run = run_move_away, .queue = queue };
	struct vt_command enter = { .run = run_start, .queue = queue };
	struct vt_command back = enter;
	struct vt_worker *old = queue->worker;
	struct vt_port *before = queue->port, *port = NULL;
	int result;

	/* Ports come and go by the calls of the thread that calls this one. */
	if (before && !(port = port_there(queue, worker)))
		return -ENXIO;
	result = vt_worker_ask(old, &leave);
	if (result)
		return result;
	queue->worker = worker;
	queue->port = port;
	result = vt_worker_ask(worker, &enter);
	if (result) {
		queue->worker = old;
		queue->port = before;
		vt_worker_ask(old, &back);
	}
	return result;
}

uint64_t vt_queue_served(const struct vt_queue *queue)
{
	return __atomic_load_n(&queue->served, __ATOMIC_RELAXED);
}

static int run_set_memory(struct vt_command *command)
{
	struct vt_queue *queue = command->queue;
	struct vt_memory *memory = command->argument;
	int result = vt_ring_set_memory(queue->ring, memory);

	if (result) {
		vt_queue_breaks(queue, vt_ring_broken(queue->ring));
		return result;
	}
	vt_memory_put(queue->memory);
	queue->memory = vt_memory_get(memory);
	return 0;
}

int vt_queue_set_memory(struct vt_queue *queue, struct vt_memory *memory)
{
	struct vt_command command = { .run = run_set_memory, .queue = queue, .argument = memory };

	return vt_worker_ask(queue->worker, &command);
}

static int run_set_call(struct vt_command *command)
{
	struct vt_queue *queue = command->queue;
	int *fd = command->argument;

	if (queue->call_fd >= 0)
		close(queue->call_fd);
	queue->call_fd = *fd;
	/* A signal may have gone to the old one. */
	if (!queue->broken)
		vt_queue_signal(queue);
	return 0;
}

int vt_queue_set_call(struct vt_queue *queue, int call_fd)
{
	int kept;
	struct vt_command command = { .run = run_set_call, .queue = queue, .argument = &kept };

	if (!keep(call_fd, &kept))
		return -EMFILE;
	if (kept >= 0)
		fcntl(kept, F_SETFL, O_NONBLOCK);
	return vt_worker_ask(queue->worker, &command);
}

const char *vt_queue_broken(struct vt_queue *queue)
{
	return __atomic_load_n(&queue->broken, __ATOMIC_ACQUIRE);
}

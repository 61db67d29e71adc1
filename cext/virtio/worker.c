#define _GNU_SOURCE
#include "virtio/worker.h"

#include "virtio/worker_state.h"

#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#define FIRST_WINDOW_NS 2000u
/* Kicks of sleeping queues are looked for after so many rounds over the waking ones. */
#define ROUNDS 32u
#define EVENTS 64

uint64_t vt_now_ns(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

static void count(uint64_t *counter)
{
	__atomic_store_n(counter, *counter + 1, __ATOMIC_RELAXED);
}

void vt_signal(int fd)
{
	uint64_t one = 1;

	/* Full (EAGAIN) is as good as signalled; nothing else can be done about an error here. */
	if (fd >= 0 && write(fd, &one, sizeof(one)) < 0)
		return;
}

void vt_queue_breaks(struct vt_queue *queue, const char *why)
{
	if (queue->broken)
		return;
	if (queue->kick_fd >= 0)
		epoll_ctl(queue->worker->epoll, EPOLL_CTL_DEL, queue->kick_fd, NULL);
	__atomic_store_n(&queue->broken, why, __ATOMIC_RELEASE);
	vt_signal(queue->error_fd);
}

void vt_queue_wake(struct vt_queue *queue)
{
	struct vt_worker *worker = queue->worker;

	if (queue->awake)
		return;
	queue->awake = true;
	queue->next = worker->awake;
	worker->awake = queue;
}

void vt_queue_forget(struct vt_queue *queue)
{
	for (struct vt_queue **at = &queue->worker->awake; *at; at = &(*at)->next)
		if (*at == queue) {
			*at = queue->next;
			break;
		}
	queue->awake = false;
}

/* Do one batch of what is available. Return: how many requests there were. */
static uint32_t serve(struct vt_worker *worker, struct vt_queue *queue)
{
	int got = vt_ring_fetch(queue->ring, worker->chains, VT_BATCH, worker->arena, VT_ARENA);

	if (got <= 0) {
		if (got < 0)
			vt_queue_breaks(queue, vt_ring_broken(queue->ring));
		return 0;
	}
	vt_ring_notify_off(queue->ring);
	for (int i = 0; i < got; i++) {
		const struct vt_chain *chain = &worker->chains[i];
		int64_t written = vt_blk_request(queue->disk, &queue->mode, chain,
						 worker->arena + chain->first);

		if (written < 0) {
			vt_queue_breaks(queue, "a request without a header or a status");
			written = 0;
		}
		vt_dirty_chain(&queue->dirty, queue->memory, chain, worker->arena + chain->first,
			       (uint64_t)written);
		vt_dirty_used(&queue->dirty, vt_ring_used(queue->ring) & (queue->size - 1));
		vt_ring_complete(queue->ring, chain->head, (uint32_t)written);
		count(&worker->figures.requests);
		if (queue->broken)
			break;
	}
	count(&worker->figures.batches);
	if (vt_ring_publish(queue->ring)) {
		count(&worker->figures.signals);
		vt_signal(queue->call_fd);
	}
	if (vt_ring_broken(queue->ring))
		vt_queue_breaks(queue, vt_ring_broken(queue->ring));
	return (uint32_t)got;
}

/* Look at a waking queue. Return: whether it stays awake. */
static bool visit(struct vt_worker *worker, struct vt_queue *queue, uint64_t now)
{
	if (queue->broken)
		return false;
	if (vt_ring_waiting(queue->ring)) {
		uint64_t waited = now - queue->worked_at;

		/* Work that came while we looked was worth looking for. */
		if (queue->window_ns && waited < queue->window_ns) {
			queue->window_ns *= 2;
			if (queue->window_ns > worker->poll_ns)
				queue->window_ns = worker->poll_ns;
		}
		serve(worker, queue);
		queue->worked_at = now;
		return !queue->broken;
	}
	if (now - queue->worked_at < queue->window_ns)
		return true;
	queue->window_ns /= 2;
	if (queue->window_ns < FIRST_WINDOW_NS)
		queue->window_ns = worker->poll_ns < FIRST_WINDOW_NS ? worker->poll_ns :
								       FIRST_WINDOW_NS;
	/* A queue without a kick is never slept on. */
	return vt_ring_notify_on(queue->ring) || queue->kick_fd < 0;
}

static void visit_all(struct vt_worker *worker)
{
	uint64_t now = vt_now_ns();
	struct vt_queue **at = &worker->awake;

	while (*at) {
		struct vt_queue *queue = *at;

		if (visit(worker, queue, now)) {
			at = &queue->next;
		} else {
			*at = queue->next;
			queue->awake = false;
		}
	}
}

static void run_commands(struct vt_worker *worker)
{
	struct vt_command *command;

	pthread_mutex_lock(&worker->lock);
	command = worker->commands;
	worker->commands = NULL;
	pthread_mutex_unlock(&worker->lock);
	while (command) {
		struct vt_command *next = command->next;
		int result = command->run(command);

		pthread_mutex_lock(&worker->lock);
		command->result = result;
		command->done = true;
		pthread_cond_broadcast(&worker->answered);
		pthread_mutex_unlock(&worker->lock);
		command = next;
	}
}

/* Take an eventfd's count without waiting, whatever its mode: that is shared with the driver, who
 * may make it block and read it before we do. */
static ssize_t read_now(int fd)
{
	uint64_t ignored;
	struct iovec there = { &ignored, sizeof(ignored) };

	return preadv2(fd, &there, 1, -1, RWF_NOWAIT);
}

static void take_events(struct vt_worker *worker, int timeout_ms)
{
	struct epoll_event events[EVENTS];
	bool asked = false;
	int got;

	if (timeout_ms)
		count(&worker->figures.sleeps);
	got = epoll_wait(worker->epoll, events, EVENTS, timeout_ms);
	for (int i = 0; i < got; i++) {
		struct vt_queue *queue = events[i].data.ptr;
		int fd = queue ? queue->kick_fd : worker->mailbox;
		ssize_t size = read_now(fd);

		/* EAGAIN is normal: somebody else's wake-up, or one that was taken before. */
		if (queue && (!size || (size < 0 && errno != EAGAIN && errno != EINTR)))
			vt_queue_breaks(queue, "its kick is not an eventfd");
		if (!queue) {
			asked = true;
			continue;
		}
		count(&worker->figures.kicks);
		queue->worked_at = vt_now_ns();
		vt_queue_wake(queue);
	}
	/* After the kicks: a command may free a queue that an event names. */
	if (asked)
		run_commands(worker);
}

static void *work(void *argument)
{
	struct vt_worker *worker = argument;
	uint32_t rounds = 0;

	while (!worker->ending) {
		if (!worker->awake) {
			take_events(worker, -1);
			continue;
		}
		visit_all(worker);
		if (++rounds % ROUNDS == 0)
			take_events(worker, 0);
	}
	return NULL;
}

int vt_worker_ask(struct vt_worker *worker, struct vt_command *command)
{
	struct vt_command **at;

	pthread_mutex_lock(&worker->lock);
	for (at = &worker->commands; *at; at = &(*at)->next)
		;
	*at = command;
	vt_signal(worker->mailbox);
	while (!command->done)
		pthread_cond_wait(&worker->answered, &worker->lock);
	pthread_mutex_unlock(&worker->lock);
	return command->result;
}

int vt_worker_start(uint32_t poll_us, struct vt_worker **worker)
{
	struct vt_worker *made = calloc(1, sizeof(*made));
	struct epoll_event event = { .events = EPOLLIN };
	sigset_t all, before;
	int result;

	*worker = NULL;
	if (!made)
		return -ENOMEM;
	made->poll_ns = 1000ull * poll_us;
	pthread_mutex_init(&made->lock, NULL);
	pthread_cond_init(&made->answered, NULL);
	made->epoll = epoll_create1(EPOLL_CLOEXEC);
	made->mailbox = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (made->epoll < 0 || made->mailbox < 0 ||
	    epoll_ctl(made->epoll, EPOLL_CTL_ADD, made->mailbox, &event)) {
		result = -errno;
	} else {
		/* Signals are the control's; a fault of memory is told to the thread all the same. */
		sigfillset(&all);
		sigdelset(&all, SIGBUS);
		sigdelset(&all, SIGSEGV);
		sigdelset(&all, SIGFPE);
		sigdelset(&all, SIGILL);
		pthread_sigmask(SIG_SETMASK, &all, &before);
		result = -pthread_create(&made->thread, NULL, work, made);
		pthread_sigmask(SIG_SETMASK, &before, NULL);
	}
	if (result) {
		if (made->epoll >= 0)
			close(made->epoll);
		if (made->mailbox >= 0)
			close(made->mailbox);
		free(made);
		return result;
	}
	*worker = made;
	return 0;
}

static int run_end(struct vt_command *command)
{
	struct vt_worker *worker = command->argument;

	if (worker->queues)
		return -EBUSY;
	worker->ending = true;
	return 0;
}

int vt_worker_stop(struct vt_worker *worker)
{
	struct vt_command command = { .run = run_end, .argument = worker };
	int result = vt_worker_ask(worker, &command);

	if (result)
		return result;
	pthread_join(worker->thread, NULL);
	close(worker->epoll);
	close(worker->mailbox);
	pthread_cond_destroy(&worker->answered);
	pthread_mutex_destroy(&worker->lock);
	free(worker);
	return 0;
}

void vt_worker_figures(const struct vt_worker *worker, struct vt_worker_figures *figures)
{
	const uint64_t *from = (const uint64_t *)&worker->figures;
	uint64_t *to = (uint64_t *)figures;

	for (size_t i = 0; i < sizeof(*figures) / sizeof(uint64_t); i++)
		to[i] = __atomic_load_n(&from[i], __ATOMIC_RELAXED);
}


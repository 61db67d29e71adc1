#define _GNU_SOURCE
#include "virtio/worker.h"

#include "virtio/inflight.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#define BATCH 64u
#define ARENA (2u * VT_CHAIN_SEGMENTS)
#define FIRST_WINDOW_NS 2000u
/* Kicks of sleeping queues are looked for after so many rounds over the waking ones. */
#define ROUNDS 32u
#define EVENTS 64
#define LOG_PAGE 4096u

struct vt_queue {
	struct vt_worker *worker;
	struct vt_ring *ring;
	struct vt_memory *memory, *log_memory;
	struct vt_disk *disk;
	struct vt_blk_mode mode;
	int kick_fd, call_fd, error_fd;
	struct vt_dirty_log dirty;
	uint8_t *dirty_bits;
	const char *broken;
	bool awake;             /* the worker looks at it by itself */
	uint32_t size;
	uint64_t window_ns;     /* how long, after its last work */
	uint64_t worked_at;
	struct vt_queue *next;  /* awake ones */
};

struct command {
	int (*run)(struct command *command);
	void *queue, *argument;
	int result;
	bool done;
	struct command *next;
};

struct vt_worker {
	pthread_t thread;
	int epoll, mailbox;
	uint64_t poll_ns;
	pthread_mutex_t lock;   /* of the commands */
	pthread_cond_t answered;
	struct command *commands;
	uint32_t queues;        /* that it serves; the worker's own */
	bool ending;
	struct vt_queue *awake;
	struct vt_worker_figures figures;
	struct iovec arena[ARENA];
	struct vt_chain chains[BATCH];
};

static uint64_t now_ns(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

static void count(uint64_t *counter)
{
	__atomic_store_n(counter, *counter + 1, __ATOMIC_RELAXED);
}

static void signal_fd(int fd)
{
	uint64_t one = 1;

	/* Full (EAGAIN) is as good as signalled; nothing else can be done about an error here. */
	if (fd >= 0 && write(fd, &one, sizeof(one)) < 0)
		return;
}

static void breaks(struct vt_queue *queue, const char *why)
{
	if (queue->broken)
		return;
	if (queue->kick_fd >= 0)
		epoll_ctl(queue->worker->epoll, EPOLL_CTL_DEL, queue->kick_fd, NULL);
	__atomic_store_n(&queue->broken, why, __ATOMIC_RELEASE);
	signal_fd(queue->error_fd);
}

static void wake(struct vt_worker *worker, struct vt_queue *queue)
{
	if (queue->awake)
		return;
	queue->awake = true;
	queue->next = worker->awake;
	worker->awake = queue;
}

static void forget(struct vt_worker *worker, struct vt_queue *queue)
{
	for (struct vt_queue **at = &worker->awake; *at; at = &(*at)->next)
		if (*at == queue) {
			*at = queue->next;
			break;
		}
	queue->awake = false;
}

static void log_range(struct vt_queue *queue, uint64_t guest, uint64_t length)
{
	uint64_t last;

	if (!length || guest + (length - 1) < guest)
		return;
	last = (guest + (length - 1)) / LOG_PAGE;
	for (uint64_t page = guest / LOG_PAGE; page <= last && page / 8 < queue->dirty.size; page++)
		__atomic_or_fetch(&queue->dirty_bits[page / 8], (uint8_t)(1u << page % 8),
				  __ATOMIC_RELAXED);
}

/* Log what a chain's request wrote and the used entry that tells of it. */
static void log_chain(struct vt_queue *queue, const struct vt_chain *chain,
		      const struct iovec *segments, uint64_t written)
{
	const struct iovec *writable = segments + chain->readable;

	for (uint32_t i = 0; i < chain->writable && written; i++) {
		uint64_t guest = vt_memory_guest(queue->memory, writable[i].iov_base);
		uint64_t length = writable[i].iov_len < written ? writable[i].iov_len : written;

		if (guest != UINT64_MAX)
			log_range(queue, guest, length);
		written -= length;
	}
	if (queue->dirty.ring) {
		uint64_t entry = vt_ring_used(queue->ring) & (queue->size - 1);

		log_range(queue, queue->dirty.ring_guest, 4);
		log_range(queue, queue->dirty.ring_guest + 4 + 8 * entry, 8);
	}
}

/* Do one batch of what is available. Return: how many requests there were. */
static uint32_t serve(struct vt_worker *worker, struct vt_queue *queue)
{
	int got = vt_ring_fetch(queue->ring, worker->chains, BATCH, worker->arena, ARENA);

	if (got <= 0) {
		if (got < 0)
			breaks(queue, vt_ring_broken(queue->ring));
		return 0;
	}
	vt_ring_notify_off(queue->ring);
	for (int i = 0; i < got; i++) {
		const struct vt_chain *chain = &worker->chains[i];
		int64_t written = vt_blk_request(queue->disk, &queue->mode, chain,
						 worker->arena + chain->first);

		if (written < 0) {
			breaks(queue, "a request without a header or a status");
			written = 0;
		}
		if (queue->dirty_bits)
			log_chain(queue, chain, worker->arena + chain->first, (uint64_t)written);
		vt_ring_complete(queue->ring, chain->head, (uint32_t)written);
		count(&worker->figures.requests);
		if (queue->broken)
			break;
	}
	count(&worker->figures.batches);
	if (vt_ring_publish(queue->ring)) {
		count(&worker->figures.signals);
		signal_fd(queue->call_fd);
	}
	if (vt_ring_broken(queue->ring))
		breaks(queue, vt_ring_broken(queue->ring));
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
	uint64_t now = now_ns();
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
	struct command *command;

	pthread_mutex_lock(&worker->lock);
	command = worker->commands;
	worker->commands = NULL;
	pthread_mutex_unlock(&worker->lock);
	while (command) {
		struct command *next = command->next;
		int result = command->run(command);

		pthread_mutex_lock(&worker->lock);
		command->result = result;
		command->done = true;
		pthread_cond_broadcast(&worker->answered);
		pthread_mutex_unlock(&worker->lock);
		command = next;
	}
}

static void take_events(struct vt_worker *worker, int timeout_ms)
{
	struct epoll_event events[EVENTS];
	uint64_t ignored;
	bool asked = false;
	int got;

	if (timeout_ms)
		count(&worker->figures.sleeps);
	got = epoll_wait(worker->epoll, events, EVENTS, timeout_ms);
	for (int i = 0; i < got; i++) {
		struct vt_queue *queue = events[i].data.ptr;
		int fd = queue ? queue->kick_fd : worker->mailbox;

		ssize_t size = read(fd, &ignored, sizeof(ignored));

		/* EAGAIN is normal: somebody else's wake-up, or one that was taken before. */
		if (queue && (!size || (size < 0 && errno != EAGAIN && errno != EINTR)))
			breaks(queue, "its kick cannot be read");
		if (!queue) {
			asked = true;
			continue;
		}
		count(&worker->figures.kicks);
		queue->worked_at = now_ns();
		wake(worker, queue);
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

/* Have the worker run a command, and wait for its answer. */
static int ask(struct vt_worker *worker, struct command *command)
{
	struct command **at;

	pthread_mutex_lock(&worker->lock);
	for (at = &worker->commands; *at; at = &(*at)->next)
		;
	*at = command;
	signal_fd(worker->mailbox);
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

static int run_end(struct command *command)
{
	struct vt_worker *worker = command->argument;

	if (worker->queues)
		return -EBUSY;
	worker->ending = true;
	return 0;
}

int vt_worker_stop(struct vt_worker *worker)
{
	struct command command = { .run = run_end, .argument = worker };
	int result = ask(worker, &command);

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

static void free_queue(struct vt_queue *queue)
{
	vt_ring_stop(queue->ring);
	vt_memory_put(queue->memory);
	vt_memory_put(queue->log_memory);
	vt_memory_put(queue->dirty.memory);
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

static int take_dirty_log(struct vt_queue *queue, const struct vt_dirty_log *dirty)
{
	struct vt_memory *old = queue->dirty.memory;
	uint8_t *bits = NULL;

	if (dirty->memory) {
		bits = vt_memory_user(dirty->memory, dirty->at, dirty->size, 1);
		if (!bits || !dirty->size)
			return -EFAULT;
		vt_memory_get(dirty->memory);
	}
	queue->dirty = *dirty;
	queue->dirty_bits = bits;
	vt_memory_put(old);
	return 0;
}

static int run_set_dirty_log(struct command *command)
{
	return take_dirty_log(command->queue, command->argument);
}

int vt_queue_set_dirty_log(struct vt_queue *queue, const struct vt_dirty_log *dirty)
{
	struct vt_dirty_log wanted = *dirty;
	struct command command = { .run = run_set_dirty_log, .queue = queue, .argument = &wanted };

	return ask(queue->worker, &command);
}

static int run_start(struct command *command)
{
	struct vt_queue *queue = command->queue;
	struct epoll_event event = { .events = EPOLLIN, .data.ptr = queue };

	if (queue->kick_fd >= 0 &&
	    epoll_ctl(queue->worker->epoll, EPOLL_CTL_ADD, queue->kick_fd, &event))
		return -errno;
	queue->worker->queues++;
	/* What was made available before we came is announced by nobody. */
	queue->worked_at = now_ns();
	queue->window_ns = queue->worker->poll_ns;
	wake(queue->worker, queue);
	return 0;
}

static int begin_ring(struct vt_queue *queue, const struct vt_queue_settings *settings)
{
	int result = vt_ring_start(settings->memory, &settings->layout, (uint16_t)settings->base,
				   &queue->ring);
	void *at;

	if (result || !settings->log_memory)
		return result;
	queue->log_memory = vt_memory_get(settings->log_memory);
	at = vt_memory_user(queue->log_memory, settings->log_at,
			    vt_log_size(settings->layout.size), 8);
	if (!at)
		return -EFAULT;
	result = vt_ring_set_log(queue->ring, at);
	return result < 0 ? result : 0;
}

int vt_queue_start(struct vt_worker *worker, const struct vt_queue_settings *settings,
		   struct vt_queue **queue)
{
	struct command command = { .run = run_start };
	struct vt_queue *made = calloc(1, sizeof(*made));
	int result;

	*queue = NULL;
	if (!made)
		return -ENOMEM;
	made->worker = worker;
	made->disk = settings->disk;
	made->size = settings->layout.size;
	made->mode = settings->mode;
	made->kick_fd = made->call_fd = made->error_fd = -1;
	made->memory = vt_memory_get(settings->memory);
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
	result = begin_ring(made, settings);
	if (!result)
		result = take_dirty_log(made, &settings->dirty);
	command.queue = made;
	if (!result)
		result = ask(worker, &command);
	if (result) {
		free_queue(made);
		return result;
	}
	*queue = made;
	return 0;
}

static int run_stop(struct command *command)
{
	struct vt_queue *queue = command->queue;

	/* Requests end within the visit that fetched them, so none is in flight here. */
	if (queue->kick_fd >= 0)
		epoll_ctl(queue->worker->epoll, EPOLL_CTL_DEL, queue->kick_fd, NULL);
	forget(queue->worker, queue);
	queue->worker->queues--;
	return 0;
}

int vt_queue_stop(struct vt_queue *queue)
{
	struct command command = { .run = run_stop, .queue = queue };
	uint16_t base;

	ask(queue->worker, &command);
	base = vt_ring_stop(queue->ring);
	queue->ring = NULL;
	free_queue(queue);
	return base;
}

static int run_set_memory(struct command *command)
{
	struct vt_queue *queue = command->queue;
	struct vt_memory *memory = command->argument;
	int result = vt_ring_set_memory(queue->ring, memory);

	if (result) {
		breaks(queue, vt_ring_broken(queue->ring));
		return result;
	}
	vt_memory_put(queue->memory);
	queue->memory = vt_memory_get(memory);
	return 0;
}

int vt_queue_set_memory(struct vt_queue *queue, struct vt_memory *memory)
{
	struct command command = { .run = run_set_memory, .queue = queue, .argument = memory };

	return ask(queue->worker, &command);
}

static int run_set_call(struct command *command)
{
	struct vt_queue *queue = command->queue;
	int *fd = command->argument;

	if (queue->call_fd >= 0)
		close(queue->call_fd);
	queue->call_fd = *fd;
	/* A signal may have gone to the old one. */
	signal_fd(queue->call_fd);
	return 0;
}

int vt_queue_set_call(struct vt_queue *queue, int call_fd)
{
	int kept;
	struct command command = { .run = run_set_call, .queue = queue, .argument = &kept };

	if (!keep(call_fd, &kept))
		return -EMFILE;
	if (kept >= 0)
		fcntl(kept, F_SETFL, O_NONBLOCK);
	return ask(queue->worker, &command);
}

const char *vt_queue_broken(struct vt_queue *queue)
{
	return __atomic_load_n(&queue->broken, __ATOMIC_ACQUIRE);
}

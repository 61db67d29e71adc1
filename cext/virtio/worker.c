#define _GNU_SOURCE
#include "virtio/worker.h"

#include "clock.h"
#include "vfio/ioctl.h"
#include "virtio/signal.h"
#include "virtio/worker_state.h"

#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#define SECOND 1000000000u
/* What a request costs beside its bytes when queues take turns, and what one turn is worth. */
#define REQUEST_BYTES 4096u
#define TURN_BYTES (16u * 2u * REQUEST_BYTES)
#define SHORTEST_LOOK_NS 2000u
/* A round that took longer may have been one without the processor. */
#define AWAY_NS 3000u
/* How long rings are not looked at after that was seen. */
#define NO_LOOK_NS 10000000u
/* And after looks of all lengths were in vain: what those cost is a few per cent of this. */
#define REST_NS 2000000u
/* Kicks of sleeping queues are looked for after so many rounds over the waking ones. */
#define ROUNDS 32u
#define EVENTS 64
/* VDUSE_VQ_INJECT_IRQ of linux/vduse.h, which old headers do not have. */
#define INJECT_IRQ _IOW(0x81, 0x17, uint32_t)

uint64_t vt_now_ns(void)
{
	return vt_clock_ns();
}

void vt_count(uint64_t *counter)
{
	__atomic_store_n(counter, *counter + 1, __ATOMIC_RELAXED);
}

/* Return: false if it blocks, or another of the disk's driver did. */
static bool tell(struct vt_queue *queue, int fd)
{
	if (fd < 0)
		return true;
	if (!vt_disk_is_muted(queue->disk) && vt_signal(fd))
		return true;
	vt_disk_mute(queue->disk, true);
	return false;
}

void vt_queue_signal(struct vt_queue *queue)
{
	if (queue->call_is_vduse) {
		/* It fails when the driver has taken its interrupt away, which is its affair. */
		if (queue->call_fd < 0 ||
		    vt_ioctl(queue->call_fd, INJECT_IRQ, &queue->call_index) < 0)
			return;
	} else if (!tell(queue, queue->call_fd)) {
		close(queue->call_fd);
		queue->call_fd = -1;
		vt_queue_breaks(queue, VT_SIGNAL_BLOCKS);
	}
}

void vt_queue_breaks(struct vt_queue *queue, const char *why)
{
	if (queue->broken)
		return;
	if (queue->kick_fd >= 0)
		epoll_ctl(queue->worker->epoll, EPOLL_CTL_DEL, queue->kick_fd, NULL);
	__atomic_store_n(&queue->broken, why, __ATOMIC_RELEASE);
	tell(queue, queue->error_fd);
}

void vt_queue_wake(struct vt_queue *queue)
{
	struct vt_worker *worker = queue->worker;

	if (queue->awake)
		return;
	queue->awake = true;
	queue->next = worker->awake;
	worker->awake = queue;
	worker->awake_count++;
}

static void unlink_queue(struct vt_queue **at, struct vt_queue *queue)
{
	for (; *at; at = &(*at)->next)
		if (*at == queue) {
			*at = queue->next;
			return;
		}
}

void vt_queue_forget(struct vt_queue *queue)
{
	if (queue->awake) {
		unlink_queue(&queue->worker->awake, queue);
		queue->worker->awake_count--;
	} else if (queue->parked) {
		unlink_queue(&queue->worker->parked, queue);
	}
	queue->awake = queue->parked = false;
}

/* Leave a queue alone until its limits let it go on; it is no longer awake. */
static void park(struct vt_worker *worker, struct vt_queue *queue, uint64_t due)
{
	struct itimerspec at = { .it_value = { .tv_sec = (time_t)(due / SECOND),
					       .tv_nsec = (long)(due % SECOND) } };

	queue->parked = true;
	queue->due = due;
	queue->next = worker->parked;
	worker->parked = queue;
	if (due >= worker->due)
		return;
	worker->due = due;
	timerfd_settime(worker->timer, TFD_TIMER_ABSTIME, &at, NULL);
}

/* Wake the parked queues whose time has come by `now`. */
static void unpark(struct vt_worker *worker, uint64_t now)
{
	struct vt_queue *parked = worker->parked;

	worker->parked = NULL;
	worker->due = UINT64_MAX;
	while (parked) {
		struct vt_queue *queue = parked;

		parked = queue->next;
		queue->parked = false;
		if (queue->due > now)
			park(worker, queue, queue->due);
		else
			vt_queue_wake(queue);
	}
}

/* Charge a batch to the queue's limits and to its turn. */
static void account(struct vt_queue *queue, const struct vt_chain *chains, uint32_t got,
		    uint64_t now)
{
	uint64_t bytes = 0;

	for (uint32_t i = 0; i < got; i++)
		bytes += (uint64_t)chains[i].readable_bytes + chains[i].writable_bytes;
	queue->credit -= (int64_t)(bytes + got * REQUEST_BYTES);
	__atomic_store_n(&queue->served, queue->served + got, __ATOMIC_RELAXED);
	if (queue->share)
		vt_share_took(queue->share, got, bytes, now);
}

/* What of a queue's waiting requests may be done now: not more than its turn among the waking ones
 * and its limits allow. Return: their number; 0: none, and `*wait_ns` says how long its limits hold
 * it, or 0 if it is the others' turn. */
static uint32_t allowed(struct vt_worker *worker, struct vt_queue *queue, uint64_t now,
			uint64_t *wait_ns)
{
	uint32_t most = VT_BATCH, limit = VT_BATCH;
	uint32_t weight = queue->share ? vt_share_weight(queue->share) : VT_WEIGHT;

	*wait_ns = 0;
	if (worker->awake_count > 1) {
		int64_t turn = (int64_t)((uint64_t)TURN_BYTES * weight / VT_WEIGHT);

		/* What a queue did not use while it had little to do is not saved up. */
		queue->credit = (queue->credit > turn ? turn : queue->credit) + turn;
		if (queue->credit <= 0)
			return 0;
		if (queue->credit < (int64_t)(VT_BATCH * REQUEST_BYTES))
			most = 1 + (uint32_t)queue->credit / REQUEST_BYTES;
	} else {
		queue->credit = 0;
	}
	if (queue->share)
		limit = vt_share_ask(queue->share, &queue->turn, vt_ring_waiting(queue->ring), now,
				     wait_ns);
	return limit < most ? limit : most;
}

/* Whether another thread had our processor since this was asked last. */
static bool was_preempted(struct vt_worker *worker)
{
	int64_t before = worker->preemptions;
	struct rusage usage;

	if (getrusage(RUSAGE_THREAD, &usage))
		return false;
	worker->preemptions = usage.ru_nivcsw;
	return worker->preemptions != before;
}

/* Work came while a queue was looked at: that was worth it, and it is looked at for longer. But not
 * if it came while another thread had our processor, who may be the driver itself: it runs sooner
 * when we sleep. */
static void judge_look(struct vt_worker *worker, struct vt_queue *queue, uint64_t now)
{
	if (now - worker->round_at > AWAY_NS && was_preempted(worker)) {
		queue->window_ns = 0;
		queue->look_at = now + NO_LOOK_NS;
		return;
	}
	queue->window_ns *= 2;
	if (queue->window_ns > worker->poll_ns)
		queue->window_ns = worker->poll_ns;
}

/* No work came while a queue was looked at: a shorter look is to do, and when the shortest was in vain
 * too, none for a while. */
static void shorten_look(struct vt_worker *worker, struct vt_queue *queue, uint64_t now)
{
	if (now < queue->look_at || !worker->poll_ns)
		return;
	if (queue->look_at) {
		queue->look_at = 0;
		queue->window_ns = worker->poll_ns;
		/* What was before does not count. */
		was_preempted(worker);
		return;
	}
	queue->window_ns /= 2;
	if (queue->window_ns >= SHORTEST_LOOK_NS)
		return;
	queue->window_ns = 0;
	queue->look_at = now + REST_NS;
}

/* Do what a queue with work may do. Return: whether it stays awake. */
static bool work_on(struct vt_worker *worker, struct vt_queue *queue, uint64_t now)
{
	uint64_t waited = now - queue->worked_at, wait_ns;
	uint32_t most = allowed(worker, queue, now, &wait_ns), got;

	if (!most && wait_ns) {
		/* No work can come before it is parked, so nothing is gained by a notification. */
		vt_ring_notify_off(queue->ring);
		queue->credit = 0;
		queue->worked_at = now;
		queue->awake = false;
		worker->awake_count--;
		queue->due = now + wait_ns;
		return false;
	}
	if (!most)
		return true;
	/* What a kick announced was not found by looking. */
	if (queue->kicked)
		queue->kicked = false;
	else if (queue->window_ns && waited < queue->window_ns)
		judge_look(worker, queue, now);
	if (queue->port && !vt_port_is_busy(queue->port))
		worker->port_at = now;
	most = most > queue->step ? queue->step : most;
	got = vt_serve(worker, queue, most);
	if (got == queue->step && queue->step < VT_BATCH)
		queue->step *= 2;
	account(queue, worker->chains, got, now);
	worker->since_events += got;
	queue->worked_at = now;
	return !queue->broken;
}

/* Look at a waking queue. Return: whether it stays awake. */
static bool visit(struct vt_worker *worker, struct vt_queue *queue, uint64_t now)
{
	if (queue->broken)
		return false;
	if (vt_ring_waiting(queue->ring))
		return work_on(worker, queue, now);
	queue->credit = 0;
	queue->step = VT_FIRST_STEP;
	if (now - queue->worked_at < queue->window_ns)
		return true;
	shorten_look(worker, queue, now);
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
			continue;
		}
		*at = queue->next;
		if (queue->awake) {
			queue->awake = false;
			worker->awake_count--;
		} else {
			park(worker, queue, queue->due);
		}
	}
	worker->round_at = now;
	if (worker->due <= now)
		unpark(worker, now);
}

void vt_worker_answer(struct vt_worker *worker, struct vt_command *command, int result)
{
	pthread_mutex_lock(&worker->lock);
	command->result = result;
	command->done = true;
	pthread_cond_broadcast(&worker->answered);
	pthread_mutex_unlock(&worker->lock);
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

		if (result != VT_LATER)
			vt_worker_answer(worker, command, result);
		command = next;
	}
}

/* Read one of the worker's own descriptors, none of which blocks. */
static void empty(int fd)
{
	uint64_t ignored;

	if (read(fd, &ignored, sizeof(ignored)) < 0)
		return;
}

/* A queue's eventfd was written. It is not read: each write is an event of its own (EPOLLET), and a
 * reader would only meet others' (EAGAIN). */
static void kicked(struct vt_worker *worker, struct vt_queue *queue, uint32_t events)
{
	if (events & (EPOLLERR | EPOLLHUP)) {
		vt_queue_breaks(queue, "its kick cannot be read");
		return;
	}
	vt_count(&worker->figures.kicks);
	/* What waits for its limits is not hurried by its driver. */
	if (queue->parked)
		return;
	queue->worked_at = vt_now_ns();
	queue->kicked = !queue->awake;
	vt_queue_wake(queue);
}

static void take_events(struct vt_worker *worker, int timeout_ms)
{
	struct epoll_event events[EVENTS];
	bool asked = false;
	int got;

	if (timeout_ms)
		vt_count(&worker->figures.sleeps);
	got = epoll_wait(worker->epoll, events, EVENTS, timeout_ms);
	for (int i = 0; i < got; i++) {
		void *source = events[i].data.ptr;

		if (!source) {
			empty(worker->mailbox);
			asked = true;
		} else if (source == &worker->timer) {
			empty(worker->timer);
		} else if (source != &worker->io && source != worker->ports) {
			kicked(worker, source, events[i].events);
		}
	}
	if (worker->due != UINT64_MAX) {
		uint64_t now = vt_now_ns();

		if (worker->due <= now)
			unpark(worker, now);
	}
	if ((worker->io && vt_io_ready(worker->io)) || worker->port_count)
		vt_serve_finished(worker);
	/* After the rest: a command may free a queue that an event names. */
	if (asked)
		run_commands(worker);
}

/* Start what was begun, and take what is done. Return: whether the worker may sleep. */
static bool attend_io(struct vt_worker *worker)
{
	bool started;

	vt_attend_ports(worker);
	if (!worker->io)
		return true;
	started = vt_io_submit(worker->io);
	if (vt_io_ready(worker->io)) {
		vt_serve_finished(worker);
		started = vt_io_submit(worker->io) && started;
	}
	return started;
}

/* The thread's own ring, if the kernel gives it one; without it disks are waited for. */
static void begin_io(struct vt_worker *worker)
{
	struct epoll_event event = { .events = EPOLLIN, .data.ptr = &worker->io };

	if (vt_io_create(&worker->io))
		return;
	if (epoll_ctl(worker->epoll, EPOLL_CTL_ADD, vt_io_descriptor(worker->io), &event)) {
		vt_io_destroy(worker->io);
		worker->io = NULL;
	}
}

static void *work(void *argument)
{
	struct vt_worker *worker = argument;
	uint32_t rounds = 0;

	begin_io(worker);
	while (!worker->ending) {
		/* What the kernel had no room for is tried again soon. */
		int patience_ms = attend_io(worker) ? -1 : 1;

		if (!worker->awake) {
			if (!vt_watches_ports(worker))
				take_events(worker, patience_ms);
			else if (++rounds % ROUNDS == 0)
				take_events(worker, 0);
			continue;
		}
		visit_all(worker);
		/* Those that sleep are heard before much is done for those that are awake. */
		if (++rounds % ROUNDS == 0 || worker->since_events >= VT_BATCH) {
			worker->since_events = 0;
			take_events(worker, 0);
		}
	}
	vt_io_destroy(worker->io);
	return NULL;
}

int vt_worker_ask(struct vt_worker *worker, struct vt_command *command)
{
	struct vt_command **at;

	pthread_mutex_lock(&worker->lock);
	for (at = &worker->commands; *at; at = &(*at)->next)
		;
	*at = command;
	eventfd_write(worker->mailbox, 1);
	while (!command->done)
		pthread_cond_wait(&worker->answered, &worker->lock);
	pthread_mutex_unlock(&worker->lock);
	return command->result;
}

int vt_worker_start(uint32_t poll_us, struct vt_worker **worker)
{
	struct vt_worker *made = calloc(1, sizeof(*made));
	struct epoll_event event = { .events = EPOLLIN }, timed = { .events = EPOLLIN };
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
	made->timer = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
	made->due = UINT64_MAX;
	timed.data.ptr = &made->timer;
	if (made->epoll < 0 || made->mailbox < 0 || made->timer < 0 ||
	    epoll_ctl(made->epoll, EPOLL_CTL_ADD, made->mailbox, &event) ||
	    epoll_ctl(made->epoll, EPOLL_CTL_ADD, made->timer, &timed)) {
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
		if (made->timer >= 0)
			close(made->timer);
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
	close(worker->timer);
	pthread_cond_destroy(&worker->answered);
	pthread_mutex_destroy(&worker->lock);
	free(worker);
	return 0;
}

static int run_recheck(struct vt_command *command)
{
	unpark(command->argument, UINT64_MAX);
	return 0;
}

void vt_worker_recheck(struct vt_worker *worker)
{
	struct vt_command command = { .run = run_recheck, .argument = worker };

	vt_worker_ask(worker, &command);
}

void vt_worker_figures(const struct vt_worker *worker, struct vt_worker_figures *figures)
{
	const uint64_t *from = (const uint64_t *)&worker->figures;
	uint64_t *to = (uint64_t *)figures;

	for (size_t i = 0; i < sizeof(*figures) / sizeof(uint64_t); i++)
		to[i] = __atomic_load_n(&from[i], __ATOMIC_RELAXED);
}


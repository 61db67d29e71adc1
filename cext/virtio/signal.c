#define _GNU_SOURCE
#include "virtio/signal.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

/* One thread that signals. Only it writes `write`: odd while it is in a write. */
struct signaller {
	struct signaller *next;
	pthread_t thread;
	uint64_t write;
	uint64_t seen; /* the watch's: `write` as it was a look ago */
};

/* What is in here is of all threads; the watch begins with the first signal of the process. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct signaller *signallers;
static pthread_key_t leaving;
static int alarm_clock = -1; /* wakes the watch */
static bool active;          /* there were signals since its last look */
static bool begun;
static __thread struct signaller *own;

static int interruption(void)
{
	return SIGRTMAX - 3;
}

static void interrupted(int number)
{
	/* That the write returns is all that is wanted. */
	(void)number;
}

static void leave(void *signaller)
{
	pthread_mutex_lock(&lock);
	for (struct signaller **at = &signallers; *at; at = &(*at)->next)
		if (*at == signaller) {
			*at = (*at)->next;
			break;
		}
	pthread_mutex_unlock(&lock);
	free(signaller);
}

/* Interrupt writes that were there at the last look already. Return: whether there is any write. */
static bool look(void)
{
	bool writing = false;

	pthread_mutex_lock(&lock);
	for (struct signaller *one = signallers; one; one = one->next) {
		uint64_t write = __atomic_load_n(&one->write, __ATOMIC_ACQUIRE);

		if (write & 1) {
			writing = true;
			if (write == one->seen)
				pthread_kill(one->thread, interruption());
		}
		one->seen = write;
	}
	pthread_mutex_unlock(&lock);
	return writing;
}

static void *watch(void *unused)
{
	const struct timespec patience = { .tv_nsec = VT_SIGNAL_PATIENCE_MS * 1000000l };
	uint64_t ignored;

	(void)unused;
	for (;;) {
		/* `active` was false for a whole patience before it is relied on: whoever saw it true
		 * has shown its write by then. */
		bool was_active = __atomic_exchange_n(&active, false, __ATOMIC_SEQ_CST);

		if (look() || was_active)
			nanosleep(&patience, NULL);
		else if (read(alarm_clock, &ignored, sizeof(ignored)) < 0 && errno != EINTR)
			return NULL;
	}
}

static void before_fork(void)
{
	pthread_mutex_lock(&lock);
}

static void in_parent(void)
{
	pthread_mutex_unlock(&lock);
}

/* There is no watch; the child's first signal begins its own. */
static void in_child(void)
{
	begun = false;
	signallers = own;
	if (own) {
		own->next = NULL;
		own->thread = pthread_self();
	}
	pthread_mutex_unlock(&lock);
}

/* Begin the watch. With the lock. */
static bool begin(void)
{
	static bool hooked;
	struct sigaction action = { .sa_handler = interrupted };
	sigset_t all, before;
	pthread_t thread;
	bool made;

	sigemptyset(&action.sa_mask);
	if (!hooked && (pthread_key_create(&leaving, leave) ||
			pthread_atfork(before_fork, in_parent, in_child) ||
			sigaction(interruption(), &action, NULL)))
		return false;
	hooked = true;
	if (alarm_clock >= 0)
		close(alarm_clock);
	alarm_clock = eventfd(0, EFD_CLOEXEC);
	if (alarm_clock < 0)
		return false;
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	made = !pthread_create(&thread, NULL, watch, NULL);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	if (made)
		pthread_detach(thread);
	return made;
}

/* Have this thread watched. Return: whether it is. */
static bool enter(void)
{
	struct signaller *made;
	sigset_t wanted;
	bool watched;

	sigemptyset(&wanted);
	sigaddset(&wanted, interruption());
	pthread_mutex_lock(&lock);
	if (!begun)
		begun = begin();
	if (begun && !own && (made = calloc(1, sizeof(*made)))) {
		pthread_sigmask(SIG_UNBLOCK, &wanted, NULL);
		made->thread = pthread_self();
		made->next = signallers;
		signallers = own = made;
		pthread_setspecific(leaving, made);
	}
	watched = begun && own;
	pthread_mutex_unlock(&lock);
	return watched;
}

static bool add_one(int fd)
{
	const uint64_t one = 1;

	return write(fd, &one, sizeof(one)) >= 0 || errno != EINTR;
}

const char *vt_signal_blocks(void)
{
	return VT_SIGNAL_BLOCKS;
}

bool vt_signal(int fd)
{
	bool done;

	if (fd < 0)
		return true;
	if ((!own || !__atomic_load_n(&begun, __ATOMIC_RELAXED)) && !enter())
		return add_one(fd);
	__atomic_store_n(&own->write, own->write + 1, __ATOMIC_RELEASE);
	if (!__atomic_load_n(&active, __ATOMIC_RELAXED)) {
		__atomic_store_n(&active, true, __ATOMIC_SEQ_CST);
		add_one(alarm_clock);
	}
	done = add_one(fd);
	__atomic_store_n(&own->write, own->write + 1, __ATOMIC_RELEASE);
	return done;
}

/* Many drivers in one thread: each has one read of 4 KiB in flight and sleeps until it is told.
 * For bench_vhost_tenants.py; rings as tests/virtio/frontend.py lays them out. */
#define _GNU_SOURCE
#include <stdint.h>
#include <sys/epoll.h>
#include <time.h>
#include <unistd.h>

#define SIZE 64u
#define EVENTS 256

struct client {
	uint8_t *memory; /* its ring at 0, a chain of header, data and status in the table's first three */
	uint64_t data;   /* where the header lies */
	int32_t kick, call;
	uint64_t sectors; /* of the disk */
	uint64_t done, began;
	uint32_t added, seen;
};

static uint64_t now_ns(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

static uint64_t state = 88172645463325252u;

static uint64_t chance(void)
{
	state ^= state << 13;
	state ^= state >> 7;
	return state ^= state << 17;
}

static uint16_t *word(struct client *client, uint32_t at)
{
	return (uint16_t *)(void *)(client->memory + at);
}

static void submit(struct client *client, uint64_t now)
{
	uint16_t old = (uint16_t)client->added, event;
	uint64_t one = 1;

	*(uint64_t *)(void *)(client->memory + client->data + 8) =
		chance() % (client->sectors / 8) * 8;
	client->began = now;
	*word(client, 0x1004 + 2 * (old % SIZE)) = 0;
	client->added = (uint16_t)(old + 1);
	__atomic_store_n(word(client, 0x1002), (uint16_t)client->added, __ATOMIC_RELEASE);
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	event = __atomic_load_n(word(client, 0x2004 + 8 * SIZE), __ATOMIC_RELAXED);
	if ((uint16_t)(client->added - event - 1) < (uint16_t)(client->added - old) &&
	    write(client->kick, &one, 8) < 0)
		return;
}

/* Take what is complete and go on. Return: whether something was. */
static int collect(struct client *client, uint64_t now, uint32_t *buckets, uint32_t bucket_count)
{
	uint64_t took;

	if (__atomic_load_n(word(client, 0x2002), __ATOMIC_ACQUIRE) == (uint16_t)client->seen)
		return 0;
	client->seen = (uint16_t)(client->seen + 1);
	/* Tell me of the next one. */
	*word(client, 0x1004 + 2 * SIZE) = (uint16_t)client->seen;
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	client->done++;
	took = (now - client->began) / 1000;
	buckets[took < bucket_count ? took : bucket_count - 1]++;
	return 1;
}

/* Drive `count` clients for a time, of which `buckets` has the latencies in microseconds.
 * Return: nanoseconds that passed. */
uint64_t drive(struct client *clients, uint32_t count, uint64_t window_ns, uint32_t *buckets,
	       uint32_t bucket_count)
{
	int epoll = epoll_create1(0);
	struct epoll_event events[EVENTS];
	uint64_t begun = now_ns(), now = begun, ignored;

	for (uint32_t i = 0; i < count; i++) {
		struct epoll_event event = { .events = EPOLLIN, .data.u32 = i };

		epoll_ctl(epoll, EPOLL_CTL_ADD, clients[i].call, &event);
		if (clients[i].added == clients[i].seen)
			submit(&clients[i], now);
	}
	while (now - begun < window_ns) {
		int got = epoll_wait(epoll, events, EVENTS, 100);

		now = now_ns();
		for (int i = 0; i < got; i++) {
			struct client *client = &clients[events[i].data.u32];

			if (read(client->call, &ignored, 8) == 8 &&
			    collect(client, now, buckets, bucket_count))
				submit(client, now_ns());
		}
	}
	/* What is in flight ends, so that the next window begins with nothing. */
	for (uint64_t end = now + 1000000000u; now < end; now = now_ns()) {
		uint32_t left = 0;

		for (uint32_t i = 0; i < count; i++) {
			if (clients[i].added != clients[i].seen)
				left += !collect(&clients[i], now, buckets, bucket_count);
		}
		if (!left)
			break;
		usleep(100);
	}
	close(epoll);
	return now_ns() - begun;
}

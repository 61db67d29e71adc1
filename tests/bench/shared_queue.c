/* An NVMe controller that takes no time of its own: it answers when the queue is looked at. */
#include <stdint.h>
#include <string.h>
#include <time.h>

typedef int submit_function(void *, const void *, uint32_t);
typedef int poll_function(void *, void *, uint32_t, uint32_t, uint64_t, uint32_t *);

static submit_function *submit;
static poll_function *poll;
static const uint8_t *commands;
static volatile uint32_t *completions;
static uint32_t entries, room, seen, head, at, phase;
static uint64_t due[65536], last, delay, in_turn;

static uint64_t now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

void begin(uint64_t submits, uint64_t polls, uint64_t sq, uint64_t cq, uint32_t sq_entries,
	   uint32_t cq_entries, uint64_t delay_ns, uint64_t one_by_one)
{
	submit = (submit_function *)submits;
	poll = (poll_function *)polls;
	commands = (const uint8_t *)sq;
	completions = (volatile uint32_t *)cq;
	entries = sq_entries;
	room = cq_entries;
	seen = head = at = 0;
	phase = 1;
	last = 0;
	delay = delay_ns;
	in_turn = one_by_one;
}

int sent(void *queue, const void *io, uint32_t count)
{
	int result = submit(queue, io, count);

	if (result > 0) {
		uint64_t time = now();

		if (in_turn && last > time)
			time = last;
		due[seen] = last = time + delay;
		seen = (seen + 1) % entries;
	}
	return result;
}

static void answer(void)
{
	uint64_t time = now();

	while (head != seen && due[head] <= time) {
		volatile uint32_t *entry = completions + 4 * at;
		uint16_t cid;

		memcpy(&cid, commands + 64 * head + 2, 2);
		head = (head + 1) % entries;
		entry[0] = entry[1] = 0;
		entry[2] = head | 1 << 16;
		entry[3] = cid | phase << 16;
		at = (at + 1) % room;
		phase ^= !at;
	}
}

int looked(void *queue, void *done, uint32_t places, uint32_t least, uint64_t wait_ns,
	   uint32_t *held)
{
	uint64_t end = now() + wait_ns;
	int result;

	(void)least;
	do {
		answer();
		result = poll(queue, done, places, 0, 0, held);
	} while (!result && wait_ns && now() < end);
	return result;
}

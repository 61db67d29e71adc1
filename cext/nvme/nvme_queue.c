#define _GNU_SOURCE
#include "nvme/nvme_queue.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "nvme/nvme_ring.h"
#include "vfio/fork.h"

uint64_t vt_nvme_ns_a_tick_32;

/* One moment on both clocks: of some tries the one that was least disturbed in between. */
static void read_both(uint64_t *clock, uint64_t *tick)
{
	uint64_t narrowest = UINT64_MAX;

	for (int i = 0; i < 16; i++) {
		uint64_t before = ticks(), between = vt_clock_ns(), span = ticks() - before;

		if (span < narrowest) {
			narrowest = span;
			*clock = between;
			*tick = before + span / 2;
		}
	}
}

static void calibrate(void)
{
	uint64_t clock = 0, first = 0, end = 0, last = 0;

	read_both(&clock, &first);
	while (vt_clock_ns() - clock < 10000000u)
		rest();
	read_both(&end, &last);
	if (last <= first)
		last = first + 1;
	vt_nvme_ns_a_tick_32 = (uint64_t)(((unsigned __int128)(end - clock) << 32) / (last - first));
	vt_watch_forks();
}

static volatile uint32_t *word_at(uint64_t address)
{
	return (volatile uint32_t *)(uintptr_t)address;
}

static int layout_fits(const struct vt_nvme_layout *layout)
{
	uint64_t shadows = layout->tail_shadow | layout->head_shadow | layout->tail_event |
			   layout->head_event;
	int all = layout->tail_shadow && layout->head_shadow && layout->tail_event &&
		  layout->head_event;

	return layout->submission && !(layout->submission % COMMAND_BYTES) && layout->completion &&
	       !(layout->completion % sizeof(struct completion)) && layout->tail_doorbell &&
	       !(layout->tail_doorbell % 4) && layout->head_doorbell &&
	       !(layout->head_doorbell % 4) && !(shadows % 4) && (!shadows || all) &&
	       layout->sq_entries >= 2 && layout->sq_entries <= ENTRIES_MAX &&
	       layout->cq_entries >= layout->sq_entries && layout->cq_entries <= ENTRIES_MAX &&
	       layout->page_size >= 4096 && !(layout->page_size & (layout->page_size - 1)) &&
	       !(layout->gate % 4) && !(layout->memory_gate % 4) && !(layout->lists % 8) && !(layout->lists_iova % layout->page_size);
}

static void free_all(struct vt_nvme_queue *q)
{
	for (uint32_t i = 0; i < q->depth; i++)
		q->free_cids[i] = (uint16_t)(q->depth - 1 - i);
}

int vt_nvme_new(const struct vt_nvme_layout *layout, struct vt_nvme_queue **queue)
{
	static pthread_once_t once = PTHREAD_ONCE_INIT;
	struct vt_nvme_queue *q;

	if (!layout_fits(layout))
		return -EINVAL;
	pthread_once(&once, calibrate);
	q = calloc(1, sizeof(*q));
	if (!q)
		return -ENOMEM;
	q->depth = layout->sq_entries - 1;
	q->slots = calloc(q->depth, sizeof(*q->slots));
	q->free_cids = calloc(q->depth, sizeof(*q->free_cids));
	if (layout->memory_gate)
		q->commands = calloc(layout->sq_entries, COMMAND_BYTES);
	if (!q->slots || !q->free_cids || (layout->memory_gate && !q->commands)) {
		free(q->commands);
		vt_nvme_free(q);
		return -ENOMEM;
	}
	for (q->cid_step = 1; q->cid_step < q->depth;)
		q->cid_step *= 2;
	for (uint32_t i = 0; i < q->depth; i++)
		q->slots[i].cid = (uint16_t)i;
	free_all(q);
	q->gate = (struct vt_gate *)(uintptr_t)layout->gate;
	if (layout->memory_gate) {
		q->memory_gate = (struct vt_gate *)(uintptr_t)layout->memory_gate;
		q->device_commands = (volatile uint64_t *)(uintptr_t)layout->submission;
	} else {
		q->commands = (struct command *)(uintptr_t)layout->submission;
	}
	q->completions = (volatile struct completion *)(uintptr_t)layout->completion;
	q->tail_bell = (struct doorbell){ word_at(layout->tail_doorbell),
					  word_at(layout->tail_shadow),
					  word_at(layout->tail_event), 0 };
	q->head_bell = (struct doorbell){ word_at(layout->head_doorbell),
					  word_at(layout->head_shadow),
					  word_at(layout->head_event), 0 };
	q->sq_entries = layout->sq_entries;
	q->cq_entries = layout->cq_entries;
	q->page_size = layout->page_size;
	q->id = layout->id;
	q->lists = (uint64_t *)(uintptr_t)layout->lists;
	q->lists_iova = layout->lists_iova;
	q->phase = 1;
	/* What is in flight and what is untold must never fill the completion queue together. */
	q->untold_limit = layout->lazy ? layout->cq_entries - layout->sq_entries : 0;
	if (!q->untold_limit)
		q->untold_limit = 1;
	q->generation = vt_fork_generation;
	*queue = q;
	return 0;
}

void vt_nvme_free(struct vt_nvme_queue *q)
{
	if (!q)
		return;
	if (q->device_commands)
		free(q->commands);
	free(q->slots);
	free(q->free_cids);
	free(q);
}

static int leaving(const struct vt_nvme_queue *q)
{
	return __atomic_load_n(&q->stopping, __ATOMIC_RELAXED) ||
	       __atomic_load_n(&q->stopped, __ATOMIC_RELAXED);
}

/* What only a ring in the device's memory needs stands apart from the others' way. */
#define RARE __attribute__((noinline, cold))

/* After the doorbells' gate, the one of the ring: 0, or -EACCES and outside of both. */
static RARE int enter_memory(struct vt_nvme_queue *q)
{
	if (vt_gate_enter(q->memory_gate))
		return 0;
	if (q->gate)
		vt_gate_leave(q->gate);
	return -EACCES;
}

int vt_nvme_enter(struct vt_nvme_queue *q)
{
	int result = 0;

	/* In a child the rings are not mapped: MADV_DONTFORK. And it may be busy there for ever, with
	 * a thread that is the parent's. */
	if (q->generation != vt_fork_generation)
		return -ESTALE;
	/* Who stops the queue pair must not have to find the moment between two of our calls. */
	if (leaving(q))
		return -ESHUTDOWN;
	if (__atomic_exchange_n(&q->busy, 1, __ATOMIC_ACQUIRE))
		return leaving(q) ? -ESHUTDOWN : -EBUSY;
	if (q->gate && !vt_gate_enter(q->gate))
		result = -EACCES;
	else if (q->memory_gate)
		result = enter_memory(q);
	if (result)
		__atomic_store_n(&q->busy, 0, __ATOMIC_RELEASE);
	return result;
}

static inline __attribute__((always_inline)) int leave(struct vt_nvme_queue *q, int result)
{
	if (q->memory_gate)
		vt_gate_leave(q->memory_gate);
	if (q->gate)
		vt_gate_leave(q->gate);
	/* After a load that left commands out it stays busy for ever: see vt_nvme_stop. */
	if (!__atomic_load_n(&q->stopped, __ATOMIC_RELAXED))
		__atomic_store_n(&q->busy, 0, __ATOMIC_RELEASE);
	return result;
}

int vt_nvme_leave(struct vt_nvme_queue *q, int result)
{
	return leave(q, result);
}

int vt_nvme_stop(struct vt_nvme_queue *q)
{
	/* Every call is turned away in a child, and who was in one is not there to leave. */
	if (q->generation != vt_fork_generation)
		return 0;
	__atomic_store_n(&q->stopping, 1, __ATOMIC_RELAXED);
	if (__atomic_exchange_n(&q->busy, 1, __ATOMIC_ACQUIRE))
		return __atomic_load_n(&q->stopped, __ATOMIC_ACQUIRE) ? 0 : -EBUSY;
	/* It stays busy for ever: that is what turns every later call away. */
	__atomic_store_n(&q->stopped, 1, __ATOMIC_RELEASE);
	return 0;
}

void vt_nvme_halt(struct vt_nvme_queue *q)
{
	int running = 0;

	__atomic_compare_exchange_n(&q->halted, &running, HALTED, 0, __ATOMIC_RELEASE,
				    __ATOMIC_RELAXED);
}

void vt_nvme_abandon(struct vt_nvme_queue *q)
{
	__atomic_store_n(&q->halted, ABANDONED, __ATOMIC_RELEASE);
}

/* Base Specification 2.0, 4.1.1: the first entry may begin within a page, the second is either
 * the second page or a list of all but the first. */
static int set_data(struct vt_nvme_queue *q, uint16_t index, uint64_t iova, uint32_t bytes,
		    uint64_t *prp1, uint64_t *prp2)
{
	uint64_t page = q->page_size, first = page - iova % page, next = iova + first, entries;
	uint64_t *list;

	*prp1 = htole64(iova);
	*prp2 = 0;
	if (iova % 4 || bytes % 4)
		return -EINVAL;
	if (bytes <= first)
		return 0;
	entries = (bytes - first + page - 1) / page;
	if (entries == 1) {
		*prp2 = htole64(next);
		return 0;
	}
	/* One page of entries is enough for 2 MiB, more than controllers take in a command. */
	if (!q->lists || entries > page / sizeof(*list))
		return -EINVAL;
	list = q->lists + index * (page / sizeof(*list));
	for (uint64_t i = 0; i < entries; i++, next += page)
		list[i] = htole64(next);
	*prp2 = htole64(q->lists_iova + index * page);
	return 0;
}

int vt_nvme_make(struct vt_nvme_queue *q, uint16_t index, const struct vt_nvme_io *io,
		 struct command *command)
{
	uint64_t prp1 = 0, prp2 = 0;

	if (io->blocks > BLOCKS_MAX || (io->bytes && !io->blocks))
		return -EINVAL;
	if (io->bytes && set_data(q, index, io->iova, io->bytes, &prp1, &prp2))
		return -EINVAL;
	*command = (struct command){
		.opcode = io->opcode,
		.cid = htole16(q->slots[index].cid),
		.nsid = htole32(io->nsid),
		.prp1 = prp1,
		.prp2 = prp2,
		.lba = io->blocks ? htole64(io->lba) : 0,
		.blocks = io->blocks ? htole16((uint16_t)(io->blocks - 1)) : 0,
		.control = htole16(io->control),
	};
	return 0;
}

/* A device's memory is reached by accesses of the width that they are made with: the command goes
 * there in whole words, each stored once, and is never read back. The barrier before the doorbell
 * orders them. */
RARE void vt_nvme_store(struct vt_nvme_queue *q)
{
	volatile uint64_t *to = q->device_commands + q->tail * (COMMAND_BYTES / sizeof(*to));
	uint64_t words[COMMAND_BYTES / sizeof(*to)];

	memcpy(words, &q->commands[q->tail], COMMAND_BYTES);
	for (uint32_t i = 0; i < COMMAND_BYTES / sizeof(*to); i++)
		to[i] = words[i];
}

static uint16_t next_index(const struct vt_nvme_queue *q)
{
	return q->free_cids[q->depth - q->in_flight - 1];
}

int vt_nvme_submit(struct vt_nvme_queue *q, const struct vt_nvme_io *ios, uint32_t count)
{
	uint64_t now = ticks();
	uint32_t done = 0;
	int result = vt_nvme_enter(q);

	if (result)
		return result;
	for (; done < count && q->in_flight < q->depth; done++) {
		uint16_t index = next_index(q);

		result = vt_nvme_make(q, index, &ios[done], &q->commands[q->tail]);
		if (result)
			break;
		take_index(q, index, ios[done].tag, now);
	}
	if (done)
		ring(&q->tail_bell, q->tail);
	return leave(q, done ? (int)done : result);
}

int vt_nvme_submit_many(struct vt_nvme_queue *q, const struct vt_nvme_io *pattern,
			const uint64_t *lbas, const uint64_t *tags, uint32_t count,
			uint64_t stride, uint64_t slots)
{
	struct vt_nvme_io io = *pattern;
	uint64_t now = ticks();
	uint32_t done = 0;
	int result = vt_nvme_enter(q);

	if (result)
		return result;
	for (; done < count && q->in_flight < q->depth; done++) {
		uint16_t index = next_index(q);

		io.lba = lbas[done];
		io.iova = pattern->iova + tags[done] * stride;
		result = tags[done] < slots ? vt_nvme_make(q, index, &io, &q->commands[q->tail]) :
					      -EINVAL;
		if (result)
			break;
		take_index(q, index, tags[done], now);
	}
	if (done)
		ring(&q->tail_bell, q->tail);
	return leave(q, done ? (int)done : result);
}

/* The data pointers of a command on pages apart from each other. */
static int set_pages(struct vt_nvme_queue *q, uint16_t index, const struct vt_nvme_io *io,
		     const uint64_t *entries, struct command *command)
{
	uint64_t page = q->page_size, room = page / sizeof(uint64_t);
	uint64_t count = (entries[0] % page + io->bytes + page - 1) / page;
	uint64_t *list;

	if (entries[0] % 4 || count - 1 > room || (count > 2 && !q->lists))
		return -EINVAL;
	command->prp1 = htole64(entries[0]);
	if (count == 2)
		command->prp2 = htole64(entries[1]);
	if (count <= 2)
		return 0;
	list = q->lists + index * room;
	for (uint64_t i = 1; i < count; i++)
		list[i - 1] = htole64(entries[i]);
	command->prp2 = htole64(q->lists_iova + index * page);
	return 0;
}

int vt_nvme_put(struct vt_nvme_queue *q, const struct vt_nvme_io *io, const uint64_t *entries)
{
	struct vt_nvme_io bare = *io;
	struct command *command;
	uint16_t index;
	int result = vt_nvme_enter(q);

	if (result)
		return result;
	if (q->in_flight == q->depth)
		return leave(q, 0);
	index = next_index(q);
	command = &q->commands[q->tail];
	bare.bytes = 0;
	result = vt_nvme_make(q, index, &bare, command);
	if (!result && io->bytes)
		result = set_pages(q, index, io, entries, command);
	if (result)
		return leave(q, result);
	take_index(q, index, io->tag, ticks());
	return leave(q, 1);
}

int vt_nvme_tell(struct vt_nvme_queue *q)
{
	int result = vt_nvme_enter(q);

	if (result)
		return result;
	ring(&q->tail_bell, q->tail);
	return leave(q, 0);
}

int vt_nvme_submit_raw(struct vt_nvme_queue *q, const void *bytes, uint64_t tag)
{
	struct command *command;
	uint16_t index;
	int result = vt_nvme_enter(q);

	if (result)
		return result;
	if (q->in_flight == q->depth)
		return leave(q, 0);
	index = next_index(q);
	command = &q->commands[q->tail];
	memcpy(command, bytes, COMMAND_BYTES);
	command->cid = htole16(q->slots[index].cid);
	take_index(q, index, tag, ticks());
	ring(&q->tail_bell, q->tail);
	return leave(q, 1);
}

/* Takes what is there, up to `room`: how many commands ended. `put` stores each. At most a whole
 * ring in one go: a controller that overruns it would keep us here. */
#define TAKE_ALL(q, room, held, put)                                                             \
	for (uint32_t looked = 0; *(held) < (room) && looked < (q)->cq_entries && waiting(q);    \
	     looked++) {                                                                         \
		if (take(q, &done, &started, &index))                                            \
			continue;                                                                \
		(q)->free_cids[(q)->depth - (q)->in_flight - 1] = index;                         \
		put;                                                                             \
		++*(held);                                                                       \
	}

/* A poll: its end in time (0: it does not wait) and in places filled. */
struct poll {
	uint64_t deadline;
	uint32_t before, enough;
};

static int begin_poll(struct vt_nvme_queue *q, struct poll *poll, uint32_t room, uint32_t least,
		      uint64_t timeout_ns, const uint32_t *held)
{
	uint64_t now = ticks();
	int result = vt_nvme_enter(q);

	if (result)
		return result;
	if (*held > room)
		return leave(q, -EINVAL);
	poll->deadline = timeout_ns ? now + to_ticks(timeout_ns) : 0;
	poll->before = *held;
	poll->enough = least > room - *held ? room : *held + least;
	return 0;
}

/* Whether a poll with `held` places filled goes on; waits for the next completion if so. */
static int goes_on(struct vt_nvme_queue *q, const struct poll *poll, uint32_t held)
{
	return held < poll->enough && q->in_flight && poll->deadline && await(q, poll->deadline);
}

static int end_poll(struct vt_nvme_queue *q, const struct poll *poll, uint32_t held)
{
	tell_head(q);
	__atomic_store_n(&q->halted, 0, __ATOMIC_RELAXED);
	return leave(q, (int)(held - poll->before));
}

int vt_nvme_poll(struct vt_nvme_queue *q, struct vt_nvme_done *all, uint32_t room, uint32_t least,
		 uint64_t timeout_ns, uint32_t *held)
{
	uint64_t started, now;
	struct vt_nvme_done done;
	struct poll poll;
	uint16_t index;
	int result = begin_poll(q, &poll, room, least, timeout_ns, held);

	if (result)
		return result;
	do {
		now = ticks();
		TAKE_ALL(q, room, held, (done.latency_ns = to_ns(now - started), all[*held] = done))
	} while (goes_on(q, &poll, *held));
	return end_poll(q, &poll, *held);
}

int vt_nvme_poll_tags(struct vt_nvme_queue *q, uint64_t *tags, uint32_t room, uint32_t least,
		      uint64_t timeout_ns, uint32_t *held, uint32_t *status)
{
	uint64_t started;
	struct vt_nvme_done done;
	struct poll poll;
	uint16_t index;
	int result = begin_poll(q, &poll, room, least, timeout_ns, held);

	*status = 0;
	if (result)
		return result;
	do {
		TAKE_ALL(q, room, held,
			 (tags[*held] = done.tag, *status = *status ? *status : done.status))
	} while (goes_on(q, &poll, *held));
	return end_poll(q, &poll, *held);
}

int vt_nvme_restart(struct vt_nvme_queue *q, struct vt_nvme_done *all, uint32_t room,
		    uint32_t *held)
{
	uint64_t now = ticks(), started;
	uint32_t before = *held;
	struct vt_nvme_done done;
	uint16_t index;

	if (!q->stopped)
		return -EBUSY;
	TAKE_ALL(q, room, held, (done.latency_ns = to_ns(now - started), all[*held] = done))
	for (uint32_t i = 0; i < q->depth; i++) {
		struct slot *slot = &q->slots[i];

		/* What was out may still be told by somebody: not by its old identifier. */
		if (slot->active)
			slot->cid = (uint16_t)(slot->cid + q->cid_step);
		slot->active = 0;
	}
	free_all(q);
	memset(q->commands, 0, (size_t)q->sq_entries * COMMAND_BYTES);
	memset((void *)(uintptr_t)q->completions, 0,
	       (size_t)q->cq_entries * sizeof(struct completion));
	q->tail = q->head = q->untold = 0;
	__atomic_store_n(&q->in_flight, 0, __ATOMIC_RELAXED);
	q->phase = 1;
	__atomic_store_n(&q->stopping, 0, __ATOMIC_RELAXED);
	__atomic_store_n(&q->stopped, 0, __ATOMIC_RELAXED);
	__atomic_store_n(&q->halted, 0, __ATOMIC_RELAXED);
	__atomic_store_n(&q->busy, 0, __ATOMIC_RELEASE);
	return (int)(*held - before);
}

int vt_nvme_identifier(const struct vt_nvme_queue *q, uint64_t tag)
{
	for (uint32_t i = 0; i < q->depth; i++)
		if (q->slots[i].active && q->slots[i].tag == tag)
			return q->slots[i].cid;
	return -ENOENT;
}

const uint32_t *vt_nvme_in_flight(const struct vt_nvme_queue *q)
{
	return &q->in_flight;
}

const uint64_t *vt_nvme_submitted(const struct vt_nvme_queue *q)
{
	return &q->submitted;
}

void vt_nvme_count(const struct vt_nvme_queue *q, struct vt_nvme_counters *counters)
{
#define READ(counter) __atomic_load_n(&q->counter, __ATOMIC_RELAXED)
	*counters = (struct vt_nvme_counters){
		.submitted = READ(submitted),
		.completed = READ(completed),
		.failed = READ(failed),
		.strays = READ(strays),
		.last_stray = READ(last_stray),
		.tail_writes = READ(tail_bell.writes),
		.head_writes = READ(head_bell.writes),
		.in_flight = READ(in_flight),
		.depth = q->depth,
	};
#undef READ
}

/* What nvme_queue.c and nvme_load.c share: a queue pair from inside. Private to these two. */
#ifndef VT_NVME_RING_H
#define VT_NVME_RING_H

#include <endian.h>
#include <errno.h>
#include <stdint.h>
#include <time.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "clock.h"
#include "vfio/gate.h"
#include "vfio/mmio.h"
#include "nvme/nvme_queue.h"

#define COMMAND_BYTES 64u
#define ENTRIES_MAX 65536u  /* Base Specification 2.0, 3.3.3.1: CAP.MQES is 16 bits, zero based */
#define BLOCKS_MAX 65536u   /* NVM Command Set 1.0, 3.2.4: NLB is 16 bits, zero based */
#define SPINS_A_LOOK 64u    /* reads of the phase bit between two looks at the clock */
/* Reads after which every look comes with a pause, about a millisecond: an earlier one costs more
 * than it saves, above all under QEMU's TCG, where it takes the lock that the device needs. */
#define SPINS_EAGER (1u << 20)

/* What `halted` says: end soon; or at once, without what is in flight. */
enum { HALTED = 1, ABANDONED = 2 };

/* Base Specification 2.0, figure 87 (all commands) and NVM Command Set 1.0, section 3.2. */
struct command {
	uint8_t opcode, flags;
	uint16_t cid;
	uint32_t nsid;
	uint32_t dword2, dword3;
	uint64_t metadata;
	uint64_t prp1, prp2;
	uint64_t lba;
	uint16_t blocks, control;
	uint32_t dword13, dword14, dword15;
};
_Static_assert(sizeof(struct command) == COMMAND_BYTES, "a command has 64 bytes");

/* Figure 90. Bit 0 of `status` is the phase tag. */
struct completion {
	uint32_t result, dword1;
	uint16_t sq_head, sq_id, cid, status;
};
_Static_assert(sizeof(struct completion) == 16, "a completion has 16 bytes");

/* A command that may be out. `cid` is its index below `cid_step`, and above a count that goes on
 * with every use: a completion that comes twice or late is not taken for the next command's. */
struct slot {
	uint64_t tag;
	uint64_t started; /* ticks */
	uint16_t cid, active;
};

/* A doorbell, with its shadow and event index where the controller reads those (section 5.8). */
struct doorbell {
	volatile uint32_t *reg, *shadow, *event;
	uint64_t writes;
};

struct vt_nvme_queue {
	struct command *commands; /* where commands are made: the ring, or ordinary memory beside it */
	volatile uint64_t *device_commands; /* the ring where it is memory of the device, or NULL */
	volatile struct completion *completions;
	struct doorbell tail_bell, head_bell;
	uint32_t sq_entries, cq_entries, page_size, id;
	uint32_t tail, head, phase;
	uint32_t untold, untold_limit; /* completions taken that the head doorbell does not show */
	uint32_t depth, in_flight;
	uint64_t *lists, lists_iova;
	struct slot *slots;
	uint16_t *free_cids; /* indices: a stack of depth - in_flight entries */
	uint32_t cid_step;   /* a power of two, at least depth; 65536 leaves no room for a count */
	uint64_t submitted, completed, failed, strays;
	uint32_t last_stray; /* identifier, and status in the upper half */
	struct vt_gate *gate; /* before the doorbells; may be absent */
	struct vt_gate *memory_gate; /* before `device_commands`; absent where that is */
	uint64_t generation;
	int busy, halted;
	int stopping; /* asked for: nobody comes in any more, and who is inside leaves */
	int stopped;
};

/* The length of a tick in nanoseconds, 32.32 fixed point; set with the first queue. */
extern uint64_t vt_nvme_ns_a_tick_32;

/* Entry and exit of every call: 0, -EBUSY, -ESHUTDOWN, -ESTALE or -EACCES; and `result` again. */
int vt_nvme_enter(struct vt_nvme_queue *queue);
int vt_nvme_leave(struct vt_nvme_queue *queue, int result);
/* The identifier and data pointers of a command, all in wire order. 0 or -EINVAL. */
int vt_nvme_make(struct vt_nvme_queue *queue, uint16_t index, const struct vt_nvme_io *io,
		 struct command *command);

/* Stores the command that was made at the tail into a ring in the device's memory. */
void vt_nvme_store(struct vt_nvme_queue *queue);

/* The clock of the hot path: clock_gettime can be a system call, and is one in a guest that does
 * not trust its time stamp counter. */
static inline uint64_t ticks(void)
{
#if defined(__x86_64__)
	return __rdtsc();
#elif defined(__aarch64__)
	uint64_t value;

	__asm__ __volatile__("mrs %0, cntvct_el0" : "=r"(value));
	return value;
#else
	return vt_clock_ns();
#endif
}

static inline uint64_t to_ns(uint64_t span)
{
	return (uint64_t)(((unsigned __int128)span * vt_nvme_ns_a_tick_32) >> 32);
}

static inline uint64_t to_ticks(uint64_t ns)
{
	unsigned __int128 span = ((unsigned __int128)ns << 32) / vt_nvme_ns_a_tick_32;

	return span >> 62 ? (uint64_t)1 << 62 : (uint64_t)span;
}

static inline void rest(void)
{
#if defined(__x86_64__)
	_mm_pause();
#elif defined(__aarch64__)
	__asm__ __volatile__("yield" ::: "memory");
#endif
}

/* Whether another thread wants us to end, and how. */
static inline int halted(const struct vt_nvme_queue *q)
{
	int asked = __atomic_load_n(&q->halted, __ATOMIC_RELAXED);

	return asked || !__atomic_load_n(&q->stopping, __ATOMIC_RELAXED) ? asked : HALTED;
}

/* Counters are read by other threads at any time (vt_nvme_count), each by itself. */
#define ADD(counter, by) __atomic_store_n(&(counter), (counter) + (by), __ATOMIC_RELAXED)

/* Whether somebody waits for us to leave the doorbells alone. */
static inline int barred(const struct vt_nvme_queue *q)
{
	return (q->gate && !vt_gate_is_open(q->gate)) ||
	       (q->memory_gate && !vt_gate_is_open(q->memory_gate));
}

/* Tells the controller `value`. With a shadow the register is written only if the controller asked
 * for it: the event index lies in (old, value]. Linux's nvme_dbbuf_need_event is the same test. */
static inline void ring(struct doorbell *bell, uint32_t value)
{
	vt_write_barrier();
	if (bell->shadow) {
		uint16_t old = (uint16_t)le32toh(*bell->shadow), event;

		*bell->shadow = htole32(value);
		/* The shadow is visible before the event index is read, else both sides may sleep. */
		__atomic_thread_fence(__ATOMIC_SEQ_CST);
		event = (uint16_t)le32toh(*bell->event);
		if ((uint16_t)(value - event - 1) >= (uint16_t)(value - old))
			return;
		vt_write_barrier();
	}
	*bell->reg = htole32(value);
	ADD(bell->writes, 1);
}

static inline void advance_tail(struct vt_nvme_queue *q)
{
	q->tail = q->tail + 1 == q->sq_entries ? 0 : q->tail + 1;
}

/* The command at the tail is complete: it takes its index from the stack. */
static inline void take_index(struct vt_nvme_queue *q, uint16_t index, uint64_t tag, uint64_t now)
{
	struct slot *slot = &q->slots[index];

	slot->tag = tag;
	slot->started = now;
	slot->active = 1;
	ADD(q->in_flight, 1);
	ADD(q->submitted, 1);
	if (q->device_commands)
		vt_nvme_store(q);
	advance_tail(q);
}

static inline int waiting(const struct vt_nvme_queue *q)
{
	return (le16toh(q->completions[q->head].status) & 1) == q->phase;
}

/* Takes the completion at the head, which is there: 0 with `done` filled but for its latency, and
 * the command's index; -EPROTO for one of no command, which is counted. */
static inline int take(struct vt_nvme_queue *q, struct vt_nvme_done *done, uint64_t *started,
		       uint16_t *index)
{
	const volatile struct completion *entry = &q->completions[q->head];
	struct slot *slot;
	uint16_t sq_id;

	vt_read_barrier();
	done->cid = le16toh(entry->cid);
	done->status = le16toh(entry->status) >> 1;
	done->result = le32toh(entry->result);
	sq_id = le16toh(entry->sq_id);
	q->untold++;
	if (++q->head == q->cq_entries) {
		q->head = 0;
		q->phase ^= 1;
	}
	*index = (uint16_t)(done->cid & (q->cid_step - 1));
	slot = &q->slots[*index];
	if (*index >= q->depth || sq_id != q->id || !slot->active || slot->cid != done->cid) {
		ADD(q->strays, 1);
		__atomic_store_n(&q->last_stray, (uint32_t)done->status << 16 | done->cid,
				 __ATOMIC_RELAXED);
		return -EPROTO;
	}
	slot->active = 0;
	slot->cid = (uint16_t)(slot->cid + q->cid_step);
	done->tag = slot->tag;
	done->number = q->completed;
	*started = slot->started;
	ADD(q->in_flight, -1u);
	ADD(q->completed, 1);
	ADD(q->failed, done->status != 0);
	return 0;
}

static inline void tell_head(struct vt_nvme_queue *q)
{
	if (q->untold < q->untold_limit || barred(q))
		return;
	ring(&q->head_bell, q->head);
	q->untold = 0;
}

/* Waits for a completion: 1, or 0 at the deadline, when halted or barred from the doorbells. */
static inline int await(struct vt_nvme_queue *q, uint64_t deadline)
{
	for (uint32_t spins = 1; !waiting(q); spins++) {
		if (spins % SPINS_A_LOOK == 0 &&
		    (halted(q) || barred(q) || ticks() >= deadline))
			return waiting(q);
		if (spins >= SPINS_EAGER) {
			spins -= SPINS_A_LOOK;
			rest();
		}
	}
	return 1;
}

#endif

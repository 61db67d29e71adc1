/* A controller that is a thread over plain memory, for nvme_queue_test.c and nvme_load_test.c. */
#ifndef VT_TESTS_NVME_CONTROLLER_H
#define VT_TESTS_NVME_CONTROLLER_H

#include <pthread.h>
#include <string.h>
#include <unistd.h>

#include "nvme/nvme_queue.h"
#include "tests/check.h"

#define PAGE 4096u
#define SQ 8u
#define CQ 32u
#define LISTS_IOVA 0x7000000000u

struct device {
	uint8_t *sq, *lists;
	volatile uint8_t *cq;
	uint32_t words[6]; /* doorbells, shadows, event indices: tail then head */
	int shadows, mute, reverse;
	uint32_t sq_head, cq_tail, phase, fetched;
	uint16_t status;
	pthread_t thread;
	int ending;
	uint64_t max_untold;
};

/* The controller is hardware: it orders its accesses by what the bus and fences promise, which the
 * thread sanitizer does not know of. What it looks at are the threads of the driver. */
#define HARDWARE __attribute__((no_sanitize("thread")))

HARDWARE static inline uint32_t load32(const uint32_t *word)
{
	return __atomic_load_n(word, __ATOMIC_SEQ_CST);
}

HARDWARE static inline void complete(struct device *device, uint16_t cid)
{
	volatile uint8_t *entry = device->cq + 16 * device->cq_tail;
	uint32_t head = load32(&device->words[device->shadows ? 3 : 1]);
	uint32_t used = (device->cq_tail + CQ - head) % CQ;
	uint32_t low = 0xabcd0000u | cid;
	uint16_t ids[3] = { (uint16_t)device->sq_head, 1, cid };

	/* A controller must never find its completion queue full with commands in flight. */
	CHECK(used < CQ - 1);
	if (used > device->max_untold)
		device->max_untold = used;
	memcpy((void *)(uintptr_t)entry, &low, 4);
	memcpy((void *)(uintptr_t)(entry + 8), ids, 6);
	__atomic_store_n((uint16_t *)(uintptr_t)(entry + 14),
			 (uint16_t)(device->status << 1 | device->phase), __ATOMIC_RELEASE);
	if (++device->cq_tail == CQ) {
		device->cq_tail = 0;
		device->phase ^= 1;
	}
}

/* Fetches all that the tail shows; answers in order or the other way round. */
HARDWARE static inline int work(struct device *device)
{
	uint32_t tail = load32(&device->words[device->shadows ? 2 : 0]);
	uint16_t cids[SQ];
	uint32_t count = 0;

	while (device->sq_head != tail) {
		memcpy(&cids[count++], device->sq + 64 * device->sq_head + 2, 2);
		device->sq_head = (device->sq_head + 1) % SQ;
		device->fetched++;
	}
	if (device->shadows)
		__atomic_store_n(&device->words[4], device->sq_head, __ATOMIC_SEQ_CST);
	for (uint32_t i = 0; i < count && !device->mute; i++)
		complete(device, cids[device->reverse ? count - 1 - i : i]);
	return count != 0;
}

HARDWARE static inline void *live(void *argument)
{
	struct device *device = argument;
	uint32_t rung = 0;

	while (!__atomic_load_n(&device->ending, __ATOMIC_RELAXED)) {
		/* With shadows it sleeps until the register changes, as QEMU's does: a skipped
		 * doorbell that was needed shows as a hang. */
		if (device->shadows && load32(&device->words[0]) == rung &&
		    load32(&device->words[2]) == device->sq_head) {
			usleep(10);
			continue;
		}
		rung = load32(&device->words[0]);
		if (!work(device))
			usleep(10);
	}
	return NULL;
}

/* A queue of the device's memory and doorbells, and no more. */
static inline struct vt_nvme_layout layout_of(struct device *device)
{
	return (struct vt_nvme_layout){
		.submission = (uintptr_t)device->sq, .completion = (uintptr_t)device->cq,
		.tail_doorbell = (uintptr_t)&device->words[0],
		.head_doorbell = (uintptr_t)&device->words[1],
		.sq_entries = SQ, .cq_entries = CQ, .page_size = PAGE, .id = 1,
	};
}

static inline struct vt_nvme_queue *start(struct device *device, int shadows, int lazy, int threaded)
{
	struct vt_nvme_layout layout;
	struct vt_nvme_queue *queue = NULL;

	memset(device, 0, sizeof(*device));
	device->sq = aligned_alloc(PAGE, PAGE);
	device->cq = aligned_alloc(PAGE, PAGE);
	device->lists = aligned_alloc(PAGE, SQ * PAGE);
	memset(device->sq, 0xee, PAGE);
	memset((void *)(uintptr_t)device->cq, 0, PAGE);
	device->shadows = shadows;
	device->phase = 1;
	layout = layout_of(device);
	if (shadows) {
		layout.tail_shadow = (uintptr_t)&device->words[2];
		layout.head_shadow = (uintptr_t)&device->words[3];
		layout.tail_event = (uintptr_t)&device->words[4];
		layout.head_event = (uintptr_t)&device->words[5];
	}
	layout.lists = (uintptr_t)device->lists;
	layout.lists_iova = LISTS_IOVA;
	layout.lazy = (uint32_t)lazy;
	CHECK(vt_nvme_new(&layout, &queue) == 0);
	if (threaded)
		CHECK(pthread_create(&device->thread, NULL, live, device) == 0);
	return queue;
}

static inline void end(struct device *device, struct vt_nvme_queue *queue)
{
	if (device->thread) {
		__atomic_store_n(&device->ending, 1, __ATOMIC_RELAXED);
		pthread_join(device->thread, NULL);
	}
	vt_nvme_free(queue);
	free(device->sq);
	free((void *)(uintptr_t)device->cq);
	free(device->lists);
}

static inline int poll_once(struct vt_nvme_queue *queue, struct vt_nvme_done *done, uint32_t room,
		     uint32_t least, uint64_t timeout_ns)
{
	uint32_t held = 0;
	int count = vt_nvme_poll(queue, done, room, least, timeout_ns, &held);

	CHECK(count < 0 || (uint32_t)count == held);
	return count;
}

static inline struct vt_nvme_io read_of(uint64_t tag)
{
	return (struct vt_nvme_io){ .tag = tag, .lba = 1000 + tag, .iova = 0x10000, .bytes = 4096,
				    .blocks = 8, .nsid = 1, .opcode = 2 };
}

static inline uint64_t word64(const uint8_t *bytes)
{
	uint64_t value;

	memcpy(&value, bytes, 8);
	return value;
}

/* The tests of nvme_load_test.c. */
void loads_hold(void);

#endif

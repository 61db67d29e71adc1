/* Tests of nvme_queue.c and nvme_load.c against a controller that is a thread over plain memory.
 * Run by tests/drivers/nvme/test_queue_pair.py, under the sanitizers. Exits 0, or says what was wrong. */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "nvme/nvme_load.h"
#include "nvme/nvme_queue.h"
#include "vfio/gate.h"

#define PAGE 4096u
#define SQ 8u
#define CQ 32u
#define LISTS_IOVA 0x7000000000u

#define CHECK(condition)                                                                         \
	do {                                                                                     \
		if (!(condition)) {                                                              \
			fprintf(stderr, "%s:%d: %s\n", __func__, __LINE__, #condition);          \
			exit(1);                                                                 \
		}                                                                                \
	} while (0)

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

HARDWARE static uint32_t load32(const uint32_t *word)
{
	return __atomic_load_n(word, __ATOMIC_SEQ_CST);
}

HARDWARE static void complete(struct device *device, uint16_t cid)
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
HARDWARE static int work(struct device *device)
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

HARDWARE static void *live(void *argument)
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

static struct vt_nvme_queue *start(struct device *device, int shadows, int lazy, int threaded)
{
	struct vt_nvme_layout layout = { 0 };
	struct vt_nvme_queue *queue = NULL;

	memset(device, 0, sizeof(*device));
	device->sq = aligned_alloc(PAGE, PAGE);
	device->cq = aligned_alloc(PAGE, PAGE);
	device->lists = aligned_alloc(PAGE, SQ * PAGE);
	memset(device->sq, 0xee, PAGE);
	memset((void *)(uintptr_t)device->cq, 0, PAGE);
	device->shadows = shadows;
	device->phase = 1;
	layout.submission = (uintptr_t)device->sq;
	layout.completion = (uintptr_t)device->cq;
	layout.tail_doorbell = (uintptr_t)&device->words[0];
	layout.head_doorbell = (uintptr_t)&device->words[1];
	if (shadows) {
		layout.tail_shadow = (uintptr_t)&device->words[2];
		layout.head_shadow = (uintptr_t)&device->words[3];
		layout.tail_event = (uintptr_t)&device->words[4];
		layout.head_event = (uintptr_t)&device->words[5];
	}
	layout.lists = (uintptr_t)device->lists;
	layout.lists_iova = LISTS_IOVA;
	layout.sq_entries = SQ;
	layout.cq_entries = CQ;
	layout.page_size = PAGE;
	layout.id = 1;
	layout.lazy = (uint32_t)lazy;
	CHECK(vt_nvme_new(&layout, &queue) == 0);
	if (threaded)
		CHECK(pthread_create(&device->thread, NULL, live, device) == 0);
	return queue;
}

static void end(struct device *device, struct vt_nvme_queue *queue)
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

static int poll_once(struct vt_nvme_queue *queue, struct vt_nvme_done *done, uint32_t room,
		     uint32_t least, uint64_t timeout_ns)
{
	uint32_t held = 0;
	int count = vt_nvme_poll(queue, done, room, least, timeout_ns, &held);

	CHECK(count < 0 || (uint32_t)count == held);
	return count;
}

static struct vt_nvme_io read_of(uint64_t tag)
{
	return (struct vt_nvme_io){ .tag = tag, .lba = 1000 + tag, .iova = 0x10000, .bytes = 4096,
				    .blocks = 8, .nsid = 1, .opcode = 2 };
}

static void every_command_comes_back_once(int shadows, int lazy, int reverse)
{
	enum { TOTAL = 1200 };
	static uint8_t seen[TOTAL];
	struct vt_nvme_done done[SQ];
	struct vt_nvme_counters counters;
	struct device device;
	struct vt_nvme_queue *queue = start(&device, shadows, lazy, 1);
	uint64_t sent = 0, got = 0;

	device.reverse = reverse;
	memset(seen, 0, sizeof(seen));
	while (got < TOTAL) {
		struct vt_nvme_io ios[3];
		uint32_t want = 0;
		int count;

		for (; want < 3 && sent + want < TOTAL; want++)
			ios[want] = read_of(sent + want);
		count = vt_nvme_submit(queue, ios, want);
		CHECK(count >= 0);
		sent += (uint64_t)count;
		count = poll_once(queue, done, SQ, 1, 5000000000u);
		CHECK(count > 0);
		for (int i = 0; i < count; i++) {
			CHECK(done[i].tag < TOTAL && !seen[done[i].tag]++);
			CHECK(done[i].status == 0 && done[i].latency_ns < 5000000000u);
			CHECK(done[i].result == (0xabcd0000u | done[i].cid));
		}
		got += (uint64_t)count;
	}
	vt_nvme_count(queue, &counters);
	CHECK(counters.submitted == TOTAL && counters.completed == TOTAL && !counters.in_flight);
	if (lazy)
		CHECK(counters.head_writes < TOTAL / 10);
	end(&device, queue);
}

static void a_full_queue_takes_no_more(void)
{
	struct device device;
	struct vt_nvme_queue *queue = start(&device, 0, 0, 0);
	struct vt_nvme_io ios[2 * SQ];
	struct vt_nvme_done done[2 * SQ];

	for (uint64_t i = 0; i < 2 * SQ; i++)
		ios[i] = read_of(i);
	CHECK(vt_nvme_submit(queue, ios, 2 * SQ) == SQ - 1);
	CHECK(vt_nvme_submit(queue, ios, 1) == 0);
	CHECK(vt_nvme_submit_raw(queue, device.lists, 9) == 0);
	CHECK(poll_once(queue, done, SQ, 1, 0) == 0);
	CHECK(poll_once(queue, done, SQ, 1, 1000000) == 0);
	work(&device);
	CHECK(poll_once(queue, done, 2 * SQ, 2 * SQ, 1000000000u) == SQ - 1);
	CHECK(vt_nvme_submit(queue, ios, 1) == 1);
	end(&device, queue);
}

static uint64_t word64(const uint8_t *bytes)
{
	uint64_t value;

	memcpy(&value, bytes, 8);
	return value;
}

/* The pages that a command's pointers name, from its bytes. */
static uint32_t pages_of(const struct device *device, const uint8_t *command, uint32_t bytes,
			 uint64_t *pages)
{
	uint64_t prp1 = word64(command + 24), prp2 = word64(command + 32);
	uint32_t first = PAGE - (uint32_t)(prp1 % PAGE), count = 0;

	pages[count++] = prp1;
	if (bytes <= first) {
		CHECK(prp2 == 0);
	} else if (bytes - first <= PAGE) {
		pages[count++] = prp2;
	} else {
		CHECK(prp2 % PAGE == 0 && prp2 >= LISTS_IOVA && prp2 < LISTS_IOVA + SQ * PAGE);
		for (uint32_t left = bytes - first, i = 0; left; i++) {
			pages[count++] = word64(device->lists + (prp2 - LISTS_IOVA) + 8 * i);
			left -= left < PAGE ? left : PAGE;
		}
	}
	return count;
}

static void data_pointers_name_every_page(void)
{
	static const uint32_t offsets[] = { 0, 4, 512, 2048, 4092 };
	static const uint32_t sizes[] = { 4,     512,	 4096,	  4100,	   8192,
					  12288, 131072, 1048576, 2093056, 2097152 };
	struct device device;
	struct vt_nvme_queue *queue = start(&device, 0, 0, 0);
	struct vt_nvme_done done;
	uint64_t pages[600];

	for (size_t o = 0; o < 5; o++) {
		for (size_t s = 0; s < 10; s++) {
			struct vt_nvme_io io = read_of(7);
			uint32_t slot = device.sq_head, count;

			io.iova = 0x40000000u + offsets[o];
			io.bytes = sizes[s];
			CHECK(vt_nvme_submit(queue, &io, 1) == 1);
			count = pages_of(&device, device.sq + 64 * slot, io.bytes, pages);
			CHECK(count == (io.iova % PAGE + io.bytes + PAGE - 1) / PAGE);
			CHECK(pages[0] == io.iova);
			for (uint32_t i = 1; i < count; i++)
				CHECK(pages[i] == 0x40000000u + (uint64_t)i * PAGE);
			work(&device);
			CHECK(poll_once(queue, &done, 1, 1, 1000000000u) == 1);
		}
	}
	end(&device, queue);
}

static void a_command_has_its_fields(void)
{
	struct device device;
	struct vt_nvme_queue *queue = start(&device, 0, 0, 0);
	struct vt_nvme_io io = { .lba = 0x123456789abu, .iova = 0x5000, .bytes = 0x2000,
				 .blocks = 16, .nsid = 3, .control = 0x4000, .opcode = 1 };
	struct vt_nvme_io flush = { .nsid = 3 };
	const uint8_t expected[64] = { 1, 0, 0, 0, 3, 0, 0, 0,
				       [25] = 0x50, [33] = 0x60,
				       [40] = 0xab, 0x89, 0x67, 0x45, 0x23, 0x01,
				       [48] = 15, [51] = 0x40 };
	const uint8_t flushed[64] = { 0, 0, 1, 0, 3 };

	CHECK(vt_nvme_submit(queue, &io, 1) == 1);
	CHECK(vt_nvme_submit(queue, &flush, 1) == 1);
	CHECK(memcmp(device.sq, expected, 64) == 0);
	CHECK(memcmp(device.sq + 64, flushed, 64) == 0);
	end(&device, queue);
}

static void impossible_commands_are_refused(void)
{
	struct device device;
	struct vt_nvme_queue *queue = start(&device, 0, 0, 0);
	struct vt_nvme_io io = read_of(0);
	struct vt_nvme_layout layout = { .sq_entries = 1 };

	CHECK(vt_nvme_new(&layout, &queue) == -EINVAL);
	io.iova = 0x10002;
	CHECK(vt_nvme_submit(queue, &io, 1) == -EINVAL);
	io = read_of(0);
	io.blocks = 65537;
	CHECK(vt_nvme_submit(queue, &io, 1) == -EINVAL);
	io = read_of(0);
	io.blocks = 0;
	CHECK(vt_nvme_submit(queue, &io, 1) == -EINVAL);
	io = read_of(0);
	io.bytes = 2101252;
	CHECK(vt_nvme_submit(queue, &io, 1) == -EINVAL);
	CHECK(device.words[0] == 0);
	end(&device, queue);
}

static uint64_t strays_of(const struct vt_nvme_queue *queue)
{
	struct vt_nvme_counters counters;

	vt_nvme_count(queue, &counters);
	return counters.strays;
}

static void completions_of_no_command_end_none(void)
{
	struct device device;
	struct vt_nvme_queue *queue = start(&device, 0, 0, 0);
	struct vt_nvme_io io = read_of(1);
	struct vt_nvme_done done[4];

	CHECK(vt_nvme_submit(queue, &io, 1) == 1);
	complete(&device, 60000);
	complete(&device, 1);
	CHECK(poll_once(queue, done, 4, 1, 1000000) == 0);
	CHECK(strays_of(queue) == 2);
	work(&device);
	CHECK(poll_once(queue, done, 4, 1, 1000000000u) == 1 && done[0].tag == 1);
	end(&device, queue);
}

/* The identifier of a command that has ended is not soon another's: a second completion of it, in
 * time or late, is a stray. */
static void a_completion_that_comes_twice_ends_one_command(void)
{
	struct device device;
	struct vt_nvme_queue *queue = start(&device, 0, 0, 0);
	struct vt_nvme_done done[4];

	for (uint64_t tag = 0; tag < 3000; tag++) {
		struct vt_nvme_io io = read_of(tag);
		uint16_t cid;

		CHECK(vt_nvme_submit(queue, &io, 1) == 1);
		memcpy(&cid, device.sq + 64 * ((device.sq_head) % SQ) + 2, 2);
		if (tag)
			complete(&device, done[0].cid);
		work(&device);
		CHECK(poll_once(queue, done, 4, 4, 1000000000u) == 1);
		CHECK(done[0].tag == tag && done[0].cid == cid && done[0].number == tag);
	}
	CHECK(strays_of(queue) == 2999);
	end(&device, queue);
}

static void another_queues_completion_is_not_ours(void)
{
	struct device device;
	struct vt_nvme_queue *queue = start(&device, 0, 0, 0);
	struct vt_nvme_io io = read_of(1);
	struct vt_nvme_done done;

	CHECK(vt_nvme_submit(queue, &io, 1) == 1);
	complete(&device, 0);
	*(uint8_t *)(uintptr_t)(device.cq + 10) = 7;
	CHECK(poll_once(queue, &done, 1, 1, 1000000) == 0 && strays_of(queue) == 1);
	end(&device, queue);
}

/* A controller that fills the ring again and again keeps nobody inside. */
static void a_flood_of_strays_ends(void)
{
	struct device device;
	struct vt_nvme_queue *queue = start(&device, 0, 0, 0);
	struct vt_nvme_io io = read_of(1);
	struct vt_nvme_done done;

	CHECK(vt_nvme_submit(queue, &io, 1) == 1);
	for (int i = 0; i < 100; i++) {
		complete(&device, 99);
		CHECK(poll_once(queue, &done, 1, 1, 1000) == 0);
	}
	CHECK(strays_of(queue) == 100);
	end(&device, queue);
}

static void what_was_taken_stays_with_the_caller(void)
{
	struct device device;
	struct vt_nvme_queue *queue = start(&device, 0, 0, 0);
	struct vt_nvme_done done[4];
	uint32_t held = 0;

	for (uint64_t tag = 0; tag < 3; tag++) {
		struct vt_nvme_io io = read_of(tag);

		CHECK(vt_nvme_submit(queue, &io, 1) == 1);
		work(&device);
		CHECK(vt_nvme_poll(queue, done, 4, 1, 1000000, &held) == 1);
		CHECK(held == tag + 1 && done[tag].tag == tag);
	}
	held = 5;
	CHECK(vt_nvme_poll(queue, done, 4, 1, 1000000, &held) == -EINVAL);
	end(&device, queue);
}

static void a_barred_queue_leaves_the_doorbells_alone(void)
{
	static struct vt_gate gate;
	struct device device;
	struct vt_nvme_queue *queue, *other = start(&device, 0, 0, 0);
	struct vt_nvme_layout layout = {
		.submission = (uintptr_t)device.sq, .completion = (uintptr_t)device.cq,
		.tail_doorbell = (uintptr_t)&device.words[0],
		.head_doorbell = (uintptr_t)&device.words[1], .gate = (uintptr_t)&gate,
		.sq_entries = SQ, .cq_entries = CQ, .page_size = PAGE, .id = 1,
	};
	struct vt_nvme_io io = read_of(1);
	struct vt_nvme_done done;

	CHECK(vt_nvme_new(&layout, &queue) == 0);
	CHECK(vt_nvme_submit(queue, &io, 1) == -EACCES && device.words[0] == 0);
	CHECK(poll_once(queue, &done, 1, 1, 0) == -EACCES);
	vt_gate_set(&gate, 1);
	CHECK(vt_nvme_submit(queue, &io, 1) == 1 && device.words[0] == 1);
	work(&device);
	CHECK(poll_once(queue, &done, 1, 1, 1000000) == 1 && device.words[1] == 1);
	CHECK(!vt_gate_is_busy(&gate));
	vt_nvme_free(other);
	end(&device, queue);
}

static void a_queue_starts_again_after_a_reset(void)
{
	struct device device;
	struct vt_nvme_queue *queue = start(&device, 0, 0, 0);
	struct vt_nvme_done done[4];
	struct vt_nvme_counters counters;
	uint16_t before, after;
	uint32_t held;

	for (uint64_t round = 0; round < 20; round++) {
		struct vt_nvme_io io = read_of(round);

		CHECK(vt_nvme_submit(queue, &io, 1) == 1);
		memcpy(&before, device.sq + 64 * device.sq_head + 2, 2);
		held = 0;
		CHECK(vt_nvme_restart(queue, done, 4, &held) == -EBUSY);
		CHECK(vt_nvme_stop(queue) == 0);
		/* What had come before the reset is not lost. */
		if (round % 2)
			work(&device);
		CHECK(vt_nvme_restart(queue, done, 4, &held) == (int)(round % 2));
		CHECK(held == round % 2 && (!held || done[0].tag == round));
		device.sq_head = device.cq_tail = device.words[0] = device.words[1] = 0;
		device.phase = 1;
		vt_nvme_count(queue, &counters);
		CHECK(counters.in_flight == 0);
		CHECK(vt_nvme_submit(queue, &io, 1) == 1);
		memcpy(&after, device.sq + 2, 2);
		CHECK(before != after);
		work(&device);
		CHECK(poll_once(queue, done, 4, 1, 1000000) == 1 && done[0].tag == round);
	}
	end(&device, queue);
}

static void failures_are_counted(void)
{
	struct device device;
	struct vt_nvme_queue *queue = start(&device, 0, 0, 0);
	uint64_t lbas[3] = { 5, 6, 7 }, tags[3] = { 2, 0, 1 }, back[3];
	struct vt_nvme_io io = read_of(0);
	uint32_t status, held = 0;

	device.status = 0x4281;
	CHECK(vt_nvme_submit_many(queue, &io, lbas, tags, 3, 4096, 2) == -EINVAL);
	CHECK(vt_nvme_submit_many(queue, &io, lbas, tags, 3, 4096, 3) == 3);
	CHECK(word64(device.sq + 24) == 0x10000 + 2 * 4096 && word64(device.sq + 40) == 5);
	CHECK(word64(device.sq + 64 + 24) == 0x10000 && word64(device.sq + 64 + 40) == 6);
	work(&device);
	CHECK(vt_nvme_poll_tags(queue, back, 3, 3, 1000000, &held, &status) == 3);
	CHECK(status == 0x4281);
	CHECK(!memcmp(back, tags, sizeof(tags)));
	end(&device, queue);
}

static struct vt_nvme_job job_of(uint64_t limit)
{
	return (struct vt_nvme_job){ .span = 4096, .iova = 0x100000, .stride = 4096, .seed = 42,
				     .limit = limit, .depth = 4, .batch = 1, .blocks = 8,
				     .bytes = 4096, .nsid = 1, .random = 1, .read_percent = 70 };
}

static void a_load_adds_up(int shadows, uint32_t batch)
{
	static struct vt_nvme_report report;
	struct device device;
	struct vt_nvme_queue *queue = start(&device, shadows, 1, 1);
	struct vt_nvme_job job = job_of(2000);
	uint64_t sum = 0;

	job.batch = batch;
	CHECK(vt_nvme_run(queue, &job, &report) == 0);
	for (uint32_t i = 0; i < VT_NVME_BUCKETS; i++)
		sum += report.histogram[i];
	CHECK(sum == 2000 && report.reads + report.writes == 2000 && device.fetched == 2000);
	CHECK(report.reads > 1200 && report.reads < 1600);
	CHECK(report.latency_min_ns <= report.latency_sum_ns / 2000);
	CHECK(report.latency_max_ns >= report.latency_sum_ns / 2000);
	CHECK(report.tail_writes <= 2000 / batch + 4 && report.failed == 0);
	job.limit = 0;
	job.runtime_ns = 50000000;
	CHECK(vt_nvme_run(queue, &job, &report) == 0);
	CHECK(report.elapsed_ns >= 49000000 && report.reads > 0);
	end(&device, queue);
}

static void a_load_stops_at_the_first_failure(void)
{
	static struct vt_nvme_report report;
	struct device device;
	struct vt_nvme_queue *queue = start(&device, 0, 0, 1);
	struct vt_nvme_job job = job_of(1000000);

	device.status = 0x80;
	CHECK(vt_nvme_run(queue, &job, &report) == 0);
	CHECK(report.failed >= 1 && report.failed <= 4 && report.first_status == 0x80);
	end(&device, queue);
}

static void *halt_soon(void *queue)
{
	usleep(20000);
	vt_nvme_halt(queue);
	return NULL;
}

static void *stop_soon(void *queue)
{
	struct vt_nvme_done done;

	usleep(20000);
	CHECK(poll_once(queue, &done, 1, 1, 0) == -EBUSY);
	CHECK(vt_nvme_stop(queue) == -EBUSY);
	vt_nvme_halt(queue);
	return NULL;
}

static void halting_and_stopping(void)
{
	static struct vt_nvme_report report;
	struct device device;
	struct vt_nvme_queue *queue = start(&device, 0, 0, 1);
	struct vt_nvme_job job = job_of(0);
	struct vt_nvme_io io = read_of(1);
	struct vt_nvme_done done;
	pthread_t thread;

	job.runtime_ns = 60000000000u;
	CHECK(pthread_create(&thread, NULL, halt_soon, queue) == 0);
	CHECK(vt_nvme_run(queue, &job, &report) == 0);
	pthread_join(thread, NULL);
	CHECK(report.elapsed_ns < 30000000000u);
	CHECK(pthread_create(&thread, NULL, stop_soon, queue) == 0);
	CHECK(vt_nvme_run(queue, &job, &report) == 0);
	pthread_join(thread, NULL);
	CHECK(vt_nvme_stop(queue) == 0);
	CHECK(vt_nvme_stop(queue) == 0);
	CHECK(vt_nvme_submit(queue, &io, 1) == -ESHUTDOWN);
	CHECK(poll_once(queue, &done, 1, 1, 0) == -ESHUTDOWN);
	end(&device, queue);
}

struct poller {
	struct vt_nvme_queue *queue;
	struct vt_nvme_io io;
	int shut, calls;
};

/* As a driver that polls slice after slice: between two calls there is hardly a moment. */
static void *poll_on(void *argument)
{
	struct poller *poller = argument;
	struct vt_nvme_done done;
	int result = 0;

	while (result >= 0) {
		vt_nvme_submit(poller->queue, &poller->io, 1);
		result = poll_once(poller->queue, &done, 1, 1, 50000000);
		__atomic_add_fetch(&poller->calls, 1, __ATOMIC_RELAXED);
	}
	poller->shut = result == -ESHUTDOWN;
	return NULL;
}

static void a_stop_needs_no_luck_against_a_thread_that_polls(void)
{
	for (int round = 0; round < 20; round++) {
		struct device device;
		struct poller poller = { .queue = start(&device, 0, 0, 0), .io = read_of(1) };
		struct vt_nvme_counters counters;
		pthread_t thread;
		int tries = 0, result, calls;

		CHECK(pthread_create(&thread, NULL, poll_on, &poller) == 0);
		usleep(1000);
		vt_nvme_count(poller.queue, &counters);
		result = vt_nvme_stop(poller.queue);
		calls = __atomic_load_n(&poller.calls, __ATOMIC_RELAXED);
		while (result < 0 && ++tries < 1000) {
			usleep(1000);
			result = vt_nvme_stop(poller.queue);
		}
		pthread_join(thread, NULL);
		/* The first try ended the call that was running; the next one was turned away. */
		CHECK(!result && poller.shut && poller.calls <= calls + 2);
		CHECK(counters.in_flight < SQ);
		end(&device, poller.queue);
	}
}

static void silence_ends_a_load(void)
{
	static struct vt_nvme_report report;
	struct device device;
	struct vt_nvme_queue *queue = start(&device, 0, 0, 1);
	struct vt_nvme_job job = job_of(10);

	device.mute = 1;
	CHECK(vt_nvme_run(queue, &job, &report) == -ETIMEDOUT);
	CHECK(vt_nvme_run(queue, &job, &report) == -ESHUTDOWN);
	end(&device, queue);
}

static void *shut_soon(void *gate)
{
	usleep(20000);
	vt_gate_set(gate, 0);
	while (vt_gate_is_busy(gate))
		usleep(10);
	return NULL;
}

/* Whoever shuts the gate finds nobody at the doorbells, however long the poll would have taken. */
static void a_gate_that_shuts_ends_a_poll_and_a_load(void)
{
	static struct vt_nvme_report report;
	static struct vt_gate gate;
	struct device device;
	struct vt_nvme_queue *queue, *other = start(&device, 0, 0, 0);
	struct vt_nvme_layout layout = {
		.submission = (uintptr_t)device.sq, .completion = (uintptr_t)device.cq,
		.tail_doorbell = (uintptr_t)&device.words[0],
		.head_doorbell = (uintptr_t)&device.words[1], .gate = (uintptr_t)&gate,
		.sq_entries = SQ, .cq_entries = CQ, .page_size = PAGE, .id = 1,
	};
	struct vt_nvme_io io = read_of(1);
	struct vt_nvme_done done;
	struct vt_nvme_job job = job_of(10);
	pthread_t thread;

	CHECK(vt_nvme_new(&layout, &queue) == 0);
	vt_gate_set(&gate, 1);
	CHECK(vt_nvme_submit(queue, &io, 1) == 1);
	CHECK(pthread_create(&thread, NULL, shut_soon, &gate) == 0);
	CHECK(poll_once(queue, &done, 1, 1, 60000000000u) == 0);
	pthread_join(thread, NULL);
	work(&device);
	vt_gate_set(&gate, 1);
	CHECK(poll_once(queue, &done, 1, 1, 1000000) == 1);
	CHECK(pthread_create(&thread, NULL, shut_soon, &gate) == 0);
	CHECK(vt_nvme_run(queue, &job, &report) == -EACCES);
	pthread_join(thread, NULL);
	vt_nvme_free(other);
	end(&device, queue);
}

static void *abandon_soon(void *queue)
{
	usleep(20000);
	vt_nvme_abandon(queue);
	return NULL;
}

static void giving_up_does_not_wait_for_what_is_out(void)
{
	static struct vt_nvme_report report;
	struct device device;
	struct vt_nvme_queue *queue = start(&device, 0, 0, 1);
	struct vt_nvme_job job = job_of(10);
	pthread_t thread;

	device.mute = 1;
	CHECK(pthread_create(&thread, NULL, abandon_soon, queue) == 0);
	CHECK(vt_nvme_run(queue, &job, &report) == -ETIMEDOUT);
	pthread_join(thread, NULL);
	CHECK(report.elapsed_ns < 2500000000u);
	end(&device, queue);
}

static void a_child_is_turned_away(void)
{
	struct device device;
	struct vt_nvme_queue *queue = start(&device, 0, 0, 0);
	struct vt_nvme_io io = read_of(1);
	int status = 0;
	pid_t child = fork();

	if (!child)
		_exit(vt_nvme_submit(queue, &io, 1) == -ESTALE ? 0 : 1);
	CHECK(waitpid(child, &status, 0) == child && status == 0);
	CHECK(vt_nvme_submit(queue, &io, 1) == 1);
	end(&device, queue);
}

static void buckets_are_close_and_monotonic(void)
{
	for (uint64_t ns = 0; ns < 1u << 20; ns += 1 + ns / 1000) {
		uint32_t bucket = vt_nvme_bucket(ns);

		CHECK(vt_nvme_bucket_floor(bucket) <= ns);
		CHECK(bucket + 1 == VT_NVME_BUCKETS || vt_nvme_bucket_floor(bucket + 1) > ns);
		CHECK(ns - vt_nvme_bucket_floor(bucket) <= ns / 64);
	}
	CHECK(vt_nvme_bucket(UINT64_MAX) == VT_NVME_BUCKETS - 1);
}

int main(void)
{
	for (int variant = 0; variant < 8; variant++)
		every_command_comes_back_once(variant & 1, variant & 2, variant & 4);
	a_full_queue_takes_no_more();
	data_pointers_name_every_page();
	a_command_has_its_fields();
	impossible_commands_are_refused();
	completions_of_no_command_end_none();
	a_completion_that_comes_twice_ends_one_command();
	another_queues_completion_is_not_ours();
	a_flood_of_strays_ends();
	what_was_taken_stays_with_the_caller();
	a_barred_queue_leaves_the_doorbells_alone();
	a_queue_starts_again_after_a_reset();
	failures_are_counted();
	for (uint32_t batch = 1; batch <= 4; batch++)
		a_load_adds_up(batch % 2, batch);
	a_load_stops_at_the_first_failure();
	halting_and_stopping();
	a_stop_needs_no_luck_against_a_thread_that_polls();
	silence_ends_a_load();
	giving_up_does_not_wait_for_what_is_out();
	a_gate_that_shuts_ends_a_poll_and_a_load();
	a_child_is_turned_away();
	buckets_are_close_and_monotonic();
	return 0;
}

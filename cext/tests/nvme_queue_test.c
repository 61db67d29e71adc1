/* Tests of nvme_queue.c against a controller that is a thread; with nvme_load_test.c one program.
 * Run by tests/drivers/nvme/test_queue_pair.py, under the sanitizers. Exits 0, or says what was wrong. */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "nvme/nvme_queue.h"
#include "nvme/nvme_ring.h"
#include "tests/nvme_controller.h"
#include "vfio/gate.h"

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
	struct vt_nvme_layout layout = layout_of(&device);
	struct vt_nvme_io io = read_of(1);
	struct vt_nvme_done done;

	layout.gate = (uintptr_t)&gate;
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

/* The ring is memory of the device: whole commands and nothing else is stored there, and nothing
 * at all, nor read, while its gate is shut or the controller is reset. */
static void a_ring_in_the_device_is_stored_to_through_its_gate(void)
{
	static struct vt_gate doorbells, memory;
	struct device device;
	struct vt_nvme_queue *queue, *other = start(&device, 0, 0, 0);
	struct vt_nvme_layout layout = layout_of(&device);
	struct vt_nvme_io io = read_of(1);
	struct vt_nvme_done done;
	uint8_t plain[64], blank[64];
	uint16_t cid;
	uint32_t held = 0;

	CHECK(vt_nvme_submit(other, &io, 1) == 1);
	memcpy(plain, device.sq, sizeof(plain));
	memset(device.sq, 0xee, PAGE);
	memset(blank, 0xee, sizeof(blank));
	device.words[0] = 0;
	layout.gate = (uintptr_t)&doorbells;
	layout.memory_gate = (uintptr_t)&memory;
	vt_gate_set(&doorbells, 1);
	CHECK(vt_nvme_new(&layout, &queue) == 0);
	CHECK(!mprotect(device.sq, PAGE, PROT_NONE));
	CHECK(vt_nvme_submit(queue, &io, 1) == -EACCES && device.words[0] == 0);
	CHECK(poll_once(queue, &done, 1, 1, 0) == -EACCES);
	CHECK(!vt_gate_is_busy(&doorbells) && !vt_gate_is_busy(&memory));
	CHECK(!mprotect(device.sq, PAGE, PROT_READ | PROT_WRITE));
	vt_gate_set(&memory, 1);
	io.iova = 2;
	CHECK(vt_nvme_submit(queue, &io, 1) == -EINVAL && !memcmp(device.sq, blank, 64));
	io = read_of(1);
	for (uint32_t i = 0; i < 3 * SQ; i++) {
		uint8_t *place = device.sq + 64 * (i % SQ);

		memcpy(&cid, plain + 2, 2);
		CHECK((i % 2 ? vt_nvme_submit_raw(queue, plain, 1) : vt_nvme_submit(queue, &io, 1)) == 1);
		memcpy(place + 2, &cid, 2); /* all but its identifier */
		CHECK(!memcmp(place, plain, sizeof(plain)));
		memset(place, 0xee, 64);
		memcpy(place + 2, &(uint16_t){ 0 }, 2);
		device.mute = 1;
		work(&device);
		device.mute = 0;
		complete(&device, (uint16_t)vt_nvme_identifier(queue, 1));
		CHECK(poll_once(queue, &done, 1, 1, 1000000) == 1 && done.tag == 1);
	}
	CHECK(vt_nvme_submit(queue, &io, 1) == 1);
	vt_gate_set(&memory, 0);
	CHECK(!vt_nvme_stop(queue));
	CHECK(!mprotect(device.sq, PAGE, PROT_NONE));
	CHECK(vt_nvme_restart(queue, &done, 1, &held) == 0);
	CHECK(vt_nvme_submit(queue, &io, 1) == -EACCES);
	CHECK(!mprotect(device.sq, PAGE, PROT_READ | PROT_WRITE));
	CHECK(!vt_gate_is_busy(&doorbells) && !vt_gate_is_busy(&memory));
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

static void a_child_is_turned_away(void)
{
	struct device device;
	struct vt_nvme_queue *queue = start(&device, 0, 0, 0);
	struct vt_nvme_io io = read_of(1);
	int status = 0;
	pid_t child = fork();

	if (!child)
		_exit(vt_nvme_submit(queue, &io, 1) == -ESTALE && !vt_nvme_stop(queue) ? 0 : 1);
	CHECK(waitpid(child, &status, 0) == child && status == 0);
	/* Also where it was busy, with a thread that the child does not have. */
	CHECK(!vt_nvme_enter(queue));
	child = fork();
	if (!child)
		_exit(vt_nvme_submit(queue, &io, 1) == -ESTALE && !vt_nvme_stop(queue) ? 0 : 1);
	CHECK(waitpid(child, &status, 0) == child && status == 0);
	CHECK(!vt_nvme_leave(queue, 0));
	CHECK(vt_nvme_submit(queue, &io, 1) == 1);
	end(&device, queue);
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
	a_ring_in_the_device_is_stored_to_through_its_gate();
	a_queue_starts_again_after_a_reset();
	failures_are_counted();
	a_stop_needs_no_luck_against_a_thread_that_polls();
	a_child_is_turned_away();
	loads_hold();
	return 0;
}

/* Tests of virtio/memory.c and virtio/ring.c against drivers that are honest, fast or hostile.
 * Run by tests/virtio/test_ring.py, under the sanitizers. Exits 0, or says what was wrong.
 *
 *     ring_test ROUNDS SEED
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <string.h>
#include <sys/eventfd.h>

#include "tests/ring_driver.h"
#include "virtio/inflight.h"

/* Chains of every shape: what was laid down is what is found, in order, and comes back. */
static void honest(uint32_t rounds, bool event_index)
{
	struct driver driver;
	struct iovec arena[VT_CHAIN_SEGMENTS];
	struct vt_chain chain;

	begin(&driver, event_index);
	for (uint32_t round = 0; round < rounds; round++) {
		uint32_t reads = below(5), writes = below(5) + (reads == 0);
		bool indirect = below(2);
		struct descriptor *table = driver.table;
		uint64_t table_guest = LOW_GUEST + 0x8000 + 16 * below(16);
		uint32_t base = indirect ? 0 : below(SIZE), sum = 0, expected = 0, written = 0;
		uint16_t head = (uint16_t)base;

		if (indirect) {
			head = (uint16_t)below(SIZE);
			table = (struct descriptor *)at(&driver, table_guest);
			driver.table[head] = (struct descriptor){
				table_guest, 16 * (reads + writes), INDIRECT, 0
			};
		}
		for (uint32_t i = 0; i < reads + writes; i++) {
			uint32_t here = indirect ? i : (base + i * 7) % SIZE;
			uint32_t next = indirect ? i + 1 : (base + (i + 1) * 7) % SIZE;
			uint64_t data = below(2) ? HIGH_GUEST + below(REGION - 600) :
						   LOW_GUEST + 0x10000 + below(REGION - 0x10400);
			uint32_t length = 1 + below(500);

			table[here] = (struct descriptor){
				data, length,
				(uint16_t)((i + 1 < reads + writes ? NEXT : 0) |
					   (i >= reads ? WRITE : 0)),
				(uint16_t)next
			};
			if (i < reads)
				for (uint32_t b = 0; b < length; b++)
					at(&driver, data)[b] = (uint8_t)random32();
			else
				written += length;
		}
		for (uint32_t i = 0; i < reads; i++) {
			const struct descriptor *one = &table[indirect ? i : (base + i * 7) % SIZE];

			for (uint32_t b = 0; b < one->length; b++)
				expected += at(&driver, one->address)[b];
		}
		add(&driver, head);
		only(&driver, &chain, arena);
		CHECK(chain.head == head && vt_ring_in_flight(driver.ring) == 1);
		CHECK(chain.writable_bytes == written);
		for (uint32_t i = 0; i < chain.readable; i++)
			for (size_t b = 0; b < arena[chain.first + i].iov_len; b++)
				sum += ((uint8_t *)arena[chain.first + i].iov_base)[b];
		CHECK(sum == expected);
		CHECK(vt_ring_complete(driver.ring, head, written) == 0);
		CHECK(vt_ring_complete(driver.ring, head, written) == -EINVAL);
		CHECK(used_index(&driver) == driver.seen);
		vt_ring_publish(driver.ring);
		CHECK(used_index(&driver) == (uint16_t)(driver.seen + 1));
		CHECK(used_word(&driver, driver.seen, 0) == head);
		CHECK(used_word(&driver, driver.seen, 1) == written);
		driver.seen++;
		CHECK(vt_ring_broken(driver.ring) == NULL);
	}
	CHECK(vt_ring_fetch(driver.ring, &chain, 1, arena, VT_CHAIN_SEGMENTS) == 0);
	end(&driver);
}

/* Two threads that sleep whenever they may: a wish that gets lost shows as a timeout. */
struct pair {
	struct driver driver;
	int kick, call;
	uint32_t rounds;
};

static void sleep_on(int fd)
{
	struct pollfd one = { fd, POLLIN, 0 };
	uint64_t count;

	CHECK(poll(&one, 1, 20000) == 1);
	CHECK(read(fd, &count, 8) == 8);
}

static void *device_thread(void *argument)
{
	struct pair *pair = argument;
	struct vt_ring *ring = pair->driver.ring;
	static struct iovec arena[4 * VT_CHAIN_SEGMENTS];
	struct vt_chain chains[16];
	uint32_t done = 0;
	uint64_t one = 1;

	while (done < pair->rounds) {
		int count = vt_ring_fetch(ring, chains, 16, arena, 4 * VT_CHAIN_SEGMENTS);

		CHECK(count >= 0);
		if (!count) {
			if (!vt_ring_notify_on(ring))
				sleep_on(pair->kick);
			continue;
		}
		vt_ring_notify_off(ring);
		for (int i = 0; i < count; i++) {
			struct iovec *segments = &arena[chains[i].first];
			uint64_t value;

			CHECK(chains[i].readable == 1 && chains[i].writable == 1);
			memcpy(&value, segments[0].iov_base, 8);
			value = ~value;
			memcpy(segments[1].iov_base, &value, 8);
			CHECK(vt_ring_complete(ring, chains[i].head, 8) == 0);
			vt_ring_show(ring);
			if (i % 3 == 2 && vt_ring_publish(ring))
				CHECK(write(pair->call, &one, 8) == 8);
		}
		if (vt_ring_publish(ring))
			CHECK(write(pair->call, &one, 8) == 8);
		done += (uint32_t)count;
	}
	return NULL;
}

static void collect(struct pair *pair, uint64_t *sent)
{
	struct driver *driver = &pair->driver;

	while (driver->seen != used_index(driver)) {
		uint32_t head = used_word(driver, driver->seen, 0);
		uint64_t answer;

		CHECK(head < SIZE && used_word(driver, driver->seen, 1) == 8);
		memcpy(&answer, at(driver, HIGH_GUEST + 16 * head + 8), 8);
		CHECK(answer == ~sent[head]);
		driver->free_heads[driver->free_count++] = head;
		driver->seen++;
	}
}

static void threads(uint32_t rounds, bool event_index)
{
	struct pair pair = { .rounds = rounds, .kick = eventfd(0, 0), .call = eventfd(0, 0) };
	struct driver *driver = &pair.driver;
	uint64_t sent[SIZE], one = 1;
	uint32_t added = 0;
	pthread_t thread;

	begin(driver, event_index);
	/* Half the heads: each takes two descriptors. */
	driver->free_count = SIZE / 2;
	CHECK(!pthread_create(&thread, NULL, device_thread, &pair));
	while (added < rounds || driver->free_count < SIZE / 2) {
		uint32_t batch = 1 + below(SIZE / 2);

		collect(&pair, sent);
		while (batch-- && driver->free_count && added < rounds) {
			uint32_t head = driver->free_heads[--driver->free_count];
			uint64_t guest = HIGH_GUEST + 16 * head;

			sent[head] = (uint64_t)added << 32 | head;
			memcpy(at(driver, guest), &sent[head], 8);
			driver->table[head] = (struct descriptor){
				guest, 8, NEXT, (uint16_t)(head + SIZE / 2)
			};
			driver->table[head + SIZE / 2] =
				(struct descriptor){ guest + 8, 8, WRITE, 0 };
			if (add(driver, (uint16_t)head))
				CHECK(write(pair.kick, &one, 8) == 8);
			added++;
		}
		if (driver->free_count && added < rounds)
			continue;
		/* Signal me at the next completion; look once more; sleep. */
		if (event_index)
			__atomic_store_n(&driver->available[2 + SIZE], driver->seen,
					 __ATOMIC_RELAXED);
		__atomic_thread_fence(__ATOMIC_SEQ_CST);
		if (driver->seen == used_index(driver) && driver->free_count < SIZE / 2)
			sleep_on(pair.call);
	}
	CHECK(!pthread_join(thread, NULL));
	end(driver);
	close(pair.kick);
	close(pair.call);
}

/* Anything at all in what the driver shares: an answer or a broken ring, never an access astray. */
static void hostile(uint32_t rounds)
{
	static struct iovec arena[2 * VT_CHAIN_SEGMENTS];
	struct vt_chain chains[SIZE];
	uint32_t broken = 0, fetched = 0;

	for (uint32_t round = 0; round < rounds; round++) {
		struct driver driver;

		begin(&driver, below(2));
		/* One in `sane` words is wrong: most rings break at once, many after a while. */
		uint32_t sane = 2 + below(60);

		for (uint32_t i = 0; i < 0x9000; i += 4)
			if (below(4) == 0) {
				uint32_t word = below(3) ? below(2 * SIZE) : random32();

				memcpy(driver.low + i, &word, 4);
			}
		for (uint32_t i = 0; i < SIZE; i++) {
			if (below(sane))
				driver.table[i].address = (below(2) ? LOW_GUEST : HIGH_GUEST) +
							  below(REGION - 100);
			if (below(sane))
				driver.table[i].length = 16 * (1 + below(5));
			if (below(sane))
				driver.table[i].flags = (uint16_t)(below(2) | (i % 2 ? WRITE : 0));
			if (below(sane))
				driver.table[i].next = (uint16_t)((i + 2) % SIZE);
			if (below(sane))
				driver.available[2 + i] = (uint16_t)i;
		}
		driver.available[1] = (uint16_t)below(below(sane) ? 9 : SIZE + 3);
		for (uint32_t turn = 0; turn < 4; turn++) {
			int count = vt_ring_fetch(driver.ring, chains, SIZE, arena,
						  2 * VT_CHAIN_SEGMENTS);

			if (count < 0) {
				CHECK(count == -EPROTO && vt_ring_broken(driver.ring));
				broken++;
				break;
			}
			for (int i = 0; i < count; i++) {
				uint32_t segments = chains[i].readable + chains[i].writable;

				fetched++;
				for (uint32_t s = 0; s < segments; s++) {
					struct iovec *one = &arena[chains[i].first + s];

					memset(one->iov_base, (int)s, one->iov_len);
				}
				CHECK(!vt_ring_complete(driver.ring, chains[i].head, 1));
			}
			vt_ring_publish(driver.ring);
			driver.available[1] = (uint16_t)(driver.available[1] + below(5));
		}
		end(&driver);
	}
	CHECK(rounds < 100 || (broken > rounds / 10 && fetched > rounds / 10));
}

/* One broken rule each, with the words that name it. */
static void named(void)
{
	static const struct {
		struct descriptor first, second;
		const char *why;
	} cases[] = {
		{ { HIGH_GUEST, 8, NEXT, 0 }, { 0, 0, 0, 0 }, "a chain that goes round" },
		{ { HIGH_GUEST, 0, 0, 0 }, { 0, 0, 0, 0 }, "a descriptor without a length" },
		{ { 0x10, 8, 0, 0 }, { 0, 0, 0, 0 }, "a descriptor's memory lies in no region" },
		{ { HIGH_GUEST + REGION - 4, 8, 0, 0 },
		  { 0, 0, 0, 0 },
		  "a descriptor's memory lies in no region" },
		{ { UINT64_MAX - 3, 8, 0, 0 },
		  { 0, 0, 0, 0 },
		  "a descriptor's memory lies in no region" },
		{ { HIGH_GUEST, 8, NEXT, SIZE },
		  { 0, 0, 0, 0 },
		  "a descriptor's number is not below the table's size" },
		{ { HIGH_GUEST, 8, NEXT | WRITE, 1 },
		  { HIGH_GUEST, 8, 0, 0 },
		  "a readable descriptor after a writable one" },
		{ { HIGH_GUEST, 8, INDIRECT, 0 },
		  { 0, 0, 0, 0 },
		  "an indirect table that holds no whole descriptors" },
		{ { HIGH_GUEST, 16, INDIRECT | NEXT, 1 },
		  { HIGH_GUEST, 8, 0, 0 },
		  "an indirect descriptor with a next one" },
		{ { UINT64_MAX - 7, 16, INDIRECT, 0 },
		  { 0, 0, 0, 0 },
		  "an indirect table that runs over the address space" },
		{ { 0x10, 16, INDIRECT, 0 },
		  { 0, 0, 0, 0 },
		  "an indirect table lies in no region" },
	};
	struct iovec arena[VT_CHAIN_SEGMENTS];
	struct vt_chain chain;

	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		struct driver driver;

		begin(&driver, false);
		driver.table[0] = cases[i].first;
		driver.table[1] = cases[i].second;
		add(&driver, 0);
		CHECK(vt_ring_fetch(driver.ring, &chain, 1, arena, VT_CHAIN_SEGMENTS) == -EPROTO);
		if (strcmp(vt_ring_broken(driver.ring), cases[i].why)) {
			fprintf(stderr, "case %zu: %s\n", i, vt_ring_broken(driver.ring));
			exit(1);
		}
		end(&driver);
	}
	struct driver driver;

	begin(&driver, false);
	driver.table[0] = (struct descriptor){ HIGH_GUEST, 8, 0, 0 };
	add(&driver, 0);
	add(&driver, 0);
	CHECK(vt_ring_fetch(driver.ring, &chain, 1, arena, VT_CHAIN_SEGMENTS) == 1);
	CHECK(vt_ring_fetch(driver.ring, &chain, 1, arena, VT_CHAIN_SEGMENTS) == -EPROTO);
	CHECK(!strcmp(vt_ring_broken(driver.ring), "a head that is in use already"));
	end(&driver);
	begin(&driver, false);
	driver.available[1] = SIZE + 1;
	CHECK(vt_ring_fetch(driver.ring, &chain, 1, arena, VT_CHAIN_SEGMENTS) == -EPROTO);
	CHECK(!strcmp(vt_ring_broken(driver.ring), "the available index ran ahead of the ring"));
	end(&driver);
}

/* What is announced is checked before it is mapped. */
static void maps(void)
{
	int fd = shared(REGION), pipes[2];
	struct vt_memory *memory;
	struct iovec cut[4];
	struct vt_region two[] = { { 0, 0x1000, 0x8000, 0, fd }, { 0x8000, 0x20000, 0x8000, 0x10000, fd } };
	const struct vt_region wrong[] = {
		{ 0, 0, 0, 0, fd },
		{ UINT64_MAX - 10, 0, 4096, 0, fd },
		{ 0, UINT64_MAX - 10, 4096, 0, fd },
		{ 0, 0, 4096, UINT64_MAX - 10, fd },
		{ 0, 0, REGION + 1, 0, fd },
		{ 0, 0, UINT64_MAX, 0, fd },
		{ 0, 0, 4096, REGION, fd },
	};

	CHECK(!pipe(pipes));
	for (size_t i = 0; i < sizeof(wrong) / sizeof(wrong[0]); i++)
		CHECK(vt_memory_create(&wrong[i], 1, &memory) == -EINVAL && !memory);
	struct vt_region piped = { 0, 0, 4096, 0, pipes[0] };
	CHECK(vt_memory_create(&piped, 1, &memory) == -EINVAL);
	piped.fd = -1;
	CHECK(vt_memory_create(&piped, 1, &memory) == -EBADF);
	/* A file of a file system that answers itself. */
	piped.fd = open("/sys/kernel/uevent_seqnum", O_RDONLY | O_CLOEXEC);
	CHECK(piped.fd < 0 || vt_memory_create(&piped, 1, &memory) == -EOPNOTSUPP);
	close(piped.fd);
	CHECK(vt_memory_create(two, VT_MEMORY_REGIONS + 1, &memory) == -E2BIG);
	CHECK(vt_memory_create(two, 2, &memory) == 0);
	CHECK(vt_memory_segments(memory, 0x7ff0, 0x20, cut, 4) == 2);
	CHECK(cut[0].iov_len == 0x10 && cut[1].iov_len == 0x10);
	CHECK(vt_memory_segments(memory, 0x7ff0, 0x20, cut, 1) == -ENOBUFS);
	CHECK(vt_memory_segments(memory, 0xfff0, 0x20, cut, 4) == -EFAULT);
	CHECK(vt_memory_user(memory, 0x8ff0, 0x20, 1) == NULL);
	CHECK(vt_memory_user(memory, 0x1001, 2, 2) == NULL);
	CHECK(vt_memory_user(memory, 0x1002, 2, 2) != NULL);
	vt_memory_put(memory);
	two[1].guest = 0x7fff;
	CHECK(vt_memory_create(two, 2, &memory) == -EINVAL);
	two[1] = (struct vt_region){ 0x8000, 0x8fff, 0x8000, 0x10000, fd };
	CHECK(vt_memory_create(two, 2, &memory) == -EINVAL);
	close(fd);
	close(pipes[0]);
	close(pipes[1]);
}

/* Memory that shrinks under a running ring breaks that ring, and no other. */
static void shrinking(void)
{
	struct driver driver, other;
	struct iovec arena[VT_CHAIN_SEGMENTS];
	struct vt_chain chain;

	CHECK(vt_memory_guard() == 0);
	begin(&driver, false);
	begin(&other, false);
	driver.table[0] = (struct descriptor){ HIGH_GUEST + 8192, 4096, 0, 0 };
	add(&driver, 0);
	only(&driver, &chain, arena);
	CHECK(!ftruncate(driver.high_fd, 4096));
	for (size_t i = 0; i < arena[0].iov_len; i++)
		CHECK(((volatile uint8_t *)arena[0].iov_base)[i] == 0);
	CHECK(!strcmp(vt_ring_broken(driver.ring), "guest memory is gone"));
	CHECK(vt_ring_fetch(driver.ring, &chain, 1, arena, VT_CHAIN_SEGMENTS) == -EPROTO);
	CHECK(vt_ring_broken(other.ring) == NULL);
	end(&driver);
	end(&other);
}

/* A map is swapped under a ring with a chain in flight: the chain stays good, the ring goes on. */
static void swapped(void)
{
	struct driver driver;
	struct iovec arena[VT_CHAIN_SEGMENTS];
	struct vt_chain chain;
	struct vt_memory *fresh;
	int fd = shared(REGION);

	begin(&driver, true);
	driver.table[0] = (struct descriptor){ HIGH_GUEST, 64, 0, 0 };
	memset(at(&driver, HIGH_GUEST), 0x5a, 64);
	add(&driver, 0);
	only(&driver, &chain, arena);
	struct vt_region regions[] = {
		{ LOW_GUEST, LOW_USER, REGION, 0, driver.low_fd },
		{ 2 * (uint64_t)HIGH_GUEST, HIGH_USER, REGION, 0, fd },
	};
	CHECK(vt_memory_create(regions, 2, &fresh) == 0);
	CHECK(vt_ring_set_memory(driver.ring, fresh) == 0);
	/* The caller's reference is still there. */
	CHECK(((uint8_t *)arena[0].iov_base)[63] == 0x5a);
	CHECK(vt_ring_complete(driver.ring, 0, 0) == 0);
	vt_ring_publish(driver.ring);
	driver.table[1] = (struct descriptor){ 2 * (uint64_t)HIGH_GUEST, 64, WRITE, 0 };
	add(&driver, 1);
	only(&driver, &chain, arena);
	CHECK(chain.writable_bytes == 64);
	CHECK(vt_ring_complete(driver.ring, 1, 64) == 0);
	vt_memory_put(fresh);
	CHECK(vt_memory_create(&regions[1], 1, &fresh) == 0);
	CHECK(vt_ring_set_memory(driver.ring, fresh) == -EFAULT);
	CHECK(vt_ring_broken(driver.ring) != NULL);
	vt_memory_put(fresh);
	close(fd);
	end(&driver);
}

/* A driver that waits since before completions were shown is signalled when they are published, and one
 * that saw them all is not. */
static void shown_early(void)
{
	struct driver driver;
	struct iovec arena[2 * VT_CHAIN_SEGMENTS];
	struct vt_chain chains[4];
	uint16_t *event;

	begin(&driver, true);
	event = &driver.available[2 + SIZE];
	for (uint16_t head = 0; head < 4; head++) {
		driver.table[head] = (struct descriptor){ HIGH_GUEST, 64, 0, 0 };
		add(&driver, head);
	}
	CHECK(vt_ring_fetch(driver.ring, chains, 4, arena, 2 * VT_CHAIN_SEGMENTS) == 4);
	/* The first signal is always given. */
	CHECK(vt_ring_complete(driver.ring, 0, 0) == 0 && vt_ring_publish(driver.ring));
	*event = 1;
	CHECK(vt_ring_complete(driver.ring, 1, 0) == 0);
	CHECK(used_index(&driver) == 1);
	vt_ring_show(driver.ring);
	CHECK(used_index(&driver) == 2);
	CHECK(vt_ring_complete(driver.ring, 2, 0) == 0);
	vt_ring_show(driver.ring);
	CHECK(used_index(&driver) == 3);
	CHECK(vt_ring_publish(driver.ring));
	CHECK(!vt_ring_publish(driver.ring));
	*event = 40;
	CHECK(vt_ring_complete(driver.ring, 3, 0) == 0);
	vt_ring_show(driver.ring);
	CHECK(!vt_ring_publish(driver.ring));
	CHECK(used_index(&driver) == 4);
	end(&driver);
}

/* A process that ends at any moment leaves a log by which another one does what was not done. */
static void crashes(uint32_t rounds)
{
	static uint8_t log[16 + 16 * SIZE] __attribute__((aligned(8)));
	struct vt_ring_layout layout = { LOW_USER, LOW_USER + 0x1000, LOW_USER + 0x2000, SIZE,
					 false, true, false };
	struct iovec arena[2 * VT_CHAIN_SEGMENTS];
	struct vt_chain chains[SIZE];
	uint32_t state[SIZE] = { 0 }; /* 1: made available, not seen to be used */
	struct driver driver;

	CHECK(vt_log_size(SIZE) == sizeof(log));
	memset(log, 0, sizeof(log));
	begin(&driver, false);
	CHECK(vt_ring_set_log(driver.ring, log) == 0);
	for (uint32_t round = 0; round < rounds; round++) {
		uint32_t order[SIZE], pending = 0;
		int count;

		for (uint32_t i = below(12); i && driver.free_count; i--) {
			uint32_t head = driver.free_heads[--driver.free_count];

			driver.table[head] = (struct descriptor){ HIGH_GUEST, 8, 0, 0 };
			state[head] = 1;
			add(&driver, (uint16_t)head);
		}
		count = vt_ring_fetch(driver.ring, chains, 1 + below(SIZE), arena,
				      2 * VT_CHAIN_SEGMENTS);
		CHECK(count >= 0);
		/* Some of them are completed, in any order, and not all of that becomes visible. */
		for (int i = 0; i < count; i++)
			if (below(4))
				order[pending++] = chains[i].head;
		for (uint32_t i = 0; i < pending; i++) {
			CHECK(vt_ring_complete(driver.ring, (uint16_t)order[i], 0) == 0);
			/* Shown, and then not yet published or never. */
			if (!below(2))
				vt_ring_show(driver.ring);
			if (!below(3))
				vt_ring_publish(driver.ring);
		}
		while (driver.seen != used_index(&driver)) {
			uint32_t head = used_word(&driver, driver.seen++, 0);

			CHECK(head < SIZE && state[head] == 1);
			state[head] = 0;
			driver.free_heads[driver.free_count++] = head;
		}
		/* The process ends; another one takes over, whatever base it was told. */
		if (below(2)) {
			uint32_t outstanding = 0;

			vt_ring_stop(driver.ring);
			CHECK(vt_ring_start(driver.memory, &layout, (uint16_t)below(9),
					    &driver.ring) == 0);
			CHECK(vt_ring_set_log(driver.ring, log) >= 0);
			for (uint32_t i = 0; i < SIZE; i++)
				outstanding += state[i];
			CHECK(vt_ring_waiting(driver.ring) <= outstanding);
		} else {
			/* Or it goes on, and completes what it still has. */
			for (int i = 0; i < count; i++)
				if (vt_ring_complete(driver.ring, chains[i].head, 0) == 0)
					vt_ring_publish(driver.ring);
		}
	}
	/* Nothing is lost: all of it ends now. */
	vt_ring_stop(driver.ring);
	CHECK(vt_ring_start(driver.memory, &layout, 0, &driver.ring) == 0);
	CHECK(vt_ring_set_log(driver.ring, log) >= 0);
	for (;;) {
		int count = vt_ring_fetch(driver.ring, chains, SIZE, arena, 2 * VT_CHAIN_SEGMENTS);

		CHECK(count >= 0);
		if (!count)
			break;
		for (int i = 0; i < count; i++)
			CHECK(vt_ring_complete(driver.ring, chains[i].head, 0) == 0);
		vt_ring_publish(driver.ring);
	}
	while (driver.seen != used_index(&driver)) {
		uint32_t head = used_word(&driver, driver.seen++, 0);

		CHECK(head < SIZE && state[head] == 1);
		state[head] = 0;
	}
	for (uint32_t i = 0; i < SIZE; i++)
		CHECK(state[i] == 0);
	/* Another queue's log, and one that contradicts itself. */
	vt_ring_stop(driver.ring);
	CHECK(vt_ring_start(driver.memory, &layout, 0, &driver.ring) == 0);
	log[10] = 7;
	CHECK(vt_ring_set_log(driver.ring, log) == -EINVAL);
	end(&driver);
	begin(&driver, false);
	memset(log, 0xff, sizeof(log));
	CHECK(vt_ring_set_log(driver.ring, log) == -EINVAL);
	end(&driver);
}

int main(int count, char **arguments)
{
	uint32_t rounds = count > 1 ? (uint32_t)strtoul(arguments[1], NULL, 0) : 1000;

	seed = count > 2 ? strtoull(arguments[2], NULL, 0) : 1;
	maps();
	named();
	honest(rounds, false);
	honest(rounds, true);
	swapped();
	shown_early();
	shrinking();
	threads(20 * rounds, false);
	threads(20 * rounds, true);
	crashes(rounds);
	hostile(rounds);
	return 0;
}

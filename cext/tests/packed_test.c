/* Tests of virtio/packed.c and its in-flight log against drivers that are honest, fast or hostile,
 * and against ends at any moment. Run by tests/virtio/test_ring.py, under the sanitizers.
 *
 *     packed_test ROUNDS SEED
 */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <string.h>
#include <sys/eventfd.h>

#include "tests/guest.h"
#include "virtio/memory.h"
#include "virtio/packed_log.h"
#include "virtio/ring.h"

#define MOST 64u
#define GUEST 0x100000u
#define USER 0x7f0000000000u
#define DATA 0x40000u /* 4096 bytes for each id */
#define TABLES 0x10000u
#define DRIVER 0x1000u
#define DEVICE 0x1004u
#define LOG 0x2000u
#define AVAILABLE 0x80u
#define USED 0x8000u

struct packed {
	uint64_t address;
	uint32_t length;
	uint16_t id, flags;
};

/* The driver's end: what it made available, by id, and where it goes on. */
struct driver {
	int fd;
	uint8_t *memory;
	struct vt_memory *map;
	struct vt_ring *ring;
	struct vt_ring_layout layout;
	uint32_t size, free_slots;
	uint16_t next, seen;
	bool next_wrap, seen_wrap;
	uint16_t slots[MOST];  /* by id; 0: not in use */
	uint32_t reads[MOST], writes[MOST];
	uint32_t in_use;
};

static struct packed *slot(struct driver *driver, uint32_t place)
{
	return (struct packed *)(void *)driver->memory + place;
}

static uint16_t *word(struct driver *driver, uint32_t at)
{
	return (uint16_t *)(void *)(driver->memory + at);
}

static void begin(struct driver *driver, uint32_t size, bool event_index)
{
	*driver = (struct driver){ .size = size, .free_slots = size, .next_wrap = true,
				   .seen_wrap = true };
	driver->layout = (struct vt_ring_layout){ USER, USER + DRIVER, USER + DEVICE, size,
						  event_index, true, true };
	driver->fd = shared(REGION);
	driver->memory = mapped(driver->fd, REGION, 0);
	struct vt_region region = { GUEST, USER, REGION, 0, driver->fd };

	CHECK(vt_memory_create(&region, 1, &driver->map) == 0);
	CHECK(vt_ring_start(driver->map, &driver->layout, 0x80008000u, &driver->ring) == 0);
}

static void end(struct driver *driver)
{
	vt_ring_stop(driver->ring);
	vt_memory_put(driver->map);
	munmap(driver->memory, REGION);
	close(driver->fd);
}

static uint16_t flags_of(bool wrap)
{
	return wrap ? AVAILABLE : USED;
}

/* Make a buffer available, of `reads` and then `writes` descriptors. Return: whether there was room. */
static bool add(struct driver *driver, uint16_t id, uint32_t reads, uint32_t writes, bool indirect)
{
	uint32_t count = reads + writes, place = driver->next;
	struct packed *table = (struct packed *)(void *)(driver->memory + TABLES + 1024u * id);
	uint32_t first = place;
	uint16_t first_flags = 0;
	bool wrap = driver->next_wrap;

	if (driver->free_slots < (indirect ? 1 : count))
		return false;
	for (uint32_t i = 0; i < count; i++) {
		struct packed one = { GUEST + DATA + 4096u * id + 64 * i, 64, id,
				      i >= reads ? WRITE : 0 };

		memset(driver->memory + DATA + 4096u * id + 64 * i, (int)(id + i), 64);
		if (indirect) {
			table[i] = one;
			continue;
		}
		one.flags |= (uint16_t)((i + 1 < count ? NEXT : 0) | flags_of(wrap));
		if (i == 0) {
			first_flags = one.flags;
			one.flags = slot(driver, place)->flags;
		}
		*slot(driver, place) = one;
		if (++place == driver->size) {
			place = 0;
			wrap = !wrap;
		}
	}
	if (indirect) {
		struct packed one = { GUEST + TABLES + 1024u * id, 16 * count, id,
				      slot(driver, place)->flags };

		*slot(driver, place) = one;
		first_flags = INDIRECT | flags_of(wrap);
		if (++place == driver->size) {
			place = 0;
			wrap = !wrap;
		}
	}
	driver->slots[id] = (uint16_t)(indirect ? 1 : count);
	driver->free_slots -= driver->slots[id];
	driver->reads[id] = reads;
	driver->writes[id] = writes;
	driver->in_use++;
	driver->next = (uint16_t)place;
	driver->next_wrap = wrap;
	__atomic_store_n(&slot(driver, first)->flags, first_flags, __ATOMIC_RELEASE);
	return true;
}

/* Take used buffers back. Return: how many. */
static uint32_t collect(struct driver *driver)
{
	uint32_t count = 0;

	for (;;) {
		struct packed *used = slot(driver, driver->seen);
		uint16_t flags = __atomic_load_n(&used->flags, __ATOMIC_ACQUIRE);
		uint32_t next;

		if ((flags & (AVAILABLE | USED)) != (driver->seen_wrap ? AVAILABLE | USED : 0) ||
		    !driver->in_use)
			return count;
		CHECK(used->id < MOST && driver->slots[used->id]);
		CHECK(used->length == 64 * driver->writes[used->id]);
		CHECK(!(flags & WRITE) == !driver->writes[used->id]);
		next = driver->seen + driver->slots[used->id];
		if (next >= driver->size) {
			next -= driver->size;
			driver->seen_wrap = !driver->seen_wrap;
		}
		driver->seen = (uint16_t)next;
		driver->free_slots += driver->slots[used->id];
		driver->slots[used->id] = 0;
		driver->in_use--;
		count++;
	}
}

static void check_chain(struct driver *driver, const struct vt_chain *chain,
			const struct iovec *arena)
{
	const struct iovec *segments = arena + chain->first;

	CHECK(chain->head < MOST && driver->slots[chain->head]);
	CHECK(chain->readable == driver->reads[chain->head]);
	CHECK(chain->writable == driver->writes[chain->head]);
	for (uint32_t i = 0; i < chain->readable; i++)
		CHECK(*(uint8_t *)segments[i].iov_base == (uint8_t)(chain->head + i));
}

/* Chains of every shape, done out of order, in rings of odd sizes; with a log the process may end at
 * any moment, and another one goes on. */
static void honest(uint32_t rounds, uint32_t size, bool event_index, bool crash)
{
	static struct iovec arena[2 * VT_CHAIN_SEGMENTS];
	struct vt_chain chains[MOST];
	uint16_t held[MOST];
	uint32_t held_count = 0, ended = 0;
	struct driver driver;

	begin(&driver, size, event_index);
	if (crash)
		CHECK(vt_ring_set_log(driver.ring, driver.memory + LOG) == 0);
	for (uint32_t round = 0; round < rounds || driver.in_use; round++) {
		int got;

		for (uint32_t i = below(6); i && round < rounds; i--) {
			uint16_t id = (uint16_t)below(MOST < size ? MOST : size);
			uint32_t reads = below(4), writes = below(4) + !reads;

			if (!driver.slots[id])
				add(&driver, id, reads, writes, below(2));
		}
		got = vt_ring_fetch(driver.ring, chains, 1 + below(8), arena, 2 * VT_CHAIN_SEGMENTS);
		CHECK(got >= 0);
		for (int i = 0; i < got; i++) {
			check_chain(&driver, &chains[i], arena);
			held[held_count++] = chains[i].head;
		}
		for (uint32_t i = below(6); i && held_count; i--) {
			uint32_t which = below(held_count);
			uint16_t id = held[which];

			held[which] = held[--held_count];
			CHECK(!vt_ring_complete(driver.ring, id, 64 * driver.writes[id]));
			CHECK(vt_ring_complete(driver.ring, id, 0) == -EINVAL);
			if (!below(2))
				vt_ring_show(driver.ring);
			if (!below(3))
				vt_ring_publish(driver.ring);
		}
		if (crash && !below(4)) {
			vt_ring_stop(driver.ring);
			held_count = 0;
			CHECK(!vt_ring_start(driver.map, &driver.layout, below(2) ? 0x80008000u : 0,
					     &driver.ring));
			CHECK(vt_ring_set_log(driver.ring, driver.memory + LOG) >= 0);
		} else if (below(2)) {
			vt_ring_publish(driver.ring);
		}
		ended += collect(&driver);
		CHECK(!vt_ring_broken(driver.ring));
		CHECK(round < rounds + 100000);
	}
	CHECK(ended && driver.free_slots == size && !vt_ring_in_flight(driver.ring));
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

	CHECK(poll(&one, 1, 20000) == 1 && read(fd, &count, 8) == 8);
}

static void *device_thread(void *argument)
{
	struct pair *pair = argument;
	struct vt_ring *ring = pair->driver.ring;
	static struct iovec arena[4 * VT_CHAIN_SEGMENTS];
	struct vt_chain chains[16];
	uint64_t one = 1;

	for (uint32_t done = 0; done < pair->rounds;) {
		int got = vt_ring_fetch(ring, chains, 16, arena, 4 * VT_CHAIN_SEGMENTS);

		CHECK(got >= 0);
		if (!got) {
			if (!vt_ring_notify_on(ring))
				sleep_on(pair->kick);
			continue;
		}
		vt_ring_notify_off(ring);
		for (int i = 0; i < got; i++) {
			CHECK(!vt_ring_complete(ring, chains[i].head, 64));
			if (i % 2)
				vt_ring_show(ring);
			if (i % 3 == 2 && vt_ring_publish(ring))
				CHECK(write(pair->call, &one, 8) == 8);
		}
		if (vt_ring_publish(ring))
			CHECK(write(pair->call, &one, 8) == 8);
		done += (uint32_t)got;
	}
	return NULL;
}

/* Whether the device asked to be told of a place between `old` and the next one. */
static bool wants_kick(struct driver *driver, uint16_t old, uint32_t count)
{
	uint16_t flags, place, event;

	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	flags = __atomic_load_n(word(driver, DEVICE + 2), __ATOMIC_ACQUIRE);
	place = __atomic_load_n(word(driver, DEVICE), __ATOMIC_RELAXED);
	(void)old;
	if (flags != 2)
		return flags == 0;
	event = place & 0x7fff;
	if (!(place & 0x8000) != !driver->next_wrap)
		event = (uint16_t)(event - driver->size);
	return (uint16_t)(driver->next - event - 1) < count;
}

static void threads(uint32_t rounds, bool event_index)
{
	struct pair pair = { .rounds = rounds, .kick = eventfd(0, 0), .call = eventfd(0, 0) };
	struct driver *driver = &pair.driver;
	uint32_t added = 0;
	uint64_t one = 1;
	pthread_t thread;

	begin(driver, 48, event_index);
	CHECK(!pthread_create(&thread, NULL, device_thread, &pair));
	while (added < rounds || driver->in_use) {
		for (uint32_t batch = below(24); batch && added < rounds; batch--) {
			uint16_t id = (uint16_t)below(48), old = driver->next;

			if (driver->slots[id] || !add(driver, id, 1, 1, false))
				continue;
			added++;
			if (wants_kick(driver, old, 2))
				CHECK(write(pair.kick, &one, 8) == 8);
		}
		if (collect(driver) || !driver->in_use)
			continue;
		/* Signal me at the next one; look once more; sleep. */
		__atomic_store_n(word(driver, DRIVER),
				 (uint16_t)(driver->seen | (driver->seen_wrap ? 0x8000 : 0)),
				 __ATOMIC_RELAXED);
		__atomic_store_n(word(driver, DRIVER + 2), event_index ? 2 : 0, __ATOMIC_RELEASE);
		__atomic_thread_fence(__ATOMIC_SEQ_CST);
		if (!collect(driver))
			sleep_on(pair.call);
		__atomic_store_n(word(driver, DRIVER + 2), 1, __ATOMIC_RELAXED);
	}
	CHECK(!pthread_join(thread, NULL));
	end(driver);
	close(pair.kick);
	close(pair.call);
}

/* Anything at all in what the driver shares, the log too: an answer or a broken ring, never an access
 * astray. */
static void hostile(uint32_t rounds)
{
	static struct iovec arena[2 * VT_CHAIN_SEGMENTS];
	struct vt_chain chains[MOST];
	uint32_t broken = 0, fetched = 0, refused = 0;

	for (uint32_t round = 0; round < rounds; round++) {
		uint32_t size = 1 + below(MOST), sane = 2 + below(60);
		bool log = below(2);
		struct driver driver;

		begin(&driver, size, below(2));
		if (log && below(2)) {
			/* A log that is nearly right. */
			CHECK(vt_ring_set_log(driver.ring, driver.memory + LOG) == 0);
			add(&driver, 0, 1, 0, false);
			CHECK(vt_ring_fetch(driver.ring, chains, 1, arena, VT_CHAIN_SEGMENTS) == 1);
			vt_ring_stop(driver.ring);
			CHECK(!vt_ring_start(driver.map, &driver.layout, 0x80008000u, &driver.ring));
			for (uint32_t i = below(4); i; i--)
				driver.memory[LOG + below(32 + 32 * size)] = (uint8_t)below(256);
		} else if (log) {
			for (uint32_t i = 0; i < 32 + 32 * size; i++)
				driver.memory[LOG + i] = (uint8_t)(below(3) ? 0 : below(256));
		}
		for (uint32_t i = 0; i < size; i++) {
			struct packed one = { GUEST + below(REGION - 100), 16 * (1 + below(5)),
					      (uint16_t)i,
					      (uint16_t)(AVAILABLE | below(2) | (i % 2 ? WRITE : 0)) };

			if (!below(sane))
				one.address = ((uint64_t)below(1u << 31) << 33) + below(1u << 31);
			if (!below(sane))
				one.length = below(3) ? 0 : below(1u << 31);
			if (!below(sane))
				one.id = (uint16_t)below(1u << 16);
			if (!below(sane))
				one.flags = (uint16_t)below(1u << 16);
			*slot(&driver, i) = one;
		}
		if (log && vt_ring_set_log(driver.ring, driver.memory + LOG) < 0) {
			refused++;
			end(&driver);
			continue;
		}
		for (uint32_t turn = 0; turn < 4; turn++) {
			int got = vt_ring_fetch(driver.ring, chains, 1 + below(MOST), arena,
						2 * VT_CHAIN_SEGMENTS);

			if (got < 0) {
				CHECK(got == -EPROTO && vt_ring_broken(driver.ring));
				broken++;
				break;
			}
			for (int i = 0; i < got; i++) {
				fetched++;
				for (uint32_t s = 0; s < (uint32_t)chains[i].readable + chains[i].writable; s++) {
					struct iovec *one = &arena[chains[i].first + s];

					memset(one->iov_base, (int)below(256), one->iov_len);
				}
				if (below(4))
					CHECK(!vt_ring_complete(driver.ring, chains[i].head, 1));
			}
			if (below(2))
				vt_ring_publish(driver.ring);
			vt_ring_notify_on(driver.ring);
		}
		end(&driver);
	}
	CHECK(rounds < 400 || (broken > rounds / 20 && fetched > rounds / 20 && refused > rounds / 40));
}

int main(int count, char **arguments)
{
	static const uint32_t sizes[] = { 64, 48, 7, 33 };
	uint32_t rounds = count > 1 ? (uint32_t)strtoul(arguments[1], NULL, 0) : 1000;

	seed = count > 2 ? strtoull(arguments[2], NULL, 0) : 1;
	for (uint32_t i = 0; i < 4; i++) {
		honest(rounds, sizes[i], i % 2, false);
		honest(rounds, sizes[i], i % 2, true);
	}
	threads(20 * rounds, false);
	threads(20 * rounds, true);
	hostile(rounds);
	return 0;
}

/* The driver's end of a split ring, for ring_test.c. */
#ifndef VT_TESTS_RING_DRIVER_H
#define VT_TESTS_RING_DRIVER_H

#include <string.h>

#include "tests/guest.h"
#include "virtio/memory.h"
#include "virtio/ring.h"

#define SIZE 64u
#define LOW_GUEST 0x1000u
#define LOW_USER 0x7f0000000000u
#define HIGH_GUEST 0x100000000u
#define HIGH_USER 0x7f1000000000u

struct descriptor {
	uint64_t address;
	uint32_t length;
	uint16_t flags, next;
};

/* A driver's end: two regions that follow each other in guest addresses nowhere, the ring in the
 * first one, tables behind it, and data in both. */
struct driver {
	int low_fd, high_fd;
	uint8_t *low, *high;
	struct vt_memory *memory;
	struct vt_ring *ring;
	struct descriptor *table;
	uint16_t *available;
	uint8_t *used;
	uint16_t added, seen;
	uint32_t free_heads[SIZE];
	uint32_t free_count;
	bool event_index;
};

static inline void begin(struct driver *driver, bool event_index)
{
	struct vt_ring_layout layout = {
		.descriptors = LOW_USER,
		.available = LOW_USER + 0x1000,
		.used = LOW_USER + 0x2000,
		.size = SIZE,
		.event_index = event_index,
		.indirect = true,
	};

	*driver = (struct driver){ .low_fd = shared(REGION), .high_fd = shared(REGION + 4096),
				   .event_index = event_index };
	driver->low = mapped(driver->low_fd, REGION, 0);
	driver->high = mapped(driver->high_fd, REGION, 4096);
	struct vt_region regions[] = {
		{ HIGH_GUEST, HIGH_USER, REGION, 4096, driver->high_fd },
		{ LOW_GUEST, LOW_USER, REGION, 0, driver->low_fd },
	};
	CHECK(vt_memory_create(regions, 2, &driver->memory) == 0);
	CHECK(vt_ring_start(driver->memory, &layout, 0, &driver->ring) == 0);
	driver->table = (struct descriptor *)driver->low;
	driver->available = (uint16_t *)(driver->low + 0x1000);
	driver->used = driver->low + 0x2000;
	driver->free_count = SIZE;
	for (uint32_t i = 0; i < SIZE; i++)
		driver->free_heads[i] = i;
}

static inline void end(struct driver *driver)
{
	vt_ring_stop(driver->ring);
	vt_memory_put(driver->memory);
	munmap(driver->low, REGION);
	munmap(driver->high, REGION);
	close(driver->low_fd);
	close(driver->high_fd);
}

static inline uint16_t used_index(const struct driver *driver)
{
	return __atomic_load_n((uint16_t *)(driver->used + 2), __ATOMIC_ACQUIRE);
}

static inline uint32_t used_word(const struct driver *driver, uint16_t at, uint32_t which)
{
	uint32_t word;

	memcpy(&word, driver->used + 4 + 8 * (at % SIZE) + 4 * which, 4);
	return word;
}

/* Make a head available. Return: whether the device asked to be notified. */
static inline bool add(struct driver *driver, uint16_t head)
{
	uint16_t old = driver->added, event;

	driver->available[2 + old % SIZE] = head;
	driver->added++;
	__atomic_store_n(&driver->available[1], driver->added, __ATOMIC_RELEASE);
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	if (!driver->event_index)
		return !(__atomic_load_n((uint16_t *)driver->used, __ATOMIC_RELAXED) & 1);
	event = __atomic_load_n((uint16_t *)(driver->used + 4 + 8 * SIZE), __ATOMIC_RELAXED);
	return (uint16_t)(driver->added - event - 1) < (uint16_t)(driver->added - old);
}

static inline uint8_t *at(const struct driver *driver, uint64_t guest)
{
	return guest >= HIGH_GUEST ? driver->high + (guest - HIGH_GUEST) :
				     driver->low + (guest - LOW_GUEST);
}

static inline const struct vt_chain *only(struct driver *driver, struct vt_chain *chain,
				   struct iovec *arena)
{
	CHECK(vt_ring_fetch(driver->ring, chain, 1, arena, VT_CHAIN_SEGMENTS) == 1);
	return chain;
}

#endif

/* A guest's memory and the chance that drivers of the ring tests act by. */
#ifndef VT_TESTS_GUEST_H
#define VT_TESTS_GUEST_H

#include <stdint.h>
#include <sys/mman.h>
#include <unistd.h>

#include "tests/check.h"

#define REGION (1u << 20)
#define NEXT 1u
#define WRITE 2u
#define INDIRECT 4u

static uint64_t seed;

static inline uint32_t random32(void)
{
	seed = seed * 6364136223846793005u + 1442695040888963407u;
	return (uint32_t)(seed >> 33);
}

static inline uint32_t below(uint32_t limit)
{
	return random32() % limit;
}

/* A file of `size` bytes that a front end would hand over. */
static inline int shared(size_t size)
{
	int fd = memfd_create("guest", MFD_CLOEXEC);

	CHECK(fd >= 0 && !ftruncate(fd, (off_t)size));
	return fd;
}

/* `size` bytes of such a file, from `offset` on. */
static inline uint8_t *mapped(int fd, size_t size, off_t offset)
{
	void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, offset);

	CHECK(memory != MAP_FAILED);
	return memory;
}

#endif

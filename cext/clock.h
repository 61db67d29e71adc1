/* The clock of every deadline. */
#ifndef VT_CLOCK_H
#define VT_CLOCK_H

#include <stdint.h>
#include <time.h>

/* Nanoseconds since the machine started, CLOCK_MONOTONIC; it stands still while the machine
 * sleeps and is never set. */
static inline uint64_t vt_clock_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

#endif

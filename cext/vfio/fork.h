/* Tells an object whether this is still the process that made it: a child has its memory, and not
 * its device. Each extension counts for itself. */
#ifndef VT_FORK_H
#define VT_FORK_H

#include <stdint.h>

/* Counts the forks between this process and the one that called vt_watch_forks. Objects keep what
 * it was when they were made. */
extern uint64_t vt_fork_generation;

/* Counts from now on. Called when the extension is loaded, or by one thread before the first
 * object is made; calling it again does nothing. */
void vt_watch_forks(void);

#endif

#define _GNU_SOURCE
#include "vfio/fork.h"

#include <pthread.h>

uint64_t vt_fork_generation;

static void count_fork(void)
{
	vt_fork_generation++;
}

void vt_watch_forks(void)
{
	static int watching;

	if (!watching)
		watching = pthread_atfork(NULL, NULL, count_fork) == 0;
}

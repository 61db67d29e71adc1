/* Signals by eventfd, to drivers that may have made theirs block. */
#ifndef VT_VIRTIO_SIGNAL_H
#define VT_VIRTIO_SIGNAL_H

#include <stdbool.h>

/* Add 1 to an eventfd; -1: to none. Whether an eventfd blocks is a property that it shares with the
 * driver's end, which can have it changed, and full, between any look of ours and the write. So a
 * thread of its own looks after writes, and one that has not returned within some
 * VT_SIGNAL_PATIENCE_MS is interrupted.
 * Return: false if this one was: nobody should signal it again. Full or failed otherwise is as good
 * as signalled. */
bool vt_signal(int fd);

#define VT_SIGNAL_PATIENCE_MS 10

/* What a queue that was signalled in vain says of itself. */
#define VT_SIGNAL_BLOCKS "its driver's interrupt blocks"
const char *vt_signal_blocks(void);

#endif

/* Interrupts: assignment to eventfds, and waiting for them. VFIO_DEVICE_SET_IRQS in <linux/vfio.h>. */
#ifndef VT_IRQ_H
#define VT_IRQ_H

#include <stdint.h>

/* `fds[i]` is signalled by interrupt `start + i` of `index`; -1 takes one away. A positive result
 * is a failure too: how many vectors there would be. */
int vt_irq_assign(int device, uint32_t index, uint32_t start, const int32_t *fds, uint32_t count);
/* An action without data: VFIO_IRQ_SET_ACTION_MASK (8), _UNMASK (16) or _TRIGGER (32) on `count`
 * interrupts; TRIGGER with count 0 turns the whole index off. */
int vt_irq_action(int device, uint32_t index, uint32_t start, uint32_t count, uint32_t action);
/* The INTx pin is unmasked whenever `fd` is signalled; -1 ends that. */
int vt_irq_unmask_fd(int device, uint32_t index, int32_t fd);

int vt_eventfd(void);
/* Takes what `fd` was signalled, without waiting: 1 with `signals` set, 0 if it was not, -errno. */
int vt_eventfd_take(int fd, uint64_t *signals);
/* Waits for a signal on `fd` after vt_eventfd_take has found none: 1 with `signals` set, 0 when
 * `left_ns` (-1: no limit) have passed, -EINTR when a Unix signal arrived first; `left_ns` is then
 * what is left. Spins for `spin_ns` before it blocks. */
int vt_eventfd_wait(int fd, int64_t *left_ns, uint64_t spin_ns, uint64_t *signals);

#endif

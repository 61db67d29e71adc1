/* Interrupts while they are in use: waiting for their eventfds, masking and triggering them. For
 * vfiotool.native._types alone; assigning eventfds is irq.h. VFIO_DEVICE_SET_IRQS in
 * <linux/vfio.h>.
 */
#ifndef VT_INTERRUPT_H
#define VT_INTERRUPT_H

#include <stdint.h>

/* An action without data: VFIO_IRQ_SET_ACTION_MASK (8), _UNMASK (16) or _TRIGGER (32) on `count`
 * interrupts of `index` from `start` on; TRIGGER with count 0 turns the whole index off. 0 or
 * -errno. */
int vt_irq_action(int device, uint32_t index, uint32_t start, uint32_t count, uint32_t action);
/* Takes what `fd` was signalled, without waiting: 1 with `signals` set, 0 if it was not, -errno. */
int vt_eventfd_take(int fd, uint64_t *signals);
/* Waits for a signal on `fd` after vt_eventfd_take has found none: 1 with `signals` set, 0 when
 * `left_ns` (-1: no limit) have passed, -EINTR when a Unix signal arrived first; `left_ns` is then
 * what is left. Spins for `spin_ns` before it blocks. */
int vt_eventfd_wait(int fd, int64_t *left_ns, uint64_t spin_ns, uint64_t *signals);

#endif

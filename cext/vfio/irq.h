/* Interrupts: assignment to eventfds. VFIO_DEVICE_SET_IRQS in <linux/vfio.h>. Each function returns
 * 0 or -errno. */
#ifndef VT_IRQ_H
#define VT_IRQ_H

#include <stdint.h>

/* `fds[i]` is signalled by interrupt `start + i` of `index`; -1 takes one away. A positive result
 * is a failure too: how many vectors there would be. */
int vt_irq_assign(int device, uint32_t index, uint32_t start, const int32_t *fds, uint32_t count);
/* The INTx pin is unmasked whenever `fd` is signalled; -1 ends that. */
int vt_irq_unmask_fd(int device, uint32_t index, int32_t fd);

/* A new eventfd: close-on-exec, not blocking, at zero; or -errno. */
int vt_eventfd(void);

#endif

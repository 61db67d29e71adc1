/* Memory-mapped device registers: windows on a region, and accesses of exact width to them.
 *
 * Each access is one volatile load or store of the register's width, little-endian as PCI is. A
 * write is preceded by a write barrier (the descriptor is visible before its doorbell rings), a
 * read is followed by a read barrier (what the register announces is not read before it).
 */
#ifndef VT_MMIO_H
#define VT_MMIO_H

#include <endian.h>
#include <stdint.h>

#include "vfio/fork.h"
#include "vfio/gate.h"

/* Why an access was refused; also what vt_window_check returns. */
enum vt_refusal {
	VT_OK = 0,
	VT_CLOSED = 1,  /* the window was closed */
	VT_BLOCKED = 2, /* the device does not decode memory now: the access would be a SIGBUS */
	VT_FORKED = 3,  /* this is a child of the process that mapped it */
	VT_ACCESS = 4,  /* the region cannot be read, or cannot be written */
	VT_RANGE = 5,   /* outside the window */
	VT_ALIGN = 6,   /* not a multiple of the width */
};

#define VT_WINDOW_READ 1u
#define VT_WINDOW_WRITE 2u

struct vt_window {
	volatile uint8_t *base;
	uint64_t size;    /* bytes mapped; 0 once closed */
	uint64_t start;   /* the region offset that `base` stands for */
	uint32_t access;  /* VT_WINDOW_READ, VT_WINDOW_WRITE; 0 refuses all */
	uint32_t granted; /* what `access` returns to when the window is unblocked */
	uint64_t generation;
	uint64_t reserved_size; /* the address range kept for the window, alignment included */
	void *reserved;
	struct vt_gate gate; /* for loops that run without the interpreter's lock */
};

/* Maps `size` bytes of `fd` at `position` as the window that begins at region offset `start`, at
 * an address that is a multiple of `alignment` (0: the page). Hidden from children. 0 or -errno. */
int vt_window_map(struct vt_window *window, int fd, uint64_t position, uint64_t start,
		  uint64_t size, uint32_t access, uint64_t alignment);
/* Unmaps; the gate stays shut. The caller has seen that nobody is inside. */
void vt_window_unmap(struct vt_window *window);
/* Refuses all accesses from now on, or allows them again where `blocked` is 0. Loops that are
 * inside the gate end soon: vt_gate_is_busy tells when they have. */
void vt_window_block(struct vt_window *window, int blocked);
/* The reason why `count` accesses of `width` bytes from `offset` on would be refused, or VT_OK. */
enum vt_refusal vt_window_check(const struct vt_window *window, uint64_t offset, uint64_t count,
				uint32_t width, uint32_t access);

/* Bulk accesses to checked offsets: `count` registers in a row, or (`step` 0) one FIFO register
 * `count` times. `width` is 1, 2, 4 or 8. */
void vt_window_read_many(const struct vt_window *window, uint64_t offset, uint32_t width,
			 uint32_t step, void *out, uint64_t count);
void vt_window_write_many(const struct vt_window *window, uint64_t offset, uint32_t width,
			  uint32_t step, const void *in, uint64_t count);
/* Reads the register until (value & mask) == wanted: 1, or 0 when `timeout_ns` has passed, or -1
 * when the window's gate is shut, at once or meanwhile; `value` is then not set. Spins for 20
 * microseconds, then sleeps between reads, never longer than 100 microseconds. */
int vt_window_poll(struct vt_window *window, uint64_t offset, uint32_t width, uint64_t mask,
		   uint64_t wanted, uint64_t timeout_ns, uint64_t *value);

static inline void vt_write_barrier(void)
{
#if defined(__aarch64__)
	__asm__ __volatile__("dmb oshst" ::: "memory");
#else
	__atomic_thread_fence(__ATOMIC_RELEASE);
#endif
}

static inline void vt_read_barrier(void)
{
#if defined(__aarch64__)
	__asm__ __volatile__("dmb oshld" ::: "memory");
#else
	__atomic_thread_fence(__ATOMIC_ACQUIRE);
#endif
}

static inline int vt_window_allows(const struct vt_window *window, uint64_t offset, uint32_t width,
				   uint32_t access)
{
	uint64_t at = offset - window->start;

	return (window->access & access) && at < window->size && window->size - at >= width &&
	       !(at & (width - 1)) && window->generation == vt_fork_generation;
}

#define VT_ACCESSORS(bits, swap_in, swap_out)                                                      \
	static inline uint##bits##_t vt_load##bits(const struct vt_window *window,                 \
						   uint64_t offset)                                \
	{                                                                                          \
		uint##bits##_t value =                                                             \
			*(volatile uint##bits##_t *)(window->base + (offset - window->start));     \
		vt_read_barrier();                                                                 \
		return swap_in(value);                                                             \
	}                                                                                          \
	static inline void vt_store##bits(const struct vt_window *window, uint64_t offset,         \
					  uint##bits##_t value)                                    \
	{                                                                                          \
		vt_write_barrier();                                                                \
		*(volatile uint##bits##_t *)(window->base + (offset - window->start)) =            \
			swap_out(value);                                                           \
	}

VT_ACCESSORS(8, , )
VT_ACCESSORS(16, le16toh, htole16)
VT_ACCESSORS(32, le32toh, htole32)
VT_ACCESSORS(64, le64toh, htole64)

#endif

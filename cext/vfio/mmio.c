#define _GNU_SOURCE
#define _FILE_OFFSET_BITS 64
#include "vfio/mmio.h"

#include <errno.h>
#include <stddef.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "clock.h"

#define SPIN_NS 20000u
#define NAP_MAX_NS 100000u

int vt_window_map(struct vt_window *window, int fd, uint64_t position, uint64_t start,
		  uint64_t size, uint32_t access, uint64_t alignment)
{
	uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
	uint64_t room, phase, address;
	int protection = (access & VT_WINDOW_READ ? PROT_READ : 0) |
			 (access & VT_WINDOW_WRITE ? PROT_WRITE : 0);
	void *reserved;

	if (!size || (alignment & (alignment - 1)) || alignment > UINT64_MAX / 4 || position % page)
		return -EINVAL;
	if (alignment < page)
		alignment = page;
	/* The kernel can use large pages where virtual and physical address agree modulo their
	 * size; the region offset agrees with the physical address, so `position` gives the phase.
	 */
	phase = position & (alignment - 1);
	room = size + (alignment == page ? 0 : 2 * alignment);
	if (room < size)
		return -EINVAL;
	reserved = mmap(NULL, room, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (reserved == MAP_FAILED)
		return -errno;
	address = (uint64_t)(uintptr_t)reserved;
	if (alignment != page)
		address = ((address + alignment - 1) & ~(alignment - 1)) + phase;
	if (mmap((void *)(uintptr_t)address, size, protection, MAP_SHARED | MAP_FIXED, fd,
		 (off_t)position) == MAP_FAILED ||
	    madvise((void *)(uintptr_t)address, size, MADV_DONTFORK)) {
		int error = errno;

		munmap(reserved, room);
		return -error;
	}
	*window = (struct vt_window){
		.base = (volatile uint8_t *)(uintptr_t)address,
		.size = size,
		.start = start,
		.access = access,
		.granted = access,
		.generation = vt_fork_generation,
		.reserved = reserved,
		.reserved_size = room,
		.gate = { .open = 1 },
	};
	return 0;
}

void vt_window_unmap(struct vt_window *window)
{
	vt_gate_set(&window->gate, 0);
	if (window->reserved)
		munmap(window->reserved, window->reserved_size);
	/* All but the gate: somebody may just be turning back from it. */
	memset(window, 0, offsetof(struct vt_window, gate));
}

void vt_window_block(struct vt_window *window, int blocked)
{
	window->access = blocked ? 0 : window->granted;
	vt_gate_set(&window->gate, !blocked && window->reserved);
}

enum vt_refusal vt_window_check(const struct vt_window *window, uint64_t offset, uint64_t count,
				uint32_t width, uint32_t access)
{
	uint64_t at = offset - window->start;

	if (!window->reserved)
		return VT_CLOSED;
	if (window->generation != vt_fork_generation)
		return VT_FORKED;
	if (!(window->granted & access))
		return VT_ACCESS;
	if (!(window->access & access))
		return VT_BLOCKED;
	if (offset < window->start || at > window->size || count > (window->size - at) / width)
		return VT_RANGE;
	if (at & (width - 1))
		return VT_ALIGN;
	return VT_OK;
}

/* Eight registers a round: one load and one store each, of exactly this width (volatile: never
 * merged), and the counting once for all. A loop of one register a round takes one cycle or two for
 * the same work, as its few instructions happen to lie in the processor's fetch windows. */
#define ROUND 8

#define COPY_LOOPS(bits, swap_in, swap_out)                                                        \
	static inline void in##bits(const volatile uint##bits##_t *from, char *to)                 \
	{                                                                                          \
		uint##bits##_t value = swap_in(*from);                                             \
                                                                                                   \
		memcpy(to, &value, sizeof(value));                                                 \
	}                                                                                          \
                                                                                                   \
	static inline void out##bits(volatile uint##bits##_t *to, const char *from)                \
	{                                                                                          \
		uint##bits##_t value;                                                              \
                                                                                                   \
		memcpy(&value, from, sizeof(value));                                               \
		*to = swap_out(value);                                                             \
	}                                                                                          \
                                                                                                   \
	static void read_many##bits(const struct vt_window *window, uint64_t offset,               \
				    uint32_t step, void *out, uint64_t count)                      \
	{                                                                                          \
		const volatile uint##bits##_t *from =                                              \
			(const volatile uint##bits##_t *)(window->base +                           \
							  (offset - window->start));               \
		const uint64_t width = sizeof(*from);                                              \
		char *to = out;                                                                    \
                                                                                                   \
		for (; count >= ROUND;                                                             \
		     count -= ROUND, to += ROUND * width, from += ROUND * step) {                  \
			in##bits(from, to);                                                        \
			in##bits(from + step, to + width);                                         \
			in##bits(from + 2 * step, to + 2 * width);                                 \
			in##bits(from + 3 * step, to + 3 * width);                                 \
			in##bits(from + 4 * step, to + 4 * width);                                 \
			in##bits(from + 5 * step, to + 5 * width);                                 \
			in##bits(from + 6 * step, to + 6 * width);                                 \
			in##bits(from + 7 * step, to + 7 * width);                                 \
		}                                                                                  \
		for (; count; count--, to += width, from += step)                                  \
			in##bits(from, to);                                                        \
		vt_read_barrier();                                                                 \
	}                                                                                          \
                                                                                                   \
	static void write_many##bits(const struct vt_window *window, uint64_t offset,              \
				     uint32_t step, const void *in, uint64_t count)                \
	{                                                                                          \
		volatile uint##bits##_t *to =                                                      \
			(volatile uint##bits##_t *)(window->base + (offset - window->start));      \
		const uint64_t width = sizeof(*to);                                                \
		const char *from = in;                                                             \
                                                                                                   \
		vt_write_barrier();                                                                \
		for (; count >= ROUND;                                                             \
		     count -= ROUND, from += ROUND * width, to += ROUND * step) {                  \
			out##bits(to, from);                                                       \
			out##bits(to + step, from + width);                                        \
			out##bits(to + 2 * step, from + 2 * width);                                \
			out##bits(to + 3 * step, from + 3 * width);                                \
			out##bits(to + 4 * step, from + 4 * width);                                \
			out##bits(to + 5 * step, from + 5 * width);                                \
			out##bits(to + 6 * step, from + 6 * width);                                \
			out##bits(to + 7 * step, from + 7 * width);                                \
		}                                                                                  \
		for (; count; count--, from += width, to += step)                                  \
			out##bits(to, from);                                                       \
	}

COPY_LOOPS(8, , )
COPY_LOOPS(16, le16toh, htole16)
COPY_LOOPS(32, le32toh, htole32)
COPY_LOOPS(64, le64toh, htole64)

void vt_window_read_many(const struct vt_window *window, uint64_t offset, uint32_t width,
			 uint32_t step, void *out, uint64_t count)
{
	switch (width) {
	case 1: read_many8(window, offset, step, out, count); break;
	case 2: read_many16(window, offset, step, out, count); break;
	case 4: read_many32(window, offset, step, out, count); break;
	default: read_many64(window, offset, step, out, count); break;
	}
}

void vt_window_write_many(const struct vt_window *window, uint64_t offset, uint32_t width,
			  uint32_t step, const void *in, uint64_t count)
{
	switch (width) {
	case 1: write_many8(window, offset, step, in, count); break;
	case 2: write_many16(window, offset, step, in, count); break;
	case 4: write_many32(window, offset, step, in, count); break;
	default: write_many64(window, offset, step, in, count); break;
	}
}

static uint64_t load(const struct vt_window *window, uint64_t offset, uint32_t width)
{
	switch (width) {
	case 1: return vt_load8(window, offset);
	case 2: return vt_load16(window, offset);
	case 4: return vt_load32(window, offset);
	default: return vt_load64(window, offset);
	}
}

int vt_window_poll(struct vt_window *window, uint64_t offset, uint32_t width, uint64_t mask,
		   uint64_t wanted, uint64_t timeout_ns, uint64_t *value)
{
	uint64_t begin = vt_clock_ns(), spent = 0, nap = 1000;
	int found;

	if (!vt_gate_enter(&window->gate))
		return -1;
	for (;;) {
		if (!vt_gate_is_open(&window->gate)) {
			found = -1;
			break;
		}
		*value = load(window, offset, width);
		found = (*value & mask) == wanted;
		if (found || spent >= timeout_ns)
			break;
		if (spent > SPIN_NS) {
			struct timespec pause = { .tv_nsec = (long)nap };

			if (nap > timeout_ns - spent)
				pause.tv_nsec = (long)(timeout_ns - spent);
			nanosleep(&pause, NULL);
			nap = nap * 2 > NAP_MAX_NS ? NAP_MAX_NS : nap * 2;
		}
		spent = vt_clock_ns() - begin;
	}
	vt_gate_leave(&window->gate);
	return found;
}

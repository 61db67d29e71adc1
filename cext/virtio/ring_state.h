/* The inside of a ring, for ring.c and packed.c alone. */
#ifndef VT_VIRTIO_RING_STATE_H
#define VT_VIRTIO_RING_STATE_H

#include <endian.h>
#include <errno.h>

#include "virtio/inflight.h"
#include "virtio/ring.h"

#define DESC_NEXT 1u
#define DESC_WRITE 2u
#define DESC_INDIRECT 4u

struct descriptor {
	uint64_t address;
	uint32_t length;
	uint16_t flags;
	uint16_t next; /* in a packed ring: the buffer's id, and before the flags */
};

struct vt_ring {
	struct vt_ring_layout layout;
	struct vt_memory *memory;
	void *descriptors;
	void *available;     /* in a packed ring: the driver's event suppression */
	void *used;          /* the device's */
	const char *broken;
	uint16_t mask;
	uint16_t fetched;   /* the next available entry */
	uint16_t completed; /* the next used entry */
	uint16_t shown;     /* what the driver can see */
	uint16_t published; /* what was compared with used_event */
	bool told;          /* `published` was compared with used_event since the start */
	bool quiet;         /* notifications are off */
	uint32_t in_flight;
	struct vt_log *log;
	uint16_t *again;    /* heads that the log says are in flight, oldest first */
	uint32_t again_count, again_next;
	/* Of a packed ring: places in the ring and the wrap counters that go with them. */
	uint16_t at, used_at;
	bool at_wrap, used_wrap;
	bool batched;        /* some used descriptors wait for the first one's flags */
	uint16_t first, first_flags;
	uint16_t batch_slots; /* used since the driver's wish was looked at */
	uint32_t slots;      /* descriptors fetched and not used */
	uint32_t adopted;    /* of those, fetched from the log */
	uint16_t *taken;     /* by id: how many descriptors it has */
	struct vt_packed_log *packed_log;
	struct vt_packed_copy *copies; /* of one chain, for the log */
	uint8_t busy[];
};

/* The chain that is being taken apart, and where its descriptors come from. */
struct walk {
	struct vt_chain *chain;
	struct iovec *segments; /* of this chain */
	uint32_t room;
	uint32_t count;
	uint64_t indirect;      /* the table's guest address, or 0 in the ring's own */
	uint32_t table_size;
	bool is_indirect;
};

static inline uint16_t load16(const uint16_t *word, int order)
{
	return le16toh(order == __ATOMIC_ACQUIRE ? __atomic_load_n(word, __ATOMIC_ACQUIRE) :
						   __atomic_load_n(word, __ATOMIC_RELAXED));
}

static inline void store16(uint16_t *word, uint16_t value)
{
	__atomic_store_n(word, htole16(value), __ATOMIC_RELAXED);
}

/* Break a ring. Return: -EPROTO. */
int vt_ring_breaks(struct vt_ring *ring, const char *why);

/* Note the segments of one descriptor, of which address, length and the WRITE flag count.
 * Return: 1; 0 if the arena has no room for this chain; or the ring is broken. */
int vt_ring_add_segments(struct vt_ring *ring, struct walk *walk, const struct descriptor *entry);

/* Begin to take descriptors from an indirect table. Return: 1, or the ring is broken. */
int vt_ring_enter_table(struct vt_ring *ring, struct walk *walk, const struct descriptor *entry);

/* What ring.c does for split rings. */
int vt_packed_start(struct vt_ring *ring, uint32_t base);
uint32_t vt_packed_base(const struct vt_ring *ring);
int vt_packed_set_log(struct vt_ring *ring, void *at);
int vt_packed_fetch(struct vt_ring *ring, struct vt_chain *chains, uint32_t most,
		    struct iovec *arena, uint32_t room);
uint16_t vt_packed_waiting(const struct vt_ring *ring);
void vt_packed_complete(struct vt_ring *ring, uint16_t id, uint32_t written);
void vt_packed_show(struct vt_ring *ring);
bool vt_packed_publish(struct vt_ring *ring);
bool vt_packed_notify_on(struct vt_ring *ring);
void vt_packed_notify_off(struct vt_ring *ring);
void vt_packed_end(struct vt_ring *ring);

#endif
